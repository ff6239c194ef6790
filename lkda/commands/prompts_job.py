"""Texts for a file of prompts, written to a file. A job that was interrupted continues where it stopped.

Finished texts are appended to a journal beside the output, OUT.part, whose first line has the settings. The output is
written from it atomically when all texts are finished, in the order of the prompts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lkda.checks import InputError
from lkda.commands.command_line.text import check_text
from lkda.data.progress import patient_progress
from lkda.generation.generate import Generated, Piece
from lkda.generation.session import fingerprint
from lkda.io import check_output_file, named, write_atomically
from lkda.models.lm import LanguageModel

# What decides about the texts, beside the model and the prompts.
SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "num_samples", "stop", "seed", "ignore_eos")
# How the first line of a journal begins. It may be cut off, if the disk was full or the process was killed.
BEGINNING = f'{{"{SETTINGS[0]}": '.encode()

Numbers = tuple[int, int]  # of the prompt and of the sample


@dataclass
class PromptsJob:
    """The prompts of a file, and the texts that are finished.

    Attributes:
        settings: those that decide about the texts.
        header: the first line of the journal, once `begin` was called.
        kept: bytes of the journal, from its beginning, that are of this job and whole.
    """

    prompts: list[str]
    out: Path
    settings: dict[str, Any]
    finished: dict[Numbers, dict[str, Any]] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    kept: int = 0

    @property
    def journal(self) -> Path:
        return self.out.with_name(f"{self.out.name}.part")

    def begin(self, model: LanguageModel, wanted: Sequence[Numbers]) -> list[Numbers]:
        """Those of `wanted` that are not finished yet. Nothing is written.

        Raises: ValueError if the journal has texts of other settings, prompts or another model.
        """
        prompts = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        self.header = {**self.settings, "prompts": prompts, "model": fingerprint(model)}
        if self.journal.exists():
            content = self.journal.read_bytes()
            records, size = _whole_lines(content)
            first, *lines = records or [{}]
            if not records and content[: len(BEGINNING)] == BEGINNING[: len(content)]:
                return list(wanted)
            if "prompts" not in first or not all({"prompt_index", "sample_index"} <= line.keys() for line in lines):
                raise InputError(f"{self.journal} does not hold finished texts: move it, or give another out=...")
            changed = [name for name, value in self.header.items() if first.get(name) != value]
            if changed and lines:
                raise InputError(
                    f"{self.journal} holds finished texts of another {', '.join(changed)}: start the command with the "
                    "earlier settings, or delete that file to begin again."
                )
            self.finished = {(line["prompt_index"], line["sample_index"]): line for line in lines}
            self.kept = 0 if changed else size
        return [numbers for numbers in wanted if numbers not in self.finished]

    def write(self, pieces: Iterable[Piece]) -> None:
        """Append each finished text to the journal, then write the output and remove the journal.

        Raises: ValueError if another process writes to this journal.
        """
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.journal.open("ab") as file:
                self._lock(file)
                self._append(pieces, file)
            write_atomically(self.out, b"".join(_line(self.finished[numbers]) for numbers in sorted(self.finished)))
            self.journal.unlink()
        except OSError as error:
            raise named(error, Path(error.filename or self.journal)) from error

    def _append(self, pieces: Iterable[Piece], file: BinaryIO) -> None:
        file.truncate(self.kept)
        if not self.kept:
            file.write(_line(self.header))
            file.flush()
        with patient_progress() as bar:
            total = len(self.prompts) * self.settings["num_samples"]
            task = bar.add_task("texts", total=total, completed=len(self.finished))
            for piece in pieces:
                if piece.result is not None:
                    line = _record(piece.result)
                    self.finished[piece.prompt_index, piece.sample_index] = line
                    file.write(_line(line))
                    file.flush()
                    bar.advance(task)

    def _lock(self, file: BinaryIO) -> None:
        """Raises ValueError if another process has the journal. The lock ends with the process, however that ends."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another process is writing to {self.out}: wait for it, or give another out=..."
            ) from error


def check_prompts_job(settings: Mapping[str, Any]) -> PromptsJob:
    """The job of `prompts=` and `out=`. Raises ValueError if a file cannot be read or written."""
    for name in ("prompt", "prompt_file"):
        if settings[name] is not None:
            raise InputError(f"give either prompts=... or {name}=..., not both.")
    if settings["out"] is None:
        raise InputError("prompts=... needs out=FILE.jsonl, the file for the texts.")
    source, out = Path(check_text("prompts", settings["prompts"])), Path(check_text("out", settings["out"]))
    if out.suffix != ".jsonl":
        raise InputError(f"out must be a .jsonl file, got {out}.")
    check_output_file(out, option="out")
    job = PromptsJob(_read_prompts(source), out, {name: settings[name] for name in SETTINGS})
    if out.exists() and not job.journal.exists():
        raise InputError(f"out={out} exists already: give another file, or delete it.")
    return job


def _read_prompts(path: Path) -> list[str]:
    """Raises ValueError, naming the line, for a file that holds something else than prompts."""
    if path.suffix not in (".jsonl", ".txt"):
        raise InputError(f"prompts must be a .txt file (a prompt per line) or a .jsonl file, got {path}.")
    try:
        # Not splitlines: a text may hold other line separators, such as U+2028.
        # The byte order mark with which some editors begin a file is no part of the first prompt.
        lines = [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]
    except OSError as error:
        raise InputError(f"cannot read prompts={path}: {error.strerror}. Give a .txt or .jsonl file.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"prompts={path} is not UTF-8: {error}.") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError(f"prompts={path} holds no prompt.")
    if path.suffix == ".txt":
        return [line for _, line in numbered]
    return [_prompt_of(path, number, line) for number, line in numbered]


def _prompt_of(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # RecursionError: very many nested brackets
        raise InputError(f"line {number} of prompts={path} is not JSON: {error}.") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise InputError(f'line {number} of prompts={path} must be {{"prompt": "..."}}, got {line[:80]}.')
    return check_text(f"the prompt in line {number} of prompts={path}", record["prompt"])


def _record(result: Generated) -> dict[str, Any]:
    return {**asdict(result), "tokens": list(result.tokens)}


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _whole_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The objects in the lines of a journal, up to one that is cut off or no object, and the bytes of these lines."""
    found: list[dict[str, Any]] = []
    size = 0
    for line in content.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict):
            break
        found.append(record)
        size += len(line) + 1
    return found, size
