"""Penalties of windows, steps and prompts, on the CPU path, against SGLang's penalizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from penalty_checks import (
    REQUESTS,
    VOCAB,
    WINDOW,
    batch_of_all,
    by_sglang,
    penalties_of,
    positions_of,
    random_windows,
    request,
    rows_of,
)

from sglang_sparsespec.sampling.penalties import PenalisedPrompts


def assert_rows(
    monkeypatch: pytest.MonkeyPatch, reqs: list[Any], candidates: torch.Tensor, before: torch.Tensor, after: torch.Tensor
) -> None:
    """Row i of each window is what SGLang gives a request whose output ends with drafts 1 to i."""
    for number, req in enumerate(reqs):
        for index in range(WINDOW):
            row = number * WINDOW + index
            expected = by_sglang(monkeypatch, req, candidates[number, 1 : 1 + index].tolist(), before[row])
            torch.testing.assert_close(after[row], expected, rtol=1e-6, atol=1e-6)


def test_a_row_of_a_window_sees_the_output_and_the_drafts_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reqs = batch_of_all()
    candidates, logits = random_windows(len(reqs))
    before, penalties = logits.clone(), penalties_of(reqs)
    penalties.apply(logits, rows_of(reqs), positions_of(reqs), candidates)
    assert_rows(monkeypatch, reqs, candidates, before, logits)
    neutral = [params for params, _ in REQUESTS].index({})
    assert torch.equal(logits.view(-1, WINDOW, VOCAB)[neutral], before.view(-1, WINDOW, VOCAB)[neutral])


def test_a_step_sees_the_drafts_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reqs = batch_of_all()
    candidates, logits = random_windows(len(reqs))
    before, positions, penalties = logits.clone(), positions_of(reqs).view(-1, WINDOW), penalties_of(reqs)
    for step in range(WINDOW):
        own = logits.view(-1, WINDOW, VOCAB)[:, step]
        penalties.apply(own, rows_of(reqs), positions[:, step], candidates, torch.tensor(step).expand(len(reqs)))
    assert_rows(monkeypatch, reqs, candidates, before, logits)


def test_committed_tokens_are_counted_and_rejected_drafts_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    reqs = batch_of_all()
    penalties = penalties_of(reqs)
    tokens, _ = random_windows(len(reqs))
    accept_lens = torch.tensor([1, 2, 3, 4, 1, 2], dtype=torch.int32)
    for _ in range(2):
        candidates, logits = random_windows(len(reqs))
        before = logits.clone()
        penalties.begin_round(reqs)
        penalties.apply(logits, rows_of(reqs), positions_of(reqs), candidates)
        assert_rows(monkeypatch, reqs, candidates, before, logits)
        penalties.commit(rows_of(reqs), tokens, accept_lens)
        for req, row, count in zip(reqs, tokens.tolist(), accept_lens.tolist(), strict=True):
            req.output_ids += row[:count]


def test_the_first_token_is_penalised_by_what_a_retracted_request_had_said(monkeypatch: pytest.MonkeyPatch) -> None:
    reqs = batch_of_all()
    penalties = penalties_of(reqs)
    logits = torch.randn(len(reqs), VOCAB, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    lengths = torch.tensor([len(req.origin_input_ids) + len(req.output_ids) for req in reqs])
    PenalisedPrompts(penalties, rows_of(reqs), lengths).apply(logits)
    for req, row, own in zip(reqs, before, logits, strict=True):
        torch.testing.assert_close(own, by_sglang(monkeypatch, req, [], row), rtol=1e-6, atol=1e-6)


def test_a_row_belongs_to_the_request_that_was_prefilled_last(monkeypatch: pytest.MonkeyPatch) -> None:
    penalties = penalties_of(batch_of_all())
    # Row 1's successor has no penalty, row 4's another one.
    first, fourth = request(1, {}), request(4, {"presence_penalty": 1.0})
    penalties.begin_prefill([first, fourth])
    logits = torch.ones(2, VOCAB)
    penalties.apply(logits, rows_of([first, fourth]), torch.tensor([5, 8]))
    assert torch.equal(logits, torch.ones(2, VOCAB))
    penalties.commit(torch.tensor([1, 4]), torch.tensor([[2], [2]]), torch.tensor([1, 1]))
    penalties.apply(logits, rows_of([first, fourth]), torch.tensor([6, 9]))
    assert torch.equal(logits[0], torch.ones(VOCAB))
    assert logits[1].tolist() == [1.0, 1.0, 0.0] + [1.0] * (VOCAB - 3)


def test_batches_without_penalties_do_nothing() -> None:
    """Whatever other requests of the server have."""
    reqs = batch_of_all()
    fresh = penalties_of([request(7, {})])
    assert not fresh.is_active and not len(fresh._strengths) and not len(fresh._counts)
    penalties = penalties_of(reqs)
    assert penalties.is_active
    penalties.begin_round([reqs[1]])
    assert not penalties.is_active
    # min_new_tokens is 2, and there are as many.
    reqs[4].output_ids.append(1)
    penalties.begin_round([reqs[4]])
    assert not penalties.is_active


def test_end_tokens_outside_the_vocabulary_are_left_alone() -> None:
    req = request(1, {"min_new_tokens": 5, "stop_token_ids": [-7, VOCAB, 10**12]})
    req.eos_token_ids = {VOCAB + 1}
    penalties = penalties_of([req])
    logits = torch.zeros(1, VOCAB)
    penalties.apply(logits, rows_of([req]), torch.tensor([5]))
    assert logits.isinf().nonzero()[:, 1].tolist() == [10, 11]
