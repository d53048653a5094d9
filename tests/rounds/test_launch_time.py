"""The next batch is chosen shortly before the device is done with the round in flight."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_sparsespec.rounds import launch_time
from sglang_sparsespec.rounds.launch_time import LaunchTime, Lead

ROUND_S, REQUESTS = 0.020, 6
SIZE = "4-7"
TICK_S = LaunchTime.TICK_S


class World:
    """A host's clock, a device whose work ends at ``device_until``, and messages that come at ``arrivals``.

    Attributes:
        iteration_s: what the host takes from the begin of an iteration until the device gets the first work of its batch.
            It then takes 3 ms for the rest of a batch, and waits for the results of the one before.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, iteration_s: float = 0.002) -> None:
        self.now = self.device_until = self.begun_at = 100.0
        self.arrivals: list[float] = []
        self.iteration_s = iteration_s
        clock = SimpleNamespace(perf_counter=lambda: self.now, sleep=self.sleep)
        monkeypatch.setattr(launch_time, "time", clock)
        self.launch_time = LaunchTime(self)

    def is_idle(self) -> bool:
        return self.now >= self.device_until

    def since_begin(self) -> float | None:
        return self.now - self.begun_at if self.now >= self.begun_at else None

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def arrived(self, seconds: float) -> bool:
        coming = min((at for at in self.arrivals), default=float("inf"))
        self.now = max(self.now, min(self.now + seconds, coming))
        return self.now >= coming

    def iterate(self, seconds: float = ROUND_S, expected: float | None = ROUND_S, waits: bool = True) -> float:
        """An iteration of the overlap scheduler; the seconds that the device had nothing to do before its batch.

        Args:
            expected: None for a prefill.
        """
        before = self.device_until
        if expected is None:
            self.now += self.iteration_s
            self.launch_time.note_prefill()
        else:
            self.launch_time.note_round(expected, REQUESTS)
            self.now += self.iteration_s
            self.launch_time.note_first_launch()
        self.begun_at = max(self.now, before)
        self.device_until = self.begun_at + seconds
        self.now = max(self.now + 0.003, before)
        self.launch_time.end_iteration(self.arrived if waits else None)
        return self.begun_at - before

    @property
    def lead(self) -> float:
        """Seconds, of rounds."""
        return self.launch_time.leads[SIZE]

    @property
    def left(self) -> float:
        """Seconds that the device still has work for."""
        return self.device_until - self.now


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def is_just_in_time(world: World, lead: float) -> bool:
    return lead <= world.left <= lead + ROUND_S * LaunchTime.TOLERANCE + 2 * TICK_S


def test_the_choice_comes_shortly_before_the_end_of_the_round_in_flight(world: World) -> None:
    for _ in range(3):
        world.iterate()
        assert is_just_in_time(world, world.lead)


def test_a_round_behind_a_prefill_is_timed_from_its_own_begin(world: World) -> None:
    world.iterate()
    world.iterate(seconds=0.050, expected=None)
    assert world.left > 0.046, "it waited for a batch whose end it does not know"
    world.iterate()
    assert is_just_in_time(world, world.lead)


def test_what_arrives_in_a_wait_becomes_one_batch(world: World) -> None:
    """It is chosen as early as a prefill has to be, not at the first arrival."""
    world.iteration_s = 0.008
    for _ in range(200):
        world.iterate(seconds=0.001, expected=None, waits=False)
    world.iteration_s = 0.002
    for _ in range(100):
        world.iterate()
    lead = world.launch_time.leads["prefill"]
    assert lead > 0.007 and world.lead < 0.003
    world.arrivals = [world.now + world.left + 0.004, world.now + world.left + 0.006]
    world.iterate()
    assert world.now > max(world.arrivals)
    assert is_just_in_time(world, lead)


def test_there_is_no_wait_where_it_is_not_asked_for_or_no_time_is_left(world: World) -> None:
    waits: list[float] = []
    world.arrived = lambda seconds: bool(waits.append(seconds))  # type: ignore[method-assign]
    world.launch_time.end_iteration(world.arrived)
    world.iterate(waits=False)
    world.iterate(seconds=0.003, expected=0.003)
    assert waits == []


def test_there_is_no_wait_for_a_round_that_the_device_has_not_begun(world: World) -> None:
    world.iterate()
    before = world.now
    world.begun_at = world.now + 1.0
    world.launch_time.end_iteration(world.arrived)
    assert world.now == before


def test_a_round_that_ends_early_ends_the_wait(world: World) -> None:
    world.iterate(seconds=0.005)
    assert world.now <= world.device_until + TICK_S


@pytest.mark.parametrize("iteration_s", [0.001, 0.003, 0.008])
def test_the_device_is_seldom_idle_and_the_choice_is_late(monkeypatch: pytest.MonkeyPatch, iteration_s: float) -> None:
    """Whatever an iteration takes; rounds differ from what is expected of them by up to 1.5%, iterations by a fifth."""
    world = World(monkeypatch, iteration_s)
    gaps, left = [], []
    for i in range(3000):
        world.iteration_s = iteration_s * (0.8 + 0.05 * (i * 3 % 9))
        gaps.append(world.iterate(seconds=ROUND_S * (1 + 0.005 * (i * 5 % 7 - 3))))
        left.append(world.left)
    assert sum(gaps[1000:]) < 0.001 * ROUND_S * 2000
    assert max(left[1000:]) < 1.3 * iteration_s + 0.04 * ROUND_S + 2 * TICK_S


def test_one_long_iteration_changes_little(world: World) -> None:
    for _ in range(200):
        world.iterate()
    usual = world.lead
    world.iteration_s = 0.5
    world.iterate()
    assert usual < world.lead < 1.1 * usual


def test_batch_sizes_have_leads_of_their_own(world: World) -> None:
    for _ in range(100):
        world.iterate()
    world.launch_time.note_round(ROUND_S, 100)
    assert world.launch_time.leads["64-127"] == Lead().seconds != world.lead


def test_iterations_that_wait_for_results_say_nothing_about_the_host(world: World) -> None:
    """With grammars the results of each round are read before the next one is launched."""
    world.iterate()
    usual = world.lead
    world.launch_time.note_round(ROUND_S, REQUESTS, waits_for_results=True)
    world.now += 0.020
    world.launch_time.note_first_launch()
    assert world.lead == usual
