"""Compare the losses of training with compiled blocks and CUDA graphs with those of training without, step by step.

    python -m lkda.commands.graph_losses --mixers kda,softmax --out outputs/graph_losses trainer=gpu data=sotu

Each mixer is trained three times from one seed: with compile=false, and twice with compile=auto. Mixers with softmax
attention or MLA are trained twice more, with compile=auto and trainer.deterministic=true. Each training is a process of
its own. Writes table.json, with every loss. The arguments key=value are settings of scripts/train.py.
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
from lkda.commands.command_line import CommandError, readable_errors
from lkda.commands.row_process import run_child
from lkda.commands.run_setup import plan_run
from lkda.commands.shipped import CONFIGS
from lkda.commands.step_benchmark import check_names, choices, header_of, made_directory
from lkda.io import write_atomically

ORDERED = ("softmax", "mla")  # mixers whose backward pass adds in any order, unless it must be deterministic
TIME_LIMIT = 1800.0  # seconds of a training
CHILD = "lkda.commands.graph_losses_row"


def compare(mixer: str, *, deterministic: bool, plain: dict[str, Any], first: dict, second: dict) -> dict[str, Any]:
    """A row of the table, from what `graph_losses_row.measure` returns: without graphs, and twice with them."""
    differences = [abs(a - b) for a, b in zip(plain["losses"], first["losses"], strict=True)]
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first["losses"], second["losses"])))
    equal = same == len(differences) and first["weights"] == second["weights"]
    return {
        "mixer": mixer,
        "trainer.deterministic": str(deterministic).lower(),
        "CUDA graphs": "yes" if first["graphs"] and not plain["graphs"] else "no",
        "loss at the end": f"{plain['losses'][-1]:.3f}",
        "largest difference": f"{max(differences):.1e}",
        "mean difference": f"{statistics.fmean(differences):.1e}",
        "at the first step": f"{differences[0]:.1e}",
        "two runs with graphs": "equal bit for bit" if equal else f"the same loss for {same} steps",
    }


def run(mixers: Sequence[str], out: Path, overrides: Sequence[str], *, steps: int, at_once: int) -> None:
    """Train and compare. Raises CommandError, with the reason, if a training fails."""
    check_count("--steps", steps, least=1)
    check_count("--at-once", at_once, least=1)
    check_names("graph_losses", "--mixers", mixers, choices("mixer"))
    settings = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", "trainer.log_every_n_steps=1"]
    settings += ["callbacks=none", "sample.max_new_tokens=0", *overrides]
    device, ordered = torch.device("cpu"), []
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for mixer in mixers:
            plan = plan_run(compose("train", overrides=[f"mixer={mixer}", *settings]), Path("."))
            device = plan.device
            ordered += [mixer] if set(ORDERED) & set(plan.model["mixer"]["pattern"]) else []
    (made_directory(out) / "logs").mkdir(exist_ok=True)
    kinds = {"plain": "compile=false", "first": "compile=auto", "second": "compile=auto"}
    with ThreadPoolExecutor(at_once) as pool:

        def begun(mixer: str, name: str, *words: str) -> Future[dict[str, Any]]:
            request = {"overrides": [f"mixer={mixer}", *settings, *words]}
            return pool.submit(run_child, CHILD, request, TIME_LIMIT, out / "logs" / f"{mixer}_{name}.txt")

        found = {mixer: {name: begun(mixer, name, word) for name, word in kinds.items()} for mixer in mixers}
        again = {
            mixer: {
                name: begun(mixer, f"{name}_deterministic", "compile=auto", "trainer.deterministic=true")
                for name in ("first", "second")
            }
            for mixer in ordered
        }
        rows, losses = [], {}
        for mixer in mixers:
            own = {name: _done(future) for name, future in found[mixer].items()}
            rows.append(compare(mixer, deterministic=False, **own))
            losses[mixer] = {"compile=false": own["plain"]["losses"], "compile=auto": own["first"]["losses"]}
            if mixer in again:
                own |= {name: _done(future) for name, future in again[mixer].items()}
                rows.append(compare(mixer, deterministic=True, **own))
            print(*(" ".join(row.values()) for row in rows[-1 - (mixer in again) :]), sep="\n", flush=True)
    header = header_of(device) | {"steps": steps, "overrides": list(overrides)}
    note = (
        f"{header['device']}, torch {header['torch']}; {steps} steps, losses in nats per token; {header['date'][:10]}."
    )
    table = {"kind": "table", "header": header, "rows": rows, "note": note, "losses": losses}
    write_atomically(out / "table.json", json.dumps(table, indent=1) + "\n")


def _done(future: Future[dict[str, Any]]) -> dict[str, Any]:
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
