"""Heads of sizes that the kernels do not have, as FLA's functions take them. FLA itself is not needed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lkda.integrations import fla_kda
from lkda.ops.runtime.kernel_inputs import HEAD_DIMS
from tests.ops.cases import relative

B, T, H, HV = 2, 70, 2, 4
LEAVES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
CASES = [  # K, V and the order of the axes of the state
    pytest.param(12, 12, False, id="square"),
    pytest.param(12, 20, False, id="wide-values"),
    pytest.param(20, 12, True, id="values-first"),
]


def arguments(K: int, V: int, state_v_first: bool, dtype: torch.dtype = torch.float64, **options: object) -> dict:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    high = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, HV, V), "beta": normal(B, T, HV)}
    tensors |= {"g": normal(B, T, HV, K), "A_log": normal(HV, dtype=high), "dt_bias": normal(HV * K, dtype=high)}
    tensors["initial_state"] = normal(B, HV, *((V, K) if state_v_first else (K, V)), dtype=high)
    words = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "use_qk_l2norm_in_kernel": True}
    words |= {"allow_neg_eigval": False, "lower_bound": None, "scale": None, "cu_seqlens": None}
    words |= {"return_intermediate_states": False, "output_final_state": True, "state_v_first": state_v_first}
    return tensors | words | options


def results(given: dict, o: Tensor, state: Tensor) -> dict[str, Tensor]:
    """o, the state and the gradients of a fixed sum of both."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (o, state)]
    loss = sum((x.double() * w.to(x.device)).sum() for x, w in zip((o, state), weights, strict=True))
    gradients = torch.autograd.grad(loss, [given[name] for name in LEAVES])
    return {"o": o, "state": state} | dict(zip(LEAVES, gradients, strict=True))


class TestWiderHeads:
    @pytest.mark.parametrize(("K", "V", "state_v_first"), CASES)
    @pytest.mark.parametrize("options", [{}, {"lower_bound": -5.0, "scale": 0.5}], ids=["softplus", "bounded"])
    def test_results_and_gradients_are_those_of_the_narrow_heads(self, options, K, V, state_v_first) -> None:
        given = arguments(K, V, state_v_first, **options)
        expected = results(given, *fla_kda.chunk(given))
        found = results(given, *fla_kda._chunk(fla_kda.with_wider_heads(given, 32), K))
        for name, x in expected.items():
            assert found[name].shape == x.shape, name
            assert relative(found[name], x) < 1e-12, name

    def test_states_of_chunks(self) -> None:
        given = arguments(12, 12, False, return_intermediate_states=True)
        with torch.inference_mode():
            *_, expected = fla_kda.chunk(given)
            *_, found = fla_kda._chunk(fla_kda.with_wider_heads(given, 32), 12)
        assert found.shape == expected.shape
        assert relative(found, expected) < 1e-12

    @pytest.mark.parametrize(("K", "size"), [(1, 32), (32, 32), (33, 64), (100, 128), (128, 128), (129, 129)])
    def test_the_size_of_the_kernels(self, K, size) -> None:
        assert fla_kda._kernel_head(K) == size

    def test_sizes_are_sorted(self) -> None:
        assert sorted(HEAD_DIMS) == list(HEAD_DIMS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("K", "V", "state_v_first"), [(60, 60, False), (100, 100, True), (60, 100, False)])
def test_a_gpu_computes_heads_of_other_sizes(K, V, state_v_first) -> None:
    given = arguments(K, V, state_v_first, torch.bfloat16)
    exact = given | {name: given[name].detach().double().requires_grad_() for name in LEAVES}
    expected = results(exact, *fla_kda.chunk(exact))
    given |= {name: given[name].detach().cuda().requires_grad_() for name in LEAVES}
    assert fla_kda.chunk_declined(given | dict.fromkeys(("cp_context", "use_graph", "safe_gate"))) is None
    found = results(given, *fla_kda.chunk(given))
    for name, x in expected.items():
        assert relative(found[name].double().cpu(), x) < 1e-2, name
