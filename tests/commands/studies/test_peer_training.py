"""Models of other packages, trained by our loop from our weights, have our losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console

from lkda.commands.benchmarks import peers
from lkda.commands.studies import peer_training
from lkda.commands.studies.peer_training import compare_training, main, run
from lkda.report.redraw import main as redraw
from tests.commands.small import composed

pytest.importorskip("transformers")

# High rates from the first step on: attention soon matters to the loss.
FAST = ("scheduler=constant", "scheduler.warmup_steps=0", "optimizer.lr=0.02", "trainer.max_steps=5")
QUIET = Console(quiet=True)


@pytest.fixture
def settings(corpus: Path) -> tuple[str, ...]:
    return ("debug=fast", "data=files", f"data.paths=[{corpus}]", "data.context=64", "trainer=cpu", *FAST)


def config(name: str, settings: tuple[str, ...], *more: str) -> DictConfig:
    return composed("train", *peers.PEERS[name].overrides, *settings, *more)


def differences(found: dict[str, Any], side: str = "theirs") -> list[float]:
    """Of the loss of each step, and of the validation, from ours."""
    ours, theirs = ([*found[which]["loss"], found[which]["val_loss"]] for which in ("ours", side))
    assert len(ours) == 6
    return [abs(a - b) for a, b in zip(ours, theirs, strict=True)]


MORE = ("model.tie_embeddings=false", "trainer.accumulate_grad_batches=2")


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", ()),
        ("qwen3", MORE),
        pytest.param("llama", MORE, marks=pytest.mark.long),
        pytest.param("qwen3", (), marks=pytest.mark.long),
    ],
)
def test_the_losses_are_equal(name: str, more: tuple[str, ...], settings: tuple[str, ...]) -> None:
    """In float64, but for what is float32 on both sides, the loss (numbers near 6 are 5e-7 apart there), and on theirs,
    the norms and the rotary angles."""
    found = compare_training(name, config(name, settings, "trainer.precision=64-true", *more), QUIET)
    assert max(differences(found)) < 3e-6
    assert max(differences(found, "ours_rounded")) < 3e-5
    assert max(found["ours"]["loss"]) - min(found["ours"]["loss"]) > 0.1  # something was trained


def test_a_peer_that_computes_something_else_is_seen(
    settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary frequencies of a half."""
    load = peers._load_body

    def load_another(*given: Any) -> torch.nn.Module:
        body = load(*given)
        body.rotary_emb.inv_freq.mul_(0.5)
        return body

    monkeypatch.setattr(peers, "_load_body", load_another)
    found = compare_training("llama", config("llama", settings, "trainer.precision=64-true"), QUIET)
    assert max(differences(found)) > 1e-4


def test_weights_are_changed_by_one_rounding() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    before, after = model.weight, peer_training.rounded(model).weight
    relative = ((after - before) / before).abs()
    assert 0 < relative.max() <= 2**-22
    assert 0.4 < (relative > 0).float().mean() < 0.9


def test_documents_of_a_row_do_not_see_each_other() -> None:
    """The layers of a peer are given each row with the bounds of the documents inside it."""
    seen = {}

    class Body(torch.nn.Module):
        def forward(self, **given: Any) -> Any:
            seen.update(given)
            return type("Output", (), {"last_hidden_state": given["inputs_embeds"]})

    layers = peers.SoftmaxLayers(Body(), 4)
    x = torch.randn(1, 8, 3)
    y, _ = layers(x, cu_seqlens=torch.tensor([0, 3, 4, 8, 8, 8]))
    assert torch.equal(y, x)
    assert seen["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    first, second = seen["attention_mask"][:, 0].int().tolist()
    assert first == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    assert second == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_kda_is_given_the_bounds_alone_and_keeps_a_bias_of_zero() -> None:
    class Body(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g_proj = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3))

        def forward(self, *, inputs_embeds: torch.Tensor, cu_seqlens: torch.Tensor, use_cache: bool) -> Any:
            assert cu_seqlens.tolist() == [0, 3, 4, 8]
            assert cu_seqlens.dtype == torch.int64
            assert not use_cache
            return type("Output", (), {"last_hidden_state": inputs_embeds})

    layers = peers.KDALayers(Body(), 4)
    x = torch.randn(1, 8, 3)
    assert layers(x, cu_seqlens=torch.tensor([0, 3, 4, 8, 8, 8], dtype=torch.int32))[0] is x
    frozen = [name for name, parameter in layers.named_parameters() if not parameter.requires_grad]
    assert frozen == ["body.g_proj.1.bias"]


def test_a_peer_that_trains_other_parameters_is_refused(
    settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = peers._load_body

    def load_frozen(*given: Any) -> torch.nn.Module:
        body = load(*given)
        body.norm.weight.requires_grad_(False)
        return body

    monkeypatch.setattr(peers, "_load_body", load_frozen)
    with pytest.raises(ValueError, match="peer llama must train the same numbers of parameters as lkda"):
        compare_training("llama", config("llama", settings), QUIET)


@pytest.mark.long
def test_a_peer_that_fails_does_not_stop_the_others(
    settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And everything is drawn from the file that is written."""
    monkeypatch.setitem(sys.modules, "fla", None)  # as if it were not installed
    with pytest.raises(SystemExit) as ending:
        main(["--peers", "fla_kda,llama", "--out", str(tmp_path / "out"), *settings])
    assert ending.value.code == 1
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [peer["peer"] for peer in found["peers"]] == ["llama"]
    assert found["failed"] == {
        "fla_kda": "InputError: peer fla_kda needs the package fla: pip install flash-linear-attention."
    }
    assert "fla_kda failed: InputError" in capsys.readouterr().out
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(written) == {"results.json", "table.json", "peer_training.png"}
    redraw([str(tmp_path / "out")])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == written


def test_an_error_of_another_package_keeps_its_traceback(
    settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_down(*_: Any) -> None:
        raise RuntimeError("their kernel\nfailed")

    monkeypatch.setattr(peer_training, "compare_training", break_down)
    assert not run(["llama", "qwen3"], tmp_path / "out", settings, QUIET)
    failed = json.loads((tmp_path / "out" / "results.json").read_text())["failed"]
    assert failed == dict.fromkeys(["llama", "qwen3"], "RuntimeError: their kernel failed")
    assert "in break_down" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "overrides", "reason"),
    [
        (["llama", "gpt2"], [], "--peers takes names of llama, qwen3, fla_kda, separated by commas; got 'llama,gpt2'"),
        ([], [], "--peers takes names of"),
        (["llama"], ["compile=true"], "compile=true has no effect here"),
        (["llama"], ["mixer=kda"], "mixer=kda has no effect here"),
        (["llama"], ["trainer.max_steps=0"], "trainer.max_steps must be a whole number of 1 or more"),
        (["llama"], ["model.num_heads=3"], "num_heads"),
    ],
)
def test_bad_input_is_told_before_any_training(
    names: list[str], overrides: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_training, "compare_training", lambda *_: pytest.fail("it trains"))
    with pytest.raises(ValueError, match=reason):
        run(names, tmp_path / "out", ["debug=fast", *overrides], QUIET)
    assert not (tmp_path / "out").exists()


def test_a_peer_that_needs_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())  # as if everything were installed
    with pytest.raises(ValueError, match="peer fla_kda needs a GPU, but this run is on cpu"):
        peers.check_available("fla_kda", torch.device("cpu"))
    peers.check_available("llama", torch.device("cpu"))


def test_data_that_are_no_text_are_refused() -> None:
    with pytest.raises(ValueError, match="peers are compared on packed text"):
        compare_training("llama", composed("train", *peers.PEERS["llama"].overrides, "data=palindrome"), QUIET)
