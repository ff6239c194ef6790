"""Train a model of lkda and the same model of another package from the same weights, and compare their losses.

    python -m lkda.commands.studies.peer_training --peers llama --out outputs/peer_training debug=fast

The peers are llama and qwen3 (transformers) and fla_kda (flash-linear-attention, on a GPU). The arguments key=value are
settings of scripts/train.py. Both models are trained on the same batches in the same order, with the same loop,
optimizer, schedule, clipping and precision. Nothing is compiled. The results are written into the directory --out:
results.json, table.json and a plot.

Training amplifies rounding errors, and more so at a higher learning rate. To measure this effect, lkda's model is
trained a second time from weights that are changed by one float32 rounding. The difference between its two runs is the
reference for the difference between the packages.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from lkda.bench.files import write_json
from lkda.checks import InputError
from lkda.commands.benchmarks.peers import PEERS, check_available, peer_model
from lkda.commands.command_line.errors import FAILED, readable_errors
from lkda.commands.run.fit import build_task, quiet_libraries, trainer_options
from lkda.commands.run.prepared_run import PreparedRun, model_of, prepare_data, with_data
from lkda.commands.run.run_setup import plan_run, require_one_device
from lkda.commands.run.summary import git_commit
from lkda.device import in_threads
from lkda.io import check_output_file
from lkda.models.lm import LanguageModel
from lkda.report.draw.tables import rich_table
from lkda.report.studies.peer_training import KIND, redraw, rows
from lkda.shipped import CONFIGS
from lkda.training.callbacks import DivergenceGuard
from lkda.training.callbacks.steps import ends_step
from lkda.training.task import LanguageModelTask

# The groups of configs/train.yaml that are used here. The mixer is decided by the peer.
_USED = ("model", "data", "optimizer", "scheduler", "trainer", "seed", "backend", "debug")

_NO_RUN = Path(".")  # no run is recorded or continued


class LossRecorder(L.Callback):
    """Stores the training loss of every optimizer step, on the device."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx):
            assert isinstance(pl_module, LanguageModelTask)
            self.losses.append(pl_module.step_metrics["train/loss"].clone())


def compare_training(name: str, config: DictConfig, console: Console) -> dict[str, Any]:
    """Train lkda's model and the peer `name` from the same weights on the same batches.

    Args:
        config: composed from configs/train.yaml with the peer's overrides.
        console: prints a line after each trained model.
    Returns: the settings, and under "ours", "theirs" and "ours_rounded" (from weights changed by one rounding) the loss
        of every step and the validation loss after the last step, in nats per token.
    Raises: InputError if a setting cannot be used, if the data are not text, or if the peer cannot represent the model;
        DivergedError if a loss is not finite.
    """
    plan = plan_run(config, _NO_RUN)
    require_one_device(plan, what="the comparison with peers")
    data = prepare_data(plan, None)
    if data.tokenizer is None:
        raise InputError(f"peers are compared on packed text, but data={data.source} is not text: give data=sotu, say.")
    prepared = with_data(plan, data, None)
    ours = model_of(prepared)
    models = {"ours": ours, "theirs": peer_model(name, ours, data.tokenizer), "ours_rounded": rounded(ours)}
    courses = {}
    for side, model in models.items():
        courses[side] = course = _train(model, prepared)
        words = f"{len(course['loss'])} steps in {course['seconds']:.0f} s, validation loss {course['val_loss']:.4f}"
        console.print(f"{name}, {side}: {words}", soft_wrap=True)
    return {
        "peer": name,
        "version": PEERS[name].version(),
        "parameters": ours.num_parameters(),
        "tokens_per_step": prepared.metadata["tokens_per_step"],
        "settings": {key: plan.record[key] for key in ("mixer", *_USED) if key in plan.record},
        **courses,
    }


@torch.no_grad()
def rounded(model: LanguageModel) -> LanguageModel:
    """A copy in which every weight is changed at random by about one float32 rounding."""
    changed = copy.deepcopy(model)
    for parameter in changed.parameters():
        parameter.mul_(1 + torch.finfo(torch.float32).eps * torch.randint_like(parameter, -1, 2))
    return changed


def _train(model: LanguageModel, prepared: PreparedRun) -> dict[str, Any]:
    """Train `model` as scripts/train.py does. Returns the loss of every step and the validation loss (nats per token),
    and the seconds."""
    plan, recorder = prepared.plan, LossRecorder()
    options = trainer_options(plan, prepared.total_steps) | {
        "val_check_interval": prepared.total_steps * plan.trainer.accumulate_grad_batches,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    prepared.data.start_batch = 0
    trainer = instantiate(options, callbacks=[DivergenceGuard(), recorder])
    started = time.perf_counter()
    trainer.fit(build_task(prepared, model), datamodule=prepared.data)
    return {
        "loss": [round(loss, 7) for loss in torch.stack(recorder.losses).tolist()],
        "val_loss": round(float(trainer.callback_metrics["val/loss"]), 7),
        "seconds": round(time.perf_counter() - started, 1),
    }


def run(peers: Sequence[str], out: Path, overrides: Sequence[str], console: Console) -> bool:
    """Compare with each of `peers` in turn. The files and the plot are updated after each one. A peer that fails does
    not stop the others.

    Returns: whether all peers were compared.
    Raises: InputError, before any training, for an unknown peer or a setting that cannot be used.
    """
    quiet_libraries()
    configs = _compose(peers, overrides)
    check_output_file(out / "results.json", option="--out")
    device = plan_run(configs[peers[0]], _NO_RUN).device
    found: dict[str, Any] = {"kind": KIND, "header": _header(overrides, device), "peers": [], "failed": {}}
    for name, config in configs.items():
        try:
            check_available(name, device)
            found["peers"].append(compare_training(name, config, console))
        except Exception as error:  # of any package: report it and continue with the next peer
            found["failed"][name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            console.print(f"{name} failed: {found['failed'][name]}", soft_wrap=True)
            if not isinstance(error, InputError):
                traceback.print_exc()
        write_json(out / "results.json", found)
        if found["peers"]:
            redraw(out / "results.json")
    if found["peers"]:
        table = rows(found)
        wide = Console(width=140, highlight=False, markup=False, emoji=False, file=console.file)
        wide.print(rich_table([*table[0]], [[*row.values()] for row in table]))
    return not found["failed"]


def _compose(peers: Sequence[str], overrides: Sequence[str]) -> dict[str, DictConfig]:
    """The checked configuration of each peer. Raises InputError for unknown peers and settings without an effect."""
    unknown = [name for name in peers if name not in PEERS]
    if unknown or not peers:
        raise InputError(f"--peers takes names of {', '.join(PEERS)}, separated by commas; got {','.join(peers)!r}.")
    unused = [word for word in overrides if word.lstrip("+~").split("=")[0].split(".")[0] not in _USED]
    if unused:
        raise InputError(
            f"{unused[0]} has no effect here; the settings are {', '.join(_USED)}, and the peer decides the mixer."
        )
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        configs = {name: compose("train", overrides=[*PEERS[name].overrides, *overrides]) for name in peers}
    for config in configs.values():
        plan_run(config, _NO_RUN)
    return configs


def _header(overrides: Sequence[str], device: torch.device) -> dict[str, Any]:
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else f"cpu, {in_threads(torch.get_num_threads())}",
        "torch": torch.__version__,
        "lightning": L.__version__,
        "git_commit": git_commit(),
        "date": datetime.date.today().isoformat(),
        "overrides": list(overrides),
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="llama,qwen3", help=f"models, separated by commas: {', '.join(PEERS)}")
    parser.add_argument("--out", type=Path, default=Path("outputs/peer_training"), help="directory of the results")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of scripts/train.py")
    options = parser.parse_intermixed_args(arguments)
    with readable_errors():
        peers = options.peers.split(",") if options.peers else []
        done = run(peers, options.out, options.overrides, Console(highlight=False, markup=False, emoji=False))
    raise SystemExit(0 if done else FAILED)


if __name__ == "__main__":
    main(sys.argv[1:])
