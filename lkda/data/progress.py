"""A progress bar that appears only if the work takes more than a few seconds, in place of those of `datasets`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

PATIENCE = 2.0


@contextmanager
def patient_progress() -> Iterator[Progress]:
    """A progress bar on stderr that appears after PATIENCE seconds, if stderr is a terminal. It is erased at the
    end."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    timer = threading.Timer(PATIENCE, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield bar
    finally:
        timer.cancel()
        timer.join()
        if bar.live.is_started:
            bar.stop()


@contextmanager
def without_bars_of_datasets() -> Iterator[None]:
    """A context without the progress bars of `datasets`, which appear at once and stay."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
