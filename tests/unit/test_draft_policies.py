"""What each draft policy attends to (CPU, without a model)."""

from __future__ import annotations

import logging

import pytest
import torch
from small_backend import HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, NUM_Q_HEADS, WINDOW, SmallServer, attended

from sglang_sparsespec.attention_backend.page_table import num_selected
from sglang_sparsespec.attention_backend.policy import CLASSES, Vegas, make_policy
from sglang_sparsespec.settings import POLICIES, Settings

BUDGET = 24


def group_scores(server: SmallServer, row: int, layer: int, q: torch.Tensor, first: int) -> torch.Tensor:
    """Mean softmax probability of positions [0, first) over queries and grouped heads: [Hkv, first].

    ``q``: [queries, Hq * D], at positions ``first``, ``first`` + 1, ...
    """
    grouped = q.view(len(q), NUM_KV_HEADS, -1, HEAD_DIM)
    total = torch.zeros(NUM_KV_HEADS, first)
    for i in range(len(q)):
        keys = server.pool.k[layer][server.req_to_token[row, : first + i + 1].long()]
        logits = torch.einsum("hgd,thd->hgt", grouped[i], keys) * HEAD_DIM**-0.5
        total += torch.softmax(logits, dim=-1)[..., :first].mean(dim=1) / len(q)
    return total


def queries(server: SmallServer, count: int) -> torch.Tensor:
    """Queries large enough that attention is peaked."""
    return 3 * server.random(count, NUM_Q_HEADS)


def test_full_drafts_attend_to_what_verification_does() -> None:
    server = SmallServer(draft_policy="full")
    assert server.backend.table.positions.shape[-1] == 1, "there are no lists to hold"
    server.prefill([1, 4], [70, 5], [70, 5])
    q = torch.randn(2, WINDOW, NUM_Q_HEADS * HEAD_DIM, generator=server.generator)
    steps = [server.draft([1, 4], [71 + i, 6 + i], q[:, i]) for i in range(WINDOW)]
    server.pool.set_kv_buffer = lambda *args: None  # type: ignore[method-assign]
    verified = server.verify([1, 4], [70, 5], q.reshape(2 * WINDOW, -1)).view(2, WINDOW, -1)
    torch.testing.assert_close(torch.stack(steps, dim=1), verified, rtol=1e-5, atol=1e-6)
    read, of = server.backend.kv_read.tolist()
    assert read == of > 0
    # And again after a verification, whatever it accepted.
    assert attended(server, 1, 73) == set(range(73))


# --------------------------------------------------------------------------- vegas


@pytest.mark.parametrize("length", [60, 41, 30])
def test_vegas_keeps_the_newest_tokens_and_the_best_of_the_others(length: int) -> None:
    server = SmallServer(draft_policy="vegas", min_budget=BUDGET)
    server.prefill([1], [length], [length])
    q = queries(server, WINDOW)
    server.verify([1], [length], q)
    count = BUDGET - WINDOW
    recent = count // Vegas.RECENT_PART
    assert recent == 5
    for layer in range(NUM_LAYERS):
        scores = group_scores(server, 1, layer, q, length)[:, : length - recent]
        for head in range(NUM_KV_HEADS):
            best = scores[head].topk(count - recent).indices.tolist()
            expected = {*best, *range(length - recent, length + 1)}
            assert attended(server, 1, length + 1, layer, head) == expected


def test_vegas_attends_to_as_many_tokens_as_pillar() -> None:
    lengths = torch.arange(0, 3000)
    settings = Settings(draft_policy="vegas", budget_ratio=0.07, min_budget=64)
    counts, start = make_policy(settings, 7).plan(lengths, 3000, torch.tensor(64.0))
    budget = num_selected(lengths, 0.07, 64, 7, 3000)
    assert torch.equal(counts + (lengths - start), budget)
    assert bool((counts >= 0).all()) and bool((counts <= start).all())
    covered = lengths <= 64
    assert torch.equal((counts + lengths - start)[covered], lengths[covered]), "short requests are read whole"


# ------------------------------------------------------------------- all of the policies


@pytest.mark.parametrize("name", POLICIES)
def test_no_list_is_longer_than_the_kernels_are_told(name: str) -> None:
    context = 2000
    policy = make_policy(Settings(min_budget=64, draft_policy=name), WINDOW)
    lengths = torch.arange(0, context - 2 * WINDOW)
    capacity = policy.capacity(context)
    counts, start = policy.plan(lengths, capacity, torch.tensor(64.0))
    assert int(counts.max()) <= capacity
    # The last draft step after a round that accepted everything.
    longest = counts + lengths + 2 * WINDOW - 1 - start
    assert int(longest.max()) <= policy.longest_list(context)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_for_study_say_so_at_the_start(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        SmallServer(draft_policy=name)
    assert ("for study" in caplog.text) == (name in ("full", "triforce"))


def test_every_policy_that_can_be_asked_for_exists() -> None:
    assert set(CLASSES) == set(POLICIES)
