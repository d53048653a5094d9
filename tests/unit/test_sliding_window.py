"""Layers with a sliding window: what they attend to in every kind of forward, in SGLang's one pool or two (CPU)."""

from __future__ import annotations

import pytest
import torch
from small_backend import (
    CONTEXT,
    HEAD_DIM,
    NUM_KV_HEADS,
    NUM_LAYERS,
    NUM_Q_HEADS,
    ROWS,
    WINDOW,
    SmallPool,
    SmallServer,
    TwoPools,
)

from sglang_sparsespec.attention_backend.kernels.reference import softmax_probabilities, weighted_values
from sglang_sparsespec.attention_backend.sliding_window import SlidingWindow

REACH = 7
#: Requests within their window, at its end, and far beyond it, by row.
LENGTHS = {1: 3, 2: REACH, 4: 60}


def slots_of_window(server: SmallServer, row: int, position: int) -> torch.Tensor:
    """Slots, in the last layer's pool, of what a query at ``position`` of ``row`` sees."""
    slots = server.req_to_token[row, max(0, position - REACH) : position + 1].long()
    return server.pool.translate_loc_from_full_to_swa(slots) if isinstance(server.pool, TwoPools) else slots


def expected(server: SmallServer, row: int, position: int, q: torch.Tensor) -> torch.Tensor:
    """Attention of the query ``q`` ([Hq * D]) in the last layer: float32 [Hq * D]."""
    slots, layer = slots_of_window(server, row, position), NUM_LAYERS - 1
    query = q.view(1, NUM_Q_HEADS, HEAD_DIM)
    probabilities, _ = softmax_probabilities(query, server.pool.k[layer][slots], HEAD_DIM**-0.5, None)
    return weighted_values(probabilities, server.pool.v[layer][slots]).flatten()


def forget_what_is_behind(server: SmallServer, lengths: dict[int, int]) -> None:
    """What SGLang frees: the slots behind the windows of requests of so many tokens have none in the other pool."""
    assert isinstance(server.pool, TwoPools)
    table = server.pool.full_to_swa_index_mapping
    for row, length in lengths.items():
        behind = server.req_to_token[row, : max(0, length - REACH)].long()
        server.pool.k[-1][table[behind]] = server.pool.v[-1][table[behind]] = float("nan")
        table[behind] = 0


@pytest.fixture(params=[SmallPool, TwoPools], ids=["one_pool", "two_pools"])
def server(request: pytest.FixtureRequest) -> SmallServer:
    server = SmallServer(reach=REACH, pool=request.param)
    server.prefill(list(LENGTHS), list(LENGTHS.values()), list(LENGTHS.values()))
    if request.param is TwoPools:
        forget_what_is_behind(server, LENGTHS)
    return server


@pytest.mark.parametrize("kind", ["draft", "plain"])
def test_single_queries_attend_to_the_window_before_them(server: SmallServer, kind: str) -> None:
    q = server.random(len(LENGTHS), NUM_Q_HEADS)
    totals = [length + 1 for length in LENGTHS.values()]
    out = getattr(server, kind)(list(LENGTHS), totals, q)
    for number, (row, length) in enumerate(LENGTHS.items()):
        torch.testing.assert_close(out[number], expected(server, row, length, q[number]))


def test_each_query_of_a_verification_has_a_window_of_its_own(server: SmallServer) -> None:
    q = server.random(WINDOW * len(LENGTHS), NUM_Q_HEADS)
    out = server.verify(list(LENGTHS), list(LENGTHS.values()), q)
    for number, (row, length) in enumerate(LENGTHS.items()):
        for step in range(WINDOW):
            place = number * WINDOW + step
            torch.testing.assert_close(out[place], expected(server, row, length + step, q[place]))


def test_mixed_forwards_do_both(server: SmallServer) -> None:
    q = server.random(1 + 2 * WINDOW, NUM_Q_HEADS)
    out = server.mixed([(4, LENGTHS[4] + 1)], [(1, LENGTHS[1]), (2, LENGTHS[2])], q)
    torch.testing.assert_close(out[0], expected(server, 4, LENGTHS[4], q[0]))
    for number, row in enumerate((1, 2)):
        for step in range(WINDOW):
            place = 1 + number * WINDOW + step
            torch.testing.assert_close(out[place], expected(server, row, LENGTHS[row] + step, q[place]))


def test_only_layers_with_full_attention_have_selections(server: SmallServer) -> None:
    assert server.backend.table.positions.shape[0] == NUM_LAYERS - 1
    assert server.backend.prefill_selection is not None and len(server.backend.prefill_selection._layers) == NUM_LAYERS - 1
    server.verify([4], [LENGTHS[4]])
    selected = server.selected(4)
    assert len(selected) == 8 - WINDOW and selected == sorted(set(selected)) and selected[-1] < LENGTHS[4]


def test_a_view_holds_the_window_of_the_first_query_and_all_after_it() -> None:
    req_to_token = torch.arange(ROWS * CONTEXT, dtype=torch.int32).view(ROWS, CONTEXT)
    sliding = SlidingWindow(REACH, req_to_token, SmallPool(torch.Generator()), WINDOW)
    # Within the window, beyond it, padding (whose length may be below 0), at the end of the row.
    rows, lengths = torch.tensor([1, 2, 0, 3]), torch.tensor([3, 50, -1, CONTEXT - WINDOW])
    view = sliding.view(rows, lengths, WINDOW)
    assert view.reach == REACH and view.slots.dtype == torch.int32 and view.slots.shape == (4, REACH + WINDOW)
    assert view.lengths.tolist() == [3, REACH, 0, REACH]
    assert view.slots[0, : 3 + WINDOW].tolist() == req_to_token[1, : 3 + WINDOW].tolist()
    assert view.slots[1].tolist() == req_to_token[2, 50 - REACH : 50 + WINDOW].tolist()
    assert view.slots[2, 0] == 0
    assert view.slots[3].tolist() == req_to_token[3, CONTEXT - WINDOW - REACH :].tolist()
    assert sliding.slots_of(rows) is None and sliding.slot_table is None


def test_slots_are_translated_by_the_table_as_it_is_at_that_time() -> None:
    pool = TwoPools(torch.Generator().manual_seed(0))
    req_to_token = torch.arange(ROWS * CONTEXT, dtype=torch.int32).view(ROWS, CONTEXT)
    sliding = SlidingWindow(REACH, req_to_token, pool, WINDOW)
    for _ in range(2):
        view = sliding.view(torch.tensor([2]), torch.tensor([50]), 1)
        slots = req_to_token[2, 50 - REACH : 51].long()
        assert view.slots[0].tolist() == pool.full_to_swa_index_mapping[slots].tolist()
        pool.full_to_swa_index_mapping[slots] = torch.arange(1, REACH + 2)
    assert sliding.slot_table is pool.full_to_swa_index_mapping
    assert NUM_KV_HEADS < NUM_Q_HEADS  # heads share keys in these tests
