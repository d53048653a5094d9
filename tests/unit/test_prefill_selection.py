"""When a prompt's first selections are made, and by which queries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_sparsespec.attention_backend.forward_plan import Prefill, PromptChunks
from sglang_sparsespec.attention_backend.prefill_selection import PrefillSelection

WINDOW = 4
LAYERS = [SimpleNamespace(layer_id=layer, tp_q_head_num=2, head_dim=3) for layer in (5, 6, 9)]


class Selector:
    """Kernels that note, as plain numbers, what they were asked to select: by layer, the scoring queries of each prompt."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[Any]]] = []
        self.batch_sizes: list[int] = []

    def plan_prefill_scores(
        self, rows: torch.Tensor, seq_lens: torch.Tensor, starts: torch.Tensor, extend_lens: torch.Tensor, window: int
    ) -> Any:
        assert window == WINDOW

        def run(queries: torch.Tensor, kv: Any, scores: torch.Tensor) -> None:
            self._scoring = []
            for start, extend in zip(starts.tolist(), extend_lens.tolist(), strict=True):
                end = start + extend
                self._scoring.append(queries[end - min(extend, WINDOW) : end, 0, 0].tolist())
            self._seq_lens = seq_lens.tolist()

        return SimpleNamespace(run=run)

    def plan_selection(self, rows: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor) -> Any:
        def run(scores: torch.Tensor, layer_index: int) -> None:
            numbers = zip(rows.tolist(), self._seq_lens, lengths.tolist(), counts.tolist(), self._scoring, strict=True)
            self.batch_sizes.append(len(rows))
            self.asked.append((layer_index, [entry for entry in numbers if entry[1]]))

        return SimpleNamespace(run=run)


def make(selector: Selector) -> PrefillSelection:
    def kv_of(layer: Any) -> Any:
        return SimpleNamespace(index=layer.layer_id)

    return PrefillSelection(LAYERS, WINDOW, torch.float32, selector, torch.zeros(1), kv_of)  # type: ignore[arg-type]


def prompts(*extend_lens: int) -> PromptChunks:
    """Prompts of which 10 tokens are cached; request i has row 20 + i."""
    extend = torch.tensor(extend_lens, dtype=torch.int32)
    seq_lens = extend.long() + 10
    starts = (extend.cumsum(0) - extend).int()
    rows = 20 + torch.arange(len(extend))
    return PromptChunks(rows, seq_lens, starts, extend, seq_lens - extend.clamp(max=WINDOW), extend // 2)


def forward(selection: PrefillSelection, batch: PromptChunks) -> None:
    plan = selection.plan(batch)
    tokens = int(batch.extend_lens.sum())
    for layer in LAYERS:
        # Token t of layer l has the query 1000 l + t.
        queries = (1000.0 * layer.layer_id + torch.arange(tokens)).view(-1, 1, 1).expand(-1, 2, 3)
        selection.note(plan, layer, queries)  # type: ignore[arg-type]


def expected(layer: int, batch: PromptChunks) -> list[Any]:
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
    plan = selection.plan(batch)
    selection.note(plan, LAYERS[0], torch.zeros(int(batch.extend_lens.sum()), 2, 3))  # type: ignore[arg-type]
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
    selection.use_graphs(lambda num_prompts: selection.run(4) is None)
    batch = prompts(8)
    forward(selection, batch)
    assert selector.asked == [(layer.layer_id, expected(layer.layer_id, batch)) for layer in LAYERS]
    assert selector.batch_sizes[-1] == 4


def test_nothing_is_selected_where_no_prefill_has_begun() -> None:
    selector = Selector()
    selection = make(selector)
    selection.note(Prefill(), LAYERS[-1], torch.zeros(3, 2, 3))  # type: ignore[arg-type]
    selection.run(2)
    assert [seen for _, seen in selector.asked] == [[]] * len(LAYERS)
