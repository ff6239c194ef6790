"""Keys of multi-head latent attention, beside PyTorch's own concatenation and its gradients."""

from __future__ import annotations

import pytest
import torch

from lkda.ops import latent_keys


def drawn(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = {"k": (2, 3, 4, 5), "shared": (2, 3, 2)}
    return {name: torch.randn(size, generator=generator, dtype=dtype) for name, size in sizes.items()}


def test_values_and_gradients():
    inputs = {name: x.requires_grad_() for name, x in drawn().items()}
    keys = latent_keys(**inputs)
    for head in range(4):
        assert torch.equal(keys[:, :, head], torch.cat([inputs["k"][:, :, head], inputs["shared"]], -1))
    upper = torch.randn(keys.shape, dtype=torch.float64)
    dk, dshared = torch.autograd.grad(keys, [*inputs.values()], upper)
    assert torch.equal(dk, upper[..., :5])
    torch.testing.assert_close(dshared, upper[..., 5:].sum(2), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradgradcheck(latent_keys, tuple(inputs.values()))


def test_the_gradient_of_the_shared_channels_is_rounded_once():
    inputs = {name: x.requires_grad_() for name, x in drawn(torch.bfloat16).items()}
    upper = torch.randn(2, 3, 4, 7).bfloat16()
    (dshared,) = torch.autograd.grad(latent_keys(**inputs), [inputs["shared"]], upper)
    assert torch.equal(dshared, upper[..., 5:].float().sum(2).bfloat16())


def test_opcheck():
    torch.library.opcheck(torch.ops.lkda.latent_keys, tuple(x.requires_grad_() for x in drawn().values()))
    torch.library.opcheck(torch.ops.lkda.sum_over_heads, (torch.randn(2, 3, 4, 5, requires_grad=True),))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"shared": torch.zeros(2, 4, 2, dtype=torch.float64)},
            r"shared \[B, T, R\], got \[2, 3, 4, 5\] and \[2, 4, 2\]",
        ),
        ({"shared": torch.zeros(2, 3, 2)}, "shared"),
    ],
)
def test_inputs_that_do_not_fit(change, said):
    with pytest.raises(ValueError, match=said):
        latent_keys(**drawn() | change)
