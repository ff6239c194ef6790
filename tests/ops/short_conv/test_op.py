"""The short convolution and the norm of heads: the form in PyTorch against a loop over tokens, and what is refused."""

import pytest
import torch

from lkda.ops import l2_normalized, short_convolution, short_convolutions

PACKED = [0, 0, 1, 3, 3, 20, 41, 41]


def by_token(x, weight, state):
    """One sequence x [T, C] with the inputs before it [width - 1, C], in a loop."""
    window, width = torch.cat([state, x]), weight.shape[-1]
    y = torch.stack([(window[t : t + width] * weight[:, 0].T).sum(0) for t in range(len(x))]) if len(x) else x
    return y * torch.sigmoid(y), window[len(x) :]


@pytest.mark.parametrize("width", [1, 2, 4, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_is_the_sum_over_taps(packed, width):
    torch.manual_seed(0)
    bounds = PACKED if packed else [0, 41, 82]
    x = torch.randn(1 if packed else 2, 41, 8, dtype=torch.float64)
    weight = torch.randn(8, 1, width, dtype=torch.float64)
    state = torch.randn(len(bounds) - 1, width - 1, 8, dtype=torch.float64)
    given = torch.tensor(bounds) if packed else None
    for before in (state, None):
        y, after = short_convolution(x, weight, state=before, cu_seqlens=given)
        before = torch.zeros_like(state) if before is None else before
        for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
            want, last = by_token(x.flatten(0, 1)[start:end], weight, before[n])
            torch.testing.assert_close(y.flatten(0, 1)[start:end], want)
            torch.testing.assert_close(after[n], last)


def test_normalised_heads_have_unit_norm():
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    weight = torch.randn(12, 1, 4, dtype=torch.float64)
    plain, _ = short_convolution(x, weight)
    y, _ = short_convolution(x, weight, head_dim=6)
    heads = plain.unflatten(-1, (2, 6))
    torch.testing.assert_close(y.unflatten(-1, (2, 6)), heads / (heads.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    torch.testing.assert_close(l2_normalized(heads)[0], y.unflatten(-1, (2, 6)))


def test_streams_are_independent():
    xs, weights = ([torch.randn(*shape) for _ in range(3)] for shape in ((2, 5, 8), (8, 1, 4)))
    ys, states = short_convolutions(xs, weights, normalized=(True, False, True), head_dim=4)
    for i, head_dim in enumerate((4, None, 4)):
        y, state = short_convolution(xs[i], weights[i], head_dim=head_dim)
        assert torch.equal(y, ys[i])
        assert torch.equal(state, states[i])


@pytest.mark.parametrize("packed", [False, True])
def test_streams_side_by_side_in_one_tensor(packed):
    draw = torch.Generator().manual_seed(0)
    given = torch.tensor(PACKED) if packed else None
    x = torch.randn(1 if packed else 2, 41, 24, dtype=torch.float64, generator=draw, requires_grad=True)
    weights = [torch.randn(8, 1, 4, dtype=torch.float64, generator=draw, requires_grad=True) for _ in range(3)]
    states = [
        torch.randn(len(PACKED) - 1 if packed else 2, 3, 8, dtype=torch.float64, generator=draw) for _ in range(3)
    ]
    options = {"normalized": (True, False, True), "head_dim": 4, "cu_seqlens": given}
    for before in (states, None):
        results = [short_convolutions(xs, weights, states=before, **options) for xs in (x, x.chunk(3, -1))]
        for got, want in zip(*((*ys, *after) for ys, after in results)):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        losses = (sum((y.sin() * i).sum() for i, y in enumerate((*ys, *after), 1)) for ys, after in results)
        gradients = [torch.autograd.grad(loss, [x, *weights]) for loss in losses]
        for got, want in zip(*gradients):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert all(state.is_contiguous() for state in results[0][1])  # a decoding step writes to them


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"xs": []}, "one to 3 tensors with a weight each, got 0 and 1"),
        ({"xs": [torch.zeros(2, 5)]}, r"xs\[0\] must be \[B, T, C\], got a shape of \[2, 5\]"),
        ({"xs": torch.zeros(2, 5, 9), "weights": [torch.zeros(4, 1, 4)] * 2}, r"got \[2, 5, 9\] and 2 weights"),
        ({"xs": torch.zeros(2, 8)}, r"\[B, T, weights \* channels\] for one to 3 weights, got \[2, 8\] and 1 weights"),
        ({"xs": torch.zeros(2, 5, 8), "weights": []}, r"got \[2, 5, 8\] and 0 weights"),
        ({"xs": [torch.zeros(2, 0, 8)]}, "T must be at least 1"),
        ({"weights": [torch.zeros(6, 1, 4)]}, r"weights\[0\] must be .*C is 8 in the tensors before it"),
        ({"states": [torch.zeros(2, 4, 8)]}, r"states\[0\] must be \[B, W-1, C\] = \[2, 3, 8\], got \[2, 4, 8\]"),
        ({"normalized": (True,)}, "a head_dim that divides 8 channels"),
        ({"normalized": (True,), "head_dim": 3}, "a head_dim that divides 8 channels"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "packed in one row"),
        ({"backend": "cuda"}, "not on a CUDA device"),
        ({"backend": "fast"}, "backend must be one of auto, cuda, cpu, torch"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    given = {"xs": [torch.zeros(2, 5, 8)], "weights": [torch.zeros(8, 1, 4)]} | changes
    with pytest.raises(ValueError, match=message):
        short_convolutions(given.pop("xs"), given.pop("weights"), **given)
