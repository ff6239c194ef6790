"""The public layers in models of others: padding, torch.compile, autocast, FSDP, DDP and activation checkpointing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lkda.layers import KimiDeltaAttention, SimplifiedAttention

LAYERS = [KimiDeltaAttention, SimplifiedAttention]
B, T, WIDTH, HEADS = 4, 20, 32, 2
LEFT, RIGHT = [0, 7, 0, 3], [0, 0, 5, 4]


def layer_of(cls, **options):
    torch.manual_seed(0)
    layer = cls(WIDTH, HEADS, **options)
    with torch.no_grad():  # large enough that a mistake shows
        for p in layer.parameters():
            p.mul_(4 if p.dim() == 2 else 1)
    return layer


def inputs(seed=1):
    return torch.randn(B, T, WIDTH, generator=torch.Generator().manual_seed(seed))


def mask_of(left=LEFT, right=RIGHT):
    position = torch.arange(T)
    return torch.stack([(position >= a) & (position < T - b) for a, b in zip(left, right)])


def gradients(layer, y):
    return torch.autograd.grad(y.square().sum(), list(layer.parameters()))


def close(got, want, tolerance=1e-5):
    assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("cls", LAYERS)
class TestMask:
    def test_each_row_is_as_its_tokens_alone(self, cls):
        layer, x, mask = layer_of(cls), inputs(), mask_of()
        y, state = layer(x, mask)
        assert torch.equal(layer(x, mask.long())[0], y)
        assert not y[~mask].any()
        for b in range(B):
            want, alone = layer(x[b : b + 1, mask[b]])
            close(y[b : b + 1, mask[b]], want)
            for part, wanted in zip(state, alone, strict=True):
                close(part[b : b + 1], wanted)

    def test_a_state_continues_masked_rows(self, cls):
        layer, x, more = layer_of(cls), inputs(), inputs(2)
        first, second = mask_of(right=[0] * B), mask_of(left=[0] * B)
        _, state = layer(x, first)
        y, state = layer(more, second, state=state)
        token = torch.randn(B, WIDTH)
        last, _ = layer.step(token, state)
        for b in range(B):
            whole = torch.cat([x[b, first[b]], more[b, second[b]], token[b : b + 1]]).unsqueeze(0)
            want, _ = layer(whole)
            count = int(second[b].sum())
            close(y[b, second[b]], want[0, -1 - count : -1])
            close(last[b], want[0, -1])

    def test_padding_gets_and_gives_no_gradient(self, cls):
        layer, mask = layer_of(cls), mask_of()
        x = inputs().requires_grad_()
        changed = torch.where(mask.unsqueeze(-1), x.detach(), 1e3).requires_grad_()
        (dx,), (dchanged,) = (torch.autograd.grad(layer(z, mask)[0].square().sum(), z) for z in (x, changed))
        assert not dx[~mask].any()
        close(dchanged, dx)

    def test_a_row_may_be_all_padding(self, cls):
        layer, x = layer_of(cls), inputs()
        mask = torch.ones(B, T, dtype=torch.bool)
        mask[1] = False
        y, state = layer(x, mask)
        assert not y[1].any()
        assert not any(part[1].any() for part in state)
        close(y[2], layer(x)[0][2])

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (torch.tensor([[1, 0, 1]]).repeat(B, 7)[:, :T], "padding between the tokens of a row"),
            (torch.ones(B, T, T, dtype=torch.bool), r"must be a tensor \[B, T\] = \[4, 20\], got \[4, 20, 20\]"),
            ([[1] * T] * B, r"attention_mask must be a tensor \[B, T\] = \[4, 20\], got list"),
            (torch.ones(B, T), "must be of booleans, or 0 and 1, on cpu, got torch.float32"),
        ],
    )
    def test_a_mask_that_does_not_fit_is_said(self, cls, mask, message):
        with pytest.raises(ValueError, match=message):
            layer_of(cls)(inputs(), mask)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.randn(T, WIDTH), r"x must be a tensor \[B, T, 32\] with no axis of length 0, got \[20, 32\]"),
            (torch.randn(B, T, 31), r"x must be a tensor \[B, T, 32\] .* got \[4, 20, 31\]"),
            (torch.randn(B, 0, WIDTH), r"with no axis of length 0, got \[4, 0, 32\]"),
            (torch.randn(0, T, WIDTH), r"with no axis of length 0, got \[0, 20, 32\]"),
            ([1.0], r"x must be a tensor \[B, T, 32\] .* got list"),
            (torch.ones(B, T, WIDTH).double(), "like the weights, of torch.float32 on cpu, got torch.float64 on cpu"),
            (torch.ones(B, T, WIDTH).long(), "like the weights, of torch.float32 on cpu, got torch.int64 on cpu"),
        ],
    )
    @pytest.mark.parametrize("masked", [False, True])
    def test_an_input_that_does_not_fit_is_said(self, cls, x, message, masked):
        layer = layer_of(cls)
        with pytest.raises(ValueError, match=message):
            layer(x, mask_of() if masked else None)
        if isinstance(x, torch.Tensor) and len(x) == B and x.dim() == 3 and x.shape[1]:
            with pytest.raises(ValueError, match=message.replace(", T,", ",").replace(", 20,", ",")):
                layer.step(x[:, 0], layer.init_state(B))

    @pytest.mark.parametrize("other", [(), [], torch.zeros(2), B + 1])
    def test_a_state_that_does_not_fit_is_said(self, cls, other):
        layer = layer_of(cls)
        state = layer.init_state(other) if isinstance(other, int) else other
        for call in (lambda: layer(inputs(), state=state), lambda: layer.step(inputs()[:, 0], state)):
            with pytest.raises(ValueError, match="state must be what an earlier call for 4 sequences returned"):
                call()

    def test_it_excludes_packed_sequences(self, cls):
        with pytest.raises(ValueError, match="attention_mask and cu_seqlens cannot be given together"):
            layer_of(cls)(inputs(), mask_of(), cu_seqlens=torch.tensor([0, T]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "masked"), [(KimiDeltaAttention, False), (KimiDeltaAttention, True), (SimplifiedAttention, False)]
)
def test_compiles_without_a_graph_break(cls, masked):
    layer, x, mask = layer_of(cls), inputs(), mask_of() if masked else None
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")
    want, got = layer(x, mask)[0], compiled(x, mask)[0]
    close(got, want)
    for one, two in zip(gradients(layer, got), gradients(layer, want), strict=True):
        close(one, two, 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("cls", LAYERS)
def test_compiles_for_every_length(cls):
    """The second length makes torch.compile trace with a symbol for it."""
    layer = layer_of(cls)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (5, 9, 70):
        x = torch.randn(2, length, WIDTH)
        close(compiled(x)[0], layer(x)[0])


@pytest.mark.parametrize("cls", LAYERS)
def test_autocast_computes_in_bfloat16_and_keeps_float32_weights(cls):
    layer, x = layer_of(cls), inputs()
    want, _ = layer(x, mask_of())
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, mask_of())
    assert y.dtype == torch.bfloat16
    assert state[-1].dtype == torch.float32
    close(y.float(), want, 0.05)
    for got, wanted in zip(gradients(layer, y.float()), gradients(layer, want), strict=True):
        assert got.dtype == torch.float32
        close(got, wanted, 0.15)


@pytest.mark.parametrize("cls", LAYERS)
def test_a_checkpointed_layer_has_the_same_gradients(cls):
    layer, x, mask = layer_of(cls), inputs(), mask_of()
    want, got = layer(x, mask)[0], checkpoint(layer, x, mask, use_reentrant=False)[0]
    assert torch.equal(got, want)
    for one, two in zip(gradients(layer, got), gradients(layer, want), strict=True):
        assert torch.equal(one, two)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("cls", LAYERS)
def test_a_sharded_layer_has_the_same_gradients(cls, one_process):
    layer, sharded = layer_of(cls), layer_of(cls)
    fully_shard(sharded, mesh=one_process)
    want, got = layer(inputs(), mask_of())[0], sharded(inputs(), mask_of())[0]
    assert torch.equal(got, want)
    want.square().sum().backward()
    got.square().sum().backward()
    for p, q in zip(layer.parameters(), sharded.parameters(), strict=True):
        close(q.grad.full_tensor(), p.grad, 1e-6)


@pytest.mark.parametrize("cls", LAYERS)
def test_a_layer_in_ddp_has_the_same_gradients(cls, one_process):
    layer, parallel = layer_of(cls), DistributedDataParallel(layer_of(cls))
    layer(inputs(), mask_of())[0].square().sum().backward()
    parallel(inputs(), mask_of())[0].square().sum().backward()
    for p, q in zip(layer.parameters(), parallel.parameters(), strict=True):
        close(q.grad, p.grad, 1e-6)


@pytest.mark.long
def test_two_processes_share_a_layer(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, (KimiDeltaAttention, str(tmp_path)), nprocs=2)


def _one_of_two(rank, cls, folder):
    """Each process has half of the batch; the gradients are the mean over both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    layer, sharded = layer_of(cls), layer_of(cls)
    fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    half = slice(2 * rank, 2 * rank + 2)
    sharded(inputs()[half], mask_of()[half])[0].square().sum().backward()
    layer(inputs(), mask_of())[0].square().sum().backward()
    for p, q in zip(layer.parameters(), sharded.parameters(), strict=True):
        close(2 * q.grad.full_tensor(), p.grad)
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cls", LAYERS)
class TestOnAGPU:
    def test_each_row_is_as_its_tokens_alone(self, cls):
        layer = cls(128, 4).cuda().bfloat16()
        x, mask = torch.randn(B, 200, 128, device="cuda", dtype=torch.bfloat16), torch.zeros(B, 200, dtype=torch.bool)
        for b, (left, right) in enumerate(zip([0, 70, 0, 3], [0, 0, 65, 4])):
            mask[b, left : 200 - right] = True
        mask = mask.cuda()
        y, state = layer(x, mask)
        for b in range(B):
            want, alone = layer(x[b : b + 1, mask[b]])
            close(y[b : b + 1, mask[b]].float(), want.float(), 0.01)
            close(state[-1][b : b + 1], alone[-1], 0.01)

    @pytest.mark.parametrize("masked", [False, True])
    def test_compiles_without_a_graph_break(self, cls, masked):
        layer = cls(128, 4).cuda()
        x = torch.randn(B, 100, 128, device="cuda")
        mask = torch.arange(100, device="cuda").expand(B, -1) >= 30 if masked else None
        compiled = torch.compile(layer, fullgraph=True, dynamic=False)
        with torch.autocast("cuda", torch.bfloat16):
            want, got = layer(x, mask)[0], compiled(x, mask)[0]
        close(got.float(), want.float(), 0.02)
        for one, two in zip(gradients(layer, got.float()), gradients(layer, want.float()), strict=True):
            close(one, two, 0.1)
