"""The language model: logits of tokens, for whole sequences or one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lkda.checks import InputError, check_count
from lkda.models.block import Block
from lkda.models.init import STD, apply_initialization
from lkda.models.linear import Linear
from lkda.models.mixer import Mixer, State
from lkda.models.residual import normed_residual
from lkda.models.rows import embedded, normed
from lkda.models.short_conv import ShortConvolution
from lkda.ops import resolve_backend

ApplyBlock = Callable[[nn.Module, Tensor, Tensor | None], Tensor]


def apply_block(block: nn.Module, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x [B, T, d_model] -> what `block` makes of it, of that shape."""
    y: Tensor = block(x, cu_seqlens=cu_seqlens)[0]
    return y


class LanguageModel(nn.Module):
    """Embedding, blocks, norm and head. `build_model` builds it.

    Attributes:
        config: the plain dict that it was built from. A checkpoint needs only this and the weights.
    """

    def __init__(self, blocks: list[Block], config: dict[str, Any]) -> None:
        super().__init__()
        vocab_size, d_model = config["vocab_size"], config["d_model"]
        self.config = config
        self.embed_tokens = nn.Embedding(vocab_size, d_model)
        self.embed_norm = nn.RMSNorm(d_model, eps=config["norm_eps"]) if config["embed_norm"] else None
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(d_model, eps=config["norm_eps"])
        self.lm_head = Linear(d_model, vocab_size)
        self._tie()

    def reset_parameters(self) -> None:
        """Initialises all weights again, and ties head and embedding again, which `to_empty` unties."""
        for module in (self.embed_tokens, self.embed_norm, *self.blocks, self.norm, self.lm_head):
            if module is not None:
                module.reset_parameters()
        self.draw_as_a_model()
        self._tie()

    def draw_as_a_model(self) -> None:
        """Initialises what has another initialisation in a model than in a single layer, then applies `config["init"]`.

        These are linear layers and embeddings, with N(0, 0.02), and convolutions.
        """
        self.apply(_draw)
        apply_initialization(self, self.config["init"])

    def _tie(self) -> None:
        if self.config["tie_embeddings"]:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """tokens [B, T] -> logits [B, T, vocab]. With cu_seqlens (B = 1), packed sequences are independent."""
        return self.lm_head(self.hidden(tokens, cu_seqlens=cu_seqlens))

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [...] -> [..., d_model], the input of the first block."""
        x = self.embed_tokens(tokens)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return x if self.config["embed_scale"] == 1.0 else x * self.config["embed_scale"]

    def hidden(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """tokens [B, T] -> [B, T, d_model], the input of the head."""
        return self.hidden_by(apply_block, tokens, cu_seqlens=cu_seqlens)

    def hidden_by(self, apply: ApplyBlock, tokens: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """As `hidden`, with each block called through `apply`, such as a compiled `apply_block`."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = apply(block, x, cu_seqlens)
        return normed_residual(x, None, self.norm)[1]

    def forward_from(self, tokens: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        """tokens [B, T], which continue the sequences of `state` -> logits [B, T, vocab] and the state after them."""
        x, after = self._hidden_from(tokens, state)
        return self.lm_head(self.norm(x)), after

    def prefill(self, tokens: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        """As `forward_from`, but with the logits [B, vocab] of the last token only."""
        x, after = self._hidden_from(tokens, state)
        return self.lm_head(self.norm(x[:, -1])), after

    def prefill_packed(self, tokens: Tensor, state: list[State], *, cu_seqlens: Tensor) -> tuple[Tensor, list[State]]:
        """Reads prompts of unequal length, packed in one row, as the first tokens of their sequences.

        Args:
            tokens: [1, T].
            state: of `init_state(N, max_tokens=...)`, which may be overwritten.
            cu_seqlens: int [N + 1], the boundaries of the prompts, none of which is empty.
        Returns: the logits [N, vocab] of the last token of each prompt, and the state after it.
        """
        self._check_state(state, len(cu_seqlens) - 1)
        x, after = self.embed(tokens), []
        for block, before in zip(self.blocks, state, strict=True):
            x, new = block.forward_packed(x, before, cu_seqlens=cu_seqlens)  # type: ignore[operator]
            after.append(new)
        return self.lm_head(self.norm(x[0, cu_seqlens[1:].long() - 1])), after

    def step(self, tokens: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        """One token per sequence: tokens [B] -> logits [B, vocab] and the state after it."""
        x, after = self.hidden_step(tokens, state)
        return self.lm_head(x), after

    def hidden_step(self, tokens: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        """As `step` without the head: tokens [B] -> [B, d_model], the input of the head."""
        if tokens.dim() != 1:
            raise InputError(f"a step takes tokens [B], one per sequence, got a shape of {list(tokens.shape)}.")
        self._check_state(state, len(tokens))
        rows = embedded(tokens, self.embed_tokens, self.embed_norm, self.config["embed_scale"])
        x, after = self.embed(tokens) if rows is None else rows, []
        for block, before in zip(self.blocks, state, strict=True):
            x, new = block.step(x, before)  # type: ignore[operator]
            after.append(new)
        return normed(x, self.norm), after

    def _check_state(self, state: Sequence[State], sequences: int) -> None:
        if len(state) != len(self.blocks):
            raise InputError(
                f"the state must have an entry for each of the {len(self.blocks)} layers, as init_state makes it, got "
                f"{len(state)}."
            )
        of_others = [len(part) for layer in state for part in layer if len(part) != sequences]
        if of_others:
            raise InputError(
                f"the state must have a row per sequence, as init_state({sequences}) makes it, got {of_others[0]} for "
                f"{sequences} sequences."
            )

    def _hidden_from(self, tokens: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        self._check_state(state, len(tokens))
        x, after = self.embed(tokens), []
        for block, before in zip(self.blocks, state, strict=True):
            x, new = block(x, state=before)
            after.append(new)
        return x, after

    def init_state(self, batch_size: int, *, max_tokens: int | None = None) -> list[State]:
        """The state before the first token: one entry per layer.

        Args:
            max_tokens: the tokens of a sequence for which growing caches (softmax, MLA) are preallocated. They are then
                written in place, and a step has static shapes. None: they grow by copying.
        Raises: ValueError for a number that is not a whole number of 0 or more.
        """
        check_count("init_state: batch_size", batch_size, least=0)
        if max_tokens is not None:
            check_count("init_state: max_tokens", max_tokens, least=0)
        return [mixer.init_state(batch_size, max_tokens=max_tokens) for mixer in self.mixers()]

    def cut_state(self, state: list[State], tokens: int) -> list[State]:
        """Views of the part of a state made with `max_tokens` that sequences of up to `tokens` tokens use."""
        return [mixer.cut_state(part, tokens) for mixer, part in zip(self.mixers(), state, strict=True)]

    @property
    def has_constant_state(self) -> bool:
        """Whether the size of the state does not depend on the number of tokens."""
        return self.state_bytes(1) == self.state_bytes(2)

    def mixers(self) -> list[Mixer]:
        """The mixer of each layer, in order."""
        return [block.mixer for block in self.blocks]  # type: ignore[misc]

    def state_bytes(self, context: int) -> int:
        """Bytes of the state after one sequence of `context` tokens, over all layers and with convolution caches."""
        return sum(mixer.state_bytes(context) for mixer in self.mixers())

    def flops_per_token(self, context: int) -> float:
        """FLOPs of the forward pass per token, averaged over `context` tokens. A multiply-add counts two."""
        blocks: list[Any] = list(self.blocks)
        mlps = sum(2 * p.numel() for block in blocks if block.mlp is not None for p in block.mlp.parameters())
        return sum(mixer.flops_per_token(context) for mixer in self.mixers()) + mlps + 2 * self.lm_head.weight.numel()

    def num_parameters(self, *, embedding: bool = True) -> int:
        """The number of parameters, without the token embedding and the head where `embedding` is False."""
        skip = set() if embedding else {id(self.embed_tokens.weight), id(self.lm_head.weight)}
        return sum(p.numel() for p in self.parameters() if id(p) not in skip)

    def resolve_backends(self, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        """The backend that each operator of the model runs on `device`, as {"kda": "chunk"}.

        Raises: ValueError, with the reason, where one cannot run there.
        """
        resolved = {}
        for mixer in self.mixers():
            if mixer.op is None:
                continue
            word = str(getattr(mixer, "backend", "auto"))
            resolved[mixer.op] = resolve_backend(mixer.op, word, device=device, head_dim=mixer.head_dim, dtype=dtype)
        return resolved


def _draw(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=STD)
    elif isinstance(module, ShortConvolution):
        module.reset_parameters()
