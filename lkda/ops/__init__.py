"""Sequence-mixing operators, as functions of tensors. They need torch alone; kernels are compiled at the first call."""

from lkda.ops.gated_norm.op import gated_rms_norm
from lkda.ops.kda.chunk_states import kda_chunk_states
from lkda.ops.kda.fused import kda_attention_fused, kda_gate
from lkda.ops.kda.op import kda_attention, kda_step
from lkda.ops.kda.reference.gate import KDAGate
from lkda.ops.kda.step import kda_step_fused
from lkda.ops.products.op import linear
from lkda.ops.residual_norm.op import residual_norm
from lkda.ops.runtime.backend import available_backends, resolve_backend
from lkda.ops.short_conv.op import l2_normalized, short_convolution, short_convolutions
from lkda.ops.simplified.decay import simplified_decay
from lkda.ops.simplified.op import simplified_attention, simplified_step
from lkda.ops.simplified.step import simplified_step_fused
from lkda.ops.softmax.heads import rotary_heads
from lkda.ops.softmax.latent_keys import latent_keys
from lkda.ops.softmax.op import softmax_attention
from lkda.ops.softmax.step import softmax_step

__all__ = [
    "KDAGate",
    "available_backends",
    "gated_rms_norm",
    "kda_attention",
    "kda_attention_fused",
    "kda_chunk_states",
    "kda_gate",
    "kda_step",
    "kda_step_fused",
    "l2_normalized",
    "latent_keys",
    "linear",
    "residual_norm",
    "resolve_backend",
    "rotary_heads",
    "short_convolution",
    "short_convolutions",
    "simplified_attention",
    "simplified_decay",
    "simplified_step",
    "simplified_step_fused",
    "softmax_attention",
    "softmax_step",
]
