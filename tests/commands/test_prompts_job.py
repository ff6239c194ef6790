"""scripts/generate.py for a file of prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

import lkda
from lkda.commands.generate import generate
from tests.commands.small import composed
from tests.commands.test_full_disk import largest_file
from tests.generation.test_generate import byte_tokenizer, model_of

PROMPTS = ["ab", "cde", "f"]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    lkda.export(model_of(["kda"]), byte_tokenizer(), tmp_path / "exported")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return tmp_path / "exported"


def run(exported: Path, *overrides: str) -> None:
    folder = exported.parent
    given = [f"ckpt={exported}", f"prompts={folder}/prompts.txt", f"out={folder}/out.jsonl", "accelerator=cpu"]
    names = {override.partition("=")[0] for override in overrides}
    defaults = [word for word in (*given, "max_new_tokens=6", "num_samples=2") if word.partition("=")[0] not in names]
    generate(composed("generate", *defaults, *overrides))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_texts_of_many_prompts(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(exported)
    found = lines(exported.parent / "out.jsonl")
    want = lkda.generate(
        *lkda.load(exported), PROMPTS, max_new_tokens=6, num_samples=2, temperature=0.8, top_p=0.95, seed=1
    )
    assert [x["text"] for x in found] == want.texts
    assert [x["prompt"] for x in found] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [(x["reason"], tuple(x["tokens"])) for x in found] == list(zip(want.reasons, want.tokens))
    assert list(exported.parent.glob("*.part")) == []
    assert "wrote" in capsys.readouterr().err
    with pytest.raises(ValueError, match="exists already"):
        run(exported)


def test_an_interrupted_job_continues(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(exported, f"out={exported.parent}/whole.jsonl")
    from lkda.commands import prompts_job

    written, record = [], prompts_job._record

    def interrupted(result):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append((result.prompt_index, result.sample_index))
        return record(result)

    monkeypatch.setattr(prompts_job, "_record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(exported)
    journal = exported.parent / "out.jsonl.part"
    assert len(lines(journal)) == 4
    journal.write_text(journal.read_text() + '{"prompt_index": 1, "sam')  # a line that was cut off
    monkeypatch.setattr(prompts_job, "_record", record)
    with pytest.raises(ValueError, match=r"finished texts of another temperature, seed: start the command with"):
        run(exported, "temperature=0.5", "seed=7")
    again = []
    monkeypatch.setattr(prompts_job, "_record", lambda result: again.append(result) or record(result))
    run(exported)
    assert len(again) == 3
    assert lines(exported.parent / "out.jsonl") == lines(exported.parent / "whole.jsonl")


def test_what_is_refused_leaves_nothing_that_is_in_the_way(exported: Path) -> None:
    lkda.export(model_of(["softmax"]), byte_tokenizer(), exported.parent / "softmax")
    out = exported.parent / "new" / "out.jsonl"
    given = (f"ckpt={exported.parent}/softmax", f"out={out}")
    with pytest.raises(ValueError, match="give a smaller max_new_tokens"):
        run(exported, *given, "max_new_tokens=1000000000000")
    assert not out.parent.exists()
    run(exported, *given)
    assert len(lines(out)) == 6


def test_a_journal_without_texts_is_of_no_job(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lkda.commands import prompts_job

    with monkeypatch.context() as patch:
        patch.setattr(prompts_job, "_record", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(exported)
    assert len(lines(exported.parent / "out.jsonl.part")) == 1
    run(exported, "seed=7")
    assert len(lines(exported.parent / "out.jsonl")) == 6


@pytest.mark.parametrize("size", [0, 5, 60])
def test_a_first_line_that_was_cut_off_is_of_no_job(exported: Path, size: int) -> None:
    with pytest.raises(OSError, match="File too large"), largest_file(size):
        run(exported)
    assert (exported.parent / "out.jsonl.part").stat().st_size == size
    run(exported, "seed=7")
    assert len(lines(exported.parent / "out.jsonl")) == 6


def interrupt(result: object) -> None:
    raise KeyboardInterrupt


def test_two_processes_do_not_write_to_one_file(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lkda.commands import prompts_job

    tried, record = [], prompts_job._record

    def recording(result):
        if not tried:
            tried.append((exported.parent / "out.jsonl.part").read_text())
            with pytest.raises(ValueError, match=r"another process is writing to .*out.jsonl: wait for it"):
                run(exported)
            assert (exported.parent / "out.jsonl.part").read_text() == tried[0]
        return record(result)

    monkeypatch.setattr(prompts_job, "_record", recording)
    run(exported)
    assert len(lines(exported.parent / "out.jsonl")) == 6


def test_a_full_disk_is_named_and_the_job_continues(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(exported, f"out={exported.parent}/whole.jsonl")
    with pytest.raises(OSError, match="File too large") as error, largest_file(900):
        run(exported)
    journal = exported.parent / "out.jsonl.part"
    assert error.value.filename == str(journal)
    assert journal.stat().st_size == 900
    run(exported)
    assert lines(exported.parent / "out.jsonl") == lines(exported.parent / "whole.jsonl")


def test_a_prompt_without_tokens_is_named(exported: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"x": 0, "ab": 1}))
    lkda.export(model_of(["kda"]), tokenizer, exported.parent / "words")
    source = exported.parent / "prompts.jsonl"
    source.write_text('{"prompt": "ab"}\n{"prompt": ""}\n')
    with pytest.raises(ValueError, match=r"prompt 1 \(from 0\) of .*prompts.jsonl is empty, and the tokenizer has no"):
        run(exported, f"ckpt={exported.parent}/words", f"prompts={source}")
    assert list(exported.parent.glob("*.part")) == []


def test_prompts_as_json(exported: Path) -> None:
    source = exported.parent / "prompts.jsonl"
    source.write_bytes('{"prompt": "ab"}\r\n\n{"prompt": "line\\nbreak"}\n{"prompt": "a\u2028b"}'.encode())
    run(exported, f"prompts={source}", "num_samples=1")
    found = (exported.parent / "out.jsonl").read_text().split("\n")[:-1]
    assert [json.loads(line)["prompt"] for line in found] == ["ab", "line\nbreak", "a\u2028b"]


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ('{"prompt": "a"}\n{"prompt"', [], "line 2 of prompts=.* is not JSON"),
        ('{"text": "a"}', [], "line 1 of prompts=.* must be"),
        ("\n", [], "holds no prompt"),
        ("[" * 100_000, [], "line 1 of prompts=.* is not JSON"),
        ('{"prompt": "a"}', ["stop=''"], "stop must be a text that is not empty"),
        ('{"prompt": "a"}', ["stop=0"], "stop must be a text that is not empty"),
        ('{"prompt": "a"}', ["out=a.txt"], "out must be a .jsonl file"),
        ('{"prompt": "a"}', ["prompt=b"], "give either prompts=... or prompt="),
        ('{"prompt": "a"}', ["prompts=none.jsonl"], "cannot read prompts=none.jsonl: No such file"),
        ('{"prompt": "a"}', ["prompts=a.csv"], "prompts must be a .txt file"),
        ('{"prompt": "a"}', ["state_dtype=int4"], "state_dtype"),
        ('{"prompt": "a"}', ["num_samples=1000000000"], "num_samples must be at most 1000000"),
        ('{"prompt": "a"}', ["num_samples=0"], "num_samples must be a whole number of 1 or more"),
    ],
)
def test_bad_files_are_one_line(exported: Path, content: str, overrides: list[str], message: str) -> None:
    source = exported.parent / "prompts.jsonl"
    source.write_text(content)
    with pytest.raises(ValueError, match=message):
        run(exported, *(overrides if any("prompts=" in x for x in overrides) else [f"prompts={source}", *overrides]))


@pytest.mark.parametrize("content", ["[]\n", "{x", '{"prompts": ""}\n{"text": "x"}\n', "words\n"])
def test_a_file_that_is_no_journal_is_kept(exported: Path, content: str) -> None:
    journal = exported.parent / "out.jsonl.part"
    journal.write_text(content)
    with pytest.raises(ValueError, match=r"out.jsonl.part does not hold finished texts: move it"):
        run(exported)
    assert journal.read_text() == content


def test_a_byte_order_mark_is_no_part_of_a_prompt(exported: Path) -> None:
    source = exported.parent / "prompts.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "ab"}\n')
    run(exported, f"prompts={source}", "num_samples=1")
    assert [line["prompt"] for line in lines(exported.parent / "out.jsonl")] == ["ab"]


@pytest.mark.long
def test_a_stop_text_has_escapes(exported: Path) -> None:
    # Hydra and the shell leave the two signs \\n as they are.
    run(exported, 'stop=["\\n","b\\t"]', "max_new_tokens=300", "temperature=1.5", "num_samples=8", "ignore_eos=true")
    found = lines(exported.parent / "out.jsonl")
    assert not any("\n" in line["text"] for line in found)
    assert {line["reason"] for line in found} >= {"stop"}
    run(
        exported,
        "stop='\\\\n'",
        f"out={exported.parent}/other.jsonl",
        "max_new_tokens=300",
        "temperature=1.5",
        "num_samples=8",
    )
    assert any("\n" in line["text"] for line in lines(exported.parent / "other.jsonl"))


def test_samples_of_one_prompt_are_whole_texts(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("max_new_tokens=5", "num_samples=3", "state_dtype=bfloat16", "top_k=20", "min_p=0.01", "stop=x")
    text = generate(composed("generate", f"ckpt={exported}", "prompt=ab", "accelerator=cpu", *options))
    assert capsys.readouterr().out == text + "\n"
    assert text.count("ab") >= 3
