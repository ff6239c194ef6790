"""The command that scripts/prepare_data.py prints at its end trains on what it has prepared."""

import random
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from lkda.commands.prepare_data import prepare_data
from lkda.commands.train import train
from tests.commands.small import composed

VOCABULARY = 2500  # of the default model: 2048
SHORT = (
    *("trainer=cpu", "trainer.max_steps=1", "trainer.limit_val_batches=1", "data.context=8", "data.batch_size=1"),
    *("model.num_layers=1", "sample.max_new_tokens=0"),
)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A directory of tokens of many words, and what was printed."""
    tmp, letters = tmp_path_factory.mktemp("prepared"), random.Random(1)
    words = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(1500)]
    (tmp / "text.txt").write_text(" ".join(words * 2))
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("rich.console.Console.print", lambda self, *lines, **options: printed.extend(map(str, lines)))
        prepare_data(
            composed("prepare_data", f"paths=[{tmp}/text.txt]", f"out={tmp}/tokens", f"vocab_size={VOCABULARY}")
        )
    return tmp / "tokens", "\n".join(printed)


def overrides(printed: str) -> list[str]:
    """Those of the command in the last line."""
    words = shlex.split(printed.splitlines()[-1])
    return words[next(i for i, word in enumerate(words) if "train" in word) + 1 :]


def test_the_printed_command_trains_the_default_model(tokens: tuple[Path, str], tmp_path: Path) -> None:
    directory, printed = tokens
    words = overrides(printed)
    assert words == ["data=tokens", f"data.paths=[{directory}]", f"model.vocab_size={VOCABULARY}"]
    assert train(composed("train", *words, *SHORT), tmp_path / "run")["steps"] == 1


def test_the_printed_command_for_a_mix(
    tokens: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepared(out: Path, **options: Any) -> dict[str, Any]:
        shutil.copytree(tokens[0], out)
        window = {"window_tokens": 32, "before": {}, "after": {}, "dropped_bytes": 0, "train_bytes": 0}
        return {"sources": [], "decontamination": window}

    monkeypatch.setattr("lkda.commands.prepare_data.prepare_mix", prepared)
    prepare_data(composed("prepare_data", f"out={tmp_path}/mix"))
    words = overrides(capsys.readouterr().out.strip())
    assert words == ["data=prose", f"data.directory={tmp_path}/mix", f"model.vocab_size={VOCABULARY}"]
    assert Tokenizer.from_file(f"{tmp_path}/mix/tokenizer.json").get_vocab_size() == VOCABULARY
