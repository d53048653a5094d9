"""When the batch after a round is chosen: by made-up events of the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_sparsespec.rounds import late_choice
from sglang_sparsespec.rounds import planner as planner_module
from sglang_sparsespec.rounds.late_choice import LateChoice
from sglang_sparsespec.rounds.planner import Planner
from sglang_sparsespec.rounds.round_times import Load
from sglang_sparsespec.settings import Settings

K = 8


class Device:
    """A device that runs a step in each tick, in place of ``RoundTimer``."""

    def __init__(self) -> None:
        self.launched = self.done = 0

    def now(self) -> Any:
        place = self.launched
        return SimpleNamespace(query=lambda: self.done >= place)

    def is_idle(self) -> bool:
        return self.done >= self.launched

    def launch(self, late: LateChoice, steps: int, due: int) -> None:
        """A round of so many steps and a verification."""
        late.begin_round(due)
        for step in range(steps):
            late.note_step(step)
            self.launched += 1
        self.launched += 1

    def sleep(self, seconds: float) -> None:
        """The time of one step passes."""
        self.done += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(late_choice.time, "sleep", device.sleep)
    return device


@pytest.fixture
def late(device: Device) -> LateChoice:
    return LateChoice(device)  # type: ignore[arg-type]


def test_the_wait_ends_when_the_device_comes_to_the_due_step(device: Device, late: LateChoice) -> None:
    device.launch(late, steps=8, due=6)
    late.end_iteration(wait=True)
    assert device.done == 6
    assert (late.waits, late.waits_too_long) == (1, 0)


@pytest.mark.parametrize("due", [0, -3])
def test_a_round_with_too_few_steps_is_not_waited_for(device: Device, late: LateChoice, due: int) -> None:
    device.launch(late, steps=1, due=due)
    late.end_iteration(wait=True)
    assert device.done == late.waits == 0


def test_where_no_arrival_would_be_next_there_is_no_wait(device: Device, late: LateChoice) -> None:
    device.launch(late, steps=8, due=6)
    late.end_iteration(wait=False)
    assert device.done == late.waits == 0


def test_only_the_round_in_flight_is_waited_for(device: Device, late: LateChoice) -> None:
    device.launch(late, steps=8, due=6)
    late.end_iteration(wait=False)
    late.end_iteration(wait=True)  # after a prefill
    assert device.done == 0
    late.note_step(6)  # of a round that the planner was not asked about
    late.end_iteration(wait=True)
    assert device.done == 0


def test_waits_after_which_the_device_is_idle_are_counted(device: Device, late: LateChoice) -> None:
    device.launch(late, steps=8, due=6)
    late.end_iteration(wait=True)
    device.done = device.launched
    device.launch(late, steps=8, due=6)
    assert late.waits_too_long == 1
    late.end_iteration(wait=False)
    device.done = device.launched
    device.launch(late, steps=8, due=6)
    assert late.waits_too_long == 1


class Times:
    """Seconds of every forward."""

    def __init__(self, draft: float, verify: float, plain: float) -> None:
        self.draft, self.verify, self.plain = (lambda load, s=seconds: s for seconds in (draft, verify, plain))


@pytest.mark.parametrize(
    ("requests", "times", "speculate", "due"),
    [
        (20, Times(draft=0.0015, verify=0.006, plain=1.0), "always", K - 1),  # a verification is longer than the host's 5 ms
        (20, Times(draft=0.0015, verify=0.003, plain=1.0), "always", K - 2),  # two drafts and it
        (128, Times(draft=0.002, verify=0.003, plain=1.0), "always", K - 4),
        (20, Times(draft=0.0015, verify=0.004, plain=0.002), "never", 1),  # three steps of four
    ],
)
def test_the_host_has_its_time_before_the_round_ends(
    monkeypatch: pytest.MonkeyPatch, requests: int, times: Any, speculate: str, due: int
) -> None:
    group = SimpleNamespace(world_size=1, rank_in_group=0)
    monkeypatch.setattr(planner_module, "get_tp_group", lambda: group)
    planner = Planner(Settings(speculate=speculate), K, on_gpu=True)
    planner.times = times
    told: list[int] = []
    planner._timer = SimpleNamespace(now=lambda: 0.0, finished=lambda: ())  # type: ignore[assignment]
    monkeypatch.setattr(planner.late_choice, "begin_round", told.append)
    choice = planner._choose(Load(requests, 1000 * requests), must_verify=False)
    assert (choice.drafts or choice.plain_steps) > due
    assert told == [due]
