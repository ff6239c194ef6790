"""A tokenizer.json of a stranger: it fills no memory, and what its library cannot run ends in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import lkda
from lkda.checks import InputError
from lkda.commands.run.run_directory import tokenizer_of
from lkda.data.text.tokenizer import decode_tokens, encode_text, encode_texts, load_tokenizer
from lkda.tokenizer_growth import growths
from lkda.tokenizer_loading import refusing_panics
from tests.formats.models import model, tokenizer

TENFOLD = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
PREPEND = {"type": "Prepend", "prepend": "x" * 2000}
SPACED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
COPIES = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2000,
    "special_tokens": {},
}
COPIES["pair"] = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
GROWING: dict[str, dict[str, Any]] = {
    "many replaces": {"normalizer": {"type": "Sequence", "normalizers": [TENFOLD] * 12}},
    "nested": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [TENFOLD] * 4}]}},
    "without the names of the types": {
        "normalizer": {"normalizers": [{"pattern": {"String": "a"}, "content": "b" * 1001}]}
    },
    "as an array": {"normalizer": [[TENFOLD] * 4]},
    "of two parts": {
        "normalizer": {"type": "Sequence", "normalizers": [TENFOLD] * 3},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPACED]},
    },
    "a long prefix": {"normalizer": PREPEND},
    "between all characters": {"normalizer": {"type": "Replace", "pattern": {"Regex": "b*"}, "content": "x" * 900}},
    "spaces": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPACED] * 6}},
    "decoder": {"decoder": {"type": "Sequence", "decoders": [TENFOLD] * 12}},
    "copies": {"post_processor": COPIES},
    # The library normalizes added tokens when it loads them.
    "an added token": {
        "normalizer": {"type": "Sequence", "normalizers": [TENFOLD] * 12},
        "added_tokens": [
            {"id": 0, "content": "a", "single_word": False, "lstrip": False}
            | {"rstrip": False, "normalized": True, "special": False}
        ],
    },
}
SPLIT = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
PANICS: dict[str, dict[str, Any]] = {
    "pre_tokenizer": {"pre_tokenizer": SPLIT},
    "normalizer": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+c"}, "content": "x"}},
}
ENDLESS = "a" * 60 + "b"


def written(path: Path, change: dict[str, Any]) -> Path:
    made = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    path.write_text(json.dumps({**json.loads(made.to_str()), **change}))
    return path


@pytest.mark.parametrize("kind", GROWING)
def test_a_tokenizer_that_lengthens_texts_is_refused(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / "tokenizer.json", GROWING[kind])
    with pytest.raises(InputError, match=r"could make a text [\d,]+ times longer .*expected at most 1,000 times"):
        load_tokenizer(path)


def test_repeated_entries_hide_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "tokenizer.json", {"normalizer": PREPEND})
    path.write_text(path.read_text().replace('"normalizer":', '"normalizer": null, "normalizer":'))
    with pytest.raises(InputError, match="could make a text 2,001 times longer"):
        load_tokenizer(path)


def test_checkpoints_and_exported_models_are_checked_too(tmp_path: Path) -> None:
    path = written(tmp_path / "tokenizer.json", GROWING["many replaces"])
    with pytest.raises(InputError, match=r"c.ckpt is damaged: it holds no tokenizer that can be used: .* times longer"):
        tokenizer_of(path.read_text(), source="c.ckpt")
    lkda.export(model(("kda",)), tokenizer(), tmp_path / "out")
    path.rename(tmp_path / "out" / "tokenizer.json")
    with pytest.raises(InputError, match=r"out/tokenizer.json is not a tokenizer.json that can be used: .* longer"):
        lkda.load(tmp_path / "out")


def test_growth_is_an_upper_bound() -> None:
    """Of the steps of known tokenizers and their worst characters, what the library really does."""
    made = Tokenizer(models.BPE())
    texts = [
        "a",
        " ",
        "\ufdfa",
        "\u0130",
        "\u4e00",
        "\u0390",
        "\u1fb7",
        "\U0001d160",
        "a b",
        "aa",
        "\x00",
        "\xe9",
        "\ufb2c",
    ]
    steps = [
        *(normalizers.NFD(), normalizers.NFC(), normalizers.NFKD(), normalizers.NFKC(), normalizers.Lowercase()),
        *(normalizers.BertNormalizer(), normalizers.Nmt(), normalizers.ByteLevel(), normalizers.Prepend("▁")),
        *(
            normalizers.Replace(" ", "▁"),
            normalizers.Replace(Regex("a*"), "xy"),
            normalizers.Replace(Regex(r"\b"), "xy"),
        ),
        *(
            normalizers.Replace(Regex("(?=a)"), "xy"),
            normalizers.Replace(Regex("a|"), "xy"),
            normalizers.Replace("", "xy"),
        ),
        *(normalizers.Replace(Regex("[ab]{0,3}"), "xy"), normalizers.Replace(Regex("[a*]"), "xyz")),
    ]
    for step in steps:
        made.normalizer = step
        bound = growths(made)["encoding"]
        for text in texts:
            assert len(step.normalize_str(text).encode()) <= bound * len(text.encode()), (step, text)
    made.normalizer = None
    for before in (
        pre_tokenizers.ByteLevel(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Metaspace(),
    ):
        made.pre_tokenizer = before
        bound = growths(made)["encoding"]
        for text in texts:
            size = sum(len(word.encode()) for word, _ in before.pre_tokenize_str(text))
            assert size <= bound * len(text.encode()), (before, text)


def test_known_tokenizers_stay_below_the_bound(tmp_path: Path) -> None:
    made = Tokenizer(models.BPE({"a": 0, "▁": 1}, []))
    like_albert = [
        *(
            normalizers.Replace("``", '"'),
            normalizers.Replace("''", '"'),
            normalizers.NFKD(),
            normalizers.StripAccents(),
        ),
        *(normalizers.Lowercase(), normalizers.Replace(Regex(" {2,}"), " ")),
    ]
    many = [normalizers.Replace(Regex(f"[{sign}]|\\?"), "'") for sign in "abcdefghijklm"]
    like_llama = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    for steps in (like_albert, like_llama, many):
        made.normalizer, made.pre_tokenizer = normalizers.Sequence(steps), pre_tokenizers.Metaspace()
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        made.save(str(tmp_path / "tokenizer.json"))
        assert load_tokenizer(tmp_path / "tokenizer.json").to_str() == made.to_str()


def test_a_table_of_sentencepiece_is_measured() -> None:
    """A trie of one unit for nothing, and a long text."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Precompiled((1024).to_bytes(4, "little") + bytes(1024) + b"x" * 6000 + b"\0")
    assert growths(made)["encoding"] >= 2000


@pytest.mark.parametrize("kind", PANICS)
def test_an_expression_without_an_end_is_an_error_of_one_line(kind: str, tmp_path: Path) -> None:
    loaded = load_tokenizer(written(tmp_path / "tokenizer.json", PANICS[kind]))
    for encode in (lambda: encode_text(loaded, ENDLESS), lambda: encode_texts(loaded, [ENDLESS])):
        with pytest.raises(InputError, match=r"^the tokenizer failed on a text \(.*\): .*Use another") as caught:
            encode()
        assert "\n" not in str(caught.value)


def test_an_added_token_that_its_normalizer_cannot_take(tmp_path: Path) -> None:
    added = [{**GROWING["an added token"]["added_tokens"][0], "content": ENDLESS}]
    path = written(tmp_path / "tokenizer.json", {**PANICS["normalizer"], "added_tokens": added})
    with pytest.raises(InputError, match=r"is not a tokenizer.json"):
        load_tokenizer(path)


def test_a_decoder_that_fails() -> None:
    made = Tokenizer(models.BPE({ENDLESS: 0}, []))
    made.decoder = decoders.Replace(Regex("(a+)+c"), "x")
    with pytest.raises(InputError, match=r"the tokenizer failed on a text \(.*\): .*Use another"):
        decode_tokens(made, [0])


def test_other_ends_pass() -> None:
    with pytest.raises(KeyboardInterrupt), refusing_panics():
        raise KeyboardInterrupt
