"""The attention backend: selections and the life of their row, kinds of forward, accounting (CPU, without a model)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention import base_attn_backend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from small_backend import (
    CONTEXT,
    HEAD_DIM,
    NUM_KV_HEADS,
    NUM_LAYERS,
    NUM_Q_HEADS,
    ROWS,
    WINDOW,
    BaseBackend,
    SmallServer,
    attended,
)

from sglang_sparsespec.attention_backend.forward_plan import Draft
from sglang_sparsespec.attention_backend.lse_hints import LseHints


@pytest.mark.parametrize("policy", ["pillar", "window", "streaming"])
def test_a_row_that_is_used_again_forgets_its_last_requests_selection(policy: str) -> None:
    """Finished, aborted or retracted: the next request of the row begins with a prefill of its own."""
    server = SmallServer(draft_policy=policy)
    server.prefill([2, 3], [60, 50], [60, 50])
    assert len(server.selected(2)) == 8 - WINDOW
    neighbour = [
        server.selected(3, layer, head) for layer in range(NUM_LAYERS) for head in range(NUM_KV_HEADS)
    ]

    server.prefill([2], [9], [9])  # a new request of 9 tokens, 6 of them before the last window
    assert int(server.backend.table.tail_start[2]) == 9 - WINDOW
    for layer in range(NUM_LAYERS):
        for head in range(NUM_KV_HEADS):
            assert server.selected(2, layer, head) == [0, 1, 2, 3, 4, 5]
    assert neighbour == [
        server.selected(3, layer, head) for layer in range(NUM_LAYERS) for head in range(NUM_KV_HEADS)
    ]


def test_a_cached_prompt_of_one_new_token_begins_with_a_selection() -> None:
    """With the radix cache the prefill may have a single query."""
    server = SmallServer()
    server.prefill([1], [40], [1])
    selected = server.selected(1)
    assert len(selected) == 8 - WINDOW and selected == sorted(set(selected)) and selected[-1] < 39
    assert int(server.backend.table.tail_start[1]) == 39


def test_each_chunk_of_a_prompt_replaces_the_selection() -> None:
    server = SmallServer()
    server.prefill([1], [30], [30])
    server.prefill([1], [60], [30])
    assert int(server.backend.table.tail_start[1]) == 60 - WINDOW
    assert server.selected(1)[-1] < 60 - WINDOW


@pytest.mark.parametrize("policy", ["pillar", "window", "streaming"])
def test_a_verification_renews_the_selection_whatever_was_accepted(policy: str) -> None:
    server = SmallServer(draft_policy=policy)
    server.prefill([1], [40], [40])
    before = server.selected(1)
    server.verify([1], [40])
    assert int(server.backend.table.tail_start[1]) == 40
    selected = server.selected(1)
    assert len(selected) == 8 - WINDOW and selected == sorted(set(selected)) and selected[-1] < 40
    if policy == "window":
        assert selected == [35, 36, 37, 38, 39]
    if policy == "streaming":
        assert selected == [0, 1, 2, 3, 39]
    if policy == "pillar":
        assert selected != before


def test_drafts_equal_the_verification_while_the_budget_covers_the_request() -> None:
    server = SmallServer(min_budget=64)
    server.prefill([1, 4], [30, 5], [30, 5])
    q = torch.randn(2, WINDOW, NUM_Q_HEADS * HEAD_DIM, generator=server.generator)
    steps = [server.draft([1, 4], [31 + i, 6 + i], q[:, i]) for i in range(WINDOW)]
    # The same KV for the verification: it is stored by position, and random per call.
    stored_k, stored_v = server.pool.k.clone(), server.pool.v.clone()
    server.pool.set_kv_buffer = lambda *args: None  # type: ignore[method-assign]
    verified = server.verify([1, 4], [30, 5], q.reshape(2 * WINDOW, -1)).view(2, WINDOW, -1)
    assert torch.equal(stored_k, server.pool.k) and torch.equal(stored_v, server.pool.v)
    torch.testing.assert_close(torch.stack(steps, dim=1), verified, rtol=1e-5, atol=1e-6)


def test_kv_read_counts_what_draft_steps_attend_to() -> None:
    """Per round of k = 2: step j of a request of L tokens sees L + j, or the selected ones and the tail."""
    server = SmallServer()
    server.prefill([1, 2], [40, 6], [40, 6])
    read = full = 0
    for row, length in ((1, 40), (2, 6)):
        for step in range(1, WINDOW):
            read += len(server.selected(row)) + length + step - (length - WINDOW)
            full += length + step
    server.verify([1, 2], [40, 6])
    assert server.backend.kv_read.tolist() == [read, full]
    server.verify([0], [0])  # a padding row
    assert server.backend.kv_read.tolist() == [read, full]


def test_kv_read_counts_no_more_draft_steps_than_there_were() -> None:
    counted = []
    for drafts in (1, WINDOW - 1):
        server = SmallServer()
        server.prefill([1], [40], [40])
        skipped = 40 - WINDOW - len(server.selected(1))
        server.backend.begin_lockstep_round(drafts)
        server.verify([1], [40])
        full = sum(40 + step for step in range(1, drafts + 1))
        assert server.backend.kv_read.tolist() == [full - drafts * skipped, full]
        counted.append(full)
    assert counted[0] < counted[1]


def test_a_round_sets_the_least_budget_of_the_selections_after_it() -> None:
    server = SmallServer()
    server.prefill([1], [40], [40])
    configured = len(server.selected(1))
    server.backend.begin_lockstep_round(1, configured + 2 * WINDOW)
    server.verify([1], [40])
    assert len(server.selected(1)) == configured + WINDOW
    server.backend.begin_lockstep_round(1)
    server.verify([1], [40])
    assert len(server.selected(1)) == configured


def test_verifications_remember_and_prefills_do_not() -> None:
    server = SmallServer()
    table = server.backend.table
    assert table.memory == server.backend.policy.memory > 0
    server.prefill([1, 2], [40, 30], [40, 30])
    assert table.num_remembered[[1, 2]].tolist() == [0, 0]
    assert bool((table.scores[:, 1, :, : len(server.selected(1))] > 0).all()), "there is something to remember"
    server.verify([1], [40])
    assert table.num_remembered[[1, 2]].tolist() == [len(server.selected(1)), 0]
    server.prefill([1], [40], [40])
    assert table.num_remembered[1] == 0


def test_the_last_draft_of_a_short_window_stands_in_for_the_rest() -> None:
    """Hints of tokens that were never draft queries."""
    server = SmallServer()
    drafted = []
    server.backend.hints = SimpleNamespace(of=lambda rows, num_drafted: drafted.append(num_drafted.tolist()))  # type: ignore[assignment]
    for drafts in (1, 2):
        server.backend.begin_lockstep_round(drafts)
        server.backend.plan_verify(torch.tensor([1, 2]), torch.tensor([5, 6]), server.backend._all_drafted[:2])
    assert drafted == [[1, 1], [2, 2]]


@pytest.mark.parametrize("policy", ["pillar", "window"])
def test_a_mixed_forward_does_what_a_draft_step_and_a_verification_do(policy: str) -> None:
    """Requests 1 and 4 draft, request 2 verifies: outputs, KV, selections and counters are those of two forwards."""
    together, apart = SmallServer(draft_policy=policy), SmallServer(draft_policy=policy)
    for server in (together, apart):
        server.prefill([1, 2, 4], [40, 30, 20], [40, 30, 20])
        server.pool.set_kv_buffer = lambda *args: None  # type: ignore[method-assign]
    q = torch.randn(2 + WINDOW, NUM_Q_HEADS * HEAD_DIM, generator=together.generator)
    drafted = apart.draft([1, 4], [41, 21], q[:2])
    verified = apart.verify([2], [30], q[2:])
    mixed = together.mixed([(1, 41), (4, 21)], [(2, 30)], q)
    torch.testing.assert_close(mixed, torch.cat([drafted, verified]), rtol=1e-5, atol=1e-6)
    tables = together.backend.table, apart.backend.table
    for name in ("positions", "num_selected", "tail_start"):
        assert torch.equal(*(getattr(table, name) for table in tables)), name


def test_a_mixed_forward_writes_the_kv_of_all_its_tokens() -> None:
    server = SmallServer()
    server.prefill([1, 2], [40, 30], [40, 30])
    before = server.pool.k.clone()
    server.mixed([(1, 41)], [(2, 30)])
    changed = (server.pool.k != before).flatten(2).any(-1)
    written = [*server.req_to_token[2, 30 : 30 + WINDOW].tolist(), int(server.req_to_token[1, 40])]
    for layer in range(NUM_LAYERS):
        assert sorted(changed[layer].nonzero().flatten().tolist()) == sorted(written)


def test_padding_of_a_mixed_forward_changes_nothing() -> None:
    plain, padded = SmallServer(), SmallServer()
    for server in (plain, padded):
        server.req_to_token[0] = int(server.req_to_token[0, 0])
        server.prefill([1, 2], [40, 30], [40, 30])
        server.pool.set_kv_buffer = lambda *args: None  # type: ignore[method-assign]
    q = torch.randn(1 + WINDOW, NUM_Q_HEADS * HEAD_DIM, generator=plain.generator)
    expected = plain.mixed([(1, 41)], [(2, 30)], q)
    padding = torch.zeros(WINDOW, NUM_Q_HEADS * HEAD_DIM)
    found = padded.mixed([(1, 41), (0, 0)], [(2, 30), (0, 0)], torch.cat([q[:1], padding[:1], q[1:], padding]))
    torch.testing.assert_close(torch.cat([found[:1], found[2 : 2 + WINDOW]]), expected)
    assert torch.equal(plain.backend.table.positions, padded.backend.table.positions)
    assert torch.equal(plain.backend.kv_read, padded.backend.kv_read)


def test_kv_read_of_mixed_forwards_adds_up_to_that_of_a_round() -> None:
    """The same drafts, each counted in its own forward."""
    lockstep, staggered = SmallServer(), SmallServer()
    for server in (lockstep, staggered):
        server.prefill([1, 2], [40, 6], [40, 6])
    for step in range(1, WINDOW):
        staggered.mixed([(1, 40 + step), (2, 6 + step)], [])
    staggered.mixed([], [(1, 40), (2, 6)])
    lockstep.verify([1, 2], [40, 6])
    assert staggered.backend.kv_read.tolist() == lockstep.backend.kv_read.tolist()


def test_log_sum_exps_of_drafts_reach_their_window_by_row() -> None:
    """Also those of an earlier round; tokens after the last draft get its own, padding stays finite."""
    server = SmallServer()
    backend = server.backend
    hints = backend.hints = LseHints(NUM_LAYERS, ROWS, WINDOW, NUM_Q_HEADS, "cpu")
    server.prefill([1, 2, 4], [40, 30, 20], [40, 30, 20])
    server.mixed([(1, 41), (0, 0)], [])
    step = hints.last_step[:, 0].clone()
    assert step.abs().sum() > 0
    rows, live = torch.tensor([1, 0]), torch.tensor([True, False])
    hints.last_step[:, 1] = torch.nan  # padding's own
    hints.keep(rows, torch.tensor([0, -1]), live)
    kept = hints.of(torch.tensor([2, 1, 0]), torch.tensor([0, 1, 0]))
    assert torch.isfinite(kept).all()
    # The only draft's, for all tokens of its window.
    assert torch.equal(kept[:, 1], step.unsqueeze(1).expand(-1, WINDOW, -1))
    plan = backend.plan_verify(torch.tensor([4, 1]), torch.tensor([20, 40]), torch.tensor([0, 1]))
    assert plan.hints is not None and plan.hints.shape == (NUM_LAYERS, 2, WINDOW, NUM_Q_HEADS)
    assert torch.equal(plan.hints[:, 1, 0], step)


def test_the_last_draft_stands_in_for_the_windows_last_token() -> None:
    hints = LseHints(NUM_LAYERS, ROWS, WINDOW, NUM_Q_HEADS, "cpu")
    rows, live = torch.tensor([3, 1]), torch.tensor([True, True])
    for offset in range(WINDOW - 1):
        hints.last_step[:, :2] = 1.0 + offset
        hints.keep(rows, torch.tensor([offset, offset]), live)
    found = hints.of(torch.tensor([1]), torch.tensor([WINDOW - 1]))
    assert found[0, 0, :, 0].tolist() == [*(1.0 + offset for offset in range(WINDOW - 1)), WINDOW - 1.0]


def test_a_decode_forward_that_sglang_plans_itself_is_a_draft_step() -> None:
    server = SmallServer()
    server.prefill([1], [40], [40])
    batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE, req_pool_indices=torch.tensor([1]), seq_lens=torch.tensor([41])
    )
    server.backend.init_forward_metadata(batch)  # type: ignore[arg-type]
    assert isinstance(server.backend._plan, Draft)


@pytest.mark.parametrize("policy", ["pillar", "streaming"])
def test_steps_of_a_plain_round_attend_to_what_verification_does(policy: str) -> None:
    server = SmallServer(draft_policy=policy)
    server.prefill([1, 4], [70, 5], [70, 5])
    assert len(attended(server, 1, 71)) < 20
    q = torch.randn(2, WINDOW, NUM_Q_HEADS * HEAD_DIM, generator=server.generator)
    steps = [server.plain([1, 4], [71 + i, 6 + i], q[:, i]) for i in range(WINDOW)]
    # The plain tokens extend the tail of a selection that stays.
    assert attended(server, 1, 74) == {*server.selected(1), *range(70 - WINDOW, 74)}
    server.pool.set_kv_buffer = lambda *args: None  # type: ignore[method-assign]
    verified = server.verify([1, 4], [70, 5], q.reshape(2 * WINDOW, -1)).view(2, WINDOW, -1)
    torch.testing.assert_close(torch.stack(steps, dim=1), verified, rtol=1e-5, atol=1e-6)
    # The verification has selected for the rounds that follow.
    assert len(attended(server, 1, 71)) < 20


def test_a_tail_of_plain_tokens_never_exceeds_what_the_kernels_were_told() -> None:
    server = SmallServer()
    server.prefill([1, 2], [40, 20], [40, 20])
    longest = server.backend.policy.longest_list(CONTEXT)
    assert longest < 40
    for length in range(40, 70):
        server.backend.end_plain_round(torch.tensor([1]), torch.tensor([length]))
        seen = attended(server, 1, length + WINDOW)
        assert len(seen) == min(longest, len(server.selected(1)) + length + WINDOW - (40 - WINDOW))
        assert {*server.selected(1), length, length + WINDOW - 1} <= seen, "the newest tokens are kept"
    assert int(server.backend.table.tail_start[2]) == 20 - WINDOW


@pytest.mark.skipif(not hasattr(base_attn_backend, "SharedReadEnds"), reason="SGLang asks no backend when its reads end")
@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.EXTEND])
def test_the_scheduler_waits_for_whole_forwards(mode: ForwardMode) -> None:
    """Every layer reads ``req_to_token``; SGLang would write to it again once a verification has been planned."""
    backend = SmallServer().backend
    assert backend.shared_read_ends(mode) is base_attn_backend.SharedReadEnds.UNKNOWN
    early = base_attn_backend.AttentionBackend.shared_read_ends(backend, ForwardMode.TARGET_VERIFY)
    assert early is base_attn_backend.SharedReadEnds.IN_REPLAY, "SGLang's own answer has changed"


def test_properties_of_prefill_are_the_base_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseBackend, "extend_dummy_seqs_capped_by_req_pool", True, raising=False)
    assert SmallServer().backend.extend_dummy_seqs_capped_by_req_pool
    assert not hasattr(SmallServer().backend, "extend_attention_block_m")
