"""The benchmark of decoding measures what it says, and a row that fails does not lose the others."""

from __future__ import annotations

import json

import pytest
import torch

from lkda.bench import decode


def test_rows_of_a_small_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "SECONDS", 0.01)
    monkeypatch.setattr(decode, "FORWARD", (1, 64))
    monkeypatch.setattr(decode, "header", lambda device: {"device": str(device)})
    out = tmp_path / "decode.json"
    sizes = ["--model", "tiny", "--mixer", "kda", "kda+softmax", "--batch", "2", "--context", "300"]
    decode.main([*sizes, "--prefill", "--device", "cpu", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["kind"] == "decode"
    speeds = [row for row in found["rows"] if "tokens_per_s" in row]
    assert [(row["mixer"], row["batch"], row["context"]) for row in speeds] == [
        ("kda", 2, 300),
        ("kda+softmax", 2, 300),
    ]
    assert all(row["tokens_per_s"] > 0 for row in speeds)
    assert [row["prefill_tokens_per_s"] > 0 for row in found["rows"] if "prefill_tokens_per_s" in row] == [True, True]
    assert speeds[0]["bytes_per_sequence"] < speeds[1]["bytes_per_sequence"]
    assert "tokens_per_s=" in capsys.readouterr().out


def test_a_row_that_fails_says_why():
    def fails():
        raise torch.OutOfMemoryError("no\nmemory")

    assert decode._guarded(fails, 4, 8) == {"batch": 4, "context": 8, "error": "OutOfMemoryError: no memory"}


def test_an_unknown_peer_is_refused():
    with pytest.raises(SystemExit):
        decode.main(["--peers", "nobody"])
