"""Keys of multi-head latent attention: channels of each head, and channels that all heads share."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.checks import check_alike


def latent_keys(k: Tensor, shared: Tensor) -> Tensor:
    """[k, shared] in each head.

    The gradient of `shared` is a sum over heads in float32 at least, rounded once. It is an operator of its own, so
    that torch.compile does not change the order of its summands: compiled and eager training compute the same bits.

    Args:
        k: [B, T, H, N], the channels of each head.
        shared: [B, T, R], of k's data type and device.
    Returns: [B, T, H, N + R].
    Raises: ValueError if a shape, dtype or device does not fit; the message names the tensor.
    """
    fn = "latent_keys"
    if k.dim() != 4 or shared.dim() != 3 or k.shape[:2] != shared.shape[:2]:
        raise InputError(
            f"{fn}: k must be [B, T, H, N] and shared [B, T, R], got {list(k.shape)} and {list(shared.shape)}."
        )
    check_alike(fn, {"k": k, "shared": shared}, same_dtype=("k", "shared"))
    keys: Tensor = torch.ops.lkda.latent_keys(k, shared)
    return keys


def _latent_keys(k: Tensor, shared: Tensor) -> Tensor:
    return torch.cat([k, shared.unsqueeze(2).expand(-1, -1, k.shape[2], -1)], -1)


def _sum_over_heads(x: Tensor) -> Tensor:
    return x.sum(2)


_library = torch.library.Library("lkda", "FRAGMENT")
_library.define("latent_keys(Tensor k, Tensor shared) -> Tensor")
_library.define("sum_over_heads(Tensor x) -> Tensor")
for _name, _function in {"latent_keys": _latent_keys, "sum_over_heads": _sum_over_heads}.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")


def _save(ctx, inputs, output):
    ctx.sizes = [x.shape[-1] for x in inputs]


def _gradients(ctx, dkeys):
    dk, dshared = dkeys.split(ctx.sizes, -1)
    return dk, torch.ops.lkda.sum_over_heads(dshared)


def _sum_gradient(ctx, dsum):
    return dsum.unsqueeze(2).expand(ctx.shape)


def _save_shape(ctx, inputs, output):
    ctx.shape = inputs[0].shape


torch.library.register_autograd("lkda::latent_keys", _gradients, setup_context=_save, lib=_library)
torch.library.register_autograd("lkda::sum_over_heads", _sum_gradient, setup_context=_save_shape, lib=_library)
