"""Figures from profiler traces: idle shares, sums by kernel, the small trace that is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from _trace import GpuEvent, by_kernel, load_gpu_events, occupancy, write_small_trace  # noqa: E402


def test_idle_is_what_no_stream_covers() -> None:
    # Two streams overlap from 5 to 10; 2 us (a launch gap) and 20 us (waiting) are free.
    events = [GpuEvent("a", 0, 10), GpuEvent("b", 5, 13), GpuEvent("a", 20, 10), GpuEvent("c", 50, 50)]
    taken = occupancy(events)
    assert taken.window_us == 100
    assert taken.idle == pytest.approx(0.22)
    assert taken.waiting == pytest.approx(0.20)
    assert taken.longest_gap_us == 20


def test_an_event_inside_another_does_not_shorten_it() -> None:
    assert occupancy([GpuEvent("long", 0, 100), GpuEvent("short", 10, 1), GpuEvent("next", 100, 1)]).idle == 0


def test_kernels_are_summed_and_the_longest_comes_first() -> None:
    rows = by_kernel([GpuEvent("a", 0, 1000), GpuEvent("b", 0, 3000), GpuEvent("a", 9, 1500)])
    assert rows == [{"kernel": "b", "launches": 1, "ms": 3.0}, {"kernel": "a", "launches": 2, "ms": 2.5}]


def test_a_written_trace_reads_back_sorted_and_without_host_events(tmp_path: Path) -> None:
    source = tmp_path / "full.json"
    event = {"ph": "X", "ts": 30, "dur": 2, "name": "later", "cat": "kernel"}
    host = {"ph": "X", "ts": 0, "dur": 99, "name": "python", "cat": "cpu_op"}
    copy = {"ph": "X", "ts": 10.5, "dur": 1.25, "name": "Memcpy", "cat": "gpu_memcpy"}
    source.write_text(json.dumps({"traceEvents": [event, host, copy]}))
    events = load_gpu_events(source)
    assert [e.name for e in events] == ["Memcpy", "later"]
    small = tmp_path / "small.json.gz"
    write_small_trace(events, small)
    assert load_gpu_events(small) == [GpuEvent("Memcpy", 0, 1.25), GpuEvent("later", 19.5, 2)]


def test_a_trace_without_gpu_events_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({"traceEvents": [{"ph": "X", "ts": 0, "dur": 1, "name": "x", "cat": "cpu_op"}]}))
    with pytest.raises(ValueError, match="no GPU events"):
        load_gpu_events(path)
