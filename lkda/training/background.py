"""Runs functions in a thread, one after another, while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Runs jobs in one thread, in the order in which they are given.

    After a job has failed, no later one runs. `wait` raises the error of the first that failed.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._newest: Future[None] | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Run `job` after the jobs before it. This does not wait."""
        before = self._newest

        def run() -> None:
            if before is not None:
                before.result()  # it is done; this raises its error
            job()

        self._newest = self._thread.submit(run)

    def wait(self) -> None:
        """Wait until all jobs are done. Raises the error of the first job that failed, whatever its type."""
        newest, self._newest = self._newest, None
        if newest is not None:
            newest.result()

    def raise_errors(self) -> None:
        """Raise the error of a job that has failed already. This does not wait."""
        if self._newest is not None and self._newest.done():
            self.wait()
