"""What a torch profiler trace says about the GPU: its idle share, and which kernels its time goes to."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPU_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
# Gaps up to this length (us) are the GPU's own, between dependent kernels of a CUDA graph; in longer ones it waits.
LAUNCH_GAP_US = 5.0


@dataclass(frozen=True)
class GpuEvent:
    """One kernel, copy or fill: start and duration in microseconds."""

    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        """Microsecond at which it ends."""
        return self.start + self.duration


def load_gpu_events(path: Path) -> list[GpuEvent]:
    """The GPU events of a Chrome trace (plain or gzip), by start.

    Raises:
        ValueError: the trace has none.
    """
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        trace = json.load(file)
    events = [
        GpuEvent(event["name"], float(event["ts"]), float(event["dur"]))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in GPU_CATEGORIES
    ]
    if not events:
        raise ValueError(f"{path} holds no GPU events; was the profiler run with the GPU activity?")
    return sorted(events, key=lambda event: event.start)


@dataclass(frozen=True)
class Occupancy:
    """Shares of a window of time.

    Attributes:
        window_us: from the first event's start to the last one's end.
        idle: share without any event.
        waiting: share in gaps longer than :data:`LAUNCH_GAP_US`.
        longest_gap_us: the longest gap.
    """

    window_us: float
    idle: float
    waiting: float
    longest_gap_us: float


def occupancy(events: Sequence[GpuEvent]) -> Occupancy:
    """Idle shares of the window that ``events`` (by start) span; streams may overlap."""
    start, reached = events[0].start, events[0].start
    idle = waiting = longest = 0.0
    for event in events:
        gap = event.start - reached
        if gap > 0:
            idle += gap
            longest = max(longest, gap)
            if gap > LAUNCH_GAP_US:
                waiting += gap
        reached = max(reached, event.end)
    window = reached - start
    return Occupancy(window, idle / window, waiting / window, longest)


def by_kernel(events: Sequence[GpuEvent]) -> list[dict[str, Any]]:
    """Time and launches of each kernel name, longest first."""
    totals: dict[str, list[float]] = {}
    for event in events:
        entry = totals.setdefault(event.name, [0, 0.0])
        entry[0] += 1
        entry[1] += event.duration
    rows = [{"kernel": name, "launches": int(n), "ms": us / 1e3} for name, (n, us) in totals.items()]
    return sorted(rows, key=lambda row: -row["ms"])


def write_small_trace(events: Sequence[GpuEvent], path: Path) -> None:
    """``events`` as a gzipped Chrome trace that holds nothing else."""
    origin = events[0].start
    rows = [
        {
            "ph": "X",
            "cat": "kernel",
            "name": e.name[:80],
            "ts": round(e.start - origin, 3),
            "dur": round(e.duration, 3),
            "pid": 0,
            "tid": 0,
        }
        for e in events
    ]
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": rows}, file, separators=(",", ":"))
