"""The table of times: between its points, beyond them, and at the batch sizes that graphs have."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_sparsespec.rounds.measurement import grid
from sglang_sparsespec.rounds.round_timer import RoundTimer
from sglang_sparsespec.rounds.round_times import Load, PointTimes, RoundTimes, piecewise


def linear(batch: int, context: float) -> float:
    """Weights, tokens and KV of a forward, in seconds."""
    return 2e-3 + 1e-5 * batch + 3e-9 * batch * context


def table(*points: tuple[int, int], sizes: tuple[int, ...] = ()) -> RoundTimes:
    return RoundTimes(
        [PointTimes(b, c, draft=linear(b, 0.05 * c), verify=2 * linear(b, c), plain=linear(b, c)) for b, c in points], sizes
    )


CORNERS = ((1, 500), (1, 16_000), (256, 500), (256, 8000))


def test_the_load_of_a_batch_is_its_requests_and_their_tokens() -> None:
    reqs = [SimpleNamespace(origin_input_ids=array("q", range(30)), output_ids=array("q", range(n))) for n in (5, 7)]
    batch: Any = SimpleNamespace(reqs=reqs)
    assert Load.of(batch) == Load(2, 72)


@pytest.mark.parametrize(("batch", "context"), [(1, 500), (256, 8000), (1, 3000), (100, 4000), (64, 30_000), (400, 600)])
def test_what_is_linear_in_requests_and_tokens_is_met_between_the_points_and_above(batch: int, context: int) -> None:
    times, load = table(*CORNERS), Load(batch, batch * context)
    assert times.plain(load) == pytest.approx(linear(batch, context))
    assert times.verify(load) == pytest.approx(2 * linear(batch, context))
    assert times.draft(load) == pytest.approx(linear(batch, 0.05 * context))


def test_below_the_table_time_is_that_of_its_edge() -> None:
    times = table((4, 500), (4, 1000), (8, 500), (8, 1000))
    assert times.plain(Load(2, 2)) == pytest.approx(linear(4, 500))
    assert times.plain(Load(2, 2 * 750)) == pytest.approx(linear(4, 750))


def test_a_padded_batch_costs_the_weights_of_its_graph_and_its_own_tokens() -> None:
    times = table(*CORNERS, sizes=(64, 72, 256))
    assert times.plain(Load(65, 65 * 4000)) == pytest.approx(linear(72, 65 * 4000 / 72))
    assert times.plain(Load(72, 72 * 4000)) == pytest.approx(linear(72, 4000))
    assert times.plain(Load(300, 300 * 1000)) == pytest.approx(linear(300, 1000)), "no graph is so large"


def test_noise_does_not_make_larger_loads_faster_above_the_table() -> None:
    assert piecewise([(1.0, 2.0), (2.0, 1.9)], 100.0) == 1.9
    assert piecewise([(1.0, 2.0), (2.0, 1.9)], 1.5) == pytest.approx(1.95)


def test_one_point_is_enough() -> None:
    times = table((1, 64))
    assert times.plain(Load(1, 10)) == times.plain(Load(8, 8000)) == linear(1, 64)
    with pytest.raises(ValueError, match="point"):
        RoundTimes([])


def test_the_order_of_points_does_not_matter() -> None:
    points = [PointTimes(b, c, 1e-3, 2e-3, linear(b, c)) for b, c in CORNERS]
    rng = random.Random(0)
    for _ in range(5):
        rng.shuffle(points)
        assert RoundTimes(points).plain(Load(10, 10_000)) == pytest.approx(linear(10, 1000))


# ---------------------------------------------------------------------------------- grid


def test_the_coarsest_points_come_first() -> None:
    sizes = [1, 2, 4, 8, 12, 16, 32, 64, 128, 160]
    points = grid(sizes, True, most_requests=256, pool_tokens=10**8, longest=40_000, margin=9)
    assert points[:6] == [(b, c) for b in (1, 160) for c in (512, 16384, 2048)]
    assert {batch for batch, _ in points} == {1, 2, 4, 8, 16, 32, 64, 128, 160}
    assert len(points) == len(set(points))


def test_the_points_fit_the_pool_and_the_context() -> None:
    for pool in (900, 5000, 200_000):
        for on_gpu, sizes in ((True, [1, 8, 32]), (True, []), (False, [])):
            points = grid(sizes, on_gpu, most_requests=20, pool_tokens=pool, longest=4096, margin=9)
            assert points and all(b <= 20 and b * (c + 9) <= pool and c + 9 <= 4096 for b, c in points)
            if sizes:
                assert {b for b, _ in points} <= set(range(21)) & {*sizes, 20}
    assert grid([1, 8], True, most_requests=20, pool_tokens=5, longest=4096, margin=9) == []


def test_a_cpu_measures_few_points() -> None:
    assert grid([], False, 16, 12_000, 8192, 9) == [(1, 64), (1, 1024), (8, 64)]
    assert grid([], False, 1, 12_000, 256, 9) == [(1, 64), (1, 247)]


# --------------------------------------------------------------------------------- timer


def test_a_timer_gives_each_round_once() -> None:
    timer = RoundTimer(on_gpu=False)
    timer.add(timer.now(), timer.now(), "first")
    begin = timer.now()
    timer.add(begin, begin + 2.5, "second")
    (first, name), second = timer.finished()
    assert name == "first" and 0 <= first < 1
    assert second == (pytest.approx(2.5), "second")
    assert timer.finished() == []
