"""The next round is chosen shortly before the device is done with the one in flight, or as soon as something arrives."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from sglang_sparsespec.rounds import launch_time
from sglang_sparsespec.rounds.launch_time import LaunchTime

ROUND_S, HOST_S = 0.020, 0.004


class World:
    """A host's clock, a device whose work ends at ``device_until``, and a message that comes at ``arrives_at``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.device_until = self.now
        self.arrives_at = float("inf")
        monkeypatch.setattr(launch_time, "time", SimpleNamespace(perf_counter=lambda: self.now))
        self.chosen = LaunchTime(is_idle=lambda: self.now >= self.device_until)

    def arrived(self, seconds: float) -> bool:
        self.now = min(self.now + seconds, max(self.now, self.arrives_at))
        return self.now >= self.arrives_at

    def launch(self, seconds: float = ROUND_S, expected: float = ROUND_S) -> None:
        """The device runs a round after what it has to do already."""
        self.chosen.note_launch(expected, HOST_S)
        self.device_until = max(self.device_until, self.now) + seconds

    def iterate(self, host_s: float, **round_times: float) -> float:
        """An iteration: the host works, launches a round and reads the results of the one before; the device's idle time."""
        before = self.device_until
        self.now += host_s
        idle = max(0.0, self.now - before)
        self.launch(**round_times)
        self.now = max(self.now, before)
        self.chosen.note_results()
        self.chosen.wait(self.arrived)
        return idle


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_the_choice_comes_shortly_before_the_end_of_the_round_in_flight(world: World) -> None:
    world.launch()
    world.chosen.wait(world.arrived)
    left = world.device_until - world.now
    assert HOST_S <= left < HOST_S + 2 * LaunchTime.TICK_S


def test_an_arrival_ends_the_wait(world: World) -> None:
    world.launch()
    world.arrives_at = world.now + 0.005
    world.chosen.wait(world.arrived)
    assert world.now == world.arrives_at


def test_a_round_that_waits_behind_another_is_timed_from_when_its_results_are_read(world: World) -> None:
    world.launch()
    world.launch()
    world.now = world.device_until - ROUND_S
    world.chosen.note_results()
    world.chosen.wait(world.arrived)
    assert HOST_S <= world.device_until - world.now < HOST_S + 2 * LaunchTime.TICK_S


def test_nothing_is_waited_for_after_a_batch_that_is_no_round_or_without_time_left(world: World) -> None:
    waits: list[float] = []
    arrived: Callable[[float], bool] = lambda seconds: bool(waits.append(seconds))
    world.chosen.wait(arrived)
    world.launch()
    world.chosen.wait(world.arrived)
    world.chosen.wait(arrived)
    world.launch(expected=HOST_S)
    world.chosen.wait(arrived)
    assert waits == []


def test_a_round_that_ends_early_ends_the_wait(world: World) -> None:
    world.launch(seconds=0.005)
    world.chosen.wait(world.arrived)
    assert world.now <= world.device_until + LaunchTime.TICK_S


@pytest.mark.parametrize("host_s", [0.001, 0.003, 0.008])
def test_the_device_is_seldom_idle_and_new_requests_wait_for_one_round(world: World, host_s: float) -> None:
    """Whatever the host really takes; rounds differ from what is expected of them by up to 3%."""
    idle = [world.iterate(host_s, seconds=ROUND_S * (1 + 0.01 * (i * 7 % 7 - 3))) for i in range(4000)]
    settled = idle[1000:]
    assert sum(gap > 0 for gap in settled) < 0.05 * len(settled)
    assert sum(settled) < 0.002 * ROUND_S * len(settled)
    # A request that comes right after a choice waits from then on until the end of the next round.
    assert world.device_until - world.now < host_s + 0.006


def test_rounds_shorter_than_the_schedulers_work_do_not_move_the_lead(world: World) -> None:
    for _ in range(100):
        assert world.iterate(host_s=0.006, seconds=0.003, expected=0.003) > 0
    assert world.chosen.lead == 1.0
