"""The forward in one kernel, chunk_fwd.cu and chunk_fwd_pair.cu: arithmetic on the CPU, and when they run."""

import shutil

import pytest
import torch

from lkda.ops import kda_attention, l2_normalized
from lkda.ops.kda.cuda import core, plan, variants
from lkda.ops.runtime.jit import Kernel
from tests.ops.cases import kda_inputs, relative
from tests.ops.emulation import emulated, kernels_on_the_cpu, ops_run_on_the_cpu  # noqa: F401
from tests.ops.kda.test_layer import as_one, kda_layer_inputs

ARCH = "sm_90a"
SAVING = "kda_chunk_fwd_pair_saves"
TENSORS = ("q", "k", "v", "g", "beta")
each_head_size = pytest.mark.parametrize("D", [64, 128])
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def inputs_of(*shape, **options):
    """As kda_inputs, but contiguous: an emulated kernel gets addresses alone."""
    return {name: x.contiguous() for name, x in kda_inputs(*shape, **options).items()}


SAVED = ("workspaces", "states", "v_tilde", "scales")


def saved_of(v, D, items):
    """What a backward reads, not written yet: workspaces, states, v~ and the scales of v."""
    layout, (B, _, H, _) = variants.layout_of(D, v.dtype), v.shape
    sizes = (layout.workspace, layout.saved_state, layout.columns)
    return *(torch.full((items, size), 255, dtype=torch.uint8) for size in sizes), torch.full((B, H), torch.nan)


def in_two_kernels(q, k, v, g, beta, state):
    """o and the final state from the emulated kernels of intra_chunk_fwd, amax and inter_chunk_fwd."""
    return saving_in_two_kernels(q, k, v, g, beta, state)[:2]


def saving_in_two_kernels(q, k, v, g, beta, state):
    """The same, and what they save."""
    B, T, H, D = v.shape
    dtype, layout = v.dtype, variants.layout_of(D, q.dtype)
    slots = B * -(-T // layout.chunk)
    items = slots * H
    workspaces, *saved = saved_of(v, D, items)
    amax, o = torch.full((slots, H), torch.nan), torch.full_like(v, torch.nan)
    final = torch.full((B, H, D, D), torch.nan)
    intra = variants.IntraChunkFwd(D, dtype, ARCH, q.dtype)
    launch, where = (min(3, items), intra.threads), (None, items, T, H)
    if intra.helpers:
        emulated(intra.kernel)(*launch, q, k, v, g, beta, workspaces, amax, *where, D**-0.5)
    else:
        emulated(intra.kernel)(*launch, q, k, g, beta, workspaces, *where, D**-0.5)
        emulated(variants.amax_kernel(D, dtype))(-(-items // 8), 256, v, amax, *where)
    inter = variants.InterChunkKernel("inter_chunk_fwd", D, dtype, ARCH, "whole")
    results = (o, final, *saved, *(None,) * 3)
    emulated(inter.kernel)(
        B * H * inter.blocks, 32 * inter.warps, workspaces, v, amax, state, state, *results, None, B, T, H, 1, 0
    )
    return o, final, workspaces, *saved


def in_one_kernel(q, k, v, g, beta, state):
    """o and the final state from emulated chunk_fwd.cu or chunk_fwd_pair.cu."""
    B, T, H, D = v.shape
    one = variants.chunk_fwd(D, v.dtype, q.dtype)
    o, final = torch.full_like(v, torch.nan), torch.full((B, H, D, D), torch.nan)
    emulated(one.kernel)(B * H * one.blocks, one.threads, q, k, v, g, beta, state, o, final, T, H, D**-0.5)
    return o, final


def saving_in_one_kernel(q, k, v, g, beta, state, *, workspaces=True):
    """o, the final state, and what emulated chunk_fwd_pair.cu saves after emulated amax.cu."""
    B, T, H, D = v.shape
    one, slots = variants.chunk_fwd(D, v.dtype, q.dtype, saves=True), B * -(-T // 64)
    items = slots * H
    o, final = torch.full_like(v, torch.nan), torch.full((B, H, D, D), torch.nan)
    amax, saved = torch.full((slots, H), torch.nan), list(saved_of(v, D, items))
    if not workspaces:
        saved[0] = None
    emulated(variants.amax_kernel(D, v.dtype))(-(-items // 8), 256, v, amax, None, items, T, H)
    given = (q, k, v, g, beta, state, o, final, amax, *saved)
    emulated(one.kernel)(B * H * one.blocks, one.threads, *given, T, H, D**-0.5)
    return o, final, *saved


def truth(q, k, v, g, beta, state):
    """The recurrence in float64."""
    wide = (x.double() for x in (q, k, v, g, beta))
    return kda_attention(*wide, initial_state=None if state is None else state.double(), backend="recurrent")


@needs_a_compiler
class TestEmulated:
    @pytest.mark.parametrize(
        ("D", "B", "T", "gate", "dtype", "query", "with_state"),
        [
            (64, 2, 5, "slow", torch.bfloat16, torch.bfloat16, True),
            (64, 1, 64, "mixed", torch.bfloat16, torch.float16, False),
            (64, 1, 200, "slow", torch.bfloat16, torch.float16, True),
            (64, 1, 200, "fast", torch.float16, torch.float16, False),
            (64, 2, 130, "resets", torch.bfloat16, torch.bfloat16, True),
            (64, 1, 70, "zero", torch.float16, torch.float16, True),
            (64, 1, 130, "brutal", torch.bfloat16, torch.float16, True),
            (128, 2, 5, "slow", torch.bfloat16, torch.bfloat16, True),
            (128, 1, 64, "mixed", torch.bfloat16, torch.float16, False),
            (128, 1, 200, "slow", torch.bfloat16, torch.float16, True),
            (128, 1, 128, "fast", torch.float16, torch.float16, False),
            (128, 1, 130, "resets", torch.bfloat16, torch.bfloat16, True),
            (128, 1, 70, "zero", torch.float16, torch.float16, True),
            (128, 1, 130, "brutal", torch.bfloat16, torch.float16, True),
            pytest.param(128, 1, 830, "mixed", torch.bfloat16, torch.bfloat16, True, marks=pytest.mark.slow),
        ],
    )
    def test_errs_at_most_1_3_times_as_much_as_the_two_kernels(self, D, B, T, gate, dtype, query, with_state):
        """Of heads of 128 every bit is equal, because the two kernels multiply leaves on tensor cores too."""
        q, k, v, g, beta, state = inputs_of(B, T, 2, D, D, gate=gate, dtype=dtype).values()
        given = (q.to(query), k.to(query), v, g, beta, state if with_state else None)
        for one, two, want in zip(in_one_kernel(*given), in_two_kernels(*given), truth(*given), strict=True):
            assert relative(two, want) < 3e-3  # what both are compared with
            assert relative(one, want) <= max(1.3 * relative(two, want), 1e-4)
            assert D == 64 or torch.equal(one, two)

    @pytest.mark.parametrize(
        ("first", "last"),
        [
            pytest.param(0, 512, id="team 0", marks=pytest.mark.slow),
            pytest.param(512, 640, id="scanners 0", marks=pytest.mark.slow),
            pytest.param(640, 1152, id="team 1", marks=pytest.mark.slow),
            pytest.param(1152, 1280, id="scanners 1"),
        ],
    )
    def test_a_part_of_a_cluster_may_be_late(self, first, last):
        """The others wait for it."""
        inputs = inputs_of(1, 290, 1, 128, 128, dtype=torch.bfloat16).values()
        want = in_one_kernel(*inputs)
        with emulated(variants.chunk_fwd(128, torch.bfloat16).kernel).late(first, last):
            assert all(torch.equal(x, y) for x, y in zip(in_one_kernel(*inputs), want, strict=True))

    @each_head_size
    def test_without_writes_the_state_only_decays(self, D):
        q, k, v, g, beta, state = inputs_of(1, 130, 1, D, D, dtype=torch.bfloat16).values()
        beta = torch.zeros_like(beta)
        _, final = in_one_kernel(q, k, v, g, beta, state)
        assert relative(final, truth(q, k, v, g, beta, state)[1]) < 3.6e-6

    @each_head_size
    def test_future_tokens_never_change_past_outputs(self, D):
        drawn = (kda_inputs(1, 200, 1, D, D, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
        (*first, state), (*second, _) = (x.values() for x in drawn)
        o, _ = in_one_kernel(*first, state)
        for t in (7, 64, 130):
            mixed = (torch.cat([x[:, :t], y[:, t:]], 1) for x, y in zip(first, second, strict=True))
            assert torch.equal(in_one_kernel(*mixed, state)[0][:, :t], o[:, :t]), t

    @each_head_size
    def test_a_gate_of_minus_infinity_is_a_reset(self, D):
        q, k, v, g, beta, state = kda_inputs(1, 130, 1, D, D, dtype=torch.bfloat16).values()
        results = []
        for reset in (-torch.inf, -1e4):
            g[:, 70:72] = reset
            results.append(in_one_kernel(q, k, v, g, beta, state))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)

    @each_head_size
    @pytest.mark.parametrize("with_state", [True, False])
    def test_a_large_value_lowers_the_scale(self, with_state, D):
        """Earlier chunks have the bits that they have without it. All tokens of a chunk have one scale."""
        q, k, v, g, beta, state = kda_inputs(1, 200, 1, D, D, dtype=torch.bfloat16).values()
        v[:, :64] *= 2.0**-20
        state = state * 2.0**-30 if with_state else None
        large = v.clone()
        large[:, 130] *= 2.0**30
        large[0, 130, 0, 5] = torch.inf
        before, _ = in_one_kernel(q, k, v, g, beta, state)
        got = in_one_kernel(q, k, large, g, beta, state)
        assert torch.equal(got[0][:, :128], before[:, :128])
        want = truth(q, k, large, g, beta, state)
        other = [column for column in range(D) if column != 5]  # the infinity is of this column
        for t in (range(64), range(64, 128), range(130, 200)):
            assert relative(got[0][:, t][..., other], want[0][:, t][..., other]) < 6e-3
        assert relative(got[1][..., other], want[1][..., other]) < 6e-3


def same_bits(x, y):
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def assert_all_equal(got, want):
    """Bit for bit: a NaN must be where there is one."""
    pairs = zip(("o", "final state", *SAVED), got, want, strict=True)
    assert [name for name, x, y in pairs if not same_bits(x, y)] == []


@needs_a_compiler
class TestSaves:
    """chunk_fwd_pair.cu for a forward that a backward follows, beside the two kernels."""

    @pytest.mark.parametrize(
        ("B", "T", "gate", "dtype", "query", "with_state"),
        [
            (2, 5, "slow", torch.bfloat16, torch.bfloat16, True),
            (1, 64, "mixed", torch.bfloat16, torch.float16, False),
            (1, 128, "fast", torch.float16, torch.float16, False),
            (2, 150, "resets", torch.bfloat16, torch.bfloat16, True),
            pytest.param(1, 200, "brutal", torch.bfloat16, torch.float16, True, marks=pytest.mark.slow),
            pytest.param(1, 70, "zero", torch.float16, torch.float16, True, marks=pytest.mark.slow),
            pytest.param(1, 830, "mixed", torch.bfloat16, torch.bfloat16, False, marks=pytest.mark.slow),
        ],
    )
    def test_all_bits_of_the_two_kernels(self, B, T, gate, dtype, query, with_state):
        q, k, v, g, beta, state = inputs_of(B, T, 2, 128, 128, gate=gate, dtype=dtype).values()
        given = (q.to(query), k.to(query), v, g, beta, state if with_state else None)
        assert_all_equal(saving_in_one_kernel(*given), saving_in_two_kernels(*given))

    def test_without_workspaces(self):
        inputs = inputs_of(1, 70, 1, 128, 128, dtype=torch.bfloat16).values()
        got, want = saving_in_one_kernel(*inputs, workspaces=False), saving_in_two_kernels(*inputs)
        assert got[2] is None
        assert_all_equal((*got[:2], want[2], *got[3:]), want)

    @pytest.mark.parametrize("with_state", [True, False])
    def test_one_scale_for_all_chunks_and_columns(self, with_state):
        """Also where the largest |v| is of a late chunk and of one column, and for a head of another scale."""
        q, k, v, g, beta, state = inputs_of(1, 200, 2, 128, 128, dtype=torch.bfloat16).values()
        v[:, :64] *= 2.0**-20
        v[:, 130, 0, 77] *= 2.0**30
        state = state * 2.0**-30 if with_state else None
        got = saving_in_one_kernel(q, k, v, g, beta, state)
        assert got[-1][0, 0] < got[-1][0, 1]
        assert_all_equal(got, saving_in_two_kernels(q, k, v, g, beta, state))

    @pytest.mark.parametrize(
        ("first", "last"),
        [
            pytest.param(0, 511, id="team 0 but for its sender", marks=pytest.mark.slow),
            pytest.param(511, 512, id="sender 0"),
            pytest.param(512, 640, id="scanners 0", marks=pytest.mark.slow),
            pytest.param(1151, 1152, id="sender 1", marks=pytest.mark.slow),
            pytest.param(1152, 1280, id="scanners 1", marks=pytest.mark.slow),
        ],
    )
    def test_a_part_of_a_cluster_may_be_late(self, first, last):
        inputs = inputs_of(1, 410, 1, 128, 128, dtype=torch.bfloat16).values()
        with emulated(variants.chunk_fwd(128, torch.bfloat16, saves=True).kernel).late(first, last):
            got = saving_in_one_kernel(*inputs)
        assert_all_equal(got, saving_in_two_kernels(*inputs))


@pytest.fixture
def three_heads_fill_the_gpu(monkeypatch):
    """With one block each, or with two."""
    monkeypatch.setattr(plan, "architecture", lambda device: ARCH)
    monkeypatch.setattr(plan, "BLOCKS", 3)
    for name in ("segment_count", "optional_segment_count"):
        monkeypatch.setattr(plan, name, lambda *sizes: 1)
    plan._plan.cache_clear()
    yield
    plan._plan.cache_clear()


def unnormalized(T, gate, D):
    inputs = inputs_of(1, T, 3, D, D, gate=gate, dtype=torch.bfloat16)
    return inputs | {name: (3 * inputs[name]).contiguous() for name in ("q", "k")}


def normalizing(q, k, v, g, beta, initial_state=None):
    return core.kda_cuda(q, k, v, g, beta, q.shape[-1] ** -0.5, initial_state, None, normalize=True)


@needs_a_compiler
@pytest.mark.usefixtures("kernels_on_the_cpu", "three_heads_fill_the_gpu")
@pytest.mark.parametrize(
    ("D", "T", "gate", "with_state"),
    [
        (64, 200, "slow", True),
        pytest.param(64, 130, "fast", False, marks=pytest.mark.slow),
        (128, 70, "slow", True),
    ],
)
def test_the_op_that_normalizes(D, T, gate, with_state):
    inputs = unnormalized(T, gate, D)
    if not with_state:
        del inputs["initial_state"]
    got = normalizing(**inputs)
    q, k = (l2_normalized(inputs[name].double(), inputs[name].double(), backend="torch")[0] for name in ("q", "k"))
    want = truth(q, k, *(inputs.get(name) for name in ("v", "g", "beta", "initial_state")))
    for one, exact in zip(got, want, strict=True):
        assert relative(one, exact) < 6e-3


@needs_a_compiler
@pytest.mark.usefixtures("kernels_on_the_cpu", "three_heads_fill_the_gpu")
@pytest.mark.parametrize(
    ("recompute", "with_state"),
    [(False, True), pytest.param(True, False, marks=pytest.mark.slow)],
)
def test_gradients_where_the_forward_saves(recompute, with_state, monkeypatch):
    """All bits of those where the two kernels do."""
    inputs = unnormalized(70, "slow", 128)
    if not with_state:
        inputs["initial_state"] = None
    results, launched, launch = [], [], Kernel.__call__
    monkeypatch.setattr(
        Kernel, "__call__", lambda kernel, *a, **o: (launched.append(kernel.entry), launch(kernel, *a, **o))
    )
    for saves in (True, False):
        monkeypatch.setattr(core, "PAIR_SAVES", saves)
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs.values()]
        o, final = core.kda_cuda(*leaves[:5], 128**-0.5, leaves[5], None, normalize=True, recompute=recompute)
        loss = (o.float() * inputs["v"].float()).sum() + final.square().sum()
        results.append((o, final, *torch.autograd.grad(loss, [x for x in leaves if x is not None])))
        assert (SAVING in launched) is saves
        assert ("kda_inter_chunk_fwd" in launched) is not saves
        assert ("kda_intra_chunk_fwd" in launched) is (recompute or not saves)
        launched.clear()
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@needs_a_compiler
@pytest.mark.slow  # imports torch._dynamo
@pytest.mark.usefixtures("kernels_on_the_cpu", "three_heads_fill_the_gpu")
def test_compiled_in_one_graph(monkeypatch):
    inputs = {name: x for name, x in unnormalized(70, "slow", 64).items() if name != "initial_state"}
    with torch.no_grad():
        want = normalizing(**inputs)
        launched, launch = [], Kernel.__call__
        monkeypatch.setattr(
            Kernel, "__call__", lambda kernel, *a, **o: (launched.append(kernel.entry), launch(kernel, *a, **o))
        )
        with ops_run_on_the_cpu(kda_forward=core._forward_op, **short_convolution_ops()):
            got = torch.compile(normalizing, backend="aot_eager", fullgraph=True)(**inputs)
    torch._dynamo.reset()
    assert "kda_chunk_fwd" in launched
    assert not {"kda_intra_chunk_fwd", "kda_inter_chunk_fwd"} & set(launched)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def short_convolution_ops():
    from lkda.ops.short_conv import cuda as short_conv

    return {"short_conv_forward": short_conv.launch_forward}


class TestWhenItRuns:
    """Nothing runs here. The names of the launched kernels are recorded."""

    B, T = 2, 70

    @pytest.fixture(autouse=True, params=[64, 128], ids="D{}".format)
    def launched(self, monkeypatch, request):
        self.D = request.param
        self.one, self.two = {
            64: ("kda_chunk_fwd", ["kda_intra_chunk_fwd", "kda_amax", "kda_inter_chunk_fwd"]),
            128: ("kda_chunk_fwd_pair", ["kda_intra_chunk_fwd", "kda_inter_chunk_fwd"]),
        }[self.D]
        self.H = self.heads(128)
        names: list[str] = []

        def launch(kernel, grid, block, *arguments, device):
            names.append(kernel.entry)

        monkeypatch.setattr(Kernel, "__call__", launch)
        monkeypatch.setattr(plan, "architecture", lambda device: ARCH)
        monkeypatch.setattr(plan, "multiprocessors", lambda device: 132)
        plan._plan.cache_clear()
        yield names
        plan._plan.cache_clear()

    def heads(self, blocks):
        """So many that one kernel would have `blocks` blocks."""
        return blocks * 64 // self.D // self.B

    def call(self, T=T, blocks=128, dim=None, dtype=torch.bfloat16, cu_seqlens=None, gradient=False, **options):
        shape = (1 if cu_seqlens is not None else self.B, T, self.heads(blocks), dim or self.D)
        q, k, v = (torch.zeros(shape, dtype=dtype) for _ in range(3))
        g, beta = torch.zeros(shape), torch.zeros(shape[:3])
        if gradient:
            g.requires_grad_()
        return core.kda_cuda(q, k, v, g, beta, 1.0, None, cu_seqlens, **options)

    def test_where_no_backward_follows(self, launched):
        o, final = self.call()
        assert launched == [self.one]
        assert o.shape == (self.B, self.T, self.H, self.D)
        assert final.shape == (self.B, self.H, self.D, self.D)
        for no_gradient in (torch.no_grad, torch.inference_mode):
            launched.clear()
            with no_gradient():
                self.call(gradient=True)
            assert launched == [self.one]

    @pytest.mark.parametrize("recompute", [False, True])
    def test_where_one_does(self, recompute, launched, monkeypatch):
        self.call(gradient=True, recompute=recompute)
        assert launched == (["kda_amax", SAVING] if self.D == 128 else self.two)
        launched.clear()
        monkeypatch.setattr(core, "PAIR_SAVES", False)
        self.call(gradient=True, recompute=recompute)
        assert launched == self.two
        monkeypatch.setattr(core, "PAIR_SAVES", True)
        for given in ({"blocks": 90}, {"cu_seqlens": torch.tensor([0, 20, 70], dtype=torch.int32)}):
            launched.clear()
            self.call(gradient=True, **given)
            assert SAVING not in launched

    @pytest.mark.parametrize(
        "given",
        [
            {"dtype": torch.float32},
            {"dim": 32},
            {"blocks": 80},  # of 132 multiprocessors
            {"blocks": 8, "T": 4096},  # segments
            {"cu_seqlens": torch.tensor([0, 20, 70], dtype=torch.int32)},
        ],
        ids=str,
    )
    def test_not_at_other_shapes(self, given, launched):
        self.call(**given)
        assert self.one not in launched
        assert "kda_inter_chunk_fwd" in launched

    def test_not_on_other_architectures(self, launched, monkeypatch):
        monkeypatch.setattr(plan, "architecture", lambda device: "sm_100a")
        self.call()
        assert self.one not in launched

    def test_not_where_it_is_switched_off(self, launched, monkeypatch):
        other, own = ("ONE_PASS", "PAIR") if self.D == 128 else ("PAIR", "ONE_PASS")
        monkeypatch.setattr(core, other, False)
        self.call()
        assert launched == [self.one]
        launched.clear()
        monkeypatch.setattr(core, own, False)
        self.call()
        assert launched == self.two

    @pytest.mark.parametrize("save_for_backward", ["inputs", "workspaces", "core"])
    def test_in_a_layer_that_computes_its_forward_again(self, save_for_backward, launched, monkeypatch):
        """Its backward calls the two kernels, so its forward does: both must have the same bits."""
        monkeypatch.setattr(core, "PAIR_SAVES", False)
        inputs = kda_layer_inputs(self.B, self.T, heads=self.H, dim=self.D)
        run = as_one(self.D, save_for_backward=save_for_backward)
        with torch.no_grad():
            run(**inputs)
        assert self.one in launched
        launched.clear()
        y = run(**{name: x.requires_grad_() for name, x in inputs.items()})[0]
        y.sum().backward()
        assert "kda_inter_chunk_fwd" in launched
        assert self.one not in launched

    @pytest.mark.parametrize("save_for_backward", ["inputs", "workspaces", "core"])
    def test_in_a_layer_with_pair_saves(self, save_for_backward, launched):
        """The kernel has the bits of the two others, so it may run where they ran before."""
        inputs = kda_layer_inputs(self.B, self.T, heads=self.H, dim=self.D)
        inputs = {name: x.requires_grad_() for name, x in inputs.items()}
        as_one(self.D, save_for_backward=save_for_backward)(**inputs)[0].sum().backward()
        assert launched.count(SAVING) == (self.D == 128 and save_for_backward != "workspaces")
        assert self.one not in launched


@pytest.mark.parametrize(
    ("blocks", "fills"), [(1, False), (87, False), (88, True), (128, True), (132, True), (140, False), (512, True)]
)
def test_how_many_blocks_fill_the_gpu(blocks, fills):
    assert plan.fills_in_one_pass(blocks) is fills


@pytest.mark.parametrize(
    ("blocks", "fills"), [(1, False), (98, False), (99, True), (132, True), (192, False), (198, True), (512, True)]
)
def test_how_many_blocks_that_save_fill_the_gpu(blocks, fills):
    assert plan.fills_in_one_pass(blocks, saves=True) is fills
