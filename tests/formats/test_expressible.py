"""What a format cannot express is refused in a sentence that names the formats that can."""

from __future__ import annotations

from pathlib import Path

import pytest

import lkda
from lkda.formats import check_export, names
from tests.formats.models import HYBRID, model, tokenizer

KDA = ("kda",)


@pytest.mark.parametrize("format", ["hf", "gguf"])
@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        (("simplified",), {}, r"cannot express a pattern with simplified; lkda can"),
        (("kda", "softmax"), {}, r"cannot express a pattern with softmax; lkda can"),
        (KDA, {"gate_form": "bounded"}, r"cannot express the bounded gate of KDA; fla and lkda can"),
        (KDA, {"negative_eigenvalues": True}, r"cannot express KDA with negative eigenvalues; fla and lkda can"),
        (KDA, {"gate": "head"}, r"cannot express a KDA gate per head, or none; fla and lkda can"),
        (KDA, {"gate": "none"}, r"cannot express a KDA gate per head, or none; lkda can"),
        (KDA, {"output_gate": False}, r"cannot express KDA without an output gate; lkda can"),
        (KDA, {"conv_width": 0}, r"cannot express KDA without convolutions; lkda can"),
        (("softmax",), {"conv_width": 4}, r"cannot express softmax attention with convolutions; lkda can"),
        (("softmax",), {"rope_base": None}, r"cannot express softmax attention without rotary positions .*; lkda can"),
        (("softmax",), {"qk_norm": True, "norm_eps": 1e-6}, r"cannot express a QK-norm whose norm_eps .*; lkda can"),
        (("mla",), {"conv_width": 4}, r"cannot express MLA with convolutions; lkda can"),
        (("mla",), {"qk_norm": True}, r"cannot express MLA with a QK-norm; lkda can"),
        (("mla",), {"rope_base": 1e4}, r"cannot express MLA with rotary positions \(mixer.mla.rope_base\); lkda can"),
    ],
)
def test_hf_and_gguf(
    format: str, pattern: tuple[str, ...], options: dict[str, object], message: str, tmp_path: Path
) -> None:
    made = model(pattern, **{pattern[0]: options}) if options else model(pattern)
    with pytest.raises(ValueError, match=rf"format {format} {message}"):
        lkda.export(made, tokenizer(), tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pattern", [HYBRID, ("softmax",), ("mla",)], ids="_".join)
def test_fla_has_kda_alone(pattern: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"format fla cannot express a pattern with .*; gguf and hf and lkda can"):
        check_export(model(pattern).config, format="fla", dtype=None)


def test_lkda_expresses_everything() -> None:
    for options in ({"gate": "none"}, {"gate_form": "bounded"}, {"output_gate": False}, {"conv_width": 0}):
        assert check_export(model(KDA, kda=options).config, format="lkda", dtype=None) == "float32"
    assert names() == ["fla", "gguf", "hf", "lkda"]


@pytest.mark.parametrize(("format", "dtype"), [("hf", "f16"), ("gguf", "bfloat16"), ("lkda", "int8"), ("fla", "f32")])
def test_unknown_dtypes(format: str, dtype: str) -> None:
    with pytest.raises(ValueError, match=rf"dtype must be one of .* in format {format}, got '{dtype}'"):
        check_export(model(KDA).config, format=format, dtype=dtype)


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory appears whole or not at all."""

    def fail(*_: object) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr("lkda.formats.native.write_json", fail)
    with pytest.raises(RuntimeError, match="disk is full"):
        lkda.export(model(KDA), tokenizer(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
