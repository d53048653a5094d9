"""The next batch is chosen shortly before the device is done with the round in flight."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_sparsespec.rounds import launch_time
from sglang_sparsespec.rounds.launch_time import LaunchTime

#: Of a round, and what the scheduler is expected to take for an iteration.
ROUND_S, HOST_S = 0.020, 0.004
TICK_S = LaunchTime.TICK_S


class World:
    """A host's clock, a device whose work ends at ``device_until``, and messages that come at ``arrivals``.

    Attributes:
        iteration_s: what the host really takes from the begin of an iteration to the launch of its whole round; the device
            gets the first of it after half of that.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, iteration_s: float = 0.003) -> None:
        self.now = self.device_until = 100.0
        self.arrivals: list[float] = []
        self.iteration_s = iteration_s
        self.ends: list[float] = []
        clock = SimpleNamespace(perf_counter=lambda: self.now, sleep=self.sleep)
        monkeypatch.setattr(launch_time, "time", clock)
        self.launch_time = LaunchTime(is_idle=lambda: self.now >= self.device_until)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def arrived(self, seconds: float) -> bool:
        coming = min((at for at in self.arrivals), default=float("inf"))
        self.now = max(self.now, min(self.now + seconds, coming))
        return self.now >= coming

    def launch(self, seconds: float = ROUND_S, expected: float | None = ROUND_S) -> float:
        """A batch is launched; the seconds that the device had nothing to do before it."""
        self.now += self.iteration_s / 2
        self.launch_time.note_batch(expected, HOST_S)
        gap = max(0.0, self.now - self.device_until)
        self.device_until = max(self.device_until, self.now) + seconds
        self.ends.append(self.device_until)
        self.now += self.iteration_s / 2
        if expected is not None:
            self.launch_time.note_round_launched()
        return gap

    def read(self) -> None:
        """The host waits for the oldest results that it has not read."""
        self.now = max(self.now, self.ends.pop(0))
        self.launch_time.note_results()

    def iterate(self, waits: bool = True, **batch: float | None) -> float:
        """An iteration of the overlap scheduler; see :meth:`launch`."""
        gap = self.launch(**batch)  # type: ignore[arg-type]
        if len(self.ends) > 1:
            self.read()
        self.launch_time.end_iteration(self.arrived if waits else None)
        return gap

    @property
    def left(self) -> float:
        """Seconds that the device still has work for."""
        return self.device_until - self.now


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def is_shortly_before_the_end(world: World) -> bool:
    lead = world.launch_time.lead * HOST_S
    return lead <= world.left <= lead + ROUND_S * LaunchTime.TOLERANCE + 2 * TICK_S


def test_a_round_behind_another_is_timed_from_when_the_results_of_that_one_are_read(world: World) -> None:
    for _ in range(3):
        world.iterate()
        assert is_shortly_before_the_end(world)


def test_a_round_behind_a_prefill_is_timed_from_the_end_of_the_prefill(world: World) -> None:
    world.iterate()
    world.iterate(seconds=0.050, expected=None)
    assert world.left > 0.049, "it waited for a batch whose end it does not know"
    world.iterate()
    assert is_shortly_before_the_end(world)


def test_a_round_on_an_idle_device_is_timed_from_its_launch(world: World) -> None:
    world.iterate()
    world.now = world.device_until + 1.0
    world.iterate()
    assert is_shortly_before_the_end(world)


def test_what_arrives_in_a_wait_becomes_one_batch(world: World) -> None:
    """It is chosen earlier than a round, but not at the first arrival."""
    world.iterate()
    world.arrivals = [world.now + 0.002, world.now + 0.004]
    world.iterate()
    assert world.now > max(world.arrivals)
    lead = 2 * world.launch_time.lead * HOST_S
    assert lead <= world.left <= lead + ROUND_S * LaunchTime.TOLERANCE + 2 * TICK_S


def test_there_is_no_wait_where_it_is_not_asked_for_or_no_time_is_left(world: World) -> None:
    waits: list[float] = []
    world.arrived = lambda seconds: bool(waits.append(seconds))  # type: ignore[method-assign]
    world.launch_time.end_iteration(world.arrived)
    world.iterate(waits=False)
    world.iterate(seconds=HOST_S, expected=HOST_S)
    assert waits == []


def test_a_round_that_ends_early_ends_the_wait(world: World) -> None:
    world.iterate(seconds=0.005)
    assert world.now <= world.device_until + TICK_S


@pytest.mark.parametrize("iteration_s", [0.001, 0.003, 0.008])
def test_the_device_is_seldom_idle_and_the_choice_is_late(monkeypatch: pytest.MonkeyPatch, iteration_s: float) -> None:
    """Whatever an iteration takes; rounds differ from what is expected of them by up to 1.5%."""
    world = World(monkeypatch, iteration_s)
    gaps, left = [], []
    for i in range(2000):
        gaps.append(world.iterate(seconds=ROUND_S * (1 + 0.005 * (i * 5 % 7 - 3))))
        left.append(world.left)
    assert max(gaps[20:]) == 0
    assert max(left[500:]) < 1.3 * iteration_s + 0.04 * ROUND_S + 2 * TICK_S


def test_one_long_iteration_does_not_end_the_waits(world: World) -> None:
    for _ in range(50):
        world.iterate()
    usual = world.launch_time.lead
    world.iteration_s = 0.5
    world.iterate()
    world.iteration_s = 0.003
    assert world.launch_time.lead < 1.5 * usual
    for _ in range(300):
        world.iterate()
    assert world.launch_time.lead < 1.1 * usual


def test_iterations_that_wait_for_the_device_say_nothing_about_the_host(world: World) -> None:
    """With grammars the results of each round are read before the next one is launched."""
    world.iterate()
    usual = world.launch_time.lead
    for _ in range(20):
        world.read()
        world.launch()
        world.launch_time.end_iteration(world.arrived)
        assert is_shortly_before_the_end(world)
    assert world.launch_time.lead == usual


def test_rounds_shorter_than_an_iteration_are_launched_at_once(world: World) -> None:
    waits: list[float] = []
    world.arrived = lambda seconds: bool(waits.append(seconds))  # type: ignore[method-assign]
    for _ in range(100):
        world.iterate(seconds=0.002, expected=0.002)
    assert waits == []
