"""data=hub: any data set that `datasets` loads by name; here directories stand for those of the hub."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from rich.progress import Progress

from lkda.data.text.documents import Documents
from lkda.data.text.hub import HubDataModule

WORDS = "the people of these states have in their union a more perfect peace than others"


def document(n: int) -> str:
    draw = np.random.default_rng(n)
    return f"{n}: " + " ".join(draw.choice(WORDS.split(), 60))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (home := tmp_path / "set").mkdir()
    for split, numbers in (("train", range(40)), ("test", range(100, 104))):
        rows = [{"id": n, "text": document(n) if n % 10 != 9 else ""} for n in numbers]
        (home / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def module(tmp_path: Path, folder: Path, **changes: object) -> HubDataModule:
    options: dict[str, object] = {
        "context": 32,
        "batch_size": 2,
        "vocab_size": 300,
        "cache_dir": str(tmp_path / "cache"),
    }
    return HubDataModule(name=str(folder), **{**options, **changes})  # type: ignore[arg-type]


def texts(data: HubDataModule, stream: np.ndarray) -> list[str]:
    return data.tokenizer.decode(stream.tolist(), skip_special_tokens=False).split("<|endoftext|>")[1:]


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_of_a_data_set_train_and_validate(tmp_path, folder, streaming):
    data = module(tmp_path, folder, val_split="test", streaming=streaming)
    data.prepare()
    assert texts(data, data._train.token_ids) == [document(n) for n in range(40) if n % 10 != 9]
    assert texts(data, data._validation.token_ids) == [document(n) for n in range(100, 104)]
    assert data.source == str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_first_documents_of_which_some_are_held_out(tmp_path, folder, streaming):
    data = module(tmp_path, folder, max_documents=20, val_fraction=0.25, streaming=streaming)
    data.prepare()
    found = [n for n in range(20) if n % 10 != 9]
    assert texts(data, data._validation.token_ids) == [document(n) for n in found[2::4]]
    assert texts(data, data._train.token_ids) == [document(n) for n in found if n not in found[2::4]]


@pytest.mark.parametrize("streaming", [False, True])
def test_some_of_what_does_not_validate_tests(tmp_path, folder, streaming):
    data = module(
        tmp_path, folder, max_documents=20, val_fraction=0.25, test_fraction=0.25, streaming=streaming, context=16
    )
    data.prepare()
    found = [n for n in range(20) if n % 10 != 9]
    rest = [n for n in found if n not in found[2::4]]
    assert texts(data, data._validation.token_ids) == [document(n) for n in found[2::4]]
    assert texts(data, data.test.batches.rows.token_ids) == [document(n) for n in rest[2::4]]
    assert texts(data, data._train.token_ids) == [document(n) for n in rest if n not in rest[2::4]]


def test_a_split_of_the_data_set_tests(tmp_path, folder):
    data = module(tmp_path, folder, val_fraction=0.25, test_split="test", context=16)
    data.prepare()
    assert texts(data, data.test.batches.rows.token_ids) == [document(n) for n in range(100, 104)]
    with pytest.raises(ValueError, match=r"data\.test_split=test is also data\.val_split"):
        module(tmp_path, folder, val_split="test", test_split="test")
    with pytest.raises(ValueError, match=r"data\.test_fraction must be in \[0, 0\.5\] \(0: no test split\), got 0\.7"):
        module(tmp_path, folder, test_fraction=0.7)


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_files_that_are_named_are_read(tmp_path, folder, streaming):
    (folder / "more").mkdir()
    for name, numbers in (("a", range(200, 210)), ("b", range(210, 220)), ("c", range(300, 302))):
        rows = [json.dumps({"text": document(n)}) + "\n" for n in numbers]
        (folder / "more" / f"{name}.jsonl").write_text("".join(rows))
    files = OmegaConf.create({"train": "more/[ab].jsonl", "test": ["more/c.jsonl"]})
    data = module(tmp_path, folder, data_files=files, val_split="test", streaming=streaming)
    data.prepare()
    assert texts(data, data._train.token_ids) == [document(n) for n in range(200, 220)]
    assert texts(data, data._validation.token_ids) == [document(n) for n in (300, 301)]
    other = module(tmp_path, folder, data_files="more/a.jsonl", val_fraction=0.1, streaming=streaming)
    other.prepare()
    assert texts(other, other._train.token_ids) == [document(n) for n in range(200, 210) if n != 205]


@pytest.mark.parametrize("given", [[], 3, [""], {"train": []}, "/etc/passwd", ["../a.jsonl"], "https://a.b/c.jsonl"])
def test_files_that_are_not_of_the_data_set_are_refused(tmp_path, folder, given):
    with pytest.raises(ValueError, match=r"data\.data_files(=| must be)"):
        module(tmp_path, folder, data_files=given)


def test_the_documents_of_a_stream_are_counted(tmp_path, folder, monkeypatch):
    shown = []
    monkeypatch.setattr("lkda.data.text.hub._DOCUMENTS_PER_UPDATE", 10)
    monkeypatch.setattr(Progress, "update", lambda *_, description, **__: shown.append(description))
    module(tmp_path, folder, val_split="test", streaming=True).prepare()
    assert [line for line in shown if line.startswith("reading")] == [
        f"reading train: {n} documents" for n in (10, 20, 30, 40)
    ]
    assert any(line.startswith("tokenizing train: 36 documents, ") and line.endswith(" tokens") for line in shown)


def test_a_stream_is_read_no_further_than_it_is_asked_for(tmp_path, folder, monkeypatch):
    seen = []

    def rows():
        for n in range(10**9):
            seen.append(n)
            yield {"text": document(n)}

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows())
    data = module(tmp_path, folder, max_documents=30, val_fraction=0.1, streaming=True)
    data.prepare()
    assert seen == list(range(30))


def test_a_second_run_finds_the_cache_and_a_change_of_content_does_not(tmp_path, folder, monkeypatch):
    module(tmp_path, folder, val_split="test").prepare()
    with monkeypatch.context() as never:
        never.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("read again"))
        module(tmp_path, folder, val_split="test").prepare()
    (folder / "test.jsonl").write_text(json.dumps({"id": 1, "text": document(7)}) + "\n")
    data = module(tmp_path, folder, val_split="test")
    data.prepare()
    assert texts(data, data._validation.token_ids) == [document(7)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_column": "body"}, "column 'body'"),
        ({"text_column": "id"}, "holds a number, not text, in row 1"),
        ({"val_split": "validation"}, "cannot be loaded"),
        ({"val_fraction": 0.9}, "val_fraction"),
        ({"val_fraction": 0.01}, "too few"),
        ({"text_column": "id", "streaming": True}, "holds a number, not text"),
        ({"max_documents": 1}, "max_documents"),
        ({"max_documents": 2.5}, "max_documents"),
        ({"max_documents": "ten"}, "max_documents"),
        ({"subset": "french"}, "cannot be loaded"),
        ({"data_files": "none.jsonl"}, "cannot be loaded"),
    ],
    ids=str,
)
def test_bad_data_gets_one_clear_message(tmp_path, folder, changes, message, capsys):
    with pytest.raises(ValueError, match=message):
        module(tmp_path, folder, **changes).prepare()
    assert capsys.readouterr().err == ""


def test_a_column_that_a_stream_lacks_is_named(tmp_path, folder):
    with pytest.raises(ValueError, match=r"no column 'body'; the columns are id, text"):
        module(tmp_path, folder, text_column="body", streaming=True).prepare()


def test_a_path_that_is_not_there_is_not_asked_of_the_hub(tmp_path):
    with pytest.raises(ValueError, match="must be a directory, but there is none"):
        module(tmp_path, tmp_path / "nothing")


def test_without_a_network_a_name_fails_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ValueError, match="cannot be reached"):
        module(tmp_path, Path("nobody/nothing")).prepare()
    assert time.monotonic() - start < 15


def test_documents_are_read_as_they_are_iterated():
    reads = []

    class Table:
        def __len__(self):
            return 10_000

        def select_columns(self, columns):
            return self

        def select(self, rows):
            return self

        def __getitem__(self, rows):
            reads.append(rows)
            return {"text": [str(n) for n in range(rows.start, rows.stop)]}

    texts = Documents(Table(), "text", range(10_000))
    assert [text for _, text in zip(range(3), texts)] == ["0", "1", "2"]
    assert [rows.stop - rows.start for rows in reads] == [256]
