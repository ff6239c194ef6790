"""data=tokens: token files of other programs, prepared directories, and several sources with weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lkda.data.text.tokenizer import train_tokenizer
from lkda.data.text.tokens import TokensDataModule

TEXT = "the state of the union is strong and the people of the states are free to speak of peace and labor. "


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """Twenty documents."""
    tokenizer = train_tokenizer([TEXT], 280)
    return np.concatenate([[0, *tokenizer.encode(TEXT * (1 + n % 3)).ids] for n in range(20)]).astype(np.uint16)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    train_tokenizer([TEXT], 280).save(str(path))
    return path


def module(tokenizer: Path | None, *paths: Path, **changes: Any) -> TokensDataModule:
    options: dict[str, Any] = {"context": 16, "batch_size": 2, "tokenizer_path": tokenizer and str(tokenizer)}
    return TokensDataModule(**(options | {"paths": [str(path) for path in paths]} | changes))


def every_row(data: TokensDataModule) -> list[list[int]]:
    """The training rows of an epoch, in the order of the files."""
    return [data._train.row(n)[0].tolist() for n in range(data._train.count)]


def llm_c(tokens: np.ndarray, *, of_llama: bool = False) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = (20240801, 7, len(tokens)) if of_llama else (20240520, 1, len(tokens))
    return header.tobytes() + tokens.astype("<u4" if of_llama else "<u2").tobytes()


@pytest.mark.parametrize(
    "kind",
    ["npy", "npy of 64 bits", "npy with rows", "bin", "bin of 32 bits", "bin of llm.c", "bin of llm.c for Llama"],
)
def test_each_kind_of_file_has_the_same_batches(tmp_path, tokenizer, tokens, kind):
    path, options = tmp_path / f"a.{kind[:3]}", {}
    if kind == "npy":
        np.save(path, tokens)
    elif kind == "npy of 64 bits":
        np.save(path, tokens.astype(np.int64))
    elif kind == "npy with rows":
        np.save(path, tokens[: len(tokens) // 4 * 4].reshape(4, -1))
    elif kind == "bin":
        path.write_bytes(tokens.tobytes())
    elif kind == "bin of 32 bits":
        path.write_bytes(tokens.astype("<u4").tobytes())
        options = {"dtype": "uint32"}
    else:
        path.write_bytes(llm_c(tokens, of_llama="Llama" in kind))
    data = module(tokenizer, path, val_fraction=0.1, test_fraction=0.1, **options)
    data.prepare()
    used = tokens[: len(tokens) // 4 * 4] if kind == "npy with rows" else tokens
    held_out = -(-len(used) // 10)
    assert (data.val_tokens, data.test.tokens) == (held_out, held_out)
    assert data.train_tokens == len(used) - 2 * held_out
    assert every_row(data)[0] == tokens[:16].tolist()
    validation = [t for batch in data.val_dataloader() for t in batch["tokens"].flatten().tolist()]
    assert validation[: held_out - 1] == used[len(used) - held_out : -1].tolist()
    batch = data.training_batches(rank=0, world_size=1)[0]
    begins = {n for n in range(32) if n % 16 == 0 or batch["tokens"][0, n] == 0}
    assert set(batch["cu_seqlens"].tolist()) == begins | {32}


def test_shards_follow_each_other_and_no_row_crosses_two(tmp_path, tokenizer, tokens):
    cuts = [0, 100, 110, 400, len(tokens)]
    for n, (low, high) in enumerate(zip(cuts, cuts[1:])):
        np.save(tmp_path / f"shard_{n}.npy", tokens[low:high])
    np.save(tmp_path / "val.npy", tokens[:200])
    data = module(tokenizer, tmp_path / "shard_*.npy", val_paths=[str(tmp_path / "val.npy")], test_fraction=0.0)
    data.prepare()
    rows = [
        tokens[low + 16 * n :][:16].tolist() for low, high in zip(cuts, cuts[1:]) for n in range((high - low - 1) // 16)
    ]
    assert every_row(data) == rows
    assert data.train_tokens == len(tokens)
    assert data.no_test == "data.test_fraction is 0"
    text = data.tokenizer.decode(tokens[:200].tolist(), skip_special_tokens=True)
    assert data.bytes_per_token == pytest.approx(len(text.encode()) / 200)


@pytest.mark.parametrize(("written", "read", "better"), [("<u4", "uint16", "uint32"), ("<i8", "uint32", "int64")])
def test_numbers_of_more_bits_are_not_read_as_twice_as_many_tokens(tmp_path, tokenizer, tokens, written, read, better):
    """Every second token would be 0, which is a token."""
    (tmp_path / "a.bin").write_bytes(tokens.astype(written).tobytes())
    with pytest.raises(ValueError, match=rf"every second number of .*a.bin is 0, .* set data.dtype.*={better}\."):
        module(tokenizer, tmp_path / "a.bin", dtype=read).prepare()


def test_tokens_that_are_in_no_sequence_are_told(tmp_path, tokenizer, tokens):
    """A file that is shorter than a sequence is not dropped without a word."""
    folder = tmp_path / "shards"
    folder.mkdir()
    np.save(folder / "long.npy", tokens[:161])
    np.save(tmp_path / "val.npy", tokens[:200])
    options = {"val_paths": [str(tmp_path / "val.npy")], "test_fraction": 0.0}
    data = module(tokenizer, folder, **options)
    data.prepare()
    assert data.left_out is None  # one token of 161
    for n in range(3):
        np.save(folder / f"short_{n}.npy", tokens[: 10 + n])
    data = module(tokenizer, folder, **options)
    data.prepare()
    assert data.left_out == (
        "34 of 194 tokens. Of each file, those after the last whole sequence of data.context=16 are left out; 3 of 4 "
        "files are shorter than one"
    )


def prepared(folder: Path, tokenizer: Path, tokens: np.ndarray) -> Path:
    folder.mkdir()
    for name, part in (("train", tokens[:-400]), ("validation", tokens[-400:-200]), ("test", tokens[-200:])):
        np.save(folder / f"{name}.npy", part)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


def test_sources_are_mixed_by_weights(tmp_path, tokenizer, tokens):
    first = prepared(tmp_path / "first", tokenizer, tokens)
    other = np.where(tokens == 0, 0, 5).astype(np.uint16)
    second = prepared(tmp_path / "second", tokenizer, other)
    data = module(None, first, second, weights=[3, 1])
    data.prepare()
    assert data.val_tokens == data.test.tokens == 400
    batches = data.training_batches(rank=0, world_size=1)
    of_second = [bool(set(row) <= {0, 5}) for n in range(500) for row in batches[n]["tokens"].view(2, 16).tolist()]
    assert 0.2 < sum(of_second) / 1000 < 0.3
    shared = [module(None, first, second, weights=[3, 1], batch_size=1) for _ in range(2)]
    for rank, half in enumerate(shared):
        half.prepare()
        own = half.training_batches(rank=rank, world_size=2)
        assert all((own[n]["tokens"] == batches[n]["tokens"].view(2, 16)[rank]).all() for n in range(20))
    assert module_fingerprint(None, first, second) != module_fingerprint(None, first, second, weights=[1.0, 1.0])


def module_fingerprint(tokenizer: Path | None, *paths: Path, **changes: Any) -> dict[str, Any]:
    data = module(tokenizer, *paths, **changes)
    data.prepare()
    return dict(data.fingerprint)


def test_the_fingerprint_is_that_of_the_content(tmp_path, tokenizer, tokens):
    np.save(tmp_path / "a.npy", tokens)
    np.save(tmp_path / "b.npy", tokens)
    assert module_fingerprint(tokenizer, tmp_path / "a.npy") == module_fingerprint(tokenizer, tmp_path / "b.npy")
    tokens = tokens.copy()
    tokens[3] += 1
    np.save(tmp_path / "b.npy", tokens)
    changed = module_fingerprint(tokenizer, tmp_path / "b.npy")
    assert module_fingerprint(tokenizer, tmp_path / "a.npy")["train"] != changed["train"]


def bad(folder: Path, tokenizer: Path, tokens: np.ndarray) -> dict[str, tuple[list[Path], dict[str, Any], str]]:
    np.save(folder / "a.npy", tokens)
    np.save(folder / "floats.npy", tokens.astype(np.float32))
    np.save(folder / "large.npy", np.append(tokens, 999).astype(np.uint16))
    np.save(folder / "negative.npy", np.append(tokens, -1).astype(np.int32))
    np.save(folder / "short.npy", tokens[:16])
    np.save(folder / "empty.npy", tokens[:0])
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (folder / "torn.npy").write_bytes((folder / "a.npy").read_bytes()[:300])
    (folder / "odd.bin").write_bytes(b"abc")
    (folder / "torn.bin").write_bytes(llm_c(tokens)[:-2])
    (folder / "a.txt").write_text("a")
    (folder / "none").mkdir()
    a = folder / "a.npy"
    return {
        "no tokenizer": ([a], {"tokenizer_path": None}, "data.tokenizer_path is missing: give the tokenizer.json"),
        "missing": ([folder / "no.npy"], {}, "data.paths: .*no.npy does not exist"),
        "kind": ([folder / "a.txt"], {}, r"a.txt is not a token file, which ends in .npy or .bin"),
        "empty folder": ([folder / "none"], {}, "none is not a token file"),
        "floats": ([folder / "floats.npy"], {}, "must hold whole numbers, got float32"),
        "objects": ([folder / "objects.npy"], {}, "objects.npy is not a token file that can be read"),
        "torn": ([folder / "torn.npy"], {}, "torn.npy is not a token file that can be read"),
        "odd": ([folder / "odd.bin"], {}, "odd.bin has 3 bytes, which is not a multiple of 2: set data.dtype"),
        "torn bin": ([folder / "torn.bin"], {}, "has the header of llm.c, but not version 1 with"),
        "large": ([folder / "large.npy"], {}, r"has the token 999 at position \d+, but the tokenizer has 280 tokens"),
        "negative": ([folder / "negative.npy"], {}, r"has the token -1 at position \d+"),
        "validation": ([a], {"val_paths": [str(folder / "large.npy")]}, "large.npy has the token 999"),
        "short": (
            [folder / "short.npy"],
            {"val_paths": [str(a)], "test_fraction": 0.0},
            "short.npy must have a file of at least 17 tokens",
        ),
        "empty": ([folder / "empty.npy"], {}, "empty.npy (holds no tokens|is not a token file)"),
        "twice": ([a, a], {}, "a.npy is given twice in data.paths"),
        "two splits": ([a], {"val_paths": [str(a)]}, "a.npy is in two splits"),
        "weights": ([a], {"weights": [1.0, 2.0]}, "data.weights must have one entry for each of data.paths"),
        "weight": ([a], {"weights": [0.0]}, "weights must be positive"),
        "dtype": ([a], {"dtype": "float16"}, "data.dtype must be one of uint16"),
        "fractions": ([a], {"val_fraction": 0.6, "test_fraction": 0.5}, "with a sum below 1; got 0.6 and 0.5"),
        "context": ([a], {"context": 5000}, "must have a file of at least 5001 tokens"),
        "none": ([], {}, "data.paths is empty"),
    }  # fmt: skip


CASES = [
    "no tokenizer", "missing", "kind", "empty folder", "floats", "objects", "torn", "odd", "torn bin", "large",
    "negative", "validation", "short", "empty", "twice", "two splits", "weights", "weight", "dtype", "fractions",
    "context", "none",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_tokens_get_one_clear_message(case, tmp_path, tokenizer, tokens):
    paths, changes, message = bad(tmp_path, tokenizer, tokens)[case]
    with pytest.raises(ValueError, match=message):
        module(tokenizer, *paths, **changes).prepare()


def test_sources_with_different_tokenizers_are_not_mixed(tmp_path, tokenizer, tokens):
    first = prepared(tmp_path / "first", tokenizer, tokens)
    second = prepared(tmp_path / "second", tokenizer, tokens)
    train_tokenizer([TEXT[::-1]], 290).save(str(second / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"second/tokenizer.json is another tokenizer than .*first/tokenizer.json"):
        module(None, first, second).prepare()
