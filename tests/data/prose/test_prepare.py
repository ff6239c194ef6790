"""Prepared corpora: what becomes of packages and local files, without the registries that serve them."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lkda.data.prose import collect, prepare, readers
from lkda.data.prose.licences import copy_licences
from lkda.data.prose.prepare import prepare_mix
from lkda.data.prose.sources import MIXES, SOURCES, Source
from lkda.data.text.datamodule import PREPARED, TextDataModule

SENTENCE = "the people of the states are free to speak of peace and labor in house {n}. "
WORDS = "peace labor state union people house free speak strong land north south river law court"


def text(n: int) -> str:
    return " ".join(np.random.default_rng(n).choice(WORDS.split(), 200))


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[Source]:
    """Two packages that are "downloaded" from here: 45 texts, and a Python module with one long literal."""

    def download(source: Source, folder: Path) -> tuple[Path, Path]:
        unpacked = folder / "unpacked"
        unpacked.mkdir(parents=True)
        if source.name == "texts":
            (unpacked / "texts.dist-info" / "licenses").mkdir(parents=True)
            (unpacked / "texts.dist-info" / "METADATA").write_text("Name: texts\nLicense: MIT\n\nLicense: no header\n")
            (unpacked / "texts.dist-info" / "licenses" / "LICENSE").write_text("as is")
            for n in range(45):
                (unpacked / f"{n:02}.rst.gz").write_bytes(gzip.compress(text(n).encode()))
        else:
            (home := unpacked / "usr" / "share" / "doc" / "module").mkdir(parents=True)
            (home / "copyright").write_text("Files: *\nCopyright: me\nLicense: GPL-2\n\nFiles: a\nLicense: ISC\n")
            (unpacked / "module.py").write_text(f"raise SystemExit\nx = '''short'''\ny = {SENTENCE * 30!r}\n")
        return folder / f"{source.name}.whl", unpacked

    monkeypatch.setattr(collect, "download", download)
    return [
        Source("texts==1.0", "public domain", "*.rst.gz", readers.text_of),
        Source("module", "MIT", "*.py", readers.longest_string_of),
    ]


def prepare_prose(directory: Path, *, vocab_size: int, sources: list[Source], **options: Any) -> dict[str, Any]:
    own = dict.fromkeys(sources)
    return prepare_mix(directory, sources=own, vocab_size=vocab_size, cache_dir=directory.parent / "cache", **options)


def test_packages_become_streams_that_a_data_module_maps(tmp_path, sources):
    manifest = prepare_prose(tmp_path / "mix", vocab_size=300, sources=sources)
    assert manifest == json.loads((tmp_path / "mix" / "manifest.json").read_text())
    texts, module = manifest["sources"]
    assert texts["held_out"] == {"validation": ["20.rst.gz"], "test": ["30.rst.gz"]}
    assert module["held_out"] == {"validation": [], "test": []}
    assert (texts["documents"], module["documents"]) == (45, 1)
    held_out = text(20)
    assert texts["validation_bytes"] == manifest["validation_bytes"] == len(held_out)
    assert texts["test_bytes"] == manifest["test_bytes"] == len(text(30))
    assert module["train_bytes"] == len(SENTENCE * 30)
    assert module["licence"] == "MIT"
    assert manifest["decontamination"]["train_bytes"] == texts["train_bytes"] + module["train_bytes"]

    data = TextDataModule(source="prose", directory=str(tmp_path / "mix"), context=16, batch_size=2)
    data.prepare()
    assert isinstance(data._train.token_ids, np.memmap)
    assert data._train.token_ids.dtype == np.uint16
    assert data.tokenizer.decode(data._validation.token_ids.tolist(), skip_special_tokens=True) == held_out
    assert data.bytes_per_token == pytest.approx(len(held_out) / data.val_tokens)
    test = [token for batch in data.in_order(data.test.batches) for token in batch["tokens"].flatten().tolist()]
    assert text(30) in data.tokenizer.decode(test)
    assert data.test.bytes_per_token == pytest.approx(len(text(30)) / data.test.tokens)
    assert text(30) not in data.tokenizer.decode(data._train.token_ids.tolist())
    assert next(iter(data.train_dataloader()))["tokens"].shape == (1, 32)


def test_a_package_brings_what_it_says_of_its_licence(tmp_path, sources):
    texts, module = prepare_prose(tmp_path / "mix", vocab_size=300, sources=sources)["sources"]
    assert (texts["package_licence"], module["package_licence"]) == ("MIT", "GPL-2")
    assert texts["licence_files"] == ["licences/texts/METADATA", "licences/texts/LICENSE"]
    assert module["licence_files"] == ["licences/module/copyright"]
    assert (tmp_path / "mix" / "licences" / "texts" / "LICENSE").read_text() == "as is"
    assert "License: ISC" in (tmp_path / "mix" / module["licence_files"][0]).read_text()


def test_a_package_without_a_licence_is_refused(tmp_path):
    (tmp_path / "unpacked").mkdir()
    with pytest.raises(ValueError, match=r"nothing has no licence file, .*copyright in usr/share/doc: leave it out"):
        copy_licences(tmp_path / "unpacked", "nothing", tmp_path / "licences")


def _copies(path: Path) -> list[readers.Document]:
    return [readers.Document(f"{text(100)}\n\n{text(20)}\n\n{text(101)}")]


def test_what_validates_is_not_trained_on(tmp_path, sources):
    copies = Source("module", "MIT", "*.py", _copies)
    decontamination = prepare_prose(tmp_path / "mix", vocab_size=300, sources=[sources[0], copies])["decontamination"]
    assert decontamination["before"]["validation"] > 0.9
    assert decontamination["before"]["test"] == 0
    assert decontamination["after"] == {"validation": 0, "test": 0}
    assert decontamination["dropped_bytes"] == len(text(20)) + 2
    data = TextDataModule(source="prose", directory=str(tmp_path / "mix"), context=16, batch_size=2)
    data.prepare()
    train = data.tokenizer.decode(data._train.token_ids.tolist())
    assert text(20) not in train
    assert f"{text(100)}\n\n{text(101)}" in train


def test_nothing_is_left_of_a_mix_that_fails(tmp_path, sources):
    broken = Source("module", "MIT", "*.txt", readers.text_of)
    with pytest.raises(ValueError, match=r"module.whl has no text at \*.txt"):
        prepare_prose(tmp_path / "mix", vocab_size=300, sources=[sources[0], broken])
    assert not (tmp_path / "mix").exists()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["cache"]
    assert not [path for path in (tmp_path / "cache" / "sources").iterdir() if path.name.startswith(".")]


def test_a_mix_that_is_there_is_not_overwritten(tmp_path, sources):
    (tmp_path / "mix").mkdir()
    with pytest.raises(ValueError, match=r"exists"):
        prepare_prose(tmp_path / "mix", vocab_size=300, sources=sources)


def without_test(directory: Path) -> None:
    """Make it a mix of a version that knew no test split, and called the metadata facts."""
    found = json.loads((directory / "metadata.json").read_text())
    (directory / "test.npy").unlink()
    (directory / "metadata.json").unlink()
    del found["metadata"]["test_bytes"], found["sizes"]["test.npy"]
    (directory / "facts.json").write_text(json.dumps({"facts": found["metadata"], "sizes": found["sizes"]}))


def test_a_mix_of_before_the_test_split_still_trains_and_says_so(tmp_path, sources):
    prepare_prose(tmp_path / "mix", vocab_size=300, sources=sources)
    without_test(tmp_path / "mix")
    data = TextDataModule(source="prose", directory=str(tmp_path / "mix"), context=16, batch_size=2)
    data.prepare()
    assert data.test is None
    assert (
        data.no_test
        == f"{tmp_path}/mix was made by an earlier version; make it again with python scripts/prepare_data.py"
    )
    assert "test" not in data.fingerprint


def test_a_mix_of_before_the_test_split_gives_way_and_is_kept(tmp_path, sources):
    prepare_prose(tmp_path / "mix", vocab_size=300, sources=sources)
    without_test(tmp_path / "mix")
    before = (tmp_path / "mix" / "train.npy").read_bytes()
    prepare_prose(tmp_path / "mix", vocab_size=300, sources=sources)
    assert (tmp_path / "mix" / "test.npy").exists()
    assert (tmp_path / "mix_without_test" / "train.npy").read_bytes() == before
    without_test(tmp_path / "mix")
    with pytest.raises(ValueError, match=r"mix_without_test exists already: give another out, or remove it"):
        prepare_prose(tmp_path / "mix", vocab_size=300, sources=sources)


def test_something_must_validate(tmp_path, sources):
    with pytest.raises(ValueError, match="documents to make a test split"):
        prepare_prose(tmp_path / "mix", vocab_size=300, sources=sources[1:])


def test_a_package_that_cannot_be_had_is_named(tmp_path):
    source = Source("nothing==1", "none", "*", readers.text_of)
    with pytest.raises(ValueError, match=r"nothing==1 cannot be downloaded.*says gone"):
        collect.run(["bash", "-c", "echo gone >&2; exit 3"], tmp_path, source)
    with pytest.raises(ValueError, match=r"nothing==1 cannot be downloaded.*leave it out"):
        collect.run(["no-such-command-here"], tmp_path, source)


def test_a_mix_that_is_not_there_or_broken_says_what_makes_it(tmp_path, sources):
    data = TextDataModule(source="prose", cache_dir=str(tmp_path), context=16, batch_size=2)
    with pytest.raises(ValueError, match=r"prepare_data\.py"):
        data.prepare()
    prepare_prose(tmp_path / "prose", vocab_size=300, sources=sources)
    with open(tmp_path / "prose" / "train.npy", "ab") as stream:
        stream.truncate(200)
    with pytest.raises(ValueError, match=r"prepare_data\.py"):
        data.prepare()


def test_options_of_other_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.directory belongs to"):
        TextDataModule(source="sotu", directory=str(tmp_path), context=16, batch_size=2)
    with pytest.raises(ValueError, match=r"data\.tokenizer_path"):
        TextDataModule(source="prose", tokenizer_path="t.json", context=16, batch_size=2)


def test_a_page_is_its_text(tmp_path):
    page = tmp_path / "a.html"
    page.write_text("<title>On\n bread</title><script>let x</script><p>Peace &amp; <b>bread</b>\nfor all<br>today</p>")
    assert readers.page_of(page)[0].text == "On bread\nPeace & bread for all\ntoday"


def test_the_tokens_of_each_source_are_found_by_the_manifest(tmp_path, sources):
    manifest = prepare_prose(tmp_path / "mix", vocab_size=300, sources=sources)
    data = TextDataModule(source="prose", directory=str(tmp_path / "mix"), context=16, batch_size=2)
    data.prepare()
    places = [source["tokens"] for source in manifest["sources"]]
    assert [place["validation"] for place in places] == [[0, data.val_tokens], [data.val_tokens] * 2]
    (_, first), (second, end) = (place["train"] for place in places)
    assert (first, end) == (second, data.train_tokens)
    of_module = data.tokenizer.decode(data._train.token_ids[second:end].tolist(), skip_special_tokens=True)
    assert of_module == SENTENCE * 30


def test_an_interrupted_preparation_goes_on(tmp_path, sources, monkeypatch):
    """It is cut off while it tokenizes, and again before it decontaminates. What is complete is not done again."""
    whole = prepare_prose(tmp_path / "whole" / "mix", vocab_size=300, sources=sources)
    calls: list[str] = []
    stops = {"write_token_file": 2, "decontaminate": 1}  # the number of the call that is cut off

    def watched(name: str, original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if calls.count(name) == stops.get(name):
                raise KeyboardInterrupt
            return original(*arguments, **options)

        return call

    for place, name in ((collect, "_build"), (prepare, "train_on"), *((prepare, name) for name in stops)):
        monkeypatch.setattr(place, name, watched(name, getattr(place, name)))
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            prepare_prose(tmp_path / "mix", vocab_size=300, sources=sources)
        assert not (tmp_path / "mix").exists()
    assert prepare_prose(tmp_path / "mix", vocab_size=300, sources=sources) == whole
    assert [calls.count(name) for name in ("_build", "train_on", *stops)] == [2, 1, 2 + 6, 2]
    for name in ("train.npy", "validation.npy", "test.npy", "tokenizer.json"):
        assert (tmp_path / "mix" / name).read_bytes() == (tmp_path / "whole" / "mix" / name).read_bytes()


def novels(path: Path) -> Path:
    """Eighty novels of forty authors."""
    rows = [{"author": f"A{n // 2:02}", "title": f"T{n}", "text": text(n)} for n in range(80)]
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_without_a_terminal_each_step_is_a_line(tmp_path, sources, capsys):
    prepare_prose(tmp_path / "mix", vocab_size=300, sources=sources)
    names = [source.name for source in sources]
    said = capsys.readouterr().err.splitlines()
    assert said[: len(names)] == [f"collecting {name}" for name in names]
    assert said[len(names)].startswith("training a tokenizer of 300 tokens on 0 MB")
    assert said[len(names) + 1 : -1] == [f"tokenizing {name}" for name in names]
    assert said[-1] == "removing the held-out text from the training text"


def test_a_local_file_is_held_out_by_author(tmp_path):
    path = novels(tmp_path / "novels.jsonl.xz")
    options = {"sources": [SOURCES["novels"]], "paths": {"novels": path}}
    (own,) = prepare_prose(tmp_path / "mix", vocab_size=300, **options)["sources"]
    assert own["held_out"] == {"validation": ["A20: T40", "A20: T41"], "test": ["A30: T60", "A30: T61"]}
    assert own["archive"] == "novels.jsonl.xz"
    assert own["licence"].startswith("public domain")


def test_a_source_is_cut_to_its_share_and_repeats_no_line(tmp_path, sources):
    whole = sum(len(text(n)) for n in range(45))
    own = prepare_mix(
        tmp_path / "mix",
        sources={sources[0]: whole / 1e6 * 0.9},  # type: ignore[dict-item]
        vocab_size=300,
        cache_dir=tmp_path / "cache",
    )["sources"][0]
    assert own["documents"] == 40
    documents = [readers.Document("a\n\nb\na"), readers.Document("b\nc")]
    assert [document.text for document in collect._with_unique_lines(documents)] == ["a\n\nb", "c"]


def test_another_tokenizer_can_be_given(tmp_path, sources):
    first = prepare_prose(tmp_path / "first", vocab_size=300, sources=sources)
    second = prepare_prose(
        tmp_path / "second", vocab_size=300, sources=sources[:1], tokenizer_path=tmp_path / "first" / "tokenizer.json"
    )
    names = [(tmp_path / name / "tokenizer.json").read_text() for name in ("first", "second")]
    assert names[0] == names[1]
    assert second["sources"][0]["train_bytes"] == first["sources"][0]["train_bytes"]


def test_c_files_licences_services_and_prose_are_read(tmp_path):
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as archive:
        for name, content in (("a/b.c", b"int x;\xff"), ("a/b.h", b"int y;")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert list(readers.c_files_of(tmp_path / "a.tar.xz")) == [("int x;\ufffd", "a/b.c", "")]
    (tmp_path / "mit.LICENSE").write_text("---\nkey: mit\n---\n\nPermission is granted.\n")
    assert readers.licence_of(tmp_path / "mit.LICENSE")[0].text == "Permission is granted."
    line = "This operation returns the list of all the buckets that the owner has."
    service = {
        "operations": {"List": {"documentation": f"<p>{line}</p><p>Short.</p>"}},
        "shapes": [{"documentation": 1}],
    }
    (tmp_path / "s.json.gz").write_bytes(gzip.compress(json.dumps(service).encode()))
    assert readers.service_of(tmp_path / "s.json.gz")[0].text == line
    (tmp_path / "p.html").write_text(f"<p>{line}</p><td>x = y[1] + z[2]; /* {'=' * 60} */</td><p>Next</p>")
    assert readers.prose_page_of(tmp_path / "p.html")[0].text == line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"title": "no text"}\n', 'a JSON object with a "text" in each line; line 1 has none'),
        (b'{"text": "a"}\nnot json\n', r"line 2 is no JSON \(Expecting value at its character 1\)"),
        (b'{"text": "a"}\n\n{"text": "\\ud800"}\n', "line 3 is no UTF-8"),
        (b"\xff\n", "cannot be read as JSON lines, after line 0"),
    ],
)
def test_a_local_file_that_cannot_be_read_gets_one_clear_message(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(readers.rows_of(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl.xz").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as JSON lines"):
        list(readers.rows_of(tmp_path / "a.jsonl.xz"))


def test_empty_lines_and_a_byte_order_mark_of_a_local_file_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}\n\n')
    assert [document.text for document in readers.rows_of(tmp_path / "a.jsonl")] == ["a", "b"]


def test_a_local_file_without_text_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": " "}\n')
    options = {"vocab_size": 300, "cache_dir": tmp_path / "cache", "paths": {"novels": path}}
    with pytest.raises(ValueError, match=rf"^{path} has no text\.$"):
        prepare_mix(tmp_path / "mix", sources={SOURCES["novels"]: None}, **options)


def test_every_mix_has_a_configuration_and_known_sources():
    assert set(MIXES) == set(PREPARED)
    for mix in MIXES.values():
        assert mix.sources.keys() <= SOURCES.keys()
