"""Sizes of selections, their tail, and the pattern policies."""

from __future__ import annotations

import pytest
import torch

from sglang_sparsespec.attention_backend.page_table import SelectionTable, num_selected
from sglang_sparsespec.attention_backend.policy import write_pattern
from sglang_sparsespec.settings import Settings

LENGTHS = torch.arange(0, 5000)


def count(
    length: int, ratio: float = 0.05, min_budget: int = 128, window: int = 9, capacity: int = 10**6
) -> int:
    return int(num_selected(torch.tensor([length]), ratio, min_budget, window, capacity)[0])


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, 0),
        (1, 1),
        (128, 128),  # the minimum budget covers everything
        (129, 119),  # from here on it does not, and the tail takes a window of it
        (2560, 119),  # 5% is the minimum budget
        (2561, 120),  # 129 - 9
        (10_000, 491),
    ],
)
def test_selection_is_the_budget_less_one_window_or_everything(length: int, expected: int) -> None:
    assert count(length) == expected


@pytest.mark.parametrize(
    ("ratio", "min_budget", "window", "off_by"),
    [
        (0.05, 128, 9, 0),
        (0.1, 4, 4, 0),
        (1.0, 16, 2, 0),
        (0.07, 16, 2, 1),  # 0.07 x 100 is above 7 in float64 and 7 in float32
        (0.3, 2, 2, 1),
    ],
)
def test_selection_agrees_with_the_configured_budget(
    ratio: float, min_budget: int, window: int, off_by: int
) -> None:
    settings = Settings(budget_ratio=ratio, min_budget=min_budget)
    counts = num_selected(LENGTHS, ratio, min_budget, window, 10**6)
    assert counts.dtype == torch.int32
    for length, selected in zip(LENGTHS.tolist(), counts.tolist(), strict=True):
        budget = settings.budget(length)
        expected = length if budget >= length else max(budget - window, 0)
        assert abs(selected - expected) <= off_by, f"length {length}"


def test_a_draft_step_attends_to_the_budget_and_the_drafts_made_since() -> None:
    """At step j after a accepted tokens: budget - W selected, a in the tail, and j drafts."""
    window, min_budget, length = 4, 20, 300
    selected = count(length, 0.01, min_budget, window)
    for accepted in range(1, window + 1):
        for step in range(1, window):
            query_length = length + accepted + step
            attended = selected + query_length - length
            assert attended == min_budget - window + accepted + step
            assert attended <= min_budget + step


def test_a_minimum_budget_of_one_window_leaves_only_the_tail() -> None:
    assert count(1000, 0.001, 9, 9) == 0


@pytest.mark.parametrize("max_context", [1, 50, 128, 1000, 40_000])
@pytest.mark.parametrize(("ratio", "min_budget"), [(0.05, 128), (0.3, 2), (1.0, 9)])
def test_no_request_overflows_the_table(max_context: int, ratio: float, min_budget: int) -> None:
    capacity = SelectionTable.capacity_for(max_context, ratio, min_budget)
    lengths = torch.arange(0, max_context + 1)
    unlimited = num_selected(lengths, ratio, min_budget, 2, 10**6)
    assert int(unlimited.max()) <= capacity <= max_context
    assert torch.equal(num_selected(lengths, ratio, min_budget, 2, capacity), unlimited)


def test_capacity_cuts_a_selection_short() -> None:
    assert count(10_000, capacity=100) == 100


def test_a_new_window_changes_only_its_rows() -> None:
    table = SelectionTable(num_layers=2, num_rows=5, num_kv_heads=3, capacity=7, device="cpu")
    table.begin_selection(torch.tensor([1, 2, 3, 4]), torch.tensor([7, 6, 5, 4]), torch.tensor([70, 60, 50, 40]))
    table.begin_selection(torch.tensor([3, 1]), torch.tensor([2, 1]), torch.tensor([30, 10]))
    assert table.num_selected.tolist() == [0, 1, 6, 2, 4]
    assert table.tail_start.tolist() == [0, 10, 60, 30, 40]


def test_reported_bytes_are_the_tensors_bytes() -> None:
    table = SelectionTable(num_layers=2, num_rows=5, num_kv_heads=3, capacity=7, device="cpu")
    tensors = (table.positions, table.num_selected, table.num_remembered, table.tail_start)
    assert table.nbytes == sum(t.numel() * t.element_size() for t in tensors) == 4 * 5 * (2 * 3 * 7 + 3)
    with_memory = SelectionTable(num_layers=2, num_rows=5, num_kv_heads=3, capacity=7, device="cpu", memory=0.5)
    assert with_memory.nbytes == table.nbytes + 2 * 5 * 2 * 3 * 7


def test_only_a_selection_of_the_same_requests_is_remembered() -> None:
    table = SelectionTable(num_layers=1, num_rows=4, num_kv_heads=1, capacity=9, device="cpu", memory=0.5)
    rows = torch.tensor([1, 2, 3])
    table.begin_selection(rows, torch.tensor([5, 6, 7]), rows)
    assert table.num_remembered.tolist() == [0, 0, 0, 0]
    table.begin_selection(rows[:2], torch.tensor([8, 9]), rows[:2], remember=True)
    assert table.num_remembered.tolist() == [0, 5, 6, 0]
    table.begin_selection(rows, torch.tensor([1, 2, 3]), rows)
    assert table.num_remembered.tolist() == [0, 0, 0, 0]


def pattern(length: int, selected: int, num_sinks: int) -> list[int]:
    """The list that ``write_pattern`` gives a request, after checking that heads and layers agree."""
    positions = torch.full((2, 4, 3, 12), -1, dtype=torch.int32)
    write_pattern(torch.tensor([length]), torch.tensor([selected]), torch.tensor([2]), num_sinks, positions)
    assert (positions[:, [0, 1, 3]] == -1).all(), "other rows were written"
    lists = positions[:, 2, :, :selected].reshape(-1, selected)
    assert (lists == lists[0]).all()
    return lists[0].tolist()


def test_window_policy_selects_the_newest_tokens() -> None:
    assert pattern(100, 5, num_sinks=0) == [95, 96, 97, 98, 99]


def test_streaming_policy_selects_sinks_and_the_newest_tokens() -> None:
    assert pattern(100, 7, num_sinks=4) == [0, 1, 2, 3, 97, 98, 99]


@pytest.mark.parametrize("num_sinks", [0, 4])
def test_pattern_policies_select_everything_where_the_budget_covers_it(num_sinks: int) -> None:
    assert pattern(6, 6, num_sinks) == [0, 1, 2, 3, 4, 5]


def test_more_sinks_than_budget_selects_the_first_tokens() -> None:
    assert pattern(100, 3, num_sinks=4) == [0, 1, 2]


def test_pattern_policies_write_valid_positions_for_an_empty_request() -> None:
    """Nothing of it is read, but a kernel may load what lies past the counts."""
    positions = torch.full((1, 1, 1, 12), -1, dtype=torch.int32)
    write_pattern(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), 4, positions)
    assert (positions >= 0).all()


def test_the_least_budget_may_be_a_number_on_the_device() -> None:
    for least in (4, 128):
        given = torch.tensor(float(least))
        assert torch.equal(num_selected(LENGTHS, 0.05, given, 3, 10**6), num_selected(LENGTHS, 0.05, least, 3, 10**6))
