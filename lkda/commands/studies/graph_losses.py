"""Compare the losses of training with compiled blocks and CUDA graphs with those of training without, step by step.

    python -m lkda.commands.studies.graph_losses --mixers kda,softmax --out outputs/graph_losses trainer=gpu data=sotu

Each mixer is trained four times from one seed: twice with compile=false, and twice with compile=auto. The difference of
the first two shows how far losses come apart without any compilation. Mixers with softmax attention or MLA are trained
four times more, with trainer.deterministic=true. Each training is a process of its own. Writes table.json after each
mixer, with every loss. The arguments key=value are settings of scripts/train.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from lkda.checks import check_count
from lkda.commands.benchmarks.row_process import run_child
from lkda.commands.benchmarks.step_benchmark import check_names, check_overrides, choices, header_of, made_directory
from lkda.commands.command_line.errors import CommandError, readable_errors
from lkda.commands.run.run_setup import plan_run
from lkda.io import write_atomically
from lkda.shipped import CONFIGS

ORDERED = ("softmax", "mla")  # mixers whose backward pass adds in any order, unless it must be deterministic
TIME_LIMIT = 1800.0  # seconds of a training
CHILD = "lkda.commands.studies.graph_losses_row"
# Settings of scripts/train.py that a training here has already: another value would be compared under a wrong name.
OPTIONS = {
    "mixer": "give --mixers instead",
    "trainer.max_steps": "give --steps instead",
    "trainer.max_tokens": "give --steps instead",
    **dict.fromkeys(("compile", "trainer.deterministic", "trainer.log_every_n_steps"), "leave it out, it is set here"),
}
Training = dict[str, Any]  # what `graph_losses_row.measure` returns


def compare(
    mixer: str, *, deterministic: bool, without_graphs: Sequence[Training], graphs: Sequence[Training]
) -> dict[str, Any]:
    """A row of the table, from two trainings without graphs and two with them."""
    differences = _differences(without_graphs[0], graphs[0])
    return {
        "mixer": mixer,
        "trainer.deterministic": str(deterministic).lower(),
        "CUDA graphs": "yes" if graphs[0]["graphs"] and not without_graphs[0]["graphs"] else "no",
        "loss at the end": f"{without_graphs[0]['losses'][-1]:.3f}",
        "largest difference": f"{max(differences):.1e}",
        "mean difference": f"{statistics.fmean(differences):.1e}",
        "at the first step": f"{differences[0]:.1e}",
        "two runs with graphs": _how_equal(*graphs),
        "two runs without": _how_equal(*without_graphs),
    }


def _differences(one: Training, other: Training) -> list[float]:
    return [abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True)]


def _how_equal(one: Training, other: Training) -> str:
    differences = _differences(one, other)
    same = sum(1 for _ in takewhile(lambda difference: difference == 0, differences))
    if same == len(differences):
        return "equal bit for bit" if one["weights"] == other["weights"] else f"the same loss for {same} steps"
    return f"apart after step {same}, at most {max(differences):.1e}, mean {statistics.fmean(differences):.1e}"


def run(mixers: Sequence[str], out: Path, overrides: Sequence[str], *, steps: int, at_once: int) -> None:
    """Train and compare. Raises CommandError, with the reason, if a training fails."""
    check_count("--steps", steps, least=1)
    check_count("--at-once", at_once, least=1)
    check_names("graph_losses", "--mixers", mixers, choices("mixer"))
    check_overrides(overrides, OPTIONS)
    settings = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", "trainer.log_every_n_steps=1"]
    settings += ["callbacks=none", "sample.max_new_tokens=0", *overrides]
    device, ordered = torch.device("cpu"), []
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for mixer in mixers:
            plan = plan_run(compose("train", overrides=[f"mixer={mixer}", *settings]), Path("."))
            device = plan.device
            ordered += [mixer] if set(ORDERED) & set(plan.model["mixer"]["pattern"]) else []
    header = header_of(device) | {"steps": steps, "overrides": list(overrides)}
    note = (
        f"{header['device']}, torch {header['torch']}; {steps} steps, losses in nats per token; {header['date'][:10]}."
    )
    (made_directory(out) / "logs").mkdir(exist_ok=True)
    with ThreadPoolExecutor(at_once) as pool:

        def begun(mixer: str, deterministic: bool, compile: str) -> list[Future[Training]]:
            words = [f"compile={compile}", *(["trainer.deterministic=true"] if deterministic else [])]
            request = {"overrides": [f"mixer={mixer}", *settings, *words]}
            name = f"{mixer}_{compile}{'_deterministic' if deterministic else ''}"
            logs = (out / "logs" / f"{name}_{run}.txt" for run in (1, 2))
            return [pool.submit(run_child, CHILD, request, TIME_LIMIT, log) for log in logs]

        cases = [(mixer, which) for mixer in mixers for which in ([False, True] if mixer in ordered else [False])]
        found = [[begun(*each, compile) for compile in ("false", "auto")] for each in cases]
        rows, losses = [], {}
        for (mixer, deterministic), futures in zip(cases, found, strict=True):
            without_graphs, graphs = ([_done(future) for future in pair] for pair in futures)
            rows.append(compare(mixer, deterministic=deterministic, without_graphs=without_graphs, graphs=graphs))
            name = f"{mixer}, deterministic" if deterministic else mixer
            losses[name] = {"compile=false": without_graphs[0]["losses"], "compile=auto": graphs[0]["losses"]}
            print(" ".join(rows[-1].values()), flush=True)
            table = {"kind": "table", "header": header, "rows": rows, "note": note, "losses": losses}
            write_atomically(out / "table.json", json.dumps(table, indent=1) + "\n")


def _done(future: Future[Training]) -> Training:
    found = future.result()
    if "reason" in found:
        raise CommandError(found["reason"])
    return found


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default="kda,simplified,softmax,mla,kda_mla_3to1", help="choices of mixer=")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--at-once", type=int, default=1, help="trainings that run beside one another")
    parser.add_argument("--out", type=Path, required=True, help="directory for table.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of scripts/train.py")
    given = parser.parse_intermixed_args(arguments)
    with readable_errors():
        run(given.mixers.split(","), given.out, given.overrides, steps=given.steps, at_once=given.at_once)


if __name__ == "__main__":
    main(sys.argv[1:])
