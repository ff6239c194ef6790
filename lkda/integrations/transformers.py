"""lkda's kernels in the KDA models of transformers: Kimi Linear and every other family built from the same functions.

    from lkda.integrations.transformers import use_lkda_kernels

    use_lkda_kernels(model)                      # from here on, training, prefill and decoding run lkda's kernels
    use_lkda_kernels(model, enable=False)        # transformers' own code again

    with use_lkda_kernels(model):                # or only for a while
        model.generate(...)

In transformers the forward of a KDA layer calls four functions of its module: two for the convolution and two for KDA.
The layers of the model get a subclass of their class whose forward is transformers' own, but calls lkda's functions
under those names. Their gates and gated norms get subclasses with a forward of lkda's. Parameters, buffers, hooks and
state dicts stay as they are, other models are not touched, and no code of transformers is copied.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lkda.checks import InputError
from lkda.ops import KDAGate, gated_rms_norm, kda_attention, kda_gate, short_convolution
from lkda.ops.kda.op import BACKENDS
from lkda.ops.kda.reference.gate import LOWEST_BOUND
from lkda.ops.runtime.dispatch import wants_gradient

# The function of a family's module by which it is known to have KDA.
_KDA = "chunk_kimi_delta_attention"
# The mark of a subclass that was made here: its class in transformers.
_ORIGINAL = "_lkda_original"


Changes = list[tuple[nn.Module, type[nn.Module]]]  # modules with their new class


class KernelUse:
    """What `use_lkda_kernels` returns: as a context manager it undoes that call, and no other one, at its end."""

    def __init__(self, changes: Changes) -> None:
        self._after: Changes = changes
        self._before: Changes = [(module, type(module)) for module, _ in changes]
        _change(self._after)

    def __enter__(self) -> KernelUse:
        _change(self._after)
        return self

    def __exit__(self, *exception: object) -> None:
        _change(self._before)


def use_lkda_kernels(model: nn.Module, enable: bool = True) -> KernelUse:
    """Run the KDA layers of a transformers model with lkda's convolutions, gate, KDA and gated norm, or no longer.

    Call it before torch.compile, and before or after FSDP. A second call of the same kind changes nothing. The result
    is that of transformers' PyTorch code up to rounding. Packed sequences are given as `cu_seqlens` or
    `cu_seq_lens_q`.

    Args:
        model: such as a KimiLinearForCausalLM, on any device and in any dtype; or a part of one.
        enable: False for transformers' own code again.
    Returns: a context manager that undoes the call at its end; it need not be used.
    Raises: InputError (a ValueError) if the model has no KDA layer, if the installed transformers has an interface that
        lkda does not know, or if a layer has a forward of its own or a class that was made of lkda's. The model is
        unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"use_lkda_kernels: model must be a model of transformers, got {model!r:.80}.")
    changed = [module for module in model.modules() if hasattr(module, _ORIGINAL)]
    if not enable:
        return KernelUse([(module, getattr(module, _ORIGINAL)) for module in changed])
    layers = [module for module in model.modules() if _is_kda_layer(module)]
    if not layers and not changed:
        raise InputError(
            f"use_lkda_kernels: {type(model).__name__} has no KDA layer of transformers, such as those of "
            "KimiLinearForCausalLM."
        )
    return KernelUse([change for layer in layers for change in _changes(layer)])


def _change(changes: Changes) -> None:
    """Give modules their new classes. Raises InputError where that would do something else; none has changed then."""
    for module, new in changes:
        now = type(module)
        if now is not new and now is not vars(new).get(_ORIGINAL) and new is not vars(now).get(_ORIGINAL):
            raise InputError(
                f"use_lkda_kernels: a layer's class {now.__name__} was made after lkda's, as fully_shard does; undo "
                "use_lkda_kernels before that."
            )
        if not {"forward", _UNHOOKED}.isdisjoint(vars(module)) and _kept_forward(module) is None:
            raise InputError(
                f"use_lkda_kernels: {now.__name__} has a forward of its own, which hides that of its class; call "
                "use_lkda_kernels before the forward is replaced."
            )
    for module, new in changes:
        kept = _kept_forward(module)
        module.__class__ = new
        if kept == _UNHOOKED:
            setattr(module, _UNHOOKED, MethodType(new.forward, module))
        elif kept is not None:
            delattr(module, kept)


_UNHOOKED = "_old_forward"  # where the hooks of accelerate, as for several devices, keep the forward that they call


def _kept_forward(module: nn.Module) -> str | None:
    """The attribute of a module itself that holds the method of its class. accelerate leaves it as `forward` with its
    last hook."""
    for name in (_UNHOOKED, "forward"):
        own = vars(module).get(name)
        if isinstance(own, MethodType) and own.__self__ is module and own.__func__ is type(module).forward:
            return name
    return None


def _is_kda_layer(module: nn.Module) -> bool:
    """Whether a module is a KDA layer of transformers: the forward of its class, or of a base, is of a family with KDA,
    and it has a gate. False where it was changed already.

    Raises: InputError for a class that is derived from a KDA layer and has another forward, which cannot be changed.
    """
    if hasattr(module, _ORIGINAL) or not _gates(module):
        return False
    found = [_is_of_family(base) for base in type(module).__mro__ if "forward" in vars(base)]
    if any(found) and not found[0]:
        raise InputError(f"use_lkda_kernels: {type(module).__name__} is a KDA layer with a forward of its own.")
    return any(found)


def _is_of_family(layer: type) -> bool:
    """Whether the forward of a class lies in a module with transformers' function of KDA."""
    forward = inspect.unwrap(vars(layer)["forward"])
    return hasattr(sys.modules.get(getattr(forward, "__module__", "")), _KDA)


def _gates(layer: nn.Module) -> list[nn.Module]:
    return [part for part in layer.children() if hasattr(part, "A_log") and hasattr(part, "dt_bias")]


def _changes(layer: nn.Module) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """The modules of a KDA layer that change, each with its new class. Raises InputError for an unknown interface."""
    family = sys.modules[inspect.unwrap(type(layer).forward).__module__]
    for name in _REPLACEMENTS:
        _check_function(family, name)
    gates = _gates(layer)
    norms = [part for part in layer.children() if getattr(part, "activation", None) == "sigmoid"]
    if len(gates) != 1 or len(norms) != 1:
        raise _unknown(f"{type(layer).__name__} has {len(gates)} gates and {len(norms)} gated norms, not one of each")
    gate, norm = gates[0], norms[0]
    _check_parts(gate, norm)
    _check_filters(layer)
    classes: list[Any] = [type(module) for module in (layer, gate, norm)]
    yield layer, _with_functions(classes[0])
    yield gate, _with_forward(classes[1], _gate_forward)
    yield norm, _with_forward(classes[2], _norm_forward)


def _unknown(what: str) -> InputError:
    import transformers

    return InputError(
        f"use_lkda_kernels does not know the interface of transformers {transformers.__version__}: {what}. It knows "
        "that of transformers 5.24."
    )


def _check_function(family: ModuleType, name: str) -> None:
    """Raises InputError unless the function of a family's module has the arguments of its replacement."""
    function = getattr(family, name, None)
    if function is None:
        raise _unknown(f"{family.__name__} has no function {name}")
    wanted, found = (list(inspect.signature(f).parameters) for f in (_REPLACEMENTS[name], function))
    if wanted != found:
        raise _unknown(f"{family.__name__}.{name} has the arguments {', '.join(found)}, not {', '.join(wanted)}")


def _check_parts(gate: nn.Module, norm: nn.Module) -> None:
    if not hasattr(norm, "weight") or not hasattr(norm, "variance_epsilon"):
        raise _unknown(f"{type(norm).__name__} has no weight and variance_epsilon")
    if hasattr(gate, "f_proj") == (hasattr(gate, "f_a_proj") and hasattr(gate, "f_b_proj")):
        raise _unknown(f"{type(gate).__name__} has neither f_proj nor f_a_proj and f_b_proj")
    bound = _lower_bound(gate)
    if bound is not None and not LOWEST_BOUND <= bound < 0:
        raise InputError(f"use_lkda_kernels: the lower bound of the gate must be in [-5, 0), got {bound}.")


def _check_filters(layer: nn.Module) -> None:
    convolution, activation = getattr(layer, "conv1d", None), getattr(layer, "activation", None)
    if not isinstance(convolution, nn.Conv1d) or convolution.bias is not None:
        raise _unknown(f"{type(layer).__name__} has no conv1d without a bias")
    if activation not in _SILU:
        raise InputError(f"use_lkda_kernels: the convolutions of lkda have SiLU, those of the model {activation!r}.")


_SILU = ("silu", "swish")


def _lower_bound(gate: nn.Module) -> float | None:
    """The lower bound of a gate: None for the form with softplus."""
    if not getattr(gate, "safe_gate", True):
        return None
    bound = getattr(gate, "safe_gate_lower_bound", getattr(gate, "lower_bound", None))
    return None if bound is None else float(bound)


def _gate_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """g [B, T, H, K] in nats, in float32 at least."""
    logits = self.f_proj(hidden_states) if hasattr(self, "f_proj") else self.f_b_proj(self.f_a_proj(hidden_states))
    logits = logits.unflatten(-1, (-1, self.head_dim))
    bound = _lower_bound(self)
    form: dict[str, Any] = {"form": "softplus"} if bound is None else {"form": "bounded", "lower_bound": bound}
    gate = KDAGate(self.A_log.flatten(), self.dt_bias, **form)
    # The layer computes beta by itself.
    return kda_gate(logits, logits.new_zeros(logits.shape[:-1]), gate)[0]


def _norm_forward(self: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    return gated_rms_norm(hidden_states, gate.to(hidden_states.dtype), self.weight, eps=self.variance_epsilon)


# The functions below have the names of their arguments, and their order, from transformers.


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """hidden_states [B, channels, T], weight [channels, width] -> [B, channels, T]."""
    cu_seqlens = _cu_seqlens(kwargs)
    y, _ = short_convolution(hidden_states.mT, weight.unsqueeze(1), cu_seqlens=cu_seqlens)
    return y.mT


def causal_conv1d_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Some tokens after conv_state [B, channels, at least width - 1], which is updated in place."""
    width, kept = weight.shape[-1], conv_state.shape[-1]
    before = conv_state[:, :, kept - width + 1 :].mT
    y, _ = short_convolution(hidden_states.mT, weight.unsqueeze(1), state=before)
    conv_state.copy_(torch.cat([conv_state, hidden_states], -1)[:, :, -kept:])
    return y.mT


def chunk_kimi_delta_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """KDA of whole sequences: o [B, T, H, V] and the state [B, H, K, V]. The result does not depend on chunk_size."""
    o, state = kda_attention(
        *(query, key, value, g, beta),
        initial_state=initial_state,
        cu_seqlens=_cu_seqlens(kwargs),
        normalized=not use_qk_l2norm_in_kernel,
    )
    return o, state if output_final_state else None


def recurrent_kimi_delta_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """KDA of one token after a state."""
    o, state = kda_attention(
        *(query, key, value, g, beta),
        initial_state=initial_state,
        normalized=not use_qk_l2norm_in_kernel,
        backend=_step_backend(query, key, value, g, beta, initial_state),
    )
    return o, state if output_final_state else None


_REPLACEMENTS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        causal_conv1d_fn,
        causal_conv1d_update,
        chunk_kimi_delta_attention,
        recurrent_kimi_delta_attention,
    )
}


def _cu_seqlens(options: Mapping[str, Any]) -> Tensor | None:
    """The boundaries of packed sequences, under FLA's name or that of transformers' DataCollatorWithFlattening."""
    cu_seqlens: Tensor | None = options.get("cu_seqlens")
    if cu_seqlens is None:
        cu_seqlens = options.get("cu_seq_lens_q")
    if cu_seqlens is None and options.get("seq_idx") is not None:
        raise InputError("use_lkda_kernels: packed sequences need cu_seqlens; seq_idx alone is not enough.")
    return cu_seqlens


def _step_backend(q: Tensor, *others: Tensor | None) -> str:
    """The kernel of the recurrence for one token, where it can run: the chunked ones compute 64 tokens."""
    cannot_run = BACKENDS["cuda_recurrent"].cannot_run(q.device, q.shape[-1], q.dtype)
    return "auto" if cannot_run is not None or wants_gradient(q, *others) else "cuda_recurrent"


@cache
def _with_forward(original: Any, forward: Callable[..., Any]) -> type[nn.Module]:
    """A subclass of a class of modules, with another forward."""
    members = {"forward": forward, _ORIGINAL: original, "__reduce_ex__": _reduced}
    return type(original.__name__, (original,), members)


def _reduced(module: Any, protocol: Any) -> tuple[Any, ...]:
    """For pickle, which could not find the subclass by its name."""
    forward = type(module).forward
    named = forward if forward in (_gate_forward, _norm_forward) else None
    return _blank, (getattr(module, _ORIGINAL), named), vars(module)


def _blank(original: Any, forward: Callable[..., Any] | None) -> nn.Module:
    """A module of the subclass with this forward, or of the one of a KDA layer, without its parts."""
    made = _with_functions(original) if forward is None else _with_forward(original, forward)
    return made.__new__(made)


@cache
def _with_functions(original: Any) -> type[nn.Module]:
    """A subclass of a class of KDA layers whose forward calls lkda's functions."""
    return _with_forward(original, _rebuilt(original.forward, _REPLACEMENTS))


def _rebuilt(function: Any, names: Mapping[str, Any]) -> FunctionType:
    """`function` with other values of some global names. Decorators around it are kept."""
    inner = getattr(function, "__wrapped__", None)
    closure, values = function.__closure__, function.__globals__
    if inner is None:
        values = values | names
        # torch.compile looks names up in the module of this name, where it would find transformers' functions.
        values.pop("__name__")
    else:
        made = _rebuilt(inner, names)
        closure = tuple(CellType(made) if cell.cell_contents is inner else cell for cell in closure)
    found = FunctionType(function.__code__, values, function.__name__, function.__defaults__, closure)
    found.__kwdefaults__ = function.__kwdefaults__
    found.__dict__.update(function.__dict__)
    if inner is not None:
        found.__dict__["__wrapped__"] = made
    return found
