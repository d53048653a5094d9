"""Slots reserved for the next rounds, and the room for them in the rows of ``req_to_token``."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.mem_cache import allocation_sizing

from sglang_sparsespec.rounds.unified_schedule import UnifiedSchedule
from sglang_sparsespec.scheduler_patch.slots import reserve_for_staggered_rounds, row_room_for_reserve
from sglang_sparsespec.sglang_compat import DECLARES_RESOLUTION


@pytest.fixture
def serve(serving_args: Callable[[Any], None], resolve: Callable[..., Any]) -> Callable[..., tuple[int, int]]:
    """What SGLang reserves and what it widens rows by, in a server with the given arguments."""

    def sizes(**kwargs: Any) -> tuple[int, int]:
        args = resolve(**kwargs)
        serving_args(args)
        # SGLang hands its arguments over, or has them published.
        given = () if DECLARES_RESOLUTION else (args,)
        return (
            allocation_sizing.get_alloc_reserve_per_decode(*given),
            allocation_sizing.get_req_to_token_extra_context_len(*given),
        )

    return sizes


@pytest.mark.parametrize("steps", [1, 3, 8, 16])
def test_two_windows_are_reserved_per_request(steps: int, serve: Callable[..., tuple[int, int]]) -> None:
    """One for the round being launched, one because the CPU commits the last round's tokens late."""
    assert serve(speculative_num_steps=steps)[0] == 2 * (steps + 1)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 8, 16])
def test_a_staggered_round_stays_within_its_reserve(
    steps: int, overlap: bool, serve: Callable[..., tuple[int, int]]
) -> None:
    """All phases and accept lengths: the last position written is C + 3W - 2 if the CPU lags a round behind."""
    window = steps + 1
    reserve, _ = serve(speculative_num_steps=steps, sparsespec_schedule="unified")
    assert reserve == 3 * window
    schedule = UnifiedSchedule(window)
    requests = [(row, row) for row in range(1, 2 * window + 1)]
    schedule.plan_round(requests)
    last = 0
    for accepted in range(1, window + 1):
        # Committed on the CPU: 0. On the device: the round in flight has accepted as many.
        lengths = dict.fromkeys(dict(requests), accepted if overlap else 0)
        for forward in schedule.plan_round(requests):
            for row, offset in forward.drafts:
                last = max(last, lengths[row] + offset)
            for row, _ in forward.verifications:
                last = max(last, lengths[row] + window - 1)
                lengths[row] += accepted
    assert last == (3 * window - 2 if overlap else 2 * window - 2) < reserve


@pytest.mark.parametrize("schedule", ["lockstep", "unified"])
@pytest.mark.parametrize("steps", [1, 3, 8, 16])
def test_a_request_at_the_context_limit_has_room_for_its_reserve(
    steps: int, schedule: str, serve: Callable[..., tuple[int, int]]
) -> None:
    """SGLang widens the rows of ``req_to_token`` by W + 4 entries, but a decode fills up to 2W, or 3W."""
    reserve, room = serve(speculative_num_steps=steps, sparsespec_schedule=schedule)
    # A running request has committed at most the context length less 4: one token for the
    # request limit, one for the scheduler's own, one for the output still to come, and one
    # because the last token's KV is not written yet.
    assert room >= reserve - 4


def test_other_algorithms_keep_their_reserve() -> None:
    args = SimpleNamespace(speculative_algorithm="EAGLE")
    assert reserve_for_staggered_rounds(18, args) is None, "None keeps the original"
    assert row_room_for_reserve(13, args) is None
