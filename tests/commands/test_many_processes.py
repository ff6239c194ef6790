"""Several processes train as one does: the same sequences, losses and weights."""

import csv
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from lkda.checks import InputError
from lkda.commands.command_line.errors import CommandError
from lkda.commands.export import export
from lkda.commands.run.checkpoint_loading import load_trained
from lkda.commands.run.run_setup import plan_run
from lkda.commands.settings.data_options import build_data
from lkda.commands.train import train
from lkda.training import losses
from lkda.training.checkpoint import read_checkpoint
from lkda.training.processes import value_of_first
from lkda.training.sharded_checkpoint import read_sharded, rows_of
from lkda.training.task import LanguageModelTask
from tests.commands.ranks import on_ranks
from tests.commands.small import ROOT, TIMES, composed, small_run

SAME = (
    "data.batch_size=4",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=1.0",
    "trainer.gradient_clip_val=0.5",  # below the norms of the first steps, so that all are clipped
    "sample.max_new_tokens=0",
)
STRATEGIES = ("ddp", "fsdp")
LONG_DDP, SLOW_FSDP = pytest.param("ddp", marks=pytest.mark.long), pytest.param("fsdp", marks=pytest.mark.slow)
Run = Callable[..., Path]


def on(strategy: str, count: int = 2) -> tuple[str, ...]:
    return f"trainer={strategy}", "trainer.accelerator=cpu", f"trainer.devices={count}"


def trained(corpus: Path, directory: Path, *overrides: str, processes: int = 1) -> list[Any]:
    """Train in that many processes. Returns what `train` returns in each."""
    config = composed("train", *small_run(corpus, *SAME, *overrides))
    if processes == 1:
        return [train(config, directory)]
    return on_ranks(processes, lambda rank: train(config, directory), directory.with_name(directory.name + "_ranks"))


def rows(directory: Path) -> list[dict[str, float]]:
    with open(directory / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v and k not in TIMES} for row in csv.DictReader(file)]


def assert_same_rows(ours: Path, theirs: Path, *, rel: float) -> None:
    for one, other in zip(rows(ours), rows(theirs), strict=True):
        assert one == pytest.approx(other, rel=rel)


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in one process with these overrides, which runs once."""
    known: dict[tuple[str, ...], Path] = {}

    def of(*overrides: str) -> Path:
        if overrides not in known:
            known[overrides] = tmp_path_factory.mktemp("alone") / "run"
            trained(corpus, known[overrides], *overrides)
        return known[overrides]

    return of


@pytest.mark.parametrize("pieces", [1, pytest.param(2, marks=pytest.mark.long)])
def test_ddp_is_one_process(pieces: int, corpus: Path, tmp_path: Path, alone: Run) -> None:
    overrides = ("trainer.precision=64-true", f"trainer.accumulate_grad_batches={pieces}")
    summaries = trained(corpus, tmp_path / "run", *overrides, *on("ddp"), processes=2)
    assert summaries[0]["tokens"] == 4 * 4 * 32 * pieces
    assert summaries[1] == {}  # one process writes
    assert summaries[0]["device"].startswith("2 x cpu")
    assert_same_rows(tmp_path / "run", alone(*overrides), rel=1e-6)
    assert all(row["train/clipped_share"] == 1 for row in rows(tmp_path / "run") if "train/loss" in row)
    ours, theirs = (
        read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
        for run in (tmp_path / "run", alone(*overrides))
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("trainer.accumulate_grad_batches=2", "checkpointing=block"), marks=pytest.mark.long),
        pytest.param(("optimizer=muon",), marks=pytest.mark.long),
    ],
)
def test_fsdp_is_one_process(overrides: tuple[str, ...], corpus: Path, tmp_path: Path, alone: Run) -> None:
    trained(corpus, tmp_path / "run", *overrides, *on("fsdp"), processes=2)
    rel = 2e-3 if "optimizer=muon" in overrides else 2e-5  # muon multiplies matrices in bf16
    assert_same_rows(tmp_path / "run", alone(*overrides), rel=rel)


@pytest.mark.long
def test_bf16_and_fsdp(corpus: Path, tmp_path: Path, alone: Run) -> None:
    trained(corpus, tmp_path / "run", "trainer.precision=bf16-mixed", *on("fsdp"), processes=2)
    assert_same_rows(tmp_path / "run", alone("trainer.precision=bf16-mixed"), rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_first_weights_are_those_of_one_process(strategy: str, corpus: Path, tmp_path: Path) -> None:
    """Bit for bit, in every process."""

    def first(rank: int, *overrides: str) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}

        def note(task: LanguageModelTask) -> None:
            for name, p in task.model.named_parameters():
                found[name] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()

        LanguageModelTask.on_train_start = note  # type: ignore[method-assign]  # in a process of its own
        train(
            composed("train", *small_run(corpus, *SAME, "trainer.max_steps=1", *overrides)),
            tmp_path / str(len(overrides)),
        )
        return found

    (expected,) = on_ranks(1, first, tmp_path / "one")
    for found in on_ranks(2, lambda rank: first(rank, *on(strategy)), tmp_path / "two"):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def seen_rows(rank: int, config: Any, directory: Path) -> list[tuple[int, ...]]:
    """The rows that this process trains on."""
    found: list[tuple[int, ...]] = []
    step = LanguageModelTask.training_step

    def note(task: LanguageModelTask, batch: Any, batch_idx: int) -> Any:
        found.extend(tuple(row) for row in batch["tokens"].view(-1, 32).tolist())
        return step(task, batch, batch_idx)

    LanguageModelTask.training_step = note  # type: ignore[method-assign]  # in a process of its own
    train(config, directory)
    return found


@pytest.mark.slow
def test_two_one_two_processes_see_every_example_once(corpus: Path, tmp_path: Path) -> None:
    """A run that is resumed with other numbers of processes, in the middle of an epoch, and with other strategies."""
    changes: list[tuple[int, int, str]] = [(2, 2, "fsdp"), (3, 1, "single"), (5, 2, "ddp")]
    same = (*SAME, "data.batch_size=16", "checkpoint.every_n_steps=100", "trainer.val_check_interval=100")
    plan = plan_run(composed("train", *small_run(corpus, *same)), tmp_path)
    data: Any = build_data(plan.data)
    data.prepare()
    epoch = data._train.count // 16  # steps that stay within the first epoch
    seen: Counter[tuple[int, ...]] = Counter()
    changes.append((epoch, 2, "fsdp"))
    for number, (steps, count, strategy) in enumerate(changes):
        overrides = [f"trainer.max_steps={steps}", f"resume={str(number > 0).lower()}", "scheduler=constant"]
        overrides += on(strategy, count) if strategy != "single" else ()
        config = composed("train", *small_run(corpus, *same, *overrides))
        results = on_ranks(count, lambda r, c=config: seen_rows(r, c, tmp_path / "run"), tmp_path / f"part{number}")
        assert len({len(found) for found in results}) == 1  # shared out evenly
        seen.update(row for found in results for row in found)
    all_rows = Counter(tuple(data._train.row(n)[0].tolist()) for n in range(data._train.count))
    assert sum(seen.values()) == 16 * epoch
    assert all(count <= all_rows[row] for row, count in seen.items())  # none twice
    assert sum((all_rows - seen).values()) == data._train.count - 16 * epoch < 16  # and all but the incomplete batch


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_with_another_number(strategy: str, corpus: Path, tmp_path: Path, alone: Run) -> None:
    """2 -> 1 -> 2 processes end as one process that was not stopped."""
    run = tmp_path / "run"
    trained(corpus, run, "trainer.max_steps=1", *on(strategy), processes=2)
    trained(corpus, run, "trainer.max_steps=3", "resume=true")
    trained(corpus, run, *on(strategy), "resume=true", processes=2)
    every = {row["step"]: row["train/loss"] for row in rows(run) if "train/loss" in row}
    last = {row["step"]: row["train/loss"] for row in rows(alone()) if "train/loss" in row}
    assert every[1.0] == pytest.approx(last[1.0], rel=1e-5)


@pytest.mark.slow
def test_a_shared_checkpoint_is_loaded_and_exported_on_one_device(corpus: Path, tmp_path: Path, alone: Run) -> None:
    run = tmp_path / "run"
    trained(corpus, run, "checkpoint.keep=1", *on("fsdp"), processes=2)
    path = run / "checkpoints" / "last.ckpt"
    assert sorted(file.name for file in path.iterdir()) == [
        "part_00000_of_00002.pt",
        "part_00001_of_00002.pt",
        "rest.pt",
    ]
    names = {found.name for found in path.parent.iterdir()}
    assert names == {"last.ckpt", "best.ckpt", "step_0000004.ckpt"}
    shared, whole = load_trained(run), load_trained(alone())
    for (name, ours), theirs in zip(shared.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)
    export(composed("export", f"ckpt={path}", f"out={tmp_path / 'exported'}", "format=hf"))
    loaded = load_trained(tmp_path / "exported")
    tokens = torch.arange(8).unsqueeze(0)
    torch.testing.assert_close(loaded.model(tokens), shared.model(tokens))


@pytest.mark.long
def test_damaged_parts_are_named(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(corpus, run, *on("fsdp"), processes=2)
    path = run / "checkpoints" / "step_0000004.ckpt"
    part = path / "part_00001_of_00002.pt"
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"part_00001_of_00002.pt is truncated or not a part of a checkpoint"):
        read_checkpoint(path)
    with pytest.warns(UserWarning, match="skipping a broken checkpoint"):
        (summary,) = trained(corpus, run, "resume=true", "trainer.max_steps=5")
    assert summary["steps"] == 5  # from the checkpoint before
    broken = path.with_name(path.name + ".broken")
    (broken / part.name).unlink()
    with pytest.raises(InputError, match=r"is not complete: it has 1 of its files part_\*.pt"):
        read_sharded(broken)


@pytest.mark.parametrize("size", [1, 4, 5, 7])
def test_rows_are_divided_as_torch_divides_them(size: int) -> None:
    chunks = torch.arange(size).chunk(4)
    for rank in range(4):
        first, last = rows_of(size, rank, 4)
        assert torch.arange(size)[first:last].tolist() == (chunks[rank].tolist() if rank < len(chunks) else [])


MQAR = (
    "debug=fast",
    "data=mqar",
    "model=tiny",
    "model.d_model=16",
    "model.num_layers=1",
    "model.num_heads=1",
    "model.vocab_size=64",
    "trainer=cpu",
    "trainer.max_steps=3",
    "trainer.limit_val_batches=1.0",
    "data.batch_size=4",
    "data.train=[{length: 16, pairs: 2, examples: 40}, {length: 24, pairs: 4, examples: 40}]",
    "data.validation=[{length: 16, pairs: 2, examples: 5}, {length: 24, pairs: 4, examples: 11}]",
)


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accuracies_count_every_example_once(strategy: str, tmp_path: Path) -> None:
    """The last validation batch of a subset has fewer examples than there are processes."""
    train(composed("train", *MQAR), tmp_path / "one")
    config = composed("train", *MQAR, *on(strategy))
    on_ranks(2, lambda rank: train(config, tmp_path / "two"), tmp_path / "ranks")
    assert_same_rows(tmp_path / "two", tmp_path / "one", rel=1e-4)


@pytest.mark.slow
def test_unequal_numbers_of_targets(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is the mean over all targets, not over processes, also where one has none."""
    step = LanguageModelTask.training_step

    def fewer(task: LanguageModelTask, batch: Any, batch_idx: int) -> Any:
        targets = batch["targets"].view(-1, 32).clone()
        keep = batch["tokens"].view(-1, 32).sum(1) % 3  # 0: none, 1: one, 2: all, decided by the row's content
        targets[keep == 0] = -100
        targets[keep == 1, 1:] = -100
        return step(task, {**batch, "targets": targets.view(1, -1)}, batch_idx)

    monkeypatch.setattr(LanguageModelTask, "training_step", fewer)
    same = ("trainer.precision=64-true", "trainer.accumulate_grad_batches=2")
    trained(corpus, tmp_path / "one", *same)
    trained(corpus, tmp_path / "two", *same, *on("ddp"), processes=2)
    assert_same_rows(tmp_path / "two", tmp_path / "one", rel=1e-6)


@pytest.mark.long
def test_a_batch_size_for_each_device(corpus: Path, tmp_path: Path, alone: Run) -> None:
    each = ("data.batch_size=2", "trainer.global_batch=false", *on("ddp"))
    summaries = trained(corpus, tmp_path / "run", *each, processes=2)
    assert summaries[0]["tokens"] == 4 * 4 * 32
    assert_same_rows(tmp_path / "run", alone(), rel=1e-5)
    with pytest.raises(InputError, match=r"data.batch_size: 4 is recorded, 2 is given"):
        trained(corpus, tmp_path / "run", "data.batch_size=2", "resume=true")
    assert trained(corpus, tmp_path / "run", "resume=true", "trainer.max_steps=5")[0]["steps"] == 5


@pytest.mark.parametrize(
    "strategy", [pytest.param("ddp", marks=pytest.mark.slow), pytest.param("fsdp", marks=pytest.mark.long)]
)
def test_a_signal_to_one_process_stops_all(strategy: str, corpus: Path, tmp_path: Path) -> None:
    """After the same step, which is saved. The run then continues."""
    step = LanguageModelTask.training_step

    def run(rank: int) -> Any:
        def signalled(task: LanguageModelTask, batch: Any, batch_idx: int) -> Any:
            if rank == 1 and batch_idx == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(task, batch, batch_idx)

        LanguageModelTask.training_step = signalled  # type: ignore[method-assign]  # in a process of its own
        try:
            train(composed("train", *small_run(corpus, *SAME, "trainer.max_steps=9", *on(strategy))), tmp_path / "run")
        except SystemExit as ending:
            return ending.code
        return None

    codes = on_ranks(2, run, tmp_path / "ranks")
    assert codes == [143, None]
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["lkda"]["step"] == 5
    summary, _ = trained(corpus, tmp_path / "run", "trainer.max_steps=9", *on(strategy), "resume=true", processes=2)
    assert summary["status"] == "finished"


def test_a_bad_loss_of_one_process_stops_all(corpus: Path, tmp_path: Path) -> None:
    step = LanguageModelTask.training_step

    def run(rank: int) -> Any:
        def bad(task: LanguageModelTask, batch: Any, batch_idx: int) -> Any:
            if rank == 1 and batch_idx == 1:
                with torch.no_grad():
                    next(task.model.parameters()).fill_(float("nan"))
            return step(task, batch, batch_idx)

        LanguageModelTask.training_step = bad  # type: ignore[method-assign]  # in a process of its own
        try:
            return train(composed("train", *small_run(corpus, *SAME, *on("ddp"))), tmp_path / "run")
        except CommandError as error:
            return str(error)

    first, second = on_ranks(2, run, tmp_path / "ranks")
    assert "the loss became NaN or infinite at step 2" in first
    assert second == {}


@pytest.mark.long
def test_runs_of_a_sweep_follow_each_other(corpus: Path, tmp_path: Path) -> None:
    """In the same processes."""

    def run(rank: int) -> Any:
        for number in (1, 2):
            config = composed("train", *small_run(corpus, *SAME, "trainer.max_steps=1", *on("ddp")))
            train(config, tmp_path / str(number))
        return value_of_first(rank)

    assert on_ranks(2, run, tmp_path / "ranks") == [0, 0]
    assert rows(tmp_path / "1") == rows(tmp_path / "2")


@pytest.mark.long
def test_a_finished_run_has_nothing_to_do(corpus: Path, tmp_path: Path) -> None:
    first, _ = trained(corpus, tmp_path / "run", "trainer.max_steps=1", *on("ddp"), processes=2)
    again = trained(corpus, tmp_path / "run", "trainer.max_steps=1", *on("ddp"), "resume=true", processes=2)
    assert again == [first, {}]


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_blocks(strategy: str, corpus: Path, tmp_path: Path, alone: Run) -> None:
    """The blocks are traced and called, whichever strategy they have."""

    def run(rank: int) -> int:
        traced = []
        losses.keeps_less = lambda graph, inputs: traced.append(graph) or graph.forward  # in a process of its own
        config = composed("train", *small_run(corpus, *SAME, "mixer=softmax", "compile=true", *on(strategy)))
        train(config, tmp_path / "run")
        return len(traced)

    assert min(on_ranks(2, run, tmp_path / "ranks")) >= 1
    assert_same_rows(tmp_path / "run", alone("mixer=softmax"), rel=1e-4)


@pytest.mark.long  # it starts Python four times
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_command_starts_its_processes(strategy: str, corpus: Path, tmp_path: Path, alone: Run) -> None:
    """Also in a sweep, whose jobs follow each other in one process."""
    words = small_run(
        corpus, *SAME, *on(strategy), "seed=1,2", f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=${seed}"
    )
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"2 devices with {strategy}; 2 sequences at a time on each") == 2  # one process prints
    for seed in (1, 2):
        assert_same_rows(tmp_path / str(seed), alone(f"seed={seed}"), rel=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "multirun.yaml"]


def test_precisions_of_fsdp() -> None:
    with pytest.raises(
        InputError, match=r"trainer.precision=64-true cannot be used with trainer=fsdp: use bf16-mixed or 32"
    ):
        plan_run(composed("train", *on("fsdp"), "trainer.precision=64-true"), Path("nowhere"))


def ends_by_itself(strategy: str, corpus: Path, directory: Path, fault: Callable[[], None], *overrides: str) -> str:
    """What the first of two processes ends with, if `fault` happens in the second one in step 4, which does not live
    on."""
    step = LanguageModelTask.training_step
    pid = directory / "pid"

    def run(rank: int) -> str:
        def faulty(task: LanguageModelTask, batch: Any, batch_idx: int) -> Any:
            if rank == 1 and batch_idx == 3:
                pid.write_text(str(os.getpid()))
                fault()
            return step(task, batch, batch_idx)

        LanguageModelTask.training_step = faulty  # type: ignore[method-assign]  # in a process of its own
        with pytest.raises(CommandError) as caught:
            train(composed("train", *small_run(corpus, *SAME, *on(strategy), *overrides)), directory / "run")
        with suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)
        return str(caught.value)

    message, _ = on_ranks(2, run, directory / "ranks", killed=[1])
    return str(message)


def assert_continues(strategy: str, corpus: Path, run: Path, alone: Run) -> None:
    """From the checkpoint of step 2, with the losses of a run that nothing has stopped."""
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["lkda"]["step"] == 2
    summary, _ = trained(corpus, run, *on(strategy), "resume=true", processes=2)
    assert summary["status"] == "finished"
    assert_same_rows(run, alone(), rel=1e-4)


@pytest.mark.parametrize("strategy", [LONG_DDP, SLOW_FSDP])
def test_a_killed_process_ends_the_run_with_one_line(strategy: str, corpus: Path, tmp_path: Path, alone: Run) -> None:
    message = ends_by_itself(strategy, corpus, tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert message.startswith("another process of the run has ended, or did not answer for 30 minutes")
    assert_continues(strategy, corpus, tmp_path / "run", alone)


def test_a_process_that_does_not_come(corpus: Path, tmp_path: Path) -> None:
    """For example because the command was started on one of two machines."""

    def run(rank: int) -> str:
        words = small_run(corpus, *SAME, *on("ddp"), "trainer.timeout_minutes=0.01")
        with pytest.raises(CommandError) as caught:
            train(composed("train", *words), tmp_path / "run")
        return str(caught.value)

    (message,) = on_ranks(1, run, tmp_path / "ranks")
    assert message.startswith("the 2 processes of the run did not find each other within 0.01 minutes")
    assert "\n" not in message


@pytest.mark.long  # it waits for the end of the timeout
def test_a_process_that_does_not_answer_ends_the_run(corpus: Path, tmp_path: Path, alone: Run) -> None:
    """It is stopped, as a process that hangs in a driver or a file system."""

    def fault() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    message = ends_by_itself("ddp", corpus, tmp_path, fault, "trainer.timeout_minutes=0.2")
    assert message.startswith("another process of the run has ended, or did not answer for 0.2 minutes")
    assert_continues("ddp", corpus, tmp_path / "run", alone)
