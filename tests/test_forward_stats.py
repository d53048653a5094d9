"""Counting and tracing of forwards, and the picture made of two traces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_sparsespec.forward_stats import TRACE_ENV, ForwardStats, ForwardTrace

REPO = Path(__file__).resolve().parent.parent


def test_means_and_variation_of_a_lockstep_round() -> None:
    stats = ForwardStats()
    for _ in range(8):
        stats.count(10, 0)
    stats.count(0, 90)
    values = stats.as_dict()
    assert values["sparsespec_forward_tokens"] == pytest.approx(170 / 9)
    assert values["sparsespec_verify_share"] == pytest.approx(90 / 170)
    # Nine forwards of mean 18.9: the variance is 8/81 * 80^2.
    assert values["sparsespec_forward_tokens_variation"] == pytest.approx((8 / 81 * 6400) ** 0.5 / (170 / 9))


def test_even_forwards_do_not_vary() -> None:
    stats = ForwardStats()
    assert stats.as_dict()["sparsespec_forward_tokens_variation"] == 0
    for _ in range(9):
        stats.count(8, 9)
    assert stats.as_dict()["sparsespec_forward_tokens_variation"] == pytest.approx(0, abs=1e-6)


def test_a_trace_has_a_line_per_forward_and_none_for_what_lies_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ForwardTrace.from_environment("cpu", is_first_rank=True) is None
    path = tmp_path / "trace.jsonl"
    monkeypatch.setenv(TRACE_ENV, str(path))
    stats = ForwardStats(ForwardTrace.from_environment("cpu", is_first_rank=True))
    for _ in range(3):
        stats.count(2, 0)
        stats.count(0, 9)
        stats.end_of_round()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["draft_tokens"] for record in records] == [2, 0] * 3
    assert [record["verify_tokens"] for record in records] == [0, 9] * 3
    assert all(record["ms"] >= 0 for record in records)
    times = [record["at_ms"] for record in records]
    assert times == sorted(times)


def test_one_rank_of_several_writes_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would begin the file anew, and write every forward."""
    path = tmp_path / "trace.jsonl"
    path.write_text("the first rank's\n")
    monkeypatch.setenv(TRACE_ENV, str(path))
    assert ForwardTrace.from_environment("cpu", is_first_rank=False) is None
    assert path.read_text() == "the first rank's\n"


def write_trace(path: Path, forwards: list[tuple[int, int, float]]) -> None:
    at, lines = 0.0, []
    for draft_tokens, verify_tokens, ms in forwards:
        record = {"at_ms": at, "ms": ms, "draft_tokens": draft_tokens, "verify_tokens": verify_tokens}
        lines.append(json.dumps(record))
        at += ms
    path.write_text("\n".join(lines) + "\n")


def plot(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = str(REPO / "benchmarks" / "plot_schedule.py")
    return subprocess.run([sys.executable, program, *arguments], cwd=folder, capture_output=True, text=True)


def test_the_picture_shows_both_schedules_and_their_steady_state(tmp_path: Path) -> None:
    write_trace(tmp_path / "lockstep.jsonl", ([(32, 0, 4.0)] * 8 + [(0, 288, 20.0)]) * 30)
    write_trace(tmp_path / "unified.jsonl", [(28, 36, 6.0)] * 270)
    done = plot(tmp_path, "lockstep.jsonl", "unified.jsonl", "--output", "out.svg", "--results", "out.jsonl")
    assert done.returncode == 0, done.stderr
    lockstep, unified = [json.loads(line) for line in done.stdout.splitlines()]
    assert lockstep["schedule"] == "lockstep" and lockstep["tokens_variation"] > 1
    assert unified["tokens"] == 64 and unified["tokens_variation"] == 0 and unified["step_ms"] == 6
    assert unified["verify_share"] == pytest.approx(36 / 64, abs=1e-4)
    picture = (tmp_path / "out.svg").read_text()
    assert picture.count("<polyline") == 4 and "unified: 64" in picture
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_an_empty_trace_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    done = plot(tmp_path, "empty.jsonl", "--output", "out.svg")
    assert done.returncode != 0 and TRACE_ENV in done.stderr
