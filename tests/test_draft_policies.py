"""What each draft policy attends to, and how long its drafts are (CPU, without a model)."""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_backend import HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, NUM_Q_HEADS, WINDOW, SmallServer

from sglang_sparsespec import sampling
from sglang_sparsespec.attention_backend.page_table import num_selected
from sglang_sparsespec.attention_backend.policy import POLICIES, DraftPolicy, Vegas
from sglang_sparsespec.attention_backend.torch_kernels import look_ahead
from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.draft_length import AcceptanceHistory, AcceptRule, accept_drafted, fill_window

BUDGET = 24


def attended(server: SmallServer, row: int, length: int, layer: int = 0, head: int = 0) -> set[int]:
    """Positions that a draft step of ``row`` attends to; ``length`` includes the current token."""
    return {*server.selected(row, layer, head), *range(int(server.backend.table.tail_start[row]), length)}


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


# ---------------------------------------------------------------------------- full


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


@pytest.mark.parametrize("policy", ["pillar", "streaming"])
def test_steps_of_a_plain_round_attend_to_what_verification_does(policy: str) -> None:
    server = SmallServer(draft_policy=policy)
    server.prefill([1, 4], [70, 5], [70, 5])
    assert len(attended(server, 1, 71)) < 20
    server.backend.attend_to_all(torch.tensor([1, 4]))
    q = torch.randn(2, WINDOW, NUM_Q_HEADS * HEAD_DIM, generator=server.generator)
    steps = [server.draft([1, 4], [71 + i, 6 + i], q[:, i]) for i in range(WINDOW)]
    server.pool.set_kv_buffer = lambda *args: None  # type: ignore[method-assign]
    verified = server.verify([1, 4], [70, 5], q.reshape(2 * WINDOW, -1)).view(2, WINDOW, -1)
    torch.testing.assert_close(torch.stack(steps, dim=1), verified, rtol=1e-5, atol=1e-6)
    # The verification has selected for the rounds that follow.
    assert len(attended(server, 1, 71)) < 20


# ---------------------------------------------------------------------- look-ahead


@pytest.mark.parametrize("kind", ["prefill", "verification", "mixed forward"])
def test_every_selection_by_scores_looks_ahead(kind: str) -> None:
    row, length, last = 1, 70, NUM_LAYERS - 1
    server = SmallServer(min_budget=BUDGET, lookahead=4, schedule="unified")
    server.pool.k.mul_(8)  # peaked attention
    server.prefill([row], [length + WINDOW], [length + WINDOW])
    if kind == "verification":
        server.verify([row], [length])
    elif kind == "mixed forward":
        server.mixed([], [(row, length)])
    # The last layer's scores are still there; mixed forwards keep those of odd layers in the second half.
    scores = server.backend.scores[len(server.backend.scores) // 2 if kind == "mixed forward" else 0]
    own = scores[:, :length]
    best, unraised = (ranked.topk(BUDGET - WINDOW).indices.sort().values.tolist() for ranked in (look_ahead(own, 4), own))
    assert [server.selected(row, last, head) for head in range(NUM_KV_HEADS)] == best
    assert best != unraised


# -------------------------------------------------------------------------- oracle


def test_oracle_selects_the_exact_best_tokens_of_every_draft_query() -> None:
    server = SmallServer(draft_policy="oracle", min_budget=BUDGET)
    server.prefill([1, 3], [70, 50], [70, 50])
    previous: list[int] = []
    for step in range(3):
        q = queries(server, 2)
        server.draft([1, 3], [71 + step, 51 + step], q)
        for b, (row, prompt) in enumerate(((1, 70), (3, 50))):
            tail = prompt - WINDOW
            assert int(server.backend.table.tail_start[row]) == tail
            for layer in range(NUM_LAYERS):
                scores = group_scores(server, row, layer, q[b : b + 1], prompt + step)[:, :tail]
                for head in range(NUM_KV_HEADS):
                    best = scores[head].topk(BUDGET - WINDOW).indices.sort().values.tolist()
                    assert server.selected(row, layer, head) == best
        assert server.selected(1) != previous, "another query has other best tokens"
        previous = server.selected(1)


def test_oracle_attends_to_as_many_tokens_as_pillar() -> None:
    found = []
    for policy in ("oracle", "pillar"):
        server = SmallServer(draft_policy=policy, min_budget=BUDGET)
        server.prefill([1], [60], [60])
        server.verify([1], [60])
        server.draft([1], [62])
        found.append((len(attended(server, 1, 62)), int(server.backend.table.tail_start[1])))
        server.verify([1], [61])
        found[-1] += tuple(server.backend.kv_read.tolist())
    assert found[0] == found[1]


def test_oracle_padding_rows_are_not_selected_for() -> None:
    server = SmallServer(draft_policy="oracle", min_budget=BUDGET)
    server.prefill([2], [60], [60])
    before = server.backend.table.positions.clone()
    batch_rows, lengths = [2, 0], [61, 1]
    server.draft(batch_rows, lengths)
    assert torch.equal(before[:, [0, 1, 3, 4]], server.backend.table.positions[:, [0, 1, 3, 4]])


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
    config = SparseSpecConfig(budget_ratio=0.07, min_budget=64)
    counts, start = POLICIES["vegas"](config, 7).plan(lengths, 3000)
    budget = num_selected(lengths, 0.07, 64, 7, 3000)
    assert torch.equal(counts + (lengths - start), budget)
    assert bool((counts >= 0).all()) and bool((counts <= start).all())
    covered = lengths <= 64
    assert torch.equal((counts + lengths - start)[covered], lengths[covered]), "short requests are read whole"


# ------------------------------------------------------------------- all of the policies


@pytest.mark.parametrize("name", POLICIES)
def test_no_list_is_longer_than_the_kernels_are_told(name: str) -> None:
    context = 2000
    policy = POLICIES[name](SparseSpecConfig(min_budget=64, draft_policy=name), WINDOW)
    lengths = torch.arange(0, context - 2 * WINDOW)
    capacity = policy.capacity(context)
    counts, start = policy.plan(lengths, capacity)
    assert int(counts.max()) <= capacity
    # The last draft step after a round that accepted everything.
    longest = counts + lengths + 2 * WINDOW - 1 - start
    assert int(longest.max()) <= policy.longest_list(context)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_for_study_say_so_at_the_start(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        SmallServer(draft_policy=name)
    assert ("for study" in caplog.text) == (name in ("full", "oracle", "triforce"))


def test_only_adaptive_changes_the_draft_length() -> None:
    for name, policy_class in POLICIES.items():
        policy: DraftPolicy = policy_class(SparseSpecConfig(draft_policy=name), 9)
        assert policy.next_draft_length() == 8
        for _ in range(20):
            policy.note_acceptance([0, 0, 1], 8)
        assert (policy.next_draft_length() < 8) == (name == "adaptive")


# ------------------------------------------------------------------------ adaptive


def best(history: AcceptanceHistory, accepted: list[int], rounds: int = 60) -> int:
    """Best length after ``rounds`` rounds in which each request would accept so many drafts."""
    for _ in range(rounds):
        drafted = history.best_length()
        history.add([min(count, drafted) for count in accepted], drafted)
    return history.best_length()


def test_drafts_are_as_long_as_they_are_accepted() -> None:
    assert AcceptanceHistory(8, 0.15).best_length() == 8, "nothing is known yet"
    assert best(AcceptanceHistory(8, 0.15), [8]) == 8
    assert best(AcceptanceHistory(8, 0.15), [3]) == 3
    assert best(AcceptanceHistory(8, 0.15), [0]) == 1, "one draft is always made"


def test_a_longer_draft_must_pay_for_its_steps() -> None:
    """Half of the requests accept 2 drafts, the others 6."""
    assert best(AcceptanceHistory(8, 0.05), [2, 6]) == 6
    # 1 + 2 + 4 / 2 = 5 tokens in 1 + 6 cost, or 3 in 1 + 2 cost: equal at a cost of 0.25.
    assert best(AcceptanceHistory(8, 0.15), [2, 6]) == 6
    assert best(AcceptanceHistory(8, 0.4), [2, 6]) == 2


def test_the_length_is_the_best_of_all_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        accepted = torch.randint(0, 9, (6,), generator=generator).tolist()
        cost = float(torch.rand((), generator=generator)) + 0.02
        history = AcceptanceHistory(8, cost)
        for _ in range(100):
            history.add(accepted, 8)
        tokens = {n: 1 + sum(min(count, n) for count in accepted) / 6 for n in range(1, 9)}
        rate = {n: tokens[n] / (1 + n * cost) for n in tokens}
        assert rate[history.best_length()] > 0.99 * max(rate.values())


def test_short_drafts_grow_again_when_acceptance_rises() -> None:
    history = AcceptanceHistory(8, 0.15)
    assert best(history, [0]) == 1
    assert best(history, [8], rounds=100) == 8


def test_the_share_of_kv_read_counts_the_steps_that_were_made() -> None:
    server = SmallServer()
    server.prefill([1], [40], [40])
    selected = len(server.selected(1))
    server.backend.set_draft_length(1)
    server.verify([1], [40])
    assert server.backend.kv_read.tolist() == [selected + 41 - (40 - WINDOW), 41]
    server.backend.set_draft_length(WINDOW - 1)
    server.verify([1], [41])
    assert server.backend.kv_read[1] == 41 + 42 + 43


def test_hints_of_drafts_that_were_not_made_are_the_last_ones() -> None:
    backend = SmallServer().backend
    shape = (NUM_LAYERS, 2, WINDOW, NUM_Q_HEADS)
    backend.lse_hint = torch.arange(NUM_LAYERS * 2 * WINDOW * NUM_Q_HEADS).float().view(shape)
    before = backend.lse_hint.clone()
    backend.fill_lse_hint(1, 1)
    assert torch.equal(backend.lse_hint[:, 1], before[:, 1]), "another request's"
    assert torch.equal(backend.lse_hint[:, 0], before[:, 0, :1].expand(-1, WINDOW, -1))


def rule(info: Any, probs: torch.Tensor | None = None, num_drafted: torch.Tensor | None = None) -> AcceptRule:
    """The batch's acceptance, as the worker hands it over."""
    return partial(sampling.accept, info=info, draft_probs=probs, num_drafted=num_drafted)



def test_a_request_with_fewer_drafts_is_accepted_no_further() -> None:
    logits = torch.full((3 * 4, 9), -100.0)
    logits[:, 5] = 0.0
    candidates, positions = torch.full((3, 4), 5), torch.arange(12).view(3, 4)
    num_drafted = torch.tensor([1, 3, 2])
    _, accept_lens = accept_drafted(candidates, logits, positions, rule(greedy_info(), None, num_drafted))
    assert accept_lens.tolist() == [2, 4, 3]
    probs = torch.softmax(logits.view(3, 4, 9)[:, :3], dim=-1)
    tokens, accept_lens = accept_drafted(candidates, logits, positions, rule(sampled_info(3), probs, num_drafted))
    assert accept_lens.tolist() == [2, 4, 3] and (tokens[:, 0] == 5).all()


def greedy_info() -> Any:
    return SimpleNamespace(is_all_greedy=True)


def sampled_info(batch: int) -> Any:
    return SimpleNamespace(
        is_all_greedy=False,
        temperatures=torch.ones(batch, 1),
        top_ks=torch.full((batch,), 1 << 30),
        top_ps=torch.ones(batch),
        min_ps=torch.zeros(batch),
        sampling_seed=None,
        need_top_k_sampling=False,
        need_top_p_sampling=False,
        need_min_p_sampling=False,
    )


@pytest.mark.parametrize("drafted", [1, 2, 3])
def test_the_filling_of_a_window_is_never_accepted(drafted: int) -> None:
    """The target agrees with every token of the window, the filling included."""
    candidates = torch.full((2, 1 + drafted), 5)
    assert fill_window(candidates, 4).tolist() == [[5] * 4] * 2
    logits = torch.full((2 * 4, 9), -100.0)
    logits[:, 5] = 0.0
    positions = torch.arange(8).view(2, 4)
    tokens, accept_lens = accept_drafted(candidates, logits, positions, rule(greedy_info()))
    assert tokens.shape == (2, 4) and accept_lens.tolist() == [1 + drafted] * 2
    probs = torch.softmax(logits.view(2, 4, 9)[:, :drafted], dim=-1)
    tokens, accept_lens = accept_drafted(candidates, logits, positions, rule(sampled_info(2), probs))
    assert tokens.shape == (2, 4) and accept_lens.tolist() == [1 + drafted] * 2


def test_the_token_after_a_short_draft_is_the_targets() -> None:
    """Two of k = 3 drafts: when both are accepted, the third token comes from the target's third row."""
    batch, vocab = 20_000, 4
    torch.manual_seed(0)
    target = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0]])
    logits = target.log().repeat(batch, 1)
    draft = torch.full((batch, 2, vocab), 0.25)
    drafts = torch.randint(0, vocab, (batch, 2))
    candidates = torch.cat([torch.zeros(batch, 1, dtype=torch.int64), drafts], dim=1)
    positions = torch.zeros(batch, 4, dtype=torch.int64)
    tokens, accept_lens = accept_drafted(candidates, logits, positions, rule(sampled_info(batch), draft))
    assert int(accept_lens.max()) == 3
    for position in range(3):
        reached = accept_lens > position
        share = torch.bincount(tokens[reached, position], minlength=vocab) / reached.sum()
        torch.testing.assert_close(share, target[position], rtol=0, atol=5 * 0.5 / int(reached.sum()) ** 0.5)


def test_a_whole_window_is_accepted_as_before() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2 * 4, 9)
    candidates = torch.randint(0, 9, (2, 4))
    found = accept_drafted(candidates, logits, torch.zeros(2, 4, dtype=torch.int64), rule(greedy_info()))
    expected = sampling.accept_matching(candidates, logits.argmax(-1).view(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
