"""Prints a table of the model's parts before training."""

from __future__ import annotations

from collections import Counter

import lightning as L
from rich.console import Console
from rich.table import Table
from torch import nn

from lkda.models.lm import LanguageModel


class ModelOverview(L.Callback):
    """Prints the parameters, the state size in bytes and the forward FLOPs per token of the model's parts.

    The LightningModule must have a LanguageModel as `model`.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            assert isinstance(pl_module.model, LanguageModel)
            Console().print(overview(pl_module.model))


def overview(model: LanguageModel) -> Table:
    """The table of `ModelOverview`. Parts of one kind share a row; the last row is their sum."""
    context = model.config["context"]
    table = Table("part", title=f"the model, its state after {context} tokens")
    for column in ("parameters", "state bytes", "FLOPs per token"):
        table.add_column(column, justify="right")
    embedding, head = model.embed_tokens.weight, model.lm_head.weight
    table.add_row(f"embedding {embedding.shape[0]} x {embedding.shape[1]}", f"{embedding.numel():,}", "", "0")
    mixers = {type(mixer).__name__: mixer for mixer in model.mixers()}
    times = Counter(type(mixer).__name__ for mixer in model.mixers())
    for name, mixer in mixers.items():
        n = times[name]
        state, flops = n * mixer.state_bytes(context), n * mixer.flops_per_token(context)
        table.add_row(f"{n} x {name}", f"{n * _count(mixer):,}", f"{state:,}", f"{flops:,.0f}")
    mlps = [module for name, module in model.named_modules() if name.endswith(".mlp")]
    if mlps:
        parameters = sum(map(_count, mlps))
        table.add_row(f"{len(mlps)} x {type(mlps[0]).__name__}", f"{parameters:,}", "", f"{2 * parameters:,}")
    tied = head is embedding
    table.add_row("head", "the embedding's" if tied else f"{head.numel():,}", "", f"{2 * head.numel():,}")
    named = [model.embed_tokens, *([] if tied else [model.lm_head]), *model.mixers(), *mlps]
    norms = model.num_parameters() - sum(map(_count, named))
    if norms:
        table.add_row("norms", f"{norms:,}", "", "")
    table.add_section()
    flops = model.flops_per_token(context)
    table.add_row("total", f"{model.num_parameters():,}", f"{model.state_bytes(context):,}", f"{flops:,.0f}")
    return table


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
