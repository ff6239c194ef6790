"""The table of how fast batches are generated."""

import json
import sys

import pytest
import torch

from lkda.bench import synthetic_draws
from lkda.data.synthetic.palindrome import Palindrome


@pytest.fixture
def call(monkeypatch):
    monkeypatch.setattr(synthetic_draws, "tasks", lambda: [Palindrome(context=32)])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["", *map(str, words)])
        synthetic_draws.main()

    return call


def test_the_table_has_a_row_for_each_task(call, tmp_path, capsys):
    call("--out", tmp_path / "draws" / "table.json")
    (row,) = json.loads((tmp_path / "draws" / "table.json").read_text())["rows"]
    assert (row["task"], row["length"]) == ("palindrome", "32")
    assert 0 < row["ms per batch"] < 10_000
    assert capsys.readouterr().out.startswith("palindrome of 32 tokens: ")


def test_a_directory_is_refused_before_anything_is_measured(call, tmp_path, capsys):
    with pytest.raises(SystemExit, match=f"--out={tmp_path} is a directory"):
        call("--out", tmp_path)
    assert not capsys.readouterr().out


def test_help_writes_no_file(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        call("--help")
    assert ended.value.code == 0
    assert not list(tmp_path.iterdir())
