"""What a compiler gets to see of a block on a GPU: operators of lkda, matrix products, and results that round once.

The graph is traced on a CPU, with tensors that have shapes but no values. Tests on a GPU are in test_blocks_cuda.py.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lkda.ops
from lkda.models import residual
from lkda.models.mixers import mla, softmax
from tests.models.helpers import small

# They move numbers, convert them or multiply matrices. A sum of two numbers and a conversion round once, whoever
# computes them.
LAYOUT = {"view", "_unsafe_view", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "split"}
LAYOUT |= {"split_with_sizes", "alias", "detach", "unbind", "cat", "clone", "new_zeros", "zeros", "new_ones", "arange"}
SAME_BITS = LAYOUT | {"mm", "_to_copy", "add"}
KEYS_AS_WIDE_AS_VALUES = {"qk_nope_head_dim": 48, "qk_rope_head_dim": 16}
ROTARY = {"rope_base": 10000.0}
OF_MLA = ({"qk_norm": True, "conv_width": 4}, ROTARY | {"qk_norm": True}, ROTARY)
ATTENTION = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"}


@pytest.fixture
def traced_as_on_a_gpu(monkeypatch):
    """Operators choose their kernels, which the tracer does not run; autocast is that of a CPU."""
    for module in pkgutil.walk_packages(lkda.ops.__path__, "lkda.ops."):
        loaded = importlib.import_module(module.name)
        if hasattr(loaded, "choose"):
            monkeypatch.setattr(loaded, "choose", lambda fn, backends, *_, **__: next(iter(backends)))
    for module in (residual, softmax, mla):
        monkeypatch.setattr(module, "are_ordinary", lambda *tensors: True)
    monkeypatch.setattr(residual, "_multiplied_dtype", lambda x: torch.bfloat16)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d=None: SimpleNamespace(multi_processor_count=132))


def graphs_of(block):
    """The forward and the backward graph of a block of 256 channels, in autocast to bfloat16."""
    from functorch.compile import aot_function, make_boxed_func

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        names, weights = zip(
            *((name, torch.empty(p.shape, requires_grad=True)) for name, p in block.named_parameters())
        )

        def run(x, *weights):
            return torch.func.functional_call(block, dict(zip(names, weights)), (x,))[0]

        x = torch.empty(2, 512, 256, requires_grad=True)
        aot_function(run, fw_compiler=keep, bw_compiler=keep)(x, *weights).sum().backward()
    return graphs


def operators(graph):
    """The name of each operator and the data type of its result, in order."""
    nodes = [node for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    found = [(str(node.target).split(".")[:2], node.meta["val"]) for node in nodes]
    return [(*name, value.dtype if isinstance(value, torch.Tensor) else None) for name, value in found]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        *(("kda", {}), ("kda", {"gate": "head"}), ("simplified", {}), ("softmax", {}), ("softmax", {"qk_norm": True})),
        # Keys as wide as values: the attention of a CPU is one operator then, as that of a GPU is for all widths.
        *(("mla", KEYS_AS_WIDE_AS_VALUES | options) for options in OF_MLA),
    ],
    ids=str,
)
def test_nothing_is_left_that_a_compiler_may_round_differently(mixer, options, traced_as_on_a_gpu):
    settings = {"pattern": [mixer], "num_heads": 4, mixer: options}
    attends = mixer in ("softmax", "mla")
    block = small([mixer], d_model=256, mlp_hidden=512, mixer=settings).blocks[0]
    forward, backward = map(operators, graphs_of(block))
    left = {name for space, name, _ in [*forward, *backward] if space == "aten"}
    assert left <= SAME_BITS | (ATTENTION if attends else set())
    ours = [name for space, name, _ in [*forward, *backward] if space == "lkda"]
    norms = 2 + (mixer == "mla") * (3 if options.get("qk_norm") else 1)  # of MLA: the latent, q and k
    assert ours.count("residual_norm") == ours.count("residual_norm_backward") == norms
    assert [dtype for space, name, dtype in forward if name == "add"] == [torch.float32]  # the block's last sum
    # The gradient of the norm that two products read.
    sums = [dtype for space, name, dtype in backward if name == "add"]
    assert sums == ([] if attends else [torch.bfloat16])
