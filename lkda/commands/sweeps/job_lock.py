"""The lock of a run directory while one process trains and measures a job in it."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


class JobLock:
    """Held from `take` to `release`. A child process that inherits the descriptor holds it too, until it ends.

    The lock is a file beside the directory, which the directory can therefore be renamed under.

    Attributes:
        descriptor: to be given to child processes.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self.descriptor = descriptor

    @classmethod
    def take(cls, directory: Path) -> JobLock | None:
        """The lock of a run directory, which need not exist; None if another process has it."""
        path = directory.with_name(f".{directory.name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                        return cls(path, descriptor)
            except BlockingIOError:
                os.close(descriptor)
                return None
            os.close(descriptor)  # the previous holder removed the file meanwhile

    def release(self) -> None:
        """Remove the file, and the lock with it."""
        self._path.unlink(missing_ok=True)
        os.close(self.descriptor)
