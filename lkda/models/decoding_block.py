"""A block whose step takes few launches on a GPU: norms, residual sums and SwiGLU are parts of the linear layers'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkda.models.block import Block
from lkda.models.linear import MULTIPLE, is_plain
from lkda.models.mixer import State
from lkda.models.projected_mixer import ProjectedMixer
from lkda.ops.precision import at_least_float32
from lkda.ops.token_linear.op import add_gated_linear_, add_linear_, grouped_linear, normed_linear


class DecodingBlock(Block):
    """`block` with the same modules. The weights of layers of one input are concatenated here, once.

    Layers that have been replaced by others, such as adapters, are called, and so are mixers of other classes than
    `ProjectedMixer`.

    The stream of residuals is updated in place, so a step's input must not be needed afterwards.
    """

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        self.mixer_norm, self.mixer = block.mixer_norm, block.mixer
        self.mlp_norm, self.mlp = block.mlp_norm, block.mlp
        self._mixer_scale, self._mlp_scale = _scale(self.mixer_norm), _scale(self.mlp_norm)
        self._projections = self._factors = self._halves = None
        if isinstance(self.mixer, ProjectedMixer) and _are_plain(self._layers()):
            self._projections = _joined(self.mixer.step_layers())
            self._factors = _stacked([second for _, second in self.mixer.factor_layers()])
        if self.mlp is not None and _are_plain([self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj]):
            self._halves = _joined([self.mlp.gate_proj, self.mlp.up_proj], multiple=1)

    def _layers(self) -> list[nn.Linear]:
        """All linear layers of the mixer."""
        assert isinstance(self.mixer, ProjectedMixer)
        factors = [second for _, second in self.mixer.factor_layers()]
        return [*self.mixer.step_layers(), *factors, self.mixer.o_proj]

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if self._projections is None:
            y, state = self.mixer.step(self.mixer_norm(x), state)
            x = x + y
        else:
            assert isinstance(self.mixer, ProjectedMixer)
            state = self._mix(x, self.mixer, self._projections, state)
        if self._halves is None:
            return self._feed_forward(x), state
        if self.mlp is not None:
            hidden = normed_linear(x, self._mlp_scale, self._halves, eps=_eps(self.mlp_norm), swiglu=True)
            add_linear_(x, hidden, self.mlp.down_proj.weight)
        return x, state

    def _mix(self, x: Tensor, mixer: ProjectedMixer, weight: Tensor, state: State) -> State:
        """x += mixer(norm(x)), in place. Returns the state after the token."""
        sizes = [layer.out_features for layer in mixer.step_layers()]
        joined = normed_linear(x, self._mixer_scale, weight, eps=_eps(self.mixer_norm))
        factors: Sequence[Tensor]
        projected, latents = mixer.split_step(joined[:, : sum(sizes)].split(sizes, -1))
        if self._factors is not None and latents:
            rank, count = latents[0].shape[-1], len(latents)
            first = sum(sizes) - count * rank
            factors = grouped_linear(joined[:, first : sum(sizes)], self._factors)
        else:
            factors = [second(latent) for (_, second), latent in zip(mixer.factor_layers(), latents, strict=True)]
        o, gate, after = mixer.step_from(projected, factors, state)
        if mixer.o_norm is None:
            add_linear_(x, o.flatten(1), mixer.o_proj.weight)
        else:
            add_gated_linear_(x, o, gate, mixer.o_norm.weight, mixer.o_proj.weight)
        return after


def _are_plain(layers: Sequence[nn.Module]) -> bool:
    return all(map(is_plain, layers))


def _joined(layers: Sequence[nn.Linear], multiple: int = MULTIPLE) -> Tensor:
    """The concatenated weights [out, in], with zeros up to a multiple of `multiple` outputs."""
    weights = [layer.weight.detach() for layer in layers]
    padding = -sum(map(len, weights)) % multiple
    return torch.cat([*weights, weights[0].new_zeros(padding, weights[0].shape[1])])


def _stacked(layers: Sequence[nn.Linear]) -> Tensor | None:
    """The weights [count, out, in] of layers of one shape; None where their shapes differ."""
    weights = [layer.weight.detach() for layer in layers]
    return torch.stack(weights) if weights and len({w.shape for w in weights}) == 1 else None


def _scale(norm: nn.RMSNorm | None) -> Tensor:
    """The weight of a norm in float32 at least, as the kernels take it."""
    return torch.empty(0) if norm is None else at_least_float32(norm.weight.detach())


def _eps(norm: nn.RMSNorm | None) -> float:
    assert norm is not None
    assert norm.eps is not None
    return norm.eps
