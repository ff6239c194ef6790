"""Continue a text, and print the continuation while it is sampled."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

import torch
from omegaconf import DictConfig

from lkda.checks import InputError, check_count
from lkda.commands.command_line.text import check_text, encode_prompt
from lkda.commands.prompts_job import check_prompts_job
from lkda.commands.run.checkpoint_loading import load_trained
from lkda.commands.settings.config import resolve
from lkda.commands.settings.unused_options import GENERATE, check_unused
from lkda.device import resolve_device
from lkda.generation.generate import Piece, check_number_of_texts, pieces_of
from lkda.generation.text import check_stop
from lkda.models.decoder import Sampling
from lkda.models.generate import END, LENGTH, STOP, BatchGenerator, Request, check_sampling
from lkda.models.stepwise import set_state_dtype
from lkda.special_tokens import document_ends
from lkda.training.options import MOST_SEED


def generate(config: DictConfig, *, out: TextIO | None = None) -> str:
    """Write the prompt and the model's continuation to `out`, piece by piece. The speed in tokens per second and the
    reason for the end are written to stderr. With `prompts`, the texts of many prompts are written to a file instead.

    Args:
        out: None means standard output.
        config: composed from configs/generate.yaml.
    Returns: the prompt and its continuation; of several samples, each after an empty line. "" with `prompts`.
    Raises: InputError for a checkpoint or a prompt that cannot be used, or a setting outside its range.
    """
    settings = resolve(config)
    device = resolve_device(config.accelerator)
    sampling = {name: settings[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    check_sampling(max_new_tokens=config.max_new_tokens, **sampling)
    check_count("seed", config.seed, least=0, most=MOST_SEED)
    check_number_of_texts(1, config.num_samples)
    if config.batch_size is not None:
        check_count("batch_size", config.batch_size, least=1)
    if not isinstance(config.ignore_eos, bool):
        raise InputError(f"ignore_eos must be true or false, got {config.ignore_eos!r}.")
    settings["stop"] = _unescaped(settings["stop"])
    stop = check_stop(() if settings["stop"] is None else settings["stop"])
    check_unused(GENERATE, settings)
    job = None if config.prompts is None else check_prompts_job(settings)
    prompts = [_prompt(config)] if job is None else job.prompts
    check_number_of_texts(len(prompts), config.num_samples)
    trained = load_trained(config.ckpt, backend=config.backend)
    if config.state_dtype is not None:
        set_state_dtype(trained.model, config.state_dtype)
    trained.model.resolve_backends(device, torch.float32)
    model, tokenizer = trained.model.to(device), trained.tokenizer
    wanted = [(i, j) for i in range(len(prompts)) for j in range(config.num_samples)]
    if job is not None:
        wanted = job.begin(model, wanted)
    names = ["the prompt"] if job is None else [f"prompt {i} (from 0) of {config.prompts}" for i in range(len(prompts))]
    encoded = {i: encode_prompt(tokenizer, prompts[i], name=names[i])[0].tolist() for i in sorted(dict(wanted))}
    batch = BatchGenerator(
        model,
        [Request(encoded[i], i, j) for i, j in wanted],
        max_new_tokens=config.max_new_tokens,
        sampling=Sampling(**sampling),
        seed=config.seed,
        end_tokens=() if config.ignore_eos else document_ends(tokenizer),
        batch_size=config.batch_size,
    )
    pieces = _Timed(pieces_of(batch, tokenizer, prompts, stop))
    if job is not None:
        job.write(pieces)
        print(f"{pieces.count} tokens, {pieces.per_second:,.1f} tokens/s on {device}; wrote {job.out}", file=sys.stderr)
        return ""
    text, reasons = _show(pieces, prompts[0], out or sys.stdout, whole=config.num_samples > 1)
    ended = {END: "the document ended", LENGTH: f"max_new_tokens={config.max_new_tokens}", STOP: "a stop string"}
    stopped = ", ".join(ended[reason] for reason in dict.fromkeys(reasons))
    print(f"{pieces.count} tokens, {pieces.per_second:,.1f} tokens/s on {device}; stopped: {stopped}", file=sys.stderr)
    return text


def _show(pieces: Iterable[Piece], prompt: str, out: TextIO, *, whole: bool) -> tuple[str, list[str]]:
    """Write the pieces of one text as they come, or (whole) several texts one after the other."""
    parts, results = [prompt], []
    if not whole:
        out.write(prompt)
    for piece in pieces:
        if not whole and piece.text:
            parts.append(piece.text)
            out.write(piece.text)
            out.flush()
        if piece.result is not None:
            results.append(piece.result)
    text = "".join(parts)
    if whole:
        text = "\n\n".join(prompt + result.text for result in sorted(results, key=lambda x: x.sample_index))
        out.write(text)
    out.write("\n")
    out.flush()
    return text, [result.reason for result in results]


def _unescaped(stop: object) -> object:
    """Stop strings as typed, with the two characters \\n as a line break, \\t as a tab and \\\\ as a backslash. Neither
    the shell nor Hydra does this."""
    if isinstance(stop, str):
        return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], stop)
    return [_unescaped(text) for text in stop] if isinstance(stop, list) else stop


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
            text = Path(str(config.prompt_file)).read_bytes().decode("utf-8-sig")
        elif sys.stdin is None:
            raise InputError("there is no standard input to read the prompt from: give prompt=... or prompt_file=...")
        else:
            if sys.stdin.isatty():
                print("type the prompt, then Ctrl-D:", file=sys.stderr)
            text = sys.stdin.buffer.read().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}. Give a text file that exists.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt in {source} is not UTF-8: {error}.") from error
    return text.removesuffix("\n").removesuffix("\r")


class _Timed:
    """Passes pieces through, counts the tokens, and times those after the first, which includes the prompt's time."""

    def __init__(self, pieces: Iterator[Piece]) -> None:
        self.pieces = pieces
        self.count = 0
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Piece]:
        begin = 0.0
        for piece in self.pieces:
            if piece.result is None:
                now = time.perf_counter()
                begin = begin or now
                self.seconds = now - begin
                self.count += 1
            yield piece

    @property
    def per_second(self) -> float:
        return (self.count - 1) / self.seconds if self.seconds else 0.0
