"""Checkpointing keeps less for the backward pass and changes no number."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lkda.models.lm import LanguageModel
from lkda.training import losses
from lkda.training.losses import ModelLoss
from tests.models.helpers import FEW, small, tokens

PRECISIONS = {"float32": (torch.float32, False), "float64": (torch.float64, False), "bfloat16": (torch.float32, True)}


def results(model: LanguageModel, *, autocast: bool = False, **options: object) -> list[Tensor]:
    """Two losses, of rows and of packed sequences, and the sums of their gradients."""
    loss = ModelLoss(model, **options)  # type: ignore[arg-type]
    x, packed = tokens(2, 130), tokens(1, 70, seed=1)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = [loss.mean(x, x.roll(-1, 1)), loss.mean(packed, packed.roll(-1, 1), torch.tensor([0, 40, 70]))]
    for value in found:
        (value / 2).backward()
    return [*found, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pattern", FEW)
def test_losses_and_gradients_are_equal_bit_for_bit(pattern: list[str], precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    model = small(pattern, scale=1).to(dtype)
    want = results(model, autocast=autocast)
    got = results(model, autocast=autocast, checkpointing="block")
    assert len(got) == len(want) == 2 + len(list(model.parameters()))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))


@pytest.mark.long
def test_a_compiled_block_is_computed_again_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model, x = small(["conv"], scale=1), tokens(1, 20)
    found = []
    for checkpointing in ("none", "block"):
        loss = ModelLoss(model, compile=True, checkpointing=checkpointing).mean(x, x)
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.equal(got, want) for got, want in zip(*found, strict=True))


@pytest.mark.slow
def test_every_kind_of_block_is_compiled_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for more than 8 of them together, where torch.compile would stop by default."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        compiled.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(losses, "keeps_less", backend)
    loss = ModelLoss(small(["conv", "softmax"], scale=1), compile=True)
    for length in range(20, 25):
        loss.mean(tokens(1, length), tokens(1, length))
    assert len(compiled) == 2 * 5


def test_it_keeps_only_the_inputs_of_blocks() -> None:
    model, x = small(["kda"], scale=1, num_layers=4), tokens(2, 130)

    def kept(checkpointing: str) -> int:
        """Bytes that blocks keep. The hooks of a checkpoint replace these; it keeps its own arguments."""
        sizes = {}

        def pack(y: Tensor) -> Tensor:
            sizes[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
            return y

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
            hidden = ModelLoss(model, checkpointing=checkpointing)._hidden(x, None)
        hidden.sum().backward()
        return sum(sizes.values())

    assert kept("block") < kept("none") / 10


def test_an_evaluation_computes_a_block_once() -> None:
    model, x = small(["kda"], scale=1), tokens(2, 20)
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    loss = ModelLoss(model, checkpointing="block")
    with torch.no_grad():
        loss.each(x, x)
    assert len(calls) == 1
    loss.mean(x, x).backward()
    assert len(calls) == 3


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="checkpointing must be none or block, got 'layer'"):
        ModelLoss(small(["kda"]), checkpointing="layer")


def test_mixers_recompute_only_where_blocks_do_not() -> None:
    model = small(["kda"])
    for checkpointing, want in (("block", False), ("none", True)):
        ModelLoss(model, checkpointing=checkpointing)
        assert all(mixer.recomputes is want for mixer in model.mixers())


def test_only_its_own_compilation_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo
    from torch._functorch import config

    seen = []

    def compiler(
        graph: torch.fx.GraphModule, inputs: list[Tensor], *, config_patches: dict[str, bool]
    ) -> torch.fx.GraphModule:
        seen.append(config.ban_recompute_materialized_backward)
        return graph

    before = config.ban_recompute_materialized_backward
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: compiler)
    model = small(["kda"])
    want = ModelLoss(model).mean(tokens(1, 8), tokens(1, 8))
    got = ModelLoss(model, compile=True).mean(tokens(1, 8), tokens(1, 8))
    torch.testing.assert_close(got, want)
    assert seen
    assert not any(seen)
    assert config.ban_recompute_materialized_backward is before
