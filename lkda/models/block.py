"""One layer: x + mixer(norm(x)), then x + mlp(norm(x))."""

from __future__ import annotations

from torch import Tensor, nn

from lkda.models.init import reset_children
from lkda.models.mixer import Mixer, State
from lkda.models.mlp import SwiGLU
from lkda.models.residual import normed_residual
from lkda.models.rows import added, normed


class Block(nn.Module):
    """A pre-norm layer, without a feed-forward part where mlp_hidden is 0."""

    def __init__(self, mixer: Mixer, d_model: int, *, mlp_hidden: int, norm_eps: float) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.mixer = mixer
        self.mlp_norm = nn.RMSNorm(d_model, eps=norm_eps) if mlp_hidden else None
        self.mlp = SwiGLU(d_model, mlp_hidden) if mlp_hidden else None

    def reset_parameters(self) -> None:
        """Initialises all weights again."""
        reset_children(self)

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x, normed_x = normed_residual(x, None, self.mixer_norm)
        y, state = self.mixer(normed_x, cu_seqlens=cu_seqlens, state=state)
        return self._feed_forward(x, y), state

    def forward_packed(self, x: Tensor, state: State, *, cu_seqlens: Tensor) -> tuple[Tensor, State]:
        x, normed_x = normed_residual(x, None, self.mixer_norm)
        y, state = self.mixer.forward_packed(normed_x, state, cu_seqlens=cu_seqlens)
        return self._feed_forward(x, y), state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.mixer.step(normed(x, self.mixer_norm), state)
        x = added(x, y)
        if self.mlp is None or self.mlp_norm is None:
            return x, state
        return added(x, self.mlp(normed(x, self.mlp_norm))), state

    def _feed_forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        """x + y, with the feed-forward part added; y is what the mixer adds, None if x has it already."""
        if self.mlp is None or self.mlp_norm is None:
            return x if y is None else x + y
        x, normed_x = normed_residual(x, y, self.mlp_norm)
        return x + self.mlp(normed_x)
