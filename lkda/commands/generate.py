"""Continue a text, showing it as it is drawn."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
from omegaconf import DictConfig

from lkda.commands.model_source import load_trained
from lkda.commands.settings import device_of, plain
from lkda.commands.text import encode_prompt, text_pieces
from lkda.models.generate import generate as draw


def generate(config: DictConfig, *, out: TextIO | None = None) -> str:
    """Write the prompt and the model's continuation to `out`, piece by piece; the speed goes to stderr.

    Args:
        out: standard output where None.
        config: composed from configs/generate.yaml: ckpt, prompt or prompt_file (else standard input),
            max_new_tokens, temperature, top_p, seed, accelerator, backend.
    Returns: the whole text.
    Raises:
        ValueError: no usable checkpoint or prompt, or a setting out of its range.
    """
    settings = plain(config)
    out = out or sys.stdout
    device = device_of(config.accelerator)
    prompt = _prompt(config)
    trained = load_trained(config.ckpt, backend=config.backend)
    trained.model.resolve_backends(device, torch.float32)
    model = trained.model.to(device)
    tokens = encode_prompt(trained.tokenizer, prompt).to(device)
    chosen = {name: settings[name] for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    timed = _Timed(draw(model, tokens, **chosen))
    pieces = [prompt]
    out.write(prompt)
    for piece in text_pieces(trained.tokenizer, timed):
        pieces.append(piece)
        out.write(piece)
        out.flush()
    out.write("\n")
    out.flush()
    print(f"{timed.count} tokens, {timed.per_second:,.1f} tokens/s on {device}", file=sys.stderr)
    return "".join(pieces)


def _prompt(config: DictConfig) -> str:
    if config.prompt is not None and config.prompt_file is not None:
        raise ValueError("give either prompt=... or prompt_file=..., not both.")
    if config.prompt is not None:
        return str(config.prompt)
    source = "standard input"
    try:
        if config.prompt_file is not None:
            source = config.prompt_file
            return Path(config.prompt_file).read_text(encoding="utf-8")
        if sys.stdin.isatty():
            print("type the prompt, then Ctrl-D:", file=sys.stderr)
        return sys.stdin.buffer.read().decode("utf-8").rstrip("\n")
    except OSError as error:
        raise ValueError(f"cannot read prompt_file {source}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt in {source} is not UTF-8: {error}.") from error


class _Timed:
    """Passes tokens through; counts them, and the time after the first (which waits for the prompt)."""

    def __init__(self, tokens: Iterator[int]) -> None:
        self.tokens = tokens
        self.count = 0
        self.seconds = 0.0

    def __iter__(self) -> Iterator[int]:
        begin = 0.0
        for token in self.tokens:
            now = time.perf_counter()
            begin = begin or now
            self.seconds = now - begin
            self.count += 1
            yield token

    @property
    def per_second(self) -> float:
        return (self.count - 1) / self.seconds if self.seconds else 0.0
