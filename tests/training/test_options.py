"""A value that no run can use is refused by name, before anything is done with it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lkda.commands.settings.config import resolve
from lkda.training.optimizer import check_optimizer, check_schedule
from lkda.training.options import (
    CheckpointOptions,
    check_checkpoint,
    check_sample,
    check_trainer,
    check_validation_batches,
)
from lkda.training.precision import _SHORT, PRECISIONS, resolve_precision
from tests.commands.small import ROOT, composed

CHECKS: dict[str, Callable[[Any], None]] = {
    "trainer": check_trainer,
    "optimizer": check_optimizer,
    "scheduler": check_schedule,
    "checkpoint": check_checkpoint,
    "sample": check_sample,
}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

# Values of the wrong kind, for every option: no number, no text, no list that could be either.
WRONG_KIND = (None, True, "many", [1], {"a": 1}, math.nan)
# Options for which one of those is right.
RIGHT = (
    ("trainer", "max_tokens", None),
    ("checkpoint", "every_minutes", None),
    ("checkpoint", "every_n_steps", None),
    ("trainer", "gradient_clip_val", None),
    ("trainer", "deterministic", True),
    ("trainer", "enable_model_summary", True),
    ("trainer", "global_batch", True),
    ("sample", "prompt", "many"),
)
# Options that are checked elsewhere: where the device is, what precision means on it, or by Hydra.
ELSEWHERE = {"_target_", "accelerator", "precision"}


def options(group: str, *overrides: str) -> dict[str, Any]:
    config = resolve(composed("train", "optimizer.lr=1e-3", *overrides))  # null: looked up before it is checked
    return config[group]


@pytest.mark.parametrize("group", CHECKS)
def test_what_the_configurations_hold_is_right(group: str) -> None:
    CHECKS[group](options(group))
    CHECKS[group](options(group, "debug=anomaly"))


@pytest.mark.parametrize(
    "choice", ["optimizer=muon", "scheduler=constant", "scheduler=cosine", "trainer=gpu", "trainer=ddp", "trainer=fsdp"]
)
def test_so_is_every_choice(choice: str) -> None:
    group = choice.split("=")[0]
    CHECKS[group](options(group, choice))


@pytest.mark.parametrize("group", CHECKS)
def test_every_option_refuses_the_wrong_kind(group: str) -> None:
    right = options(group, *(["optimizer=muon"] if group == "optimizer" else []))
    for name in right.keys() - ELSEWHERE:
        for value in WRONG_KIND:
            if (group, name, value) in RIGHT:
                CHECKS[group]({**right, name: value})
                continue
            with pytest.raises(ValueError, match=rf"^{group}\.{name} must be .*got ") as caught:
                CHECKS[group]({**right, name: value})
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("group", CHECKS)
def test_no_option_is_ignored_and_none_may_lack(group: str) -> None:
    right = options(group)
    with pytest.raises(ValueError, match=rf"{group}\.colour is not an option of {group}=.*, which has \w+"):
        CHECKS[group]({**right, "colour": "red"})
    for name in right:
        with pytest.raises(ValueError, match=rf"{group}\.{name} (is missing|must be one of)"):
            CHECKS[group]({key: value for key, value in right.items() if key != name})
    for instead in (None, 5, "auto", []):
        with pytest.raises(ValueError, match=rf"{group}(\.name)? must (have the options|be one of) "):
            CHECKS[group](instead)


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ("trainer", {"max_steps": 1e3}, "trainer.max_steps must be a whole number of 1 or more, got 1000.0"),
        ("trainer", {"val_check_interval": 0.5}, "val_check_interval must be a whole number of 1 or more, got 0.5"),
        ("trainer", {"accumulate_grad_batches": 0}, "must be a whole number of 1 or more, got 0"),
        ("trainer", {"accumulate_grad_batches": 10**9}, "accumulate_grad_batches must be at most 65536, got 10"),
        ("trainer", {"log_every_n_steps": -1}, "must be a whole number of 1 or more, got -1"),
        ("trainer", {"limit_val_batches": 0}, "limit_val_batches must be above 0: a run always validates at the end"),
        (
            "trainer",
            {"limit_val_batches": 1.5},
            r"a whole number of batches, or a fraction of them in \(0, 1\], got 1.5",
        ),
        ("trainer", {"gradient_clip_val": -0.1}, "gradient_clip_val must be 0 or more .*got -0.1"),
        ("trainer", {"gradient_clip_val": math.inf}, "gradient_clip_val must be a finite number, got inf"),
        ("trainer", {"devices": 2}, "trainer.devices=2 needs several devices: choose trainer=ddp, or trainer=fsdp"),
        ("trainer", {"devices": 1.0}, "trainer.devices must be a whole number of 1 or more, got 1.0"),
        ("trainer", {"num_nodes": 2}, "trainer.num_nodes=2 needs several devices: choose trainer=ddp"),
        ("trainer", {"context_parallel": 2}, "trainer.context_parallel=2 needs several devices: choose trainer=ddp"),
        ("trainer", {"strategy": "horovod"}, "trainer.strategy must be one of single, ddp, fsdp, got 'horovod'"),
        ("trainer", {"timeout_minutes": 1e-9}, r"trainer.timeout_minutes must be from 0.01 to 525600 .*, got 1e-09"),
        ("trainer", {"timeout_minutes": 1e300}, r"trainer.timeout_minutes must be from 0.01 to 525600 .*, got 1e\+300"),
        ("trainer", {"max_epochs": 3}, "trainer.max_epochs is not an option of trainer=auto, which has accelerator"),
        ("trainer", {"gradient_clip_algorithm": "value"}, "trainer.gradient_clip_algorithm is not an option"),
        ("trainer", {"bad_steps": "ignore"}, "trainer.bad_steps must be stop or skip, got 'ignore'"),
        ("checkpoint", {"every_minutes": 0}, "checkpoint.every_minutes must be greater than 0, got 0"),
        ("checkpoint", {"every_minutes": "often"}, "checkpoint.every_minutes must be a number, auto or null, got 'o"),
        ("checkpoint", {"every_n_steps": 0.5}, "checkpoint.every_n_steps must be a whole number of 1 or more, got 0.5"),
        ("trainer", {"profiler": "slow"}, "trainer.profiler must be one of simple, advanced, or null; got 'slow'"),
        ("trainer", {"detect_anomaly": 1}, "trainer.detect_anomaly must be true or false, got 1"),
        ("optimizer", {"lr": math.inf}, "optimizer.lr must be a finite number, got inf"),
        ("optimizer", {"lr": 10**400}, "optimizer.lr must be a finite number, got 1000"),
        ("optimizer", {"eps": 0}, "optimizer.eps must be greater than 0, got 0"),
        ("optimizer", {"betas": [0.9, 0.99, 0.999]}, r"optimizer.betas must be two numbers in \[0, 1\)"),
        ("optimizer", {"momentum": 0.9}, "optimizer.momentum is not an option of optimizer=adamw, which has "),
        ("optimizer", {"name": "muon"}, "optimizer.momentum is missing; choose optimizer=muon, which has it"),
        ("scheduler", {"name": "cosine"}, "scheduler.decay_fraction is not an option of scheduler=cosine"),
        ("scheduler", {"warmup_steps": 1.5}, "scheduler.warmup_steps must be a whole number of 0 or more, got 1.5"),
        ("checkpoint", {"keep": 0}, "checkpoint.keep must be a whole number of 1 or more, got 0"),
        ("sample", {"prompt": 1776}, "sample.prompt must be text, got 1776: quote a number"),
        ("sample", {"top_p": 0}, r"sample.top_p must be in \(0, 1\], got 0"),
        ("sample", {"temperature": -1}, "sample.temperature must be 0 or more, got -1"),
    ],
)
def test_a_number_out_of_its_range_is_named(group: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CHECKS[group]({**options(group), **change})


@pytest.mark.parametrize("limit", [1, 1000, 1.0, 0.5, 0.25])
def test_a_part_of_the_validation_is_a_batch_at_least(limit: float) -> None:
    check_validation_batches(limit, 4)
    with pytest.raises(ValueError, match=r"limit_val_batches=0.24 of 4 validation batches is less than one batch"):
        check_validation_batches(0.24, 4)


@pytest.mark.parametrize(
    ("word", "device", "ran"),
    [
        ("auto", CPU, "32-true"),
        ("auto", CUDA, "bf16-mixed"),
        ("32-true", CUDA, "32-true"),
        (32, CPU, "32-true"),
        ("bf16", CPU, "bf16-mixed"),
        ("bf16-mixed", CUDA, "bf16-mixed"),
        (16, CUDA, "16-mixed"),
        ("16-mixed", CUDA, "16-mixed"),
        ("64", CPU, "64-true"),
    ],
)
def test_a_precision_is_called_what_it_runs(word: object, device: torch.device, ran: str) -> None:
    assert resolve_precision(word, device) == ran


def test_the_guide_explains_every_precision_and_its_short_form() -> None:
    guide = (ROOT / "docs" / "guides" / "devices.md").read_text()
    short = {long: word for word, long in _SHORT.items()}
    assert all(f"\n| `{name}`, short `{short[name]}` | " in guide for name in PRECISIONS)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("half", "trainer.precision must be one of auto, 32-true, bf16-mixed, 16-mixed, 64-true, got 'half'"),
        (None, "trainer.precision must be one of .*, got None"),
        (True, "trainer.precision must be one of .*, got True"),
        (8, "trainer.precision must be one of .*, got 8"),
        ("16-mixed", "16-mixed needs a GPU: on a CPU use 32-true or bf16-mixed"),
        (16, "16-mixed needs a GPU"),
        ("16-true", "16-true keeps the weights in half precision, .*: use 16-mixed or bf16-mixed"),
        ("bf16-true", "bf16-true keeps the weights in half precision, .*: use bf16-mixed"),
        ("transformer-engine", "transformer-engine needs layers that lkda's models do not have: use bf16-mixed"),
        ("transformer-engine-float16", "transformer-engine-float16 needs layers .*: use 16-mixed"),
    ],
)
def test_a_precision_that_would_run_as_another_is_refused(word: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_precision(word, CPU)


@pytest.mark.parametrize(
    ("minutes", "steps", "on_gpu", "on_cpu"),
    [
        ("auto", "auto", (10, None), (None, 100)),
        ("auto", 50, (None, 50), (None, 50)),
        ("auto", None, (10, None), (None, None)),
        (30, "auto", (30, None), (30, None)),
        (None, "auto", (None, None), (None, None)),
        (30, 50, (30, 50), (30, 50)),
        (None, None, (None, None), (None, None)),
    ],
)
def test_the_interval_of_checkpoints(minutes: Any, steps: Any, on_gpu: Any, on_cpu: Any) -> None:
    """On a GPU it is 10 minutes, on a CPU 100 steps, and each one that is given counts."""
    given = {"every_minutes": minutes, "every_n_steps": steps, "keep": 2}
    check_checkpoint(given)
    for device, expected in (("cuda", on_gpu), ("cpu", on_cpu)):
        found = CheckpointOptions.of(given, device=device)
        assert (found.every_minutes, found.every_n_steps) == expected
