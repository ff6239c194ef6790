"""Which device a word of the command line stands for."""

from __future__ import annotations

import torch

from lkda.checks import InputError

CPU, AUTO = "cpu", "auto"


def resolve_device(
    word: object, *, option: str = "accelerator", gpu: str = "gpu", instead: str | None = None
) -> torch.device:
    """The device that `auto`, `cpu` or `gpu` stands for: `auto` is a GPU that torch sees, else the CPU.

    Args:
        word: as the user gave it.
        option: its name, for the message.
        gpu: the option's own word for a GPU.
        instead: for the message, what to give where there is no GPU; where None, the other words.
    Raises: ValueError for another word, or where a GPU is wanted and torch sees none.
    """
    if word not in (AUTO, CPU, gpu):
        raise InputError(f"{option} must be {AUTO}, {CPU} or {gpu}, got {word!r}.")
    others = f"{option}={CPU} or {option}={AUTO}"
    there = torch.cuda.is_available()
    if word == gpu and not there:
        raise InputError(f"{option}={gpu}: a GPU was asked for and torch sees no CUDA device; use {instead or others}.")
    return torch.device("cuda" if there and word != CPU else CPU)
