"""Drafts of the policy ``triforce``: proposals from repetitions, checked several at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_parts import request_in

from sglang_sparsespec.rounds.base import RoundContext
from sglang_sparsespec.rounds.ngram import NgramDrafter, TokenHistory
from sglang_sparsespec.sampling.penalties import Penalties

WINDOW, PROPOSALS, VOCAB = 7, 3, 32


def history_of(*requests: list[int], context: int = 40) -> TokenHistory:
    """Request i in row i + 1."""
    history = TokenHistory(len(requests) + 1, context, "cpu")
    history.note_prompts(list(range(1, len(requests) + 1)), list(requests))
    return history


def proposed(tokens: list[int], count: int = 3) -> list[int]:
    history = history_of(tokens)
    return history.propose(torch.tensor([1]), torch.tensor([len(tokens) - 1]), count)[0].tolist()


def test_what_followed_the_last_tokens_is_proposed() -> None:
    assert proposed([1, 2, 3, 4, 5, 9, 1, 2, 3]) == [4, 5, 9]


def test_the_longest_match_wins_and_then_the_latest() -> None:
    assert proposed([7, 2, 3, 10, 11, 12, 8, 3, 20, 21, 22, 7, 2, 3]) == [10, 11, 12]
    assert proposed([2, 3, 10, 10, 10, 2, 3, 20, 21, 22, 2, 3]) == [20, 21, 22]
    assert proposed([3, 10, 0, 3, 20, 21, 22, 5, 3]) == [20, 21, 22]


def test_the_last_token_is_repeated_where_nothing_else_is_known() -> None:
    assert proposed([1, 2, 3]) == [3, 3, 3], "it did not occur before"
    assert proposed([4]) == [4, 4, 4]
    assert proposed([5, 6, 5]) == [6, 5, 5], "the text ends with the match"


def test_nothing_after_the_known_tokens_is_used() -> None:
    history = history_of([1, 2, 9, 1, 2, 8, 8, 1])
    # Only the first five are known.
    assert history.propose(torch.tensor([1]), torch.tensor([4]), 2)[0].tolist() == [9, 1]


def test_requests_do_not_see_each_other() -> None:
    history = history_of([1, 2, 3, 1], [1, 5, 6, 1])
    found = history.propose(torch.tensor([2, 1]), torch.tensor([3, 3]), 2)
    assert found.tolist() == [[5, 6], [2, 3]]


def test_tokens_past_the_end_of_a_row_are_dropped() -> None:
    history = history_of([1, 2], context=4)
    history.write(torch.tensor([1]), torch.tensor([[2, 3, 4, 5]]), torch.tensor([[7, 8, 9, 9]]))
    assert history.tokens[1, :3].tolist() == [1, 2, 7] and not history.tokens[0].any()


class RuleModel:
    """The token after n is n + 1, but 10 after 13; records the queries that are not padding."""

    def __init__(self) -> None:
        self.queries: list[list[tuple[int, int, int]]] = []

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, batch: Any) -> Any:
        assert torch.equal(batch.seq_lens > 0, batch.out_cache_loc > 0), "padding writes to slot 0"
        live = batch.seq_lens > 0
        assert torch.equal(batch.seq_lens[live], positions[live] + 1)
        rows = zip(batch.req_pool_indices[live].tolist(), positions[live].tolist(), input_ids[live].tolist(), strict=True)
        self.queries.append(list(rows))
        following = torch.where(input_ids == 13, 10, input_ids + 1)
        return SimpleNamespace(next_token_logits=torch.nn.functional.one_hot(following, VOCAB).float())


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One greedy round of two requests with k = 6: row 2 repeats itself, row 1 does not."""
    model = RuleModel()
    counted: list[int] = []
    monkeypatch.setattr("sglang_sparsespec.rounds.base.get_tp_group", lambda: SimpleNamespace(world_size=1))
    backend: Any = SimpleNamespace(
        policy=SimpleNamespace(facts=SimpleNamespace(num_proposals=PROPOSALS)),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.arange(100, 220, dtype=torch.int32).view(3, 40)),
        device=torch.device("cpu"),
        begin=lambda plan: None,
        end=lambda: None,
        plan_draft=lambda rows, seq_lens: None,
        count_draft_queries=lambda rows, seq_lens: counted.append(int(seq_lens.sum())),
    )
    runner: Any = SimpleNamespace(model=model)
    metrics: Any = SimpleNamespace(note_forward=lambda draft_tokens, verify_tokens: None)
    worker: Any = None
    penalties = Penalties(3, VOCAB, "cpu", use_triton=False)
    context = RoundContext(worker, runner, backend, WINDOW, metrics, None, torch.float32, penalties, capture=False)
    drafter = NgramDrafter(context)
    prompts = [[10, 11, 12, 13, 10, 11, 12, 13], [1, 2, 3]]
    reqs = [request_in(row, get_fill_ids=lambda p=p: p) for row, p in zip((2, 1), prompts, strict=True)]
    info = SimpleNamespace(
        is_all_greedy=True, temperatures=None, top_ks=None, top_ps=None, min_ps=None, sampling_seed=None,
        need_top_k_sampling=False, need_top_p_sampling=False, need_min_p_sampling=False,
    )  # fmt: skip
    batch: Any = SimpleNamespace(
        reqs=reqs, req_pool_indices=torch.tensor([2, 1]), seq_lens=torch.tensor([8, 3]), sampling_info=info,
        spec_algorithm=None, spec_info=SimpleNamespace(bonus_tokens=torch.tensor([10, 4])),
    )  # fmt: skip
    drafter.note_prompts(batch)
    candidates, made = drafter.draft(batch, WINDOW - 1)
    return SimpleNamespace(candidates=candidates, made=made, model=model, counted=counted)


def test_repeated_text_is_drafted_in_fewer_forwards(drafted: Any) -> None:
    """Three forwards: 4 drafts from the first and the rest from the second, or one from each."""
    assert drafted.made.tolist() == [6, 3]
    assert len(drafted.model.queries) == WINDOW // 2 == 3
    assert drafted.candidates.shape == (2, WINDOW)


def test_drafts_are_those_of_one_token_at_a_time(drafted: Any) -> None:
    assert drafted.candidates[0].tolist() == [10, 11, 12, 13, 10, 11, 12]
    assert drafted.candidates[1, :4].tolist() == [4, 5, 6, 7]


def test_no_query_lies_beyond_the_windows_last_draft(drafted: Any) -> None:
    positions = [position for queries in drafted.model.queries for row, position, _ in queries if row == 2]
    assert positions == [8, 9, 10, 11, 12, 13], "then all six drafts are there"
    for queries in drafted.model.queries:
        ones = [position for row, position, _ in queries if row == 1]
        assert ones == list(range(ones[0], ones[0] + PROPOSALS + 1)) and ones[-1] < 3 + WINDOW - 1
    sums = [sum(position + 1 for _, position, _ in queries) for queries in drafted.model.queries]
    assert drafted.counted == sums
