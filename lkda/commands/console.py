"""What a finished run leaves on the terminal: its numbers, a sample, and what to try next."""

from __future__ import annotations

import glob
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from lkda.commands.invocation import command, given_overrides, short
from lkda.commands.overrides import override
from lkda.commands.run_directory import RunDirectory
from lkda.commands.text import encode_prompt, text_pieces
from lkda.models.generate import generate
from lkda.models.lm import LanguageModel
from lkda.special_tokens import document_ends


def draw_sample(model: LanguageModel, tokenizer: Tokenizer, sample: dict[str, Any], *, seed: int) -> str:
    """The prompt of `sample` and the model's continuation.

    Args:
        sample: {"prompt", "max_new_tokens", "temperature", "top_p"}.
    """
    model.eval()
    tokens = encode_prompt(tokenizer, sample["prompt"]).to(next(model.parameters()).device)
    drawn = generate(
        model,
        tokens,
        max_new_tokens=sample["max_new_tokens"],
        temperature=sample["temperature"],
        top_p=sample["top_p"],
        seed=seed,
        end_tokens=document_ends(tokenizer),
    )
    return sample["prompt"] + "".join(text_pieces(tokenizer, drawn))


def print_closing(console: Console, run: RunDirectory, summary: dict[str, Any], sample: str | None) -> None:
    """The table, the sample where the tokens are text, and the next commands."""
    table = Table(title=f"{summary['mixer']} · {summary['model']} · {summary['data']}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in (
        ("validation loss", f"{summary['val/loss']:.4f} nats a token"),
        *([("test loss", f"{summary['test/loss']:.4f} nats a token")] if "test/loss" in summary else []),
        *(_of_text(summary) if sample is not None else _of_parts(summary)),
        ("parameters", f"{summary['params']:,} ({summary['params_non_embedding']:,} without embeddings)"),
        ("state of one sequence", f"{summary['state_bytes']:,} bytes at {summary['context']} tokens"),
        ("tokens trained on", f"{summary['tokens']:,} in {summary['seconds']:.0f} s"),
        ("tokens/s", f"{summary['tokens_per_s']:,.0f}"),
    ):
        table.add_row(name, value)
    console.print(table)
    if sample is not None:
        console.print(Panel(Text(sample), title="a sample"))
    console.print(f"run directory {short(run.path)}\nnext:", markup=False, soft_wrap=True)
    for line in _next_commands(run, summary, of_text=sample is not None):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _next_commands(run: RunDirectory, summary: dict[str, Any], *, of_text: bool) -> list[str]:
    checkpoints = f"{short(run.path)}/checkpoints"
    other = "softmax" if summary["mixer"] != "softmax" else "kda"
    same = given_overrides(without=("mixer", "init_from=", "resume="))
    if not same and not of_text:
        same = [f"data={summary['data']}", f"model={summary['model']}"]
    beside = f"{glob.escape(short(run.path.parent))}/*"
    sample = command("generate", override("ckpt", f"{checkpoints}/last.ckpt"), "prompt=The people")
    return [
        *([sample] if of_text else []),
        command("evaluate", override("ckpt", f"{checkpoints}/best.ckpt")),
        command("train", *same, f"mixer={other}"),
        command("compare", override("runs", beside), "out=comparison"),
    ]


def _of_text(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Of the test split where there is one."""
    tested = "test/loss" in summary
    split, of = ("test", " of the test split") if tested else ("val", "")
    entropy = summary["test_unigram_entropy" if tested else "unigram_entropy"]
    gain = entropy - summary[f"{split}/loss"]
    return [
        (f"unigram entropy{of or ' of the text'}", f"{entropy:.4f} ({gain:+.2f} better)"),
        (f"perplexity{of}", f"{summary[f'{split}/perplexity']:.2f}"),
        (f"bits per byte{of}", f"{summary[f'{split}/bits_per_byte']:.4f}"),
    ]


def _of_parts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for part in summary["parts"]:
        shape = ", ".join(f"{name} {value}" for name, value in part.items() if name in ("length", "pairs"))
        if "accuracy" in part:
            rows.append(
                (f"accuracy, {shape}", f"{part['accuracy']:.2%} of tokens, {part['sequence_accuracy']:.2%} whole")
            )
    return rows
