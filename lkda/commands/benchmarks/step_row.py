"""Measures the training steps of one model, in a process of its own, which `step_benchmark` starts.

Its arguments are two files. The first is the request, JSON: {"implementation", "overrides", "warmup", "timed",
"profiled", "started"}. The implementation is

    train       scripts/train.py's own loop
    bare        lkda's model, loss and optimizer in a loop without Lightning
    a peer      a variant of `lkda.commands.benchmarks.step_peers`, in the same loop

and the overrides are those of configs/train.yaml. The second, the measurements, is written when they are complete.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict
from torch import nn

from lkda.checks import InputError
from lkda.commands.benchmarks.row_process import answer, end_with_parent
from lkda.commands.benchmarks.step_clock import StepClock, Steps
from lkda.commands.benchmarks.step_measurement import MeasuredError, StepMeasurement
from lkda.commands.benchmarks.step_peers import BARE, TRAIN, check_peer, variant
from lkda.commands.run.fit import build_task, quiet_libraries
from lkda.commands.run.prepared_run import PreparedRun, model_of, prepare_data, with_data
from lkda.commands.run.run_setup import plan_run, require_one_device
from lkda.commands.train import train
from lkda.metrics_file import read_metrics
from lkda.models.build import build_model
from lkda.models.lm import LanguageModel
from lkda.shipped import CONFIGS
from lkda.training.cuda_graphs import GraphedLoss
from lkda.training.optimizer import build_optimizer
from lkda.training.precision import PRECISIONS
from lkda.training.throughput import Throughput

_NO_RUN = Path(".")  # no run is recorded or continued


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """The measurements that a request asks for, as `StepClock.row` has them.

    If the request says when the process was started, the row has imports_s, the seconds until all packages were there.

    A row of train also has tokens_per_s_logged, the median of its metrics.csv. Rows of lkda have tflops_per_s and,
    where the peak of the device is known, mfu. product_shares divides the matrix products of the profile by their
    FLOPs.

    Raises: InputError for settings that cannot be used or a peer that cannot run.
    """
    imported = {"imports_s": round(time.time() - request["started"], 2)} if "started" in request else {}
    quiet_libraries()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=request["overrides"])
    steps = Steps(request["warmup"], request["timed"], request["profiled"])
    plan = plan_run(config, _NO_RUN)
    require_one_device(plan, what="task=step")
    prepared = with_data(plan, prepare_data(plan, None), None)
    word = request["implementation"]
    row = _train(config, prepared, steps) if word == TRAIN else _bare(prepared, steps, word)
    return imported | row


def _train(config: DictConfig, prepared: PreparedRun, steps: Steps) -> dict[str, Any]:
    """Train with scripts/train.py's function, into a run directory that is removed afterwards."""
    measurement = {
        "_target_": f"{StepMeasurement.__module__}.{StepMeasurement.__name__}",
        "warmup": steps.warmup,
        "timed": steps.timed,
        "profiled": steps.profiled,
        "tokens_per_step": prepared.metadata["tokens_per_step"],
        "device": str(prepared.plan.device),
    }
    with open_dict(config):
        config.callbacks.measurement = measurement
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(config, folder)
            raise RuntimeError(f"the training ended before step {steps.last}")
        except MeasuredError as ending:
            row = ending.row
        logged = [
            float(found["tokens_per_s"])
            for found in read_metrics(Path(folder) / "metrics.csv")
            if found["tokens_per_s"] and steps.warmup < int(found["step"]) <= steps.warmup + steps.timed
        ]
    if logged:
        row["tokens_per_s_logged"] = statistics.median(logged)
    return row | _of_device(prepared, row, lkda=True)


def _of_device(prepared: PreparedRun, row: dict[str, Any], *, lkda: bool) -> dict[str, Any]:
    """What the measurements of `row` say about the device.

    Args:
        lkda: whether the model is lkda's. If not, only product_shares, which depends on the sizes, and the precision
            are known.
    """
    if "tokens_per_s" not in row:
        return {}
    plan = prepared.plan
    with torch.device("meta"):
        model = build_model(prepared.model_config)
    shares = {"product_shares": _product_shares(model), "precision": plan.trainer.precision}
    if not lkda:
        return shares
    dtype = PRECISIONS[plan.trainer.precision]
    throughput = Throughput.of(model, context=prepared.data.context, device=plan.device, dtype=dtype)
    speed = row["tokens_per_s"]
    columns = throughput.columns(speed, speed * throughput.flops_per_token(prepared.data.context))
    return shares | {name: columns[name] for name in ("tflops_per_s", "mfu") if name in columns}


def _product_shares(model: LanguageModel) -> dict[str, float]:
    """The shares of projections, feed-forward layers and head in the FLOPs of the products with weights."""
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    sizes = {
        "MLP": sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name and p.ndim == 2),
        "head": model.lm_head.weight.numel(),
    }
    sizes = {"projections": sum(p.numel() for p in linear) - sum(sizes.values()), **sizes}
    return {name: round(size / sum(sizes.values()), 4) for name, size in sizes.items()}


def _bare(prepared: PreparedRun, steps: Steps, word: str) -> dict[str, Any]:
    """Forward, backward, clipping and optimizer in a loop that does nothing else: of lkda's model, or of a peer."""
    plan = prepared.plan
    if plan.trainer.precision not in ("bf16-mixed", "32-true"):
        raise InputError(f"a bare loop has trainer.precision=bf16-mixed or 32-true, got {plan.trainer.precision}.")
    if plan.trainer.accumulate_grad_batches != 1:
        raise InputError("a bare loop has trainer.accumulate_grad_batches=1.")
    if word != BARE:
        check_peer(word, plan.device)
    clock = StepClock(steps, tokens_per_step=prepared.metadata["tokens_per_step"], device=plan.device)
    model, gradients = _lkda(prepared) if word == BARE else _peer(prepared, word)
    # Peers have other names of parameters than those that lkda's groups of parameters are made from.
    optimizer = build_optimizer(model, plan.optimizer) if word == BARE else _adamw(model, plan.optimizer)
    batches = _on_device(prepared)
    limit = plan.trainer.gradient_clip_val
    for step in range(1, steps.last + 1):
        gradients(next(batches))
        if limit:
            nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        clock.after(step)
    return clock.row | _of_device(prepared, clock.row, lkda=word == BARE)


def _on_device(prepared: PreparedRun) -> Iterator[dict[str, Any]]:
    for batch in prepared.data.train_dataloader():
        yield {
            name: batch[name] if batch[name] is None else batch[name].to(prepared.plan.device, non_blocking=True)
            for name in ("tokens", "targets", "cu_seqlens")
        }


# Computes the gradients of a batch, in place of those of the batch before.
Gradients = Callable[[dict[str, Any]], None]


def _lkda(prepared: PreparedRun) -> tuple[Any, Gradients]:
    plan = prepared.plan
    task = build_task(prepared, model_of(prepared)).to(plan.device).train()
    graphed = plan.compile == "auto" and plan.device.type == "cuda"
    replay = GraphedLoss(task.loss.mean, task.model.parameters()) if graphed else None
    one = torch.ones((), device=plan.device)

    def gradients(batch: dict[str, Any]) -> None:
        with _autocast(prepared):
            if replay is not None:  # its gradients take the place of those before
                replay(batch, scale=one)
                return
            task.model.zero_grad()
            loss = task.loss.mean(**batch)
        loss.backward()

    return task.model, gradients


def _peer(prepared: PreparedRun, word: str) -> tuple[nn.Module, Gradients]:
    plan, found = prepared.plan, variant(word)
    L.seed_everything(plan.seed, workers=True, verbose=False)
    if plan.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as for lkda's models
    config = prepared.model_config
    model = found.build(config).to(plan.device, torch.float32).train()
    loss_of = found.loss(model)

    def gradients(batch: dict[str, Any]) -> None:
        model.zero_grad()  # before the forward pass, whose graph may take the memory of the gradients
        if found.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with _autocast(prepared):
            loss = loss_of(batch["tokens"])
        loss.backward()

    return model, gradients


def _adamw(model: nn.Module, options: dict[str, Any]) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(),
        lr=options["lr"],
        betas=tuple(options["betas"]),
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        fused=True,
    )


def _autocast(prepared: PreparedRun) -> AbstractContextManager[Any]:
    plan = prepared.plan
    mixed = plan.trainer.precision == "bf16-mixed"
    return torch.autocast(plan.device.type, torch.bfloat16) if mixed else nullcontext()


def main(arguments: list[str]) -> None:
    answer(measure, arguments)


if __name__ == "__main__":
    end_with_parent()
    main(sys.argv[1:])
