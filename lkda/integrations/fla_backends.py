"""What FLA's registries call: for each of its functions a verifier, which accepts a call or says why not, and the
function in lkda. FLA is imported with this module.

The names and the order of arguments are FLA's. Each function below takes them by name, with FLA's defaults filled in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fla.backends import BaseBackend
from torch import Tensor

from lkda.checks import InputError
from lkda.integrations import fla_kda
from lkda.integrations.fla_kda import names
from lkda.ops import gated_rms_norm, short_convolution
from lkda.ops.gated_norm import cuda as norm_cuda
from lkda.ops.residual_norm import cuda as residual_cuda
from lkda.ops.residual_norm.op import residual_norm
from lkda.ops.runtime.dispatch import can_bypass_dispatcher
from lkda.ops.short_conv import cuda as conv_cuda
from lkda.ops.short_conv.reference import last_of_sequences

Arguments = dict[str, Any]
# For each function of FLA the arguments that lkda knows. Others are declined where they are given.
KNOWN: dict[str, frozenset[str]] = {
    "chunk_kda": fla_kda.CHUNK_ARGUMENTS,
    "fused_recurrent_kda_fwd": fla_kda.RECURRENT_ARGUMENTS,
    "causal_conv1d_fwd": names(
        "x weight bias residual initial_state output_final_state activation cu_seqlens cu_seqlens_cpu chunk_indices",
        "chunk_size layout_fallback",
    ),
    "causal_conv1d_bwd": names(
        "x dy dht weight bias residual initial_state activation cu_seqlens cu_seqlens_cpu chunk_indices chunk_size",
        "layout_fallback",
    ),
    "causal_conv1d_update": names("x cache residual weight bias activation"),
    "layer_norm_gated_fwd": names("x g weight bias activation eps residual out_dtype residual_dtype is_rms_norm"),
    "layer_norm_gated_bwd": names(
        "dy x g weight bias activation eps mean rstd dresidual has_residual is_rms_norm x_dtype recompute_output"
    ),
    "layer_norm_fwd": names("x weight bias eps residual out_dtype residual_dtype is_rms_norm num_groups"),
    "layer_norm_bwd": names(
        "dy x weight bias mean rstd dres has_residual is_rms_norm x_dtype recompute_output num_groups"
    ),
    "swiglu_fwd": names("x y output_contiguous"),
    "swiglu_fwdbwd": names("x y g use_weight output_contiguous"),
}
_SIGNATURES: dict[str, inspect.Signature] = {}
_DEFAULTS: dict[str, Arguments] = {}  # of every argument by name, in FLA's order; that of a required one is never used


def check_signature(function: Callable[..., Any]) -> None:
    """Raises InputError if FLA's function lacks an argument that lkda reads."""
    name = function.__name__
    signature = inspect.signature(inspect.unwrap(function))
    missing = KNOWN[name] - fla_kda.KEYWORDS - set(signature.parameters)
    if missing:
        raise InputError(
            f"the installed FLA's {name} has no argument {', '.join(sorted(missing))}; lkda knows "
            "flash-linear-attention 0.6."
        )
    _SIGNATURES[name] = signature
    named = (p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD)
    _DEFAULTS[name] = {parameter.name: parameter.default for parameter in named}


def _arguments(name: str, args: Sequence[Any], kwargs: Arguments) -> Arguments:
    """The arguments of a call of FLA's function `name`, by name, with its defaults.

    A layer makes about twenty calls a step. Each takes 1 us here, where `Signature.bind` takes 15.
    """
    defaults = _DEFAULTS[name]
    found = defaults | dict(zip(defaults, args)) | kwargs
    if len(args) > len(defaults) or any(x is inspect.Parameter.empty for x in found.values()):
        _SIGNATURES[name].bind(*args, **kwargs)  # which says what is wrong
    return found


def _unknown(name: str, given: Arguments) -> str | None:
    """The reason to decline where an argument that lkda does not know differs from its default."""
    for word in given.keys() - KNOWN[name]:
        parameter = _SIGNATURES[name].parameters.get(word)
        if parameter is None or given[word] is not parameter.default:
            return f"lkda does not know the argument {word}"
    return None


class _Backend(BaseBackend):
    """Calls `declined_<function>`, which returns a reason or None, and `run_<function>` with arguments by name."""

    backend_type = "lkda"
    priority = 1


def _add(backend: type[_Backend], name: str, declined: Callable[..., str | None], run: Callable[..., Any]) -> None:
    """Gives a backend the two methods that FLA looks for."""

    def verifier(self: _Backend, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        given = _arguments(name, args, kwargs)
        reason = _unknown(name, given) or declined(given)
        return reason is None, reason

    def implementation(self: _Backend, *args: Any, **kwargs: Any) -> Any:
        return run(_arguments(name, args, kwargs))

    setattr(backend, f"{name}_verifier", verifier)
    setattr(backend, name, implementation)


class KDABackend(_Backend):
    """`chunk_kda` and `fused_recurrent_kda`."""


class ConvBackend(_Backend):
    """The causal convolution with SiLU."""


class NormBackend(_Backend):
    """RMSNorm: of a residual sum, and gated by a sigmoid."""


class SwiGLUBackend(_Backend):
    """SiLU(x) * y in PyTorch. FLA tries 60 configurations of its two kernels, which takes about 40 s."""


BACKENDS: dict[str, type[_Backend]] = {
    "kda": KDABackend,
    "conv": ConvBackend,
    "norm": NormBackend,
    "swiglu": SwiGLUBackend,
}


def _gradients(
    function: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of `inputs`, None for those that are None, from those of the results of `function`.

    FLA's registries have the forward and the backward as separate functions, so the forward is computed again.
    """
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        results = function(*leaves)
    pairs = [(y, dy) for y, dy in zip(results, grads, strict=True) if y is not None and dy is not None]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs], [x for x in leaves if x is not None], [dy for _, dy in pairs], allow_unused=True
        )
    )
    return [None if x is None else next(found) for x in leaves]


def _conv_declined(given: Arguments) -> str | None:
    x, weight = given["x"], given["weight"]
    if weight is None or given["activation"] not in ("silu", "swish"):
        return f"lkda's convolution has a weight and SiLU, got activation={given['activation']!r}"
    if given["bias"] is not None or given["residual"] is not None:
        return "lkda's convolution has neither a bias nor a residual"
    if not x.is_cuda:
        return None
    if weight.shape[1] > conv_cuda.MAX_TAPS or weight.shape[0] * x.element_size() % 16:
        return (
            f"lkda's convolution takes filters of up to {conv_cuda.MAX_TAPS} taps and channels of a multiple of 16 "
            f"bytes, got {weight.shape[1]} taps and {weight.shape[0]} channels of {x.dtype}"
        )
    return conv_cuda.reason_cannot_run(x.device, conv_cuda.HEAD_DIMS[0], x.dtype)


def _convolved(given: Arguments) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of x [B, T, D], weight [D, W] and state [N, D, W] that returns y, contiguous, and the last state."""
    cu_seqlens = given["cu_seqlens"]

    def run(x: Tensor, weight: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        before = None if state is None else state[..., 1:].mT
        y, _ = short_convolution(x, weight.unsqueeze(1), state=before, cu_seqlens=cu_seqlens)
        return y, _last_inputs(x, weight.shape[1], state, cu_seqlens)

    return run


def _last_inputs(x: Tensor, width: int, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The last `width` inputs of each sequence, [N, D, width], where lkda's own states have one fewer."""
    if cu_seqlens is not None:
        return last_of_sequences(x, width + 1, None if state is None else state.mT, cu_seqlens).to(x.dtype).mT
    if x.shape[1] >= width:
        return x[:, -width:].mT
    before = x.new_zeros(len(x), width, x.shape[2]) if state is None else state.mT.to(x.dtype)
    return torch.cat([before, x], 1)[:, -width:].mT


def _as_rows(x: Tensor, weight: Tensor) -> Tensor:
    """[B, T, D], also from [B, T, heads, D / heads]."""
    return x if x.shape[-1] == weight.shape[0] else x.flatten(2)


def _runs_kernels(*tensors: Tensor) -> bool:
    """Whether the kernels may be called directly, which takes a third of the host's time."""
    return tensors[0].is_cuda and can_bypass_dispatcher(*tensors)


def _conv_fwd(given: Arguments) -> tuple[Tensor, Tensor | None]:
    x, weight, state, cu_seqlens = (given[name] for name in ("x", "weight", "initial_state", "cu_seqlens"))
    rows = _as_rows(x, weight)
    with torch.no_grad():
        if state is None and _runs_kernels(x, weight):
            y = conv_cuda.convolve(rows, weight.unsqueeze(1), cu_seqlens)
        else:
            y, _ = _convolved(given)(rows, weight, state)
        last = _last_inputs(rows, weight.shape[1], state, cu_seqlens) if given["output_final_state"] else None
    return y.view(x.shape), None if last is None else last.contiguous()


def _conv_bwd(given: Arguments) -> tuple[Tensor | None, ...]:
    x, weight, state = given["x"], given["weight"], given["initial_state"]
    rows = _as_rows(x, weight)
    if state is None and given["dht"] is None and _runs_kernels(x, weight, given["dy"]):
        dy = given["dy"].reshape(rows.shape).to(x.dtype)
        dx, dw = conv_cuda.convolve_backward(dy, rows, weight.unsqueeze(1), given["cu_seqlens"])
        return dx.view(x.shape), dw.squeeze(1).to(weight.dtype), None, None, None
    given_gradients = (given["dy"].reshape(rows.shape), given["dht"])
    d_rows, d_weight, d_state = _gradients(_convolved(given), (rows, weight, state), given_gradients)
    assert d_rows is not None
    return d_rows.reshape(x.shape), d_weight, None, None, d_state


def _update_declined(given: Arguments) -> str | None:
    x = given["x"]
    if x.dim() not in (2, 3):
        return f"lkda's convolution of one token takes x of 2 or 3 axes, got {list(x.shape)}"
    return _conv_declined(given)


@torch.no_grad()
def _conv_update(given: Arguments) -> tuple[Tensor, Tensor]:
    """One token of each sequence; `cache` [N, D, W] is updated in place."""
    x, cache, weight = given["x"], given["cache"], given["weight"]
    rows = x.reshape(-1, 1, weight.shape[0])
    y, _ = short_convolution(rows, weight.unsqueeze(1), state=cache[..., 1:].mT)
    cache.copy_(torch.cat([cache[..., 1:], rows.mT.to(cache.dtype)], 2))
    return y.reshape(x.shape), cache


def _norm_declined(given: Arguments) -> str | None:
    x, g = given["x"], given["g"]
    if not given["is_rms_norm"] or given["activation"] != "sigmoid" or given["weight"] is None:
        return f"lkda's gated norm is an RMSNorm with a weight and a sigmoid, got activation={given['activation']!r}"
    if given["bias"] is not None or x.dtype != g.dtype:
        return "lkda's gated norm has no bias, and x and g are of one dtype"
    return norm_cuda.reason_cannot_run(x.device, x.shape[-1], x.dtype) if x.is_cuda else None


def _norm_fwd_declined(given: Arguments) -> str | None:
    same = (None, given["x"].dtype)
    if given["residual"] is not None or given["residual_dtype"] not in same or given["out_dtype"] not in same:
        return "lkda's gated norm has no residual and no other dtype of the result"
    return _norm_declined(given)


def _norm_bwd_declined(given: Arguments) -> str | None:
    if given["dresidual"] is not None or given["has_residual"] or given["recompute_output"]:
        return "lkda's gated norm has no residual"
    if given["x_dtype"] not in (None, given["x"].dtype):
        return "lkda's gated norm has no other dtype of the gradient"
    return _norm_declined(given)


@torch.no_grad()
def _norm_fwd(given: Arguments) -> tuple[Tensor, None, None, Tensor]:
    """y, and what FLA saves for its own backward: mean and rstd, which lkda's backward does not need, and x."""
    x, g, weight, eps = (given[name] for name in ("x", "g", "weight", "eps"))
    if _runs_kernels(x, g, weight):
        return norm_cuda.launch_forward(x, g, weight.float(), eps), None, None, x
    return gated_rms_norm(x, g, weight, eps=eps), None, None, x


def _norm_bwd(given: Arguments) -> tuple[Tensor | None, ...]:
    dy, x, g, weight = (given[name] for name in ("dy", "x", "g", "weight"))
    if _runs_kernels(dy, x, g, weight):
        dx, dg, dw = norm_cuda.launch_backward(dy.to(x.dtype), x, g, weight.float(), given["eps"])
        return dx, dg, dw.to(weight.dtype), None, None

    def norm(x: Tensor, g: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (gated_rms_norm(x, g, weight, eps=given["eps"]),)

    return *_gradients(norm, (x, g, weight), (dy,)), None, None


def _rms_declined(given: Arguments) -> str | None:
    """For both directions; x is the residual sum in the backward."""
    x, weight = given["x"], given["weight"]
    if not given["is_rms_norm"] or weight is None or given["bias"] is not None or given["num_groups"] != 1:
        return "lkda's norm is an RMSNorm of whole rows, with a weight and without a bias"
    return residual_cuda.cannot_run(x.device, x.shape[-1], x.dtype) if x.is_cuda else None


def _rms_fwd_declined(given: Arguments) -> str | None:
    x, residual, wanted = given["x"], given["residual"], given["residual_dtype"]
    stream = x.dtype if residual is None else residual.dtype
    if torch.promote_types(x.dtype, stream) != stream or (residual is None and wanted not in (None, x.dtype)):
        return "the sum of lkda's norm has the wider dtype of x and the residual"
    return _rms_declined(given)


def _rms_bwd_declined(given: Arguments) -> str | None:
    if given["recompute_output"]:
        return "lkda's norm does not compute its output again"
    return _rms_declined(given)


@torch.no_grad()
def _rms_fwd(given: Arguments) -> tuple[Tensor, None, Tensor | None, Tensor]:
    """y, and what FLA saves for its own backward: mean, which an RMSNorm lacks, rstd and the sum."""
    x, residual, weight, eps = (given[name] for name in ("x", "residual", "weight", "eps"))
    stream, added = (x, None) if residual is None else (residual, x)
    dtype = given["out_dtype"] or x.dtype
    if _runs_kernels(stream, x, weight):
        s, y, rstd = residual_cuda.launch_forward(stream, added, weight.float(), eps, dtype)
        return y, None, rstd, s
    s, y = residual_norm(stream, added, weight, eps=eps, dtype=dtype)
    rstd = (s.float().square().mean(-1) + eps).rsqrt()
    return y, None, rstd, s


def _rms_bwd(given: Arguments) -> tuple[Tensor | None, ...]:
    dy, x, weight, rstd, ds = (given[name] for name in ("dy", "x", "weight", "rstd", "dres"))
    if _runs_kernels(dy, x, weight):
        ds = None if ds is None else ds.to(x.dtype)
        dx, _, dw = residual_cuda.launch_backward(ds, dy, x, None, weight.float(), rstd, True)
    else:
        normed, scale = x.float() * rstd[:, None], dy.float() * weight.float()
        dx = (scale - normed * (scale * normed).mean(-1, keepdim=True)) * rstd[:, None]
        dx = (dx if ds is None else dx + ds.float()).to(x.dtype)
        dw = (dy.float() * normed).sum(0)
    narrow = dx if given["x_dtype"] is None else dx.to(given["x_dtype"])
    return narrow, dw.to(weight.dtype), None, dx if given["has_residual"] else None


def _swiglu_declined(given: Arguments) -> str | None:
    tensors = [given[name] for name in ("x", "y", "g") if name in given]
    if len({(x.shape, x.dtype) for x in tensors}) > 1:
        return "lkda's SwiGLU takes tensors of one shape and dtype"
    return None


@torch.no_grad()
def _swiglu_fwd(given: Arguments) -> Tensor:
    return F.silu(given["x"].contiguous()) * given["y"]


@torch.no_grad()
def _swiglu_fwdbwd(given: Arguments) -> tuple[Tensor, ...]:
    """The gradients of x and y, and with use_weight the result too."""
    x, y, g = (given[name].contiguous() for name in ("x", "y", "g"))
    dx, silu = torch.ops.aten.silu_backward(g * y, x), F.silu(x)
    return (dx, g * silu, silu * y) if given["use_weight"] else (dx, g * silu)


_add(KDABackend, "chunk_kda", fla_kda.chunk_declined, fla_kda.chunk)
_add(KDABackend, "fused_recurrent_kda_fwd", fla_kda.recurrent_declined, fla_kda.recurrent)
_add(ConvBackend, "causal_conv1d_fwd", _conv_declined, _conv_fwd)
_add(ConvBackend, "causal_conv1d_bwd", _conv_declined, _conv_bwd)
_add(ConvBackend, "causal_conv1d_update", _update_declined, _conv_update)
_add(NormBackend, "layer_norm_gated_fwd", _norm_fwd_declined, _norm_fwd)
_add(NormBackend, "layer_norm_gated_bwd", _norm_bwd_declined, _norm_bwd)
_add(NormBackend, "layer_norm_fwd", _rms_fwd_declined, _rms_fwd)
_add(NormBackend, "layer_norm_bwd", _rms_bwd_declined, _rms_bwd)
_add(SwiGLUBackend, "swiglu_fwd", _swiglu_declined, _swiglu_fwd)
_add(SwiGLUBackend, "swiglu_fwdbwd", _swiglu_declined, _swiglu_fwdbwd)
