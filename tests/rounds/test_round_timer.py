"""What the timer says of the round in flight, by events of a made-up device."""

from __future__ import annotations

import pytest

from sglang_sparsespec.rounds import round_timer
from sglang_sparsespec.rounds.round_timer import RoundTimer


class Device:
    """Has done everything up to ``now``, in milliseconds; events on its own stream are recorded ``behind`` that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.launched, self.clock_works = 0.0, 0.0, True
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = float("inf")

            def record(self, stream: object = None) -> None:
                self.at = device.launched if stream is None else device.now if device.clock_works else float("inf")

            def query(self) -> bool:
                return self.at <= device.now

            def elapsed_time(self, other: Event) -> float:
                return other.at - self.at

        monkeypatch.setattr(round_timer.torch.cuda, "Event", Event)
        monkeypatch.setattr(round_timer.torch.cuda, "Stream", object)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def launch(timer: RoundTimer, device: Device, milliseconds: float) -> None:
    begin = timer.now()
    device.launched += milliseconds
    timer.add(begin, timer.now(), "a round")


def test_the_time_since_a_round_began_is_the_devices(device: Device) -> None:
    timer = RoundTimer(on_gpu=True)
    assert timer.since_begin() is None and timer.is_idle()
    launch(timer, device, 20)
    launch(timer, device, 20)
    assert timer.since_begin() is None, "the second one waits for the first"
    device.now = 27
    assert timer.since_begin() == pytest.approx(0.007)
    assert not timer.is_idle()
    device.now = 40
    assert timer.is_idle()


def test_a_clock_that_does_not_answer_is_not_waited_for(device: Device) -> None:
    timer = RoundTimer(on_gpu=True)
    launch(timer, device, 20)
    device.now, device.clock_works = 5, False
    assert timer.since_begin() is None


def test_rounds_on_a_cpu_are_over_when_they_are_launched() -> None:
    timer = RoundTimer(on_gpu=False)
    timer.add(timer.now(), timer.now(), "a round")
    assert timer.since_begin() is None and timer.is_idle()
