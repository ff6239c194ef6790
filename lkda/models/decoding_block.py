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
from lkda.ops.token_linear.op import add_gated_linear_, add_linear_, grouped_linear, normed_linear, takes

# Reading so many bytes of a GPU's memory takes about as long as one launch. `ProjectedMixer.absorbed` saves two.
BYTES_OF_A_LAUNCH = 6 * 2**20


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
        self._projections = self._factors = self._multiplied = self._halves = self._last = None
        self._sizes: list[int] = []  # of the outputs of the layers of `absorbed`
        if isinstance(self.mixer, ProjectedMixer) and _are_plain(self._layers()):
            self._projections = _joined(self.mixer.step_layers())
            self._factors = _stacked([second for _, second in self.mixer.factor_layers()])
            self._multiplied = _multiplied(self.mixer)
            if (found := self.mixer.absorbed(most_bytes=BYTES_OF_A_LAUNCH)) is not None:
                weights, self._last = found
                self._sizes, self._multiplied = [len(weight) for weight in weights], _side_by_side(weights)
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
            state = self._mix(x, self.mixer, state)
        if self._halves is None:
            return self._feed_forward(x, None), state
        if self.mlp is not None and self.mlp_norm is not None:
            scale = self._mlp_scale if takes(x) else self.mlp_norm.weight
            hidden = normed_linear(x, scale, self._halves, eps=_eps(self.mlp_norm), swiglu=True)
            add_linear_(x, hidden, self.mlp.down_proj.weight)
        return x, state

    def _mix(self, x: Tensor, mixer: ProjectedMixer, state: State) -> State:
        """x += mixer(norm(x)), in place. Returns the state after the token."""
        if self._last is not None and takes(x):
            assert self._multiplied is not None
            joined = normed_linear(x, self._mixer_scale, self._multiplied, eps=_eps(self.mixer_norm))
            o, after = mixer.absorbed_step_from(joined[:, : sum(self._sizes)].split(self._sizes, -1), state)
            add_linear_(x, o, self._last)
            return after
        projected, factors = self._project(x, mixer)
        o, gate, after = mixer.step_from(projected, factors, state)
        if mixer.o_norm is None:
            add_linear_(x, o.flatten(1), mixer.o_proj.weight)
        else:
            add_gated_linear_(x, o, gate, mixer.o_norm.weight, mixer.o_proj.weight)
        return after

    def _project(self, x: Tensor, mixer: ProjectedMixer) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The arguments of `mixer.step_from`, from a block's input x."""
        assert self._projections is not None
        layers, pairs, eps = mixer.step_layers(), mixer.factor_layers(), _eps(self.mixer_norm)
        sizes = [layer.out_features for layer in layers]
        if takes(x) and self._multiplied is not None:
            sizes[len(layers) - len(pairs) :] = [second.out_features for _, second in pairs]
            joined = normed_linear(x, self._mixer_scale, self._multiplied, eps=eps)
            return mixer.split_step(joined[:, : sum(sizes)].split(sizes, -1))
        scale = self._mixer_scale if takes(x) else self.mixer_norm.weight
        joined = normed_linear(x, scale, self._projections, eps=eps)[:, : sum(sizes)]
        projected, latents = mixer.split_step(joined.split(sizes, -1))
        if self._factors is None:
            return projected, [second(latent) for (_, second), latent in zip(pairs, latents, strict=True)]
        return projected, grouped_linear(joined[:, -sum(latent.shape[-1] for latent in latents) :], self._factors)


def _are_plain(layers: Sequence[nn.Module]) -> bool:
    return all(map(is_plain, layers))


def _joined(layers: Sequence[nn.Linear], multiple: int = MULTIPLE) -> Tensor:
    """The concatenated weights [out, in], with zeros up to a multiple of `multiple` outputs."""
    return _side_by_side([layer.weight for layer in layers], multiple)


@torch.no_grad()
def _side_by_side(weights: Sequence[Tensor], multiple: int = MULTIPLE) -> Tensor:
    padding = -sum(map(len, weights)) % multiple
    return torch.cat([*weights, weights[0].new_zeros(padding, weights[0].shape[1])])


@torch.no_grad()
def _multiplied(mixer: ProjectedMixer) -> Tensor | None:
    """As `_joined` for the layers of a step, with both factors of each product of low rank multiplied.

    The product has more weights than its factors, but it needs one launch less. None where there are no factors.
    """
    pairs = mixer.factor_layers()
    if not pairs:
        return None
    others = mixer.step_layers()[: -len(pairs)]
    products = [(b.weight.double() @ a.weight.double()).to(a.weight.dtype) for a, b in pairs]
    return _side_by_side([*(layer.weight for layer in others), *products])


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
