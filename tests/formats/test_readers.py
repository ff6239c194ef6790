"""Programs that read our directories, where they are installed: pytest -m readers (mlx-lm and llama-cpp-python)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lkda
from lkda.models.generate import generate
from lkda.models.lm import LanguageModel
from tests.formats.models import HYBRID, logits, model, tokenizer, tokens

pytestmark = pytest.mark.readers
PATTERNS = [("kda", "kda"), ("mla", "mla"), HYBRID, ("softmax", "softmax")]
CASES = [
    pytest.param(pattern, head_dim, scale, id=f"{'_'.join(pattern)}-{head_dim}-{'large' if scale > 1 else 'fresh'}")
    for pattern in PATTERNS
    for head_dim in (32, 64, 128)
    for scale in (1.0, 3.0)
]


@pytest.mark.parametrize(("pattern", "head_dim", "scale"), CASES)
def test_mlx(pattern: tuple[str, ...], head_dim: int, scale: float, tmp_path: Path) -> None:
    """Logits of 500 tokens on the CPU."""
    pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install mlx-lm 'mlx[cpu]'")
    ours = model(pattern, head_dim=head_dim, scale=scale)
    lkda.export(ours, tokenizer(), tmp_path / "out", format="hf")
    difference = (mlx_logits(tmp_path / "out", tokens()) - logits(ours, tokens())).abs().max()
    print(f"mlx-lm: {difference:.1e}")
    assert difference < 1e-4


def mlx_logits(directory: Path, given: Tensor) -> Tensor:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    made, _ = load_model(directory)
    return torch.from_numpy(np.array(made(mx.array(given.numpy()))))[0]


@pytest.mark.parametrize(("pattern", "head_dim", "scale"), CASES)
def test_llama_cpp(pattern: tuple[str, ...], head_dim: int, scale: float, tmp_path: Path) -> None:
    """The likeliest token at each of 500 positions, and 100 tokens of greedy generation."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install llama-cpp-python")
    ours = model(pattern, head_dim=head_dim, scale=scale)
    lkda.export(ours, tokenizer(), tmp_path / "out", format="gguf")
    compare_with_llama_cpp(tmp_path / "out/model-f32.gguf", ours, tokens())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash-linear-attention runs on a GPU only")
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_fla(head_dim: int, tmp_path: Path) -> None:
    """Its logits in bf16 are as far from ours in float32 as ours in bf16, within a factor of two."""
    pytest.importorskip("fla.models", reason="needs flash-linear-attention: pip install flash-linear-attention")
    from transformers import AutoModelForCausalLM

    ours, given = model(("kda", "kda"), head_dim=head_dim), tokens()
    lkda.export(ours, tokenizer(), tmp_path / "out", format="fla")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).cuda().eval()
    for layer in made.model.layers:
        layer.attn.mode = "fused_recurrent"  # the kernels of its other mode compile for minutes
    want = logits(ours, given)
    with torch.inference_mode():
        got = made(given.cuda()).logits[0].float().cpu()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = ours(given)[0].float()
    print(f"FLA: {(got - want).norm() / want.norm():.1e}; lkda in bf16: {(rounded - want).norm() / want.norm():.1e}")
    assert (got - want).norm() <= 2 * (rounded - want).norm()


def compare_with_llama_cpp(path: Path, ours: LanguageModel, given: Tensor) -> None:
    made = read_by_llama_cpp(path)
    got, want = llama_cpp_logits(made, given), logits(ours, given)
    print(f"llama.cpp: {(got - want).abs().max():.1e} of {want.abs().max():.2f}")
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    made.reset()
    prompt, drawn = given[:, :20], []
    made.eval(prompt[0].tolist())
    for _ in range(100):
        drawn.append(int(np.argmax(made.scores[made.n_tokens - 1])))
        made.eval(drawn[-1:])
    made.close()
    assert drawn == list(generate(ours, prompt, max_new_tokens=100, temperature=0))


def read_by_llama_cpp(path: Path) -> Any:
    from llama_cpp import Llama

    # Keys and values in float32 (type 0): its default of float16 rounds them.
    return Llama(str(path), n_ctx=640, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0)


def llama_cpp_logits(made: Any, given: Tensor) -> Tensor:
    made.eval(given[0].tolist())
    return torch.from_numpy(np.array(made.scores[: given.shape[1]]))
