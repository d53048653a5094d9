"""The device's clock, read without waiting for the device: launches are not what is timed."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch


class RoundTimer:
    """Times what is launched between two :meth:`now`.

    Args:
        on_gpu: whether to record CUDA events on the current stream; else the host's clock is the device's.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._rounds: deque[tuple[Any, Any, Any]] = deque()

    def now(self) -> Any:
        """The place in the device's work that has been launched so far."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Time between two :meth:`now`, which the device has passed."""
        return begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin

    def add(self, begin: Any, end: Any, label: Any) -> None:
        """A round was launched between two :meth:`now`."""
        self._rounds.append((begin, end, label))

    def is_idle(self) -> bool:
        """Whether the device has finished all rounds."""
        return not self._rounds or not self._on_gpu or self._rounds[-1][1].query()

    def finished(self) -> list[tuple[float, Any]]:
        """Seconds and labels of the rounds that the device has finished since the last call."""
        done = []
        while self._rounds and (not self._on_gpu or self._rounds[0][1].query()):
            begin, end, label = self._rounds.popleft()
            done.append((self.seconds(begin, end), label))
        return done
