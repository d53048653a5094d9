"""Phases of staggered rounds: every request verifies once, forwards hold equal work."""

from __future__ import annotations

import random
from statistics import fmean, pstdev

import pytest

from sglang_sparsespec.rounds.unified_schedule import StaggeredForward, UnifiedSchedule, forward_capacity

WINDOW = 9
K = WINDOW - 1


def requests(rows: range | list[int]) -> list[tuple[int, str]]:
    return [(row, f"request {row}") for row in rows]


def verified(plan: tuple[StaggeredForward, ...]) -> dict[int, tuple[int, int]]:
    """(forward, drafts in the window) of each row; a row that verifies twice fails."""
    found: dict[int, tuple[int, int]] = {}
    for index, forward in enumerate(plan):
        for row, limit in forward.verifications:
            assert row not in found
            found[row] = (index, limit)
    return found


def variation(tokens: list[int]) -> float:
    return pstdev(tokens) / fmean(tokens)


@pytest.mark.parametrize("batch", [1, 2, 8, 9, 10, 31, 64, 256])
def test_every_request_verifies_once_with_k_drafts_in_steady_state(batch: int) -> None:
    schedule = UnifiedSchedule(WINDOW)
    batch_requests = requests(range(1, batch + 1))
    schedule.plan_round(batch_requests)
    plan = schedule.plan_round(batch_requests)
    found = verified(plan)
    assert sorted(found) == list(range(1, batch + 1))
    assert all(limit == K for _, limit in found.values())
    assert schedule.plan_round(batch_requests) is plan, "an unchanged round is laid out once"


def test_drafts_of_a_window_are_consecutive_across_rounds() -> None:
    """Replaying the offsets gives 0..k-1 between any two verifications, and the promised number of drafts."""
    schedule = UnifiedSchedule(WINDOW)
    rng = random.Random(0)
    made: dict[int, int] = {}
    running: list[int] = []
    for _ in range(60):
        running = [row for row in running if rng.random() > 0.1]
        new = [row for row in range(1, 41) if row not in running and rng.random() < 0.2]
        schedule.forget(new)
        made.update(dict.fromkeys(new, 0))
        running += new
        for forward in schedule.plan_round(requests(running)):
            rows = [row for row, _ in (*forward.drafts, *forward.verifications)]
            assert len(rows) == len(set(rows)), "a request is in a forward once"
            for row, offset in forward.drafts:
                assert offset == made[row] < K
                made[row] += 1
            for row, limit in forward.verifications:
                assert limit == made[row]
                made[row] = 0


def test_the_first_window_of_a_request_has_the_drafts_before_its_phase() -> None:
    schedule = UnifiedSchedule(WINDOW)
    plan = schedule.plan_round(requests(range(1, WINDOW + 1)))
    for row, (forward, limit) in verified(plan).items():
        assert limit == forward == schedule.phase(row)


def test_a_lone_request_drafts_k_tokens_in_its_first_round() -> None:
    plan = UnifiedSchedule(WINDOW).plan_round(requests([3]))
    assert verified(plan) == {3: (K, K)}
    assert [forward.tokens(WINDOW) for forward in plan] == [1] * K + [WINDOW]


def test_a_new_owner_of_a_row_has_no_drafts() -> None:
    schedule = UnifiedSchedule(WINDOW)
    old = requests(range(1, 19))
    schedule.plan_round(old)
    schedule.plan_round(old)
    first = next(row for row, _ in old if schedule.phase(row) < K)
    others = [request for request in old if request[0] != first]
    found = verified(schedule.plan_round([*others, (first, "another request")]))
    assert found[first] == (schedule.phase(first), schedule.phase(first))
    assert all(found[row][1] == K for row, _ in others)


@pytest.mark.parametrize("event", ["forget", "lose_drafts"])
def test_drafts_are_not_used_after_their_loss(event: str) -> None:
    schedule = UnifiedSchedule(WINDOW)
    batch = requests(range(1, 19))
    schedule.plan_round(batch)
    getattr(schedule, event)([row for row, _ in batch])
    for forward, limit in verified(schedule.plan_round(batch)).values():
        assert limit == forward


def test_completions_that_empty_a_phase_are_levelled_without_losing_drafts_where_possible() -> None:
    schedule = UnifiedSchedule(WINDOW)
    batch = requests(range(1, 4 * WINDOW + 1))
    schedule.plan_round(batch)
    left = [request for request in batch if schedule.phase(request[0]) != K]
    found = verified(schedule.plan_round(left))
    counts = [sum(forward == index for forward, _ in found.values()) for index in range(WINDOW)]
    assert max(counts) - min(counts) <= 1
    # The last phase was emptied, so every move went to a later forward: no window is short.
    assert all(limit == K for _, limit in found.values())


def test_moving_to_an_earlier_forward_shortens_one_window_of_the_moved_only() -> None:
    schedule = UnifiedSchedule(WINDOW)
    batch = requests(range(1, 4 * WINDOW + 1))
    schedule.plan_round(batch)
    left = [request for request in batch if schedule.phase(request[0]) != 0]
    limits = sorted(limit for _, limit in verified(schedule.plan_round(left)).values())
    # Three of the 32 moved to forward 0, from forwards 1, 2 and 3.
    assert limits == [K - 3, K - 2, K - 1] + [K] * 29
    assert all(limit == K for _, limit in verified(schedule.plan_round(left)).values())


def stream(batch: int, rounds: int, seed: int) -> tuple[list[int], list[int]]:
    """(tokens per forward, their lock-step equivalents) of a full server: requests end after a random
    number of rounds, and new ones take their rows."""
    rng = random.Random(seed)
    schedule = UnifiedSchedule(WINDOW)
    left = {row: rng.randint(1, 60) for row in range(1, batch + 1)}
    unified: list[int] = []
    lockstep: list[int] = []
    for index in range(rounds):
        for row in left:
            left[row] -= 1
            if left[row] < 0:
                left[row] = rng.randint(20, 60)
                schedule.forget([row])
        plan = schedule.plan_round(requests(list(left)))
        if index >= 2:
            unified += [forward.tokens(WINDOW) for forward in plan]
            lockstep += [batch] * K + [batch * WINDOW]
    return unified, lockstep


@pytest.mark.parametrize("batch", [32, 64, 128, 256])
def test_tokens_per_forward_vary_by_less_than_a_tenth(batch: int) -> None:
    unified, lockstep = stream(batch, 100, batch)
    assert variation(unified) < 0.10
    assert variation(lockstep) > 1
    assert fmean(unified) == pytest.approx(fmean(lockstep), rel=0.03)


@pytest.mark.parametrize("window", [2, 4, 9])
def test_no_forward_exceeds_its_capacity_whatever_comes_and_goes(window: int) -> None:
    rng = random.Random(window)
    schedule = UnifiedSchedule(window)
    running: list[int] = []
    for _ in range(300):
        running = [row for row in running if rng.random() > rng.choice([0.0, 0.05, 0.6])]
        new = [row for row in range(1, 65) if row not in running and rng.random() < 0.1]
        schedule.forget(new)
        running += new
        for bucket in (len(running), 64):
            drafts, verifications = forward_capacity(bucket, window)
            for forward in schedule.plan_round(requests(running)):
                assert len(forward.drafts) <= drafts
                assert len(forward.verifications) <= verifications
