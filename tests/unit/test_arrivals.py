"""When the scheduler waits for arrivals at the end of an iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from sglang_sparsespec.scheduler_patch import arrivals


class LateChoice:
    """Stands in for the planner's; what it is told is recorded."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def wait(self, arrived: Callable[[], bool] | None) -> None:
        self.told.append("no wait" if arrived is None else arrived())


class Worker:
    """Stands in for ``SparseSpecWorker``."""

    def __init__(self) -> None:
        self.planner = SimpleNamespace(late_choice=LateChoice())


@pytest.fixture
def sockets() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    """The scheduler's, and the tokenizer's."""
    with zmq.Context() as context, context.socket(zmq.PULL) as receiving, context.socket(zmq.PUSH) as sending:
        receiving.bind("inproc://requests")
        sending.connect("inproc://requests")
        yield receiving, sending


BATCH = SimpleNamespace(reqs=["a request"])


def told(monkeypatch: pytest.MonkeyPatch, socket: Any, batch: Any = BATCH, **changes: Any) -> list[Any]:
    """What the end of an iteration tells the planner."""
    monkeypatch.setattr(arrivals, "SparseSpecWorker", Worker)
    held = changes.pop("holds_admission", None)
    manager = None if held is None else SimpleNamespace(holds_admission=held)
    monkeypatch.setattr(arrivals, "manager_of", lambda scheduler: manager)
    receiver = SimpleNamespace(recv_from_tokenizer=socket, recv_skipper=changes.pop("recv_skipper", None))
    compiling = changes.pop("compiling", False)
    grammars = SimpleNamespace(has_waiting_grammars=lambda: compiling)
    values = {"draft_worker": Worker(), "waiting_queue": [], "chunked_req": None, "max_running_requests": 2, **changes}
    scheduler = SimpleNamespace(**values, request_receiver=receiver, grammar_manager=grammars)
    arrivals.wait_for_arrivals(None, scheduler, None, batch)
    return scheduler.draft_worker.planner.late_choice.told


@pytest.mark.parametrize("changes", [{}, {"holds_admission": False}])
def test_it_waits_for_a_message(monkeypatch: pytest.MonkeyPatch, sockets: Any, changes: dict[str, Any]) -> None:
    receiving, sending = sockets
    assert told(monkeypatch, receiving, **changes) == [False]
    sending.send(b"a request")
    assert told(monkeypatch, receiving, **changes) == [True]
    assert receiving.recv() == b"a request"  # it is SGLang's to receive


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
    monkeypatch: pytest.MonkeyPatch, sockets: Any, changes: dict[str, Any]
) -> None:
    assert told(monkeypatch, sockets[0], **changes) == ["no wait"]


def test_a_rank_that_does_not_receive_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, None) == ["no wait"]


def test_other_workers_are_left_alone() -> None:
    arrivals.wait_for_arrivals(None, SimpleNamespace(draft_worker=None), None, BATCH)
