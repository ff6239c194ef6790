"""The base of mixers whose step can be cut in three: linear layers of its input, the operator, and o_proj."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from lkda.models.linear import FusedLinear, fused_linear, has_hooks, is_plain
from lkda.models.mixer import Mixer, State
from lkda.models.norm import GatedHeadNorm


class ProjectedMixer(Mixer):
    """A mixer whose step is y = o_proj(o_norm(o)), with o of one function of the outputs of `step_layers`.

    `lkda.models.decoding_block` computes the first and the last linear layers together with what is around the mixer.

    Attributes:
        o_norm: the norm of each head of o, with a gate or without; None for no norm.
    """

    o_proj: nn.Linear
    o_norm: GatedHeadNorm | None

    @abstractmethod
    def step_layers(self) -> list[nn.Linear]:
        """The linear layers of a step's input: those of q, k and v, gates, and the first of each of `factor_layers`."""

    @abstractmethod
    def step_from(
        self, projected: Sequence[Tensor], factors: Sequence[Tensor], state: State
    ) -> tuple[Tensor, Tensor | None, State]:
        """The step after the linear layers of its input, up to the norm of the heads.

        Args:
            projected: q, k, v and gates [B, ...], as `split_step` returns them.
            factors: the outputs [B, ...] of the second of each of `factor_layers`.
        Returns: o [B, H, D], the logits [B, H * D] of its gate, None without one, and the state after the token.
        """

    def factor_layers(self) -> list[tuple[nn.Linear, nn.Linear]]:
        """The products of low rank, as pairs of layers; that of the output gate, if there is one, is the last."""
        return []

    def split_step(self, projected: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The outputs of `step_layers`: those that `step_from` takes, and those of the first factors."""
        count = len(projected) - len(self.factor_layers())
        return projected[:count], projected[count:]

    def absorbed(self, *, most_bytes: int) -> tuple[list[Tensor], Tensor] | None:
        """Weights for `absorbed_step_from`: those of a step's input, [out, d_model] each, and those of its output, with
        the weights of other layers of the mixer multiplied in. A step then has fewer products.

        Args:
            most_bytes: None is returned if they have more bytes than this beyond those of the layers that they replace.
        Returns: None also for a mixer without such layers.
        """
        return None

    def absorbed_step_from(self, projected: Sequence[Tensor], state: State) -> tuple[Tensor, State]:
        """The step between the products with the weights of `absorbed`.

        Args:
            projected: the outputs [B, ...] of the first ones.
        Returns: the input [B, ...] of the last one, and the state after the token.
        """
        raise NotImplementedError

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        projected, latents = self.split_step(fused_linear(x, self.step_layers()))
        factors = [second(latent) for (_, second), latent in zip(self.factor_layers(), latents, strict=True)]
        o, gate, after = self.step_from(projected, factors, state)
        plain = type(self.o_norm) is GatedHeadNorm and not has_hooks(self.o_norm) and is_plain(self.o_proj)
        if plain and self.o_norm is not None and isinstance(self.o_proj, FusedLinear):
            return self.o_proj.of_heads(o, gate, self.o_norm.weight), after
        if self.o_norm is not None:
            o = self.o_norm(o, None if gate is None else self.heads(gate))
        return self.o_proj(o.flatten(-2)), after
