"""When the scheduler waits for arrivals at the end of an iteration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_sparsespec.scheduler_patch import arrivals

BATCH = SimpleNamespace(reqs=["a request"])


class Worker:
    """Stands in for ``SparseSpecWorker``; what its planner is told is recorded."""

    def __init__(self) -> None:
        self.told: list[bool] = []
        self.planner = SimpleNamespace(late_choice=SimpleNamespace(end_iteration=lambda wait: self.told.append(wait)))


def told(monkeypatch: pytest.MonkeyPatch, batch: Any = BATCH, **changes: Any) -> list[bool]:
    """What the end of an iteration tells the planner."""
    monkeypatch.setattr(arrivals, "SparseSpecWorker", Worker)
    held = changes.pop("holds_admission", None)
    manager = None if held is None else SimpleNamespace(holds_admission=held)
    monkeypatch.setattr(arrivals, "manager_of", lambda scheduler: manager)
    receiver = SimpleNamespace(recv_skipper=changes.pop("recv_skipper", None))
    compiling = changes.pop("compiling", False)
    grammars = SimpleNamespace(has_waiting_grammars=lambda: compiling)
    values = {"draft_worker": Worker(), "waiting_queue": [], "chunked_req": None, "max_running_requests": 2, **changes}
    scheduler = SimpleNamespace(**values, request_receiver=receiver, grammar_manager=grammars)
    arrivals.wait_for_arrivals(None, scheduler, None, batch)
    return scheduler.draft_worker.told


@pytest.mark.parametrize("changes", [{}, {"holds_admission": False}])
def test_it_waits_where_an_arrival_would_come_next(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    assert told(monkeypatch, **changes) == [True]


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": None},
        {"max_running_requests": 1},
        {"waiting_queue": ["a request"]},
        {"chunked_req": "a request"},
        {"recv_skipper": "a skipper"},
        {"compiling": True},
        {"holds_admission": True},
    ],
)
def test_it_does_not_wait_where_an_arrival_would_not_come_next(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    assert told(monkeypatch, **changes) == [False]


def test_other_workers_are_left_alone() -> None:
    arrivals.wait_for_arrivals(None, SimpleNamespace(draft_worker=None), None, BATCH)
