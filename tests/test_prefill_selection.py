"""When a prompt's first selections are made, and by which queries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_sparsespec.attention_backend.prefill_selection import PrefillSelection, QueryRows

WINDOW = 4
LAYERS = [SimpleNamespace(layer_id=layer, tp_q_head_num=2, head_dim=3) for layer in (5, 6, 9)]


class Selector:
    """What a layer was asked to select, as plain numbers: of each request the scoring queries and the rest."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[Any]]] = []
        self.batch_sizes: list[int] = []

    def __call__(self, layer: Any, queries: torch.Tensor, batch: QueryRows) -> None:
        seen = []
        for index, (row, seq_len, length, count) in enumerate(
            zip(*(t.tolist() for t in (batch.rows, batch.seq_lens, batch.lengths, batch.counts)), strict=True)
        ):
            extend = int(batch.extend_lens[index])
            end = int(batch.starts[index]) + extend
            scoring = queries[end - min(extend, WINDOW) : end, 0, 0].tolist()
            if seq_len:
                seen.append((row, seq_len, length, count, scoring))
        self.batch_sizes.append(len(batch))
        self.asked.append((layer.layer_id, seen))


def make(selector: Selector) -> PrefillSelection:
    return PrefillSelection(LAYERS, WINDOW, torch.float32, torch.device("cpu"), selector)  # type: ignore[arg-type]


def prompts(*extend_lens: int) -> QueryRows:
    """Prompts of which 10 tokens are cached; request i has row 20 + i."""
    extend = torch.tensor(extend_lens, dtype=torch.int32)
    seq_lens = extend.long() + 10
    starts = (extend.cumsum(0) - extend).int()
    rows = 20 + torch.arange(len(extend))
    return QueryRows(rows, seq_lens, starts, extend, seq_lens - extend.clamp(max=WINDOW), extend // 2)


def forward(selection: PrefillSelection, batch: QueryRows) -> None:
    selection.begin(batch)
    tokens = int(batch.extend_lens.sum())
    for layer in LAYERS:
        # Token t of layer l has the query 1000 l + t.
        queries = (1000.0 * layer.layer_id + torch.arange(tokens)).view(-1, 1, 1).expand(-1, 2, 3)
        selection.note(layer, queries)  # type: ignore[arg-type]


def expected(layer: int, batch: QueryRows) -> list[Any]:
    found = []
    for i in range(len(batch)):
        end = int(batch.starts[i] + batch.extend_lens[i])
        scoring = [1000.0 * layer + t for t in range(end - min(WINDOW, int(batch.extend_lens[i])), end)]
        numbers = (batch.rows, batch.seq_lens, batch.lengths, batch.counts)
        found.append((*(int(t[i]) for t in numbers), scoring))
    return found


@pytest.mark.parametrize("extend_lens", [(9,), (4, 7), (1, 12, 3, 2)])
def test_all_layers_select_after_the_last_one_by_each_prompts_last_queries(extend_lens: tuple[int, ...]) -> None:
    selector = Selector()
    batch = prompts(*extend_lens)
    forward(make(selector), batch)
    assert selector.asked == [(layer.layer_id, expected(layer.layer_id, batch)) for layer in LAYERS]


def test_a_large_batch_selects_layer_by_layer() -> None:
    selector = Selector()
    selection = make(selector)
    batch = prompts(*range(1, PrefillSelection.MOST + 2))
    selection.begin(batch)
    selection.note(LAYERS[0], torch.zeros(int(batch.extend_lens.sum()), 2, 3))  # type: ignore[arg-type]
    assert [layer for layer, _ in selector.asked] == [LAYERS[0].layer_id]
    selector.asked.clear()
    forward(selection, batch)
    assert selector.asked == [(layer.layer_id, expected(layer.layer_id, batch)) for layer in LAYERS]


def test_a_captured_size_is_replayed_and_sees_nothing_of_an_earlier_batch() -> None:
    selector = Selector()
    selection = make(selector)
    forward(selection, prompts(5, 6, 7))
    selector.asked.clear()
    # A graph of four requests, replayed for one.
    selection.replay = lambda batch_size: selection.run(4) is None
    batch = prompts(8)
    forward(selection, batch)
    assert selector.asked == [(layer.layer_id, expected(layer.layer_id, batch)) for layer in LAYERS]
    assert selector.batch_sizes[-1] == 4


def test_nothing_is_selected_where_no_prefill_has_begun() -> None:
    selector = Selector()
    selection = make(selector)
    selection.note(LAYERS[-1], torch.zeros(3, 2, 3))  # type: ignore[arg-type]
    selection.run(2)
    assert [seen for _, seen in selector.asked] == [[]] * len(LAYERS)
