"""What a finished run leaves on the terminal: its numbers, a sample, and what to try next."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from lkda.commands.run_directory import RunDirectory
from lkda.commands.text import encode_prompt, text_pieces
from lkda.models.generate import generate
from lkda.models.lm import LanguageModel


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
    )
    return sample["prompt"] + "".join(text_pieces(tokenizer, drawn))


def print_closing(console: Console, run: RunDirectory, summary: dict[str, Any], sample: str) -> None:
    """The table, the sample, and the next commands."""
    table = Table(title=f"{summary['mixer']} · {summary['model']} · {summary['data']}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    gain = summary["unigram_entropy"] - summary["val/loss"]
    for name, value in (
        ("validation loss", f"{summary['val/loss']:.4f} nats a token"),
        ("unigram entropy of the text", f"{summary['unigram_entropy']:.4f} ({gain:+.2f} better)"),
        ("perplexity", f"{summary['val/perplexity']:.2f}"),
        ("bits per byte", f"{summary['val/bits_per_byte']:.4f}"),
        ("parameters", f"{summary['params']:,} ({summary['params_non_embedding']:,} without embeddings)"),
        ("state of one sequence", f"{summary['state_bytes']:,} bytes at {summary['context']} tokens"),
        ("tokens trained on", f"{summary['tokens']:,} in {summary['seconds']:.0f} s"),
        ("tokens/s", f"{summary['tokens_per_s']:,.0f}"),
    ):
        table.add_row(name, value)
    console.print(table)
    console.print(Panel(Text(sample), title="a sample"))
    here = _short(run.path)
    other = "softmax" if summary["mixer"] != "softmax" else "kda"
    console.print(f"run directory {here}\nnext:", soft_wrap=True)
    for command in (
        f'scripts/generate.py ckpt={here}/checkpoints/last.ckpt prompt="The people"',
        f"scripts/evaluate.py ckpt={here}/checkpoints/best.ckpt",
        f"scripts/train.py mixer={other}",
        f"scripts/compare.py 'runs={_short(run.path.parent)}/*' out=comparison",
    ):
        console.print(f"  {python_command()} {command}", markup=False, soft_wrap=True)


def python_command() -> str:
    """What to type for the interpreter that runs: its path where it is one of an environment that is not activated."""
    activated = "VIRTUAL_ENV" in os.environ or sys.prefix == sys.base_prefix
    return "python" if activated else _short(Path(sys.executable))


def _short(path: Path) -> str:
    """Relative to the working directory where that is below it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
