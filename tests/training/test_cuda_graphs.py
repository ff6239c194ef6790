"""A replayed loss has the value and the gradients of the loss that was captured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lkda.training import cuda_graphs
from lkda.training.cuda_graphs import CaptureError, GraphedLoss
from lkda.training.losses import ModelLoss
from tests.models.helpers import small, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: there are no graphs"),
]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 1)).cuda()


def batch(rows: int, seed: int) -> dict[str, Tensor | None]:
    draw = torch.Generator("cuda").manual_seed(seed)
    return {"x": torch.randn(rows, 8, device="cuda", generator=draw), "absent": None}


def loss_of(net: nn.Module):  # type: ignore[no-untyped-def]
    def loss(x: Tensor, absent: None) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return net(x).float().square().mean()

    return loss


def one() -> Tensor:
    return torch.ones((), device="cuda")


@pytest.mark.parametrize("pieces", [1, 3])
def test_it_trains_as_without_graphs(pieces: int) -> None:
    """Also where weights change between replays, and batches of two shapes alternate."""
    plain, graphed = model(), model()
    replay = GraphedLoss(loss_of(graphed), graphed.parameters())
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (plain, graphed)]
    for step in range(6):
        optimizers[0].zero_grad()
        for piece in range(pieces):
            inputs = batch(4 + 4 * (step % 2), seed=10 * step + piece)
            want = loss_of(plain)(**inputs)
            (want / pieces).backward()
            got = replay(inputs, scale=one() / pieces, first=piece == 0, accumulates=pieces > 1)
            torch.testing.assert_close(got, want.detach())
        for mine, theirs in zip(graphed.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("compile", [False, True])
def test_blocks_that_are_computed_again_can_be_captured(compile: bool) -> None:
    model = small(["kda"], scale=1, d_model=64).cuda()
    x = tokens(2, 130).cuda()
    found = []
    for checkpointing in ("none", "block"):
        loss = ModelLoss(model, compile=compile, checkpointing=checkpointing)

        def mean(tokens: Tensor, loss: ModelLoss = loss) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return loss.mean(tokens, tokens.roll(-1, 1))

        replay = GraphedLoss(mean, model.parameters())
        values = [replay({"tokens": tokens}, scale=one()) for tokens in (x, x.flip(1))]
        found.append((*values, *(p.grad for p in model.parameters() if p.grad is not None)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def reserved_by(step) -> int:  # type: ignore[no-untyped-def]
    """The largest number of bytes that `step` reserves beyond those that were in use before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved() - before


def test_graphs_reserve_the_memory_of_one_step() -> None:
    """Neither the warm-up calls' memory nor their gradients stay beside those of the graph."""
    net = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(1024, 1024), nn.SiLU()))).cuda()
    inputs = {"x": torch.randn(16384, 1024, device="cuda"), "absent": None}

    def plain() -> None:
        for _ in range(2):
            net.zero_grad()
            loss_of(net)(**inputs).backward()

    def graphed() -> None:
        replay = GraphedLoss(loss_of(net), net.parameters())
        for _ in range(3):
            replay(inputs, scale=one())

    want = reserved_by(plain)
    net.zero_grad()
    assert reserved_by(graphed) < 1.15 * want + 128 * 2**20  # and the inputs, and workspaces of matrix products


def test_what_cannot_be_captured_says_why() -> None:
    net = model()

    def reads(x: Tensor, absent: None) -> Tensor:
        return net(x).mean() * float(x.sum())  # waits for the device

    with pytest.raises(CaptureError, match="captur"):
        GraphedLoss(reads, net.parameters())(batch(4, 0), scale=one())
    assert torch.isfinite(net(torch.ones(1, 8, device="cuda"))).all()  # the device goes on


def test_shapes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 2)
    net = model()
    replay = GraphedLoss(loss_of(net), net.parameters())
    replay(batch(4, 0), scale=one())
    replay(batch(5, 0), scale=one())
    with pytest.raises(CaptureError, match="more than 2 shapes"):
        replay(batch(6, 0), scale=one())


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("mixer", ["kda", "simplified", "softmax", "mla"])
def test_two_trainings_are_equal_bit_for_bit(mixer: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """KDA and simplified by default; softmax and MLA with deterministic algorithms."""
    if mixer in ("softmax", "mla") and not deterministic:
        pytest.skip("the backward pass of the attention adds in any order")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as Lightning does for trainer.deterministic=true
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        first, second = (trained(mixer) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    for one_result, other in zip(first, second, strict=True):
        assert torch.equal(one_result, other)


def trained(mixer: str, steps: int = 20) -> list[Tensor]:
    """The losses and the weights of a training with graphs, clipping and fused AdamW."""
    net = small([mixer], scale=1, d_model=64).cuda()
    mean = ModelLoss(net, compile=True).mean

    def loss(tokens: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return mean(tokens, tokens.roll(-1, 1))

    replay = GraphedLoss(loss, net.parameters())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    losses = []
    for step in range(steps):
        losses.append(replay({"tokens": tokens(4, 512, seed=step).cuda()}, scale=one()))
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return [*losses, *(parameter.detach() for parameter in net.parameters())]
