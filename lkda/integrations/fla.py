"""lkda as a backend of flash-linear-attention (FLA): its KDA, short convolution and norms run lkda's kernels.

    import lkda.integrations.fla
    lkda.integrations.fla.register()

After that FLA's own functions, layers and models call lkda wherever lkda supports the call. For any other call FLA
logs the reason at level INFO ("[FLA Backend] ... rejected: ..."), and FLA's own code runs.
Without a line of code, the environment variable LKDA_FLA=1 does the same; see `lkda.integrations.autoload`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from lkda.checks import InputError

# The functions of FLA that a part replaces, and the modules that have them. FLA keeps backends by function, or by a
# name that several functions share; `None` says the first, a name the second.
ENTRY_POINTS: dict[str, tuple[tuple[str, str, str | None], ...]] = {
    "kda": (
        ("fla.ops.kda.chunk", "chunk_kda", None),
        ("fla.ops.kda.fused_recurrent", "fused_recurrent_kda_fwd", "kda"),
    ),
    "conv": (
        ("fla.modules.causal_conv1d.ops", "causal_conv1d_fwd", None),
        ("fla.modules.causal_conv1d.ops", "causal_conv1d_bwd", None),
        ("fla.modules.causal_conv1d.ops", "causal_conv1d_update", None),
    ),
    "norm": (
        ("fla.modules.norm.fused_norm_gate", "layer_norm_gated_fwd", None),
        ("fla.modules.norm.fused_norm_gate", "layer_norm_gated_bwd", None),
        ("fla.modules.norm.layernorm", "layer_norm_fwd", None),
        ("fla.modules.norm.layernorm", "layer_norm_bwd", None),
    ),
    "swiglu": (
        ("fla.modules.activations.ops", "swiglu_fwd", None),
        ("fla.modules.activations.ops", "swiglu_fwdbwd", None),
    ),
}
PARTS = tuple(ENTRY_POINTS)
_TYPE = "lkda"  # as FLA's registries call the backend


def register(parts: Sequence[str] = PARTS) -> None:
    """Make lkda a backend of FLA for `parts`, before FLA's own code and its other backends. A second call is harmless.

    Args:
        parts: which of kda (`chunk_kda` and `fused_recurrent_kda`), conv (`ShortConvolution`), norm
            (`FusedRMSNormGated` and `RMSNorm`) and swiglu (`GatedMLP`: PyTorch's functions, in place of kernels that
            FLA tunes).
    Raises: InputError (a ValueError) for an unknown part, if FLA is not installed, if its registry is switched off, or
        if the installed FLA has functions that differ from those that lkda knows.
    """
    check_parts(parts)
    backends = _fla_backends()
    from lkda.integrations import fla_backends

    for part in parts:
        found = [(_function(module, name), registry) for module, name, registry in ENTRY_POINTS[part]]
        for function, registry in found:
            fla_backends.check_signature(function)
            backends.register(registry or function)(fla_backends.BACKENDS[part])


def unregister() -> None:
    """Undo `register`: FLA runs its own code again."""
    backends = _fla_backends()
    for part in PARTS:
        for module, name, registry in ENTRY_POINTS[part]:
            function = inspect.unwrap(_function(module, name))
            known = backends._operation_registries if registry else backends._function_registries
            known[registry or function]._backends.pop(_TYPE, None)


def check_parts(parts: Sequence[str], given_by: str = "lkda.integrations.fla") -> None:
    """Raises InputError unless every part is one of PARTS; `given_by` is what the message names."""
    if isinstance(parts, str) or not parts or not set(parts) <= set(PARTS):
        raise InputError(f"{given_by}: parts must be some of {', '.join(PARTS)}, got {parts!r}.")


def _fla_backends() -> Any:
    """FLA's module of registries."""
    try:
        backends = importlib.import_module("fla.backends")
    except ImportError as error:
        raise InputError(
            "lkda.integrations.fla needs flash-linear-attention 0.6 or later with its module fla.backends, which could "
            f"not be imported ({error}): pip install 'flash-linear-attention>=0.6' 'fla-core[cuda]>=0.6'."
        ) from error
    if backends._DISPATCH_DISABLED:
        raise InputError(
            "lkda.integrations.fla: FLA_DISABLE_BACKEND_DISPATCH=1 switches FLA's backends off; unset it before FLA is "
            "imported."
        )
    return backends


def _function(module: str, name: str) -> Callable[..., Any]:
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"the installed FLA has no {module}.{name} ({error}); lkda knows flash-linear-attention 0.6."
        ) from error
    return function
