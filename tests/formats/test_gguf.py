"""The GGUF file, read back with the package that writes it. What llama.cpp makes of it: test_readers.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import lkda
from tests.formats.models import HYBRID, VOCAB, model, tokenizer

gguf = pytest.importorskip("gguf")


def read(directory: Path, dtype: str):
    found = gguf.GGUFReader(directory / f"model-{dtype}.gguf")
    return found, {tensor.name: tensor for tensor in found.tensors}


def value(found, key: str):
    return found.get_field(key).contents()


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_kimi_linear(dtype: str, tmp_path: Path) -> None:
    ours = model(HYBRID, head_dim=32)
    lkda.export(ours, tokenizer(), tmp_path / "out", format="gguf", dtype=dtype)
    found, tensors = read(tmp_path / "out", dtype)
    assert f"Llama('out/model-{dtype}.gguf')" in (tmp_path / "out/README.md").read_text()
    assert value(found, "general.architecture") == "kimi-linear"
    assert value(found, "kimi-linear.attention.head_count_kv") == [0, 0, 0, 1]
    assert len(value(found, "tokenizer.ggml.tokens")) == VOCAB
    assert value(found, "tokenizer.ggml.bos_token_id") == 0
    assert tensors["blk.0.ssm_conv1d_q.weight"].data.shape == (1, 64, 1, 4)
    A_log = ours.state_dict()["blocks.1.mixer.A_log"]
    np.testing.assert_allclose(tensors["blk.1.ssm_a"].data.ravel(), -A_log.exp().numpy().ravel(), rtol=1e-6)
    matrix = tensors["blk.0.attn_q.weight"]
    assert matrix.tensor_type.name == dtype.upper()
    there = gguf.quants.dequantize(matrix.data, matrix.tensor_type)
    want = ours.state_dict()["blocks.0.mixer.q_proj.weight"].numpy()
    allowed = {"f32": 0.0, "f16": 2**-11, "q8_0": 1 / 127}[dtype] * np.abs(want).max()
    assert np.abs(there - want).max() <= allowed


def test_llama(tmp_path: Path) -> None:
    lkda.export(model(("softmax",)), tokenizer(), tmp_path / "out", format="gguf")
    found, tensors = read(tmp_path / "out", "f32")
    assert value(found, "general.architecture") == "llama"
    assert value(found, "llama.attention.head_count_kv") == 2
    assert tensors["output.weight"].data.shape == (VOCAB, 32)


def test_tokenizers_that_split_as_gpt2_does_are_written(tmp_path: Path) -> None:
    """Those of GPT-2 and of older runs of lkda, which bound no word; not one that has other words."""
    made = Tokenizer.from_str(tokenizer().to_str())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lkda.export(model(("kda",)), made, tmp_path / "old", format="gguf")
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\S+"), "isolated"), bytes_alone])
    with pytest.raises(ValueError, match=r"is another kind"):
        lkda.export(model(("kda",)), made, tmp_path / "new", format="gguf")


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format gguf writes a byte-level BPE .* is another kind"):
        lkda.export(model(("kda",)), Tokenizer(models.WordLevel({"a": 0}, "a")), tmp_path / "out", format="gguf")
    assert not list(tmp_path.iterdir())
