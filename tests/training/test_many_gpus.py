"""On several GPUs, through NCCL: the runs of one GPU at the same number of tokens per step."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
STEPS = 200
# Losses of bf16 runs whose sums have another order, relative. The data are text, so that there is something to learn.
TOLERANCE = 1e-2
# At the usual rate of 4e-3 rounding grows to several percent after 60 steps, also between two runs on one device of
# which one adds up each gradient in two pieces. At this rate those two differ by 0.1% at most (KDA on a CPU).
RATE = 5e-4
SENTENCES = 6000  # in each of six files; the runs read less than all of them
MINUTES = 0.5  # that a process waits for one that does not answer
# NVLink multicast needs rights that containers often lack.
ENVIRONMENT = {**os.environ, "NCCL_NVLS_ENABLE": "0"}


def trained(corpus: Path, directory: Path, *overrides: str) -> dict[int, float]:
    """Train in processes of their own. Returns the training loss of every tenth step."""
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *settings(corpus, directory), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert json.loads((directory / "summary.json").read_text())["status"] == "finished"
    with open(directory / "metrics.csv", newline="") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def settings(corpus: Path, directory: Path) -> tuple[str, ...]:
    return (
        *("data=files", f"data.paths=[{corpus}]", "data.vocab_size=300", "data.context=128", "data.batch_size=8"),
        *("model=tiny", "model.vocab_size=null", f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS}"),
        *(f"optimizer.lr={RATE}", "sample.max_new_tokens=0", "callbacks=none", f"hydra.run.dir={directory}"),
    )


@pytest.fixture(scope="module")
def corpus(simple_text: Callable[[int], Path]) -> Path:
    """So much text that nothing is read twice. What is read again and again is learned by heart, and rounding makes
    large differences in its small loss."""
    return simple_text(SENTENCES)


@pytest.fixture(scope="module")
def on_one(corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    @cache
    def of(mixer: str) -> dict[int, float]:
        return trained(corpus, tmp_path_factory.mktemp("one") / "run", "trainer=gpu", f"mixer={mixer}")

    return of


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["kda", "kda_softmax_3to1", "simplified"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("how", ["ddp", "fsdp", "context_parallel"])
def test_as_on_one_gpu(how: str, count: int, mixer: str, corpus: Path, tmp_path: Path, on_one) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    parts = count if how == "context_parallel" else 1
    strategy = "ddp" if how == "context_parallel" else how
    many = (f"trainer={strategy}", f"trainer.devices={count}", f"trainer.context_parallel={parts}", f"mixer={mixer}")
    found, expected = trained(corpus, tmp_path / "run", *many), on_one(mixer)
    assert found.keys() == expected.keys()
    assert max(expected) == STEPS
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=TOLERANCE), step


@pytest.mark.gpu
def test_resumed_with_another_number_of_gpus(corpus: Path, tmp_path: Path) -> None:
    """From a checkpoint that two GPUs share, on one, and on two again."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    run = tmp_path / "run"
    trained(corpus, run, "trainer=fsdp", "trainer.devices=2", "trainer.max_steps=20")
    trained(corpus, run, "trainer=gpu", "trainer.max_steps=40", "resume=true")
    losses = trained(corpus, run, "trainer=ddp", "trainer.devices=2", "trainer.max_steps=60", "resume=true")
    assert losses[60] < losses[20] < losses[1]


@pytest.mark.gpu
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_run(fault: signal.Signals, corpus: Path, tmp_path: Path) -> None:
    """One of two is killed, or stopped as if it hung. The run ends with a line that says so, and can be continued."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    run = tmp_path / "run"
    words = (*settings(corpus, run), "trainer=ddp", "trainer.devices=2", "checkpoint.every_n_steps=10")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *words, f"trainer.timeout_minutes={MINUTES}"]
    log = tmp_path / "log"  # not a pipe, which the other process would keep open
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT)
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (other,) = (int(pid) for pid in children if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(other, fault)
    try:
        assert process.wait(60 + 60 * MINUTES) != 0
    finally:
        for pid in (other, process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    said = log.read_text()
    assert re.search(r"another process of the run has ended|Child process with PID \d+ terminated|Timeout", said), said
    losses = trained(corpus, run, "trainer=ddp", "trainer.devices=2", "resume=true")
    assert max(losses) == STEPS
