"""Run directories as scripts/train.py leaves them, with made-up courses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

STATE_BYTES = {"kda": 280_000, "simplified": 12_000, "softmax": 2_097_152, "kda_mla_3to1": 420_000}
FLOOR = {"kda": 3.9, "simplified": 4.4, "softmax": 4.0, "kda_mla_3to1": 3.85}
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


def write_run(directory: Path, mixer: str, *, seed: int = 0, **changes: Any) -> Path:
    """A finished run of `mixer`; `changes` overwrite its summary."""
    directory.mkdir(parents=True)
    rows, loss = [], math.nan
    for step in range(10, 401, 10):
        loss = FLOOR[mixer] + 0.03 * seed + 4.0 * math.exp(-step / 60)
        row = {"step": step, "tokens": step * 2048, "seconds": step * (0.2 if mixer == "simplified" else 0.3)}
        row |= {"train/loss": loss + 0.1 * math.sin(step), "train/bits_per_byte": loss / 2.48}
        rows.append(row)
        if step % 100 == 0:
            validation = {"val/loss": loss, "val/bits_per_byte": loss / 2.48}
            rows.append({name: row[name] for name in ("step", "tokens", "seconds")} | validation)
    lines = [",".join(COLUMNS), *(",".join(str(row.get(name, "")) for name in COLUMNS) for row in rows)]
    (directory / "metrics.csv").write_text("\n".join(lines) + "\n")
    (directory / "config.yaml").write_text(f"seed: {seed}\n")
    summary = {
        "val/loss": loss,
        "val/perplexity": math.exp(loss),
        "val/bits_per_byte": loss / 2.48,
        "unigram_entropy": 6.49,
        "tokens": 400 * 2048,
        "tokens_per_s": 9000 + 100 * seed,
        "params": 1_300_000,
        "state_bytes": STATE_BYTES[mixer],
        "flops_per_token": 4.2e6,
        "mixer": mixer,
        "model": "tiny",
        "data": "sotu",
        "backend": "chunk",
        "device": "cpu",
        "seed": seed,
        "status": "finished",
    }
    (directory / "summary.json").write_text(json.dumps(summary | changes))
    return directory


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Every mixer once, KDA with three seeds."""
    made = [write_run(tmp_path / "runs" / mixer, mixer) for mixer in STATE_BYTES]
    return [*made, *(write_run(tmp_path / "runs" / f"kda_{seed}", "kda", seed=seed) for seed in (1, 2))]
