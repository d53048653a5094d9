"""Moments of the device's work, and the time between them, without waiting for the device."""

from __future__ import annotations

import time
from typing import Any

import torch


class DeviceClock:
    """A clock that counts what the device does: launches are not what is timed.

    Args:
        device: "cuda" for CUDA events on the current stream; else the host's clock is the device's.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def now(self) -> Any:
        """The place in the device's work that has been launched so far."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_over(self, moment: Any) -> bool:
        """Whether the device has got to a moment of :meth:`now`."""
        return not self._cuda or moment.query()

    def seconds(self, begin: Any, end: Any) -> float:
        """Time between two moments that are over."""
        return begin.elapsed_time(end) / 1000 if self._cuda else end - begin
