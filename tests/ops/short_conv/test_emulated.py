"""The short convolution's kernels, run on the CPU, against float64: arithmetic, indices and launches without a GPU."""

import shutil

import pytest
import torch

from lkda.ops.short_conv.op import BACKENDS
from tests.ops.emulation import kernels_on_the_cpu  # noqa: F401
from tests.ops.layer_cases import assert_error_within_reference, outputs_and_gradients

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("kernels_on_the_cpu"),
]
PACKED = [0, 0, 1, 3, 3, 32, 64, 66, 127, 600, 601, 601, 601]


def convolutions(backend, *, normalized=(True, True, False), head_dim=32, cu_seqlens=None):
    """Inputs x0, w0, s0, ... -> ys and states."""

    def run(**inputs):
        xs, weights, states = ([inputs[name] for name in inputs if name[0] == kind] for kind in "xws")
        given = xs, weights, normalized[: len(xs)], head_dim, states or None, cu_seqlens
        return [y for results in BACKENDS[backend].run(*given) for y in results]

    return run


def inputs_of(B, T, C, *, width=4, streams=3, dtype=torch.bfloat16, sequences=None, states=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {f"x{i}": normal(B, T, C).to(dtype) for i in range(streams)}
    inputs |= {f"w{i}": normal(C, 1, width) for i in range(streams)}
    if states:
        inputs |= {f"s{i}": normal(sequences or B, width - 1, C) for i in range(streams)}
    return inputs


def check(inputs, **options):
    got = outputs_and_gradients(convolutions("cuda", **options), inputs)
    want = outputs_and_gradients(convolutions("torch", **options), {name: x.double() for name, x in inputs.items()})
    assert_error_within_reference(got, want)


@pytest.mark.parametrize(
    ("T", "dtype", "head_dim", "states"),
    [
        (1, torch.bfloat16, 32, True),
        (2, torch.float16, 64, True),
        (3, torch.float32, 128, False),
        pytest.param(64, torch.bfloat16, 64, False, marks=pytest.mark.long),
        pytest.param(66, torch.float32, 32, True, marks=pytest.mark.slow),
        pytest.param(600, torch.bfloat16, 128, True, marks=pytest.mark.slow),
    ],
)
def test_forward_and_backward(T, dtype, head_dim, states):
    check(inputs_of(2, T, 384, dtype=dtype, states=states), head_dim=head_dim)


@pytest.mark.parametrize(("width", "streams"), [(4, 3), (3, 2), (2, 1), (1, 1)])
def test_packed_sequences_with_empty_ones_and_states(width, streams):
    inputs = inputs_of(1, PACKED[-1], 64, width=width, streams=streams, sequences=len(PACKED) - 1)
    check(inputs, cu_seqlens=torch.tensor(PACKED))


def test_packed_sequences_without_states():
    check(inputs_of(1, PACKED[-1], 64, states=False), cu_seqlens=torch.tensor(PACKED))


def test_strided_inputs_and_gradients():
    """q, k and v as slices of one projection; layouts that differ; a gradient of stride 0."""
    inputs = inputs_of(2, 40, 64, states=False)
    whole = torch.cat([inputs[f"x{i}"] for i in range(3)], -1)
    slices = {f"x{i}": x for i, x in enumerate(whole.chunk(3, -1))}
    mixed = slices | {"x1": inputs["x1"], "x2": inputs["x2"].mT.contiguous().mT}
    want = outputs_and_gradients(convolutions("cuda"), inputs)
    for layout in (slices, mixed):
        got = outputs_and_gradients(convolutions("cuda"), inputs | layout)
        assert all(torch.equal(got[name], x) for name, x in want.items())
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    sum(y.sum() for y in convolutions("cuda")(**leaves)).backward()
    assert all(x.grad.isfinite().all() for x in leaves.values())


@pytest.mark.parametrize(("streams", "packed", "padding"), [(3, False, 0), (2, True, 0), (3, True, 16), (3, False, 3)])
def test_streams_side_by_side_in_one_tensor(streams, packed, padding):
    """Their results equal those of separate tensors bit for bit. With padding, the rows of the tensor have a stride."""
    sequences = len(PACKED) - 1 if packed else 2
    given = inputs_of(1 if packed else 2, PACKED[-1] if packed else 70, 64, streams=streams, sequences=sequences)
    bounds = torch.tensor(PACKED) if packed else None
    want = outputs_and_gradients(convolutions("cuda", cu_seqlens=bounds), given)
    xs = [given.pop(f"x{i}") for i in range(streams)]
    wide = torch.cat([*xs, xs[0].new_zeros(*xs[0].shape[:2], padding)], -1)

    def joined(**inputs):
        weights, states = ([inputs[name] for name in inputs if name[0] == kind] for kind in "ws")
        normalized = (True, True, False)[:streams]
        run = BACKENDS["cuda"].run(inputs["x"], weights, normalized, 32, states, bounds)
        return [y for results in run for y in results]

    got = outputs_and_gradients(joined, given | {"x": wide[..., : 64 * streams]})
    dx = next(got.pop(name) for name in list(got) if name.endswith("x"))
    assert dx.is_contiguous()
    parts = dx.chunk(streams, -1)
    for i, part in enumerate(parts):
        name = next(name for name in want if name.endswith(f"x{i}"))
        assert torch.equal(part, want.pop(name))
    assert got.keys() == want.keys()
    assert all(torch.equal(x, want[name]) for name, x in got.items())


def test_a_loss_of_one_output_alone():
    inputs = {name: x.requires_grad_() for name, x in inputs_of(2, 40, 64, dtype=torch.float32).items()}
    results = []
    for backend in ("cuda", "torch"):
        outputs = convolutions(backend)(**inputs)
        for loss in (outputs[0], outputs[5]):
            leaves, options = list(inputs.values()), {"retain_graph": True, "allow_unused": True}
            results.append(torch.autograd.grad(loss.square().sum(), leaves, **options, materialize_grads=True))
    for got, want in zip(results[:2], results[2:]):
        for x, y in zip(got, want):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_the_norm_alone(dtype):
    def norms(backend):
        return lambda **xs: BACKENDS[backend].run(list(xs.values()), None, (True, True), 64, None, None)[0]

    inputs = {name: x for name, x in inputs_of(2, 300, 192, dtype=dtype).items() if name in ("x0", "x1")}
    want = outputs_and_gradients(norms("torch"), {name: x.double() for name, x in inputs.items()})
    assert_error_within_reference(outputs_and_gradients(norms("cuda"), inputs), want)
