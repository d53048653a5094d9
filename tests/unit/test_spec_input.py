"""Batch state between rounds: filtered and merged as SGLang's scheduler does."""

from __future__ import annotations

from typing import Any

import torch

from sglang_sparsespec.spec_input import SparseSpecDraftInput


def draft_input(tokens: list[int], rows: list[int] | None = None) -> Any:
    made = SparseSpecDraftInput(torch.tensor(tokens), torch.tensor([10 * t for t in tokens]))
    made.future_indices = None if rows is None else torch.tensor(rows)
    return made


def test_a_filtered_batch_keeps_its_rows_tokens() -> None:
    kept = draft_input([1, 2, 3])
    kept.filter_batch(torch.tensor([2, 0]))
    assert kept.bonus_tokens.tolist() == [3, 1] and kept.new_seq_lens.tolist() == [30, 10]
    assert kept.future_indices is None


def test_merged_batches_keep_their_order() -> None:
    merged = draft_input([1, 2])
    merged.merge_batch(draft_input([3]))
    assert merged.bonus_tokens.tolist() == [1, 2, 3] and merged.new_seq_lens.tolist() == [10, 20, 30]


def test_relayed_batches_are_filtered_and_merged_by_row_only() -> None:
    """Under overlap scheduling the tokens are not known yet; stale ones must not be indexed."""
    batch = draft_input([1, 2, 3], rows=[5, 6, 7])
    batch.filter_batch(torch.tensor([0, 2]))
    assert batch.future_indices.tolist() == [5, 7]
    assert batch.bonus_tokens.tolist() == [1, 2, 3], "replaced by the relay before use"
    batch.merge_batch(draft_input([9], rows=[4]))
    assert batch.future_indices.tolist() == [5, 7, 4]


def test_a_draft_input_is_one() -> None:
    made = draft_input([1])
    assert made.is_draft_input() and not made.is_verify_input()
    assert (made.num_tokens_per_req, made.num_tokens_for_logprob_per_req) == (1, 1)
    assert made.topk_p is None and made.topk_index is None and made.hidden_states is None
