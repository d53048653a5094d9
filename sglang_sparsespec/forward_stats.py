"""How even the forwards of decoding are: tokens of each, and what part of them verifies.

Counted on the host, where both are known without asking the device. With the environment
variable ``SPARSESPEC_FORWARD_TRACE`` naming a file, each forward is also written there as one JSON
line, with its time on the device (``benchmarks/plot_schedule.py`` draws it).
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from pathlib import Path
from typing import Any

from sglang_sparsespec.device_clock import DeviceClock
from sglang_sparsespec.round_progress import RoundProgress

TRACE_ENV = "SPARSESPEC_FORWARD_TRACE"


class ForwardStats:
    """Counters of one worker's decode forwards.

    Args:
        progress: is told where each forward begins and the round ends, as the trace is.

    Attributes:
        forwards: forwards so far.
        tokens, verify_tokens: tokens they took, and those of verify windows among them.
    """

    def __init__(self, trace: ForwardTrace | None = None, progress: RoundProgress | None = None) -> None:
        self.forwards = 0
        self.tokens = 0
        self.verify_tokens = 0
        self._squares = 0
        self._trace = trace
        self._progress = progress

    def count(self, draft_tokens: int, verify_tokens: int) -> None:
        """A forward is about to be launched."""
        if self._progress is not None:
            self._progress.mark()
        tokens = draft_tokens + verify_tokens
        self.forwards += 1
        self.tokens += tokens
        self.verify_tokens += verify_tokens
        self._squares += tokens * tokens
        if self._trace is not None:
            self._trace.mark({"draft_tokens": draft_tokens, "verify_tokens": verify_tokens})

    def end_of_round(self) -> None:
        """No decode forward follows at once: what comes next is not the last forward's time."""
        if self._progress is not None:
            self._progress.end()
        if self._trace is not None:
            self._trace.mark(None)

    def as_dict(self) -> dict[str, float]:
        """Means since the start of the server, under the names used in ``/server_info``."""
        mean = self.tokens / self.forwards if self.forwards else 0.0
        variance = self._squares / self.forwards - mean * mean if self.forwards else 0.0
        return {
            "sparsespec_forward_tokens": mean,
            "sparsespec_forward_tokens_variation": math.sqrt(max(variance, 0.0)) / mean if mean else 0.0,
            "sparsespec_verify_share": self.verify_tokens / self.tokens if self.tokens else 0.0,
        }


class ForwardTrace:
    """Writes forwards with the time from each one's launch to the next mark, on the device's clock.

    Records are buffered until the device has reached them, so tracing adds an event per forward
    and no synchronisation.

    Args:
        path: JSON-lines file, begun anew.
        device: see ``DeviceClock``.
    """

    def __init__(self, path: Path, device: str) -> None:
        path.write_text("")
        self._path = path
        self._clock = DeviceClock(device)
        self._marks: deque[tuple[Any, dict[str, int] | None]] = deque()
        self._clock_ms = 0.0

    @classmethod
    def from_environment(cls, device: str, is_first_rank: bool) -> ForwardTrace | None:
        """None without ``SPARSESPEC_FORWARD_TRACE``, and on ranks other than the first: they run the same forwards."""
        path = os.environ.get(TRACE_ENV)
        return cls(Path(path), device) if path and is_first_rank else None

    def mark(self, record: dict[str, int] | None) -> None:
        """A forward begins (its record), or nothing that counts does (None)."""
        self._marks.append((self._clock.now(), record))
        if record is None:
            self._write()

    def _write(self) -> None:
        lines = []
        while len(self._marks) > 1 and self._clock.is_over(self._marks[1][0]):
            begin, record = self._marks.popleft()
            elapsed = 1000 * self._clock.seconds(begin, self._marks[0][0])
            if record is not None:
                lines.append(json.dumps({"at_ms": round(self._clock_ms, 4), "ms": round(elapsed, 4), **record}))
            self._clock_ms += elapsed
        if lines:
            with self._path.open("a") as file:
                file.write("\n".join(lines) + "\n")
