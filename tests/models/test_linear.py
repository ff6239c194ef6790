"""Linear layers of one input, multiplied as one matrix, equal the layers one by one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lkda.models import linear
from lkda.models.decoding import prepare_decoding
from lkda.models.linear import fused_linear, joined_linear
from lkda.training.losses import ModelLoss
from tests.models.helpers import IDS, PATTERNS, small, tokens


def layers_of(*sizes: int, dtype: torch.dtype = torch.float64) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(16, size, bias=False, dtype=dtype) for size in sizes]


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sizes", [(24, 8, 8), (5, 3, 1), (8,), ()])
@pytest.mark.parametrize("rows", [3, 300])
def test_outputs_and_gradients_are_those_of_the_layers(rows: int, sizes: tuple[int, ...]) -> None:
    layers = layers_of(*sizes)
    x = torch.randn(rows, 16, dtype=torch.float64, requires_grad=True)
    got, want = fused_linear(x, layers), tuple(layer(x) for layer in layers)
    assert [y.shape for y in got] == [y.shape for y in want]
    leaves = [x, *(layer.weight for layer in layers)]
    if layers:
        torch.testing.assert_close(joined_linear(x, layers), torch.cat(want, -1), rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad(torch.cat(ys, -1).sin().sum(), leaves) for ys in (got, want))
        for mine, theirs in zip((*got, *next(gradients)), (*want, *next(gradients)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_many_tokens_need_one_product_forward_and_two_backward() -> None:
    layers, x = layers_of(5, 3, 1), torch.randn(300, 16, dtype=torch.float64, requires_grad=True)
    with Products() as products:
        sum(y.sum() for y in fused_linear(x, layers)).backward()  # type: ignore[union-attr]
    assert products.count["mm"] == 3


def test_a_row_of_outputs_is_a_multiple_of_16_bytes_in_half_precision() -> None:
    for y in fused_linear(torch.randn(300, 16).bfloat16(), layers_of(5, 3, 1, dtype=torch.bfloat16)):
        assert y.stride() == (16, 1)


def test_autocast_multiplies_in_its_own_type() -> None:
    layers, x = layers_of(8, 16, dtype=torch.float32), torch.randn(300, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = fused_linear(x, layers), tuple(layer(x) for layer in layers)
    assert all(y.dtype == torch.bfloat16 for y in got)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
def test_steps_of_many_sequences_equal_the_forward(pattern: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in decoding, where each layer is multiplied by itself below a number of sequences."""
    monkeypatch.setattr(linear, "FEWEST_TOKENS", 1)
    model, x = small(pattern, scale=1).double(), tokens(3, 5)
    want, state = model(x), model.init_state(3)
    for t in range(5):
        logits, state = model.step(x[:, t], state)
        torch.testing.assert_close(logits, want[:, t])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
def test_models_have_the_same_loss_and_gradients(
    pattern: list[str], dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = small(pattern, scale=1).to(dtype), tokens(2, 130)
    names = [name for name, _ in model.named_parameters()]

    def results() -> list[Tensor]:
        logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.roll(-1, 1).flatten())
        return [logits, loss, *torch.autograd.grad(loss, list(model.parameters()))]

    with Products() as fused:
        got = results()
    monkeypatch.setattr(linear, "FEWEST_TOKENS", 10**9)
    with Products() as separate:
        want = results()
    assert fused.count["mm"] < separate.count["mm"]
    for name, mine, theirs in zip(("logits", "loss", *names), got, want, strict=True):
        error = (mine - theirs).norm() / theirs.norm()
        assert error <= tolerance, f"{name} differs by {error:.1e}"


class Wrapped(nn.Module):
    """An adapter as others write it: it keeps the layer, offers its weight, and adds to its output."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.added = nn.Parameter(torch.randn(base.out_features, base.in_features, dtype=base.weight.dtype) / 4)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.added.T


# In CI the growing caches of softmax, the constant state of simplified, and a hybrid of the others.
REPLACED = dict.fromkeys(IDS, pytest.mark.long) | dict.fromkeys(("simplified", "kda_kda_kda_mla"), pytest.mark.slow)
REPLACED["softmax"] = ()


@pytest.mark.parametrize(
    "pattern", [pytest.param(pattern, id=name, marks=REPLACED[name]) for pattern, name in zip(PATTERNS, IDS)]
)
def test_a_layer_that_was_replaced_takes_part_everywhere(pattern: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forward pass, in steps, prepared for decoding or not, and in the loss, as if its weight were the sum's."""
    monkeypatch.setattr(linear, "FEWEST_TOKENS", 1)
    x, y = tokens(2, 6), tokens(2, 6, seed=1)
    between = tuple(f"blocks.{i}." for i in range(1, len(pattern) - 1))
    modules = small(pattern).named_modules()
    names = [name for name, each in modules if isinstance(each, nn.Linear) and not name.startswith(between)]
    for name in names:
        model, summed = small(pattern, scale=1).double(), small(pattern, scale=1).double()
        for each in (model, summed):
            each.lm_head.weight = nn.Parameter(each.lm_head.weight.detach().clone())
        place, _, last = name.rpartition(".")
        wrapped = Wrapped(model.get_submodule(name))  # type: ignore[arg-type]
        setattr(model.get_submodule(place), last, wrapped)
        summed.get_submodule(name).weight.data += wrapped.added.detach()
        want = summed(x)
        torch.testing.assert_close(model(x), want, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(ModelLoss(model).mean(x, y).double(), ModelLoss(summed).mean(x, y).double())
        for decoded, gradients in ((model, True), (prepare_decoding(model), True), (prepare_decoding(model), False)):
            with torch.set_grad_enabled(gradients):  # without gradients, a step is C++ where it can be
                state = decoded.init_state(2, max_tokens=None if gradients else 3)
                for t in range(3):
                    logits, state = decoded.step(x[:, t], state)
                    torch.testing.assert_close(logits, want[:, t], msg=lambda text, name=name: f"{name}: {text}")


def test_a_bias_and_a_hook_take_part() -> None:
    layers, x = layers_of(4, 4), torch.randn(300, 16, dtype=torch.float64)
    layers[1] = nn.Linear(16, 4, dtype=torch.float64)
    torch.testing.assert_close(joined_linear(x, layers), torch.cat([layer(x) for layer in layers], -1))
    layers[0].register_forward_hook(lambda layer, inputs, output: output + 1)
    for got, layer in zip(fused_linear(x, layers), layers, strict=True):
        torch.testing.assert_close(got, layer(x))


def test_a_layer_whose_forward_was_replaced_is_called() -> None:
    """As by packages that move the weights of a layer to the device when it is called."""
    layers, x = layers_of(8, 16), torch.randn(300, 16, dtype=torch.float64)
    own = layers[1].forward
    layers[1].forward = lambda y: 2 * own(y)  # type: ignore[method-assign]
    for got, want in zip(fused_linear(x, layers), (layers[0](x), 2 * own(x)), strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(joined_linear(x, layers), torch.cat([layers[0](x), 2 * own(x)], -1))
