"""Continue a text, and print the continuation while it is sampled."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
from omegaconf import DictConfig

from lkda.checks import InputError, check_count
from lkda.commands.checkpoint_loading import load_trained
from lkda.commands.config import resolve
from lkda.commands.text import check_text, encode_prompt, text_pieces
from lkda.commands.unused_options import GENERATE, check_unused
from lkda.device import resolve_device
from lkda.models.generate import check_sampling
from lkda.models.generate import generate as sample_tokens
from lkda.special_tokens import document_ends
from lkda.training.options import MOST_SEED


def generate(config: DictConfig, *, out: TextIO | None = None) -> str:
    """Write the prompt and the model's continuation to `out`, piece by piece. The speed in tokens per second and the
    reason for the end are written to stderr.

    Args:
        out: None means standard output.
        config: composed from configs/generate.yaml: ckpt, prompt or prompt_file (if both are null, the prompt is read
            from standard input), max_new_tokens, temperature, top_p, seed, ignore_eos, accelerator, backend.
    Returns: the prompt and its continuation.
    Raises: InputError for a checkpoint or a prompt that cannot be used, or a setting outside its range.
    """
    settings = resolve(config)
    out = out or sys.stdout
    device = resolve_device(config.accelerator)
    sampling = {name: settings[name] for name in ("max_new_tokens", "temperature", "top_p")}
    check_sampling(**sampling)
    check_count("seed", config.seed, least=0, most=MOST_SEED)
    if not isinstance(config.ignore_eos, bool):
        raise InputError(f"ignore_eos must be true or false, got {config.ignore_eos!r}.")
    check_unused(GENERATE, settings)
    prompt = _prompt(config)
    trained = load_trained(config.ckpt, backend=config.backend)
    trained.model.resolve_backends(device, torch.float32)
    model = trained.model.to(device)
    tokens = encode_prompt(trained.tokenizer, prompt).to(device)
    ends = () if config.ignore_eos else document_ends(trained.tokenizer)
    timed = _Timed(sample_tokens(model, tokens, **sampling, seed=config.seed, end_tokens=ends))
    pieces = [prompt]
    out.write(prompt)
    for piece in text_pieces(trained.tokenizer, timed):
        pieces.append(piece)
        out.write(piece)
        out.flush()
    out.write("\n")
    out.flush()
    ended = "the document ended" if timed.count < config.max_new_tokens else f"max_new_tokens={config.max_new_tokens}"
    print(f"{timed.count} tokens, {timed.per_second:,.1f} tokens/s on {device}; stopped: {ended}", file=sys.stderr)
    return "".join(pieces)


def _prompt(config: DictConfig) -> str:
    """The prompt as it was given. A final line break is removed from a file or standard input: editors and `echo` add
    it."""
    if config.prompt is not None and config.prompt_file is not None:
        raise InputError("give either prompt=... or prompt_file=..., not both.")
    if config.prompt is not None:
        return check_text("prompt", config.prompt)
    source = "standard input"
    try:
        if config.prompt_file is not None:
            source = f"prompt_file {config.prompt_file}"
            text = Path(str(config.prompt_file)).read_bytes().decode("utf-8")
        elif sys.stdin is None:
            raise InputError("there is no standard input to read the prompt from: give prompt=... or prompt_file=...")
        else:
            if sys.stdin.isatty():
                print("type the prompt, then Ctrl-D:", file=sys.stderr)
            text = sys.stdin.buffer.read().decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt in {source} is not UTF-8: {error}.") from error
    return text.removesuffix("\n").removesuffix("\r")


class _Timed:
    """Passes tokens through, counts them, and times those after the first. The first one includes the prompt's time."""

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
