"""What the host learns of a device without stopping it: when its work ends, and the values that it computes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor


class Moment:
    """The moment at which a device ends the work that it has been given so far. A CPU has ended it already."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        else:
            self._time = time.perf_counter()

    def wait(self) -> None:
        """Return when the moment has come."""
        if self._event is not None:
            self._event.synchronize()

    def has_come(self) -> bool:
        return self._event is None or self._event.query()

    def seconds_since(self, earlier: Moment) -> float:
        """The seconds between two moments of one device. Waits for both."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        earlier.wait()
        self.wait()
        return earlier._event.elapsed_time(self._event) / 1000


class ComingValues:
    """Copies of scalars on a device, which reach the host while the device goes on with its work.

    Args:
        values: at least one tensor with one element, of any type that float64 holds.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        device = values[0].device
        found = torch.stack([value.detach().to(device, torch.float64).reshape(()) for value in values])
        self._values = torch.empty(len(values), dtype=torch.float64, pin_memory=device.type == "cuda")
        self._values.copy_(found, non_blocking=True)
        self.moment = Moment(device)

    def have_arrived(self) -> bool:
        return self.moment.has_come()

    def read(self) -> list[float]:
        """The values. Waits until they are there."""
        self.moment.wait()
        return [float(value) for value in self._values]
