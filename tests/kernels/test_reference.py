"""The reference kernels against attention written out query by query in float64."""

from __future__ import annotations

import math

import pytest
import torch

from sglang_sparsespec.attention_backend.kernels.interface import LayerKV, score_row
from sglang_sparsespec.attention_backend.kernels.reference import ReferenceKernels
from sglang_sparsespec.attention_backend.page_table import SelectionTable, num_selected

WINDOW = 3
NUM_KV_HEADS = 2
HEAD_DIM = 8
SCALING = 0.3
CONTEXT = 40
#: Committed lengths of the requests of a batch; 0 is a padding row or an empty request.
LENGTHS = (17, 0, 5, 30)
#: Their rows in ``req_to_token``; row 0 is SGLang's padding row.
ROWS = (3, 0, 1, 4)


class Problem:
    """A random KV pool in which the tokens of each request are scattered.

    ``k_cache``, ``v_cache`` float32 [slots, Hkv, D]; ``req_to_token`` int32 [rows, context].
    """

    def __init__(self, group: int, seed: int = 0) -> None:
        self.group = group
        self.generator = torch.Generator().manual_seed(seed)
        slots = 6 * CONTEXT
        self.k_cache = self.randn(slots, NUM_KV_HEADS, HEAD_DIM)
        self.v_cache = self.randn(slots, NUM_KV_HEADS, HEAD_DIM)
        self.req_to_token = torch.randperm(slots, generator=self.generator).int().view(6, CONTEXT)
        self.rows = torch.tensor(ROWS)
        self.lengths = torch.tensor(LENGTHS)

    def randn(self, *shape: int) -> torch.Tensor:
        return 2 * torch.randn(*shape, generator=self.generator)

    @property
    def kv(self) -> LayerKV:
        return LayerKV(self.k_cache, self.v_cache, SCALING, 0)

    def queries(self, count: int) -> torch.Tensor:
        return self.randn(count, NUM_KV_HEADS * self.group, HEAD_DIM)

    def probabilities(self, query: torch.Tensor, row: int, head: int, positions: list[int]) -> torch.Tensor:
        """Softmax over ``positions`` of one query of query head ``head``; float64 [positions]."""
        kv_head = head // self.group
        logits = torch.tensor(
            [
                SCALING
                * sum(
                    a * b
                    for a, b in zip(
                        query[head].double().tolist(),
                        self.k_cache[int(self.req_to_token[row, p]), kv_head].double().tolist(),
                        strict=True,
                    )
                )
                for p in positions
            ],
            dtype=torch.float64,
        )
        self.lse = math.log(sum(math.exp(x) for x in logits.tolist()))
        return torch.softmax(logits, dim=0)

    def attend(self, query: torch.Tensor, row: int, positions: list[list[int]]) -> torch.Tensor:
        """Output of one query [Hq, D]; KV head h reads ``positions[h]``."""
        out = torch.zeros(query.shape, dtype=torch.float64)
        for head in range(query.shape[0]):
            kv_head = head // self.group
            probs = self.probabilities(query, row, head, positions[kv_head])
            for p, prob in zip(positions[kv_head], probs.tolist(), strict=True):
                out[head] += prob * self.v_cache[int(self.req_to_token[row, p]), kv_head].double()
        return out

    def attend_all(self, query: torch.Tensor, row: int, length: int) -> torch.Tensor:
        """Full attention over positions [0, length)."""
        return self.attend(query, row, [list(range(length))] * NUM_KV_HEADS)


@pytest.fixture(params=[1, 3], ids=["mha", "gqa3"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


def kernels_of(problem: Problem, table: SelectionTable) -> ReferenceKernels:
    return ReferenceKernels(table, problem.req_to_token)


def empty_table(capacity: int = 8) -> SelectionTable:
    return SelectionTable(1, 6, NUM_KV_HEADS, capacity, "cpu")


def verify(
    problem: Problem, q: torch.Tensor, scores: torch.Tensor | None = None, window: int = WINDOW
) -> torch.Tensor:
    out = torch.full_like(q, float("nan"))
    attention = kernels_of(problem, empty_table()).plan_verify(problem.rows, problem.lengths, window)
    attention.run(q, problem.kv, out, scores)
    return out


def draft(
    problem: Problem,
    q: torch.Tensor,
    table: SelectionTable,
    lengths: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.full_like(q, float("nan"))
    kernels_of(problem, table).plan_draft(problem.rows, lengths).run(q, problem.kv, out, lse)
    return out


def random_selection(problem: Problem, ratio: float, min_budget: int) -> tuple[SelectionTable, torch.Tensor]:
    """A table with random positions of the configured sizes, and random scores behind them."""
    capacity = SelectionTable.capacity_for(CONTEXT, ratio, min_budget)
    table = SelectionTable(1, 6, NUM_KV_HEADS, capacity, "cpu")
    counts = num_selected(problem.lengths, ratio, min_budget, WINDOW, capacity)
    table.begin_selection(problem.rows, counts, problem.lengths)
    scores = torch.rand(len(LENGTHS), NUM_KV_HEADS, CONTEXT, generator=problem.generator)
    kernels_of(problem, table).plan_selection(problem.rows, problem.lengths, counts).run(scores, 0)
    return table, scores


def test_a_selection_with_a_memory_adds_a_share_of_what_positions_were_selected_by(problem: Problem) -> None:
    table = SelectionTable(1, 6, NUM_KV_HEADS, CONTEXT, "cpu", memory=0.5)
    total = torch.zeros(len(LENGTHS), NUM_KV_HEADS, CONTEXT)
    for count in (9, 5, 7):
        counts = torch.minimum(problem.lengths, torch.tensor(count)).int()
        table.begin_selection(problem.rows, counts, problem.lengths, remember=True)
        scores = torch.rand(total.shape, generator=problem.generator).half().float()
        kernels_of(problem, table).plan_selection(problem.rows, problem.lengths, counts).run(scores, 0)
        kept = torch.zeros_like(total)
        for b, (row, length, n) in enumerate(zip(ROWS, LENGTHS, counts.tolist(), strict=True)):
            all_scores = (scores + 0.5 * total)[b, :, :length]
            best = all_scores.topk(n, dim=-1).indices.sort(dim=-1).values
            assert torch.equal(table.positions[0, row, :, :n], best.int())
            kept[b].scatter_(1, best, all_scores.gather(1, best).half().float())
            assert torch.equal(table.scores[0, row, :, :n].float(), kept[b].gather(1, best))
        total = kept


# ------------------------------------------------------------------------- verification


def test_verification_is_full_causal_attention(problem: Problem) -> None:
    q = problem.queries(len(LENGTHS) * WINDOW)
    out = verify(problem, q)
    for b, (row, length) in enumerate(zip(ROWS, LENGTHS, strict=True)):
        for i in range(WINDOW):
            expected = problem.attend_all(q[b * WINDOW + i], row, length + i + 1)
            torch.testing.assert_close(out[b * WINDOW + i].double(), expected, rtol=1e-4, atol=1e-5)


def test_scores_are_the_mean_over_verify_rows_and_the_query_heads_of_a_group(problem: Problem) -> None:
    q = problem.queries(len(LENGTHS) * WINDOW)
    scores = torch.full((len(LENGTHS), NUM_KV_HEADS, CONTEXT), -1.0)
    verify(problem, q, scores)
    for b, (row, length) in enumerate(zip(ROWS, LENGTHS, strict=True)):
        for kv_head in range(NUM_KV_HEADS):
            total = torch.zeros(length, dtype=torch.float64)
            for i in range(WINDOW):
                for head in range(kv_head * problem.group, (kv_head + 1) * problem.group):
                    visible = list(range(length + i + 1))
                    total += problem.probabilities(q[b * WINDOW + i], row, head, visible)[:length]
            expected = total / (WINDOW * problem.group)
            torch.testing.assert_close(scores[b, kv_head, :length].double(), expected, rtol=1e-4, atol=1e-6)
        assert (scores[b, :, length:] == -1).all(), "written past the committed tokens"


def test_verification_without_scores_gives_the_same_output(problem: Problem) -> None:
    q = problem.queries(len(LENGTHS) * WINDOW)
    scores = torch.zeros(len(LENGTHS), NUM_KV_HEADS, CONTEXT)
    assert torch.equal(verify(problem, q), verify(problem, q, scores))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_of_one_is_a_plain_step(problem: Problem, dtype: torch.dtype) -> None:
    """It takes another path, for all requests at once; the cache may be of another type."""
    problem.k_cache, problem.v_cache = problem.k_cache.to(dtype), problem.v_cache.to(dtype)
    q = problem.queries(len(LENGTHS))
    out = verify(problem, q, window=1)
    for b, (row, length) in enumerate(zip(ROWS, LENGTHS, strict=True)):
        torch.testing.assert_close(out[b].double(), problem.attend_all(q[b], row, length + 1), rtol=1e-4, atol=1e-5)
    scores = torch.zeros(len(LENGTHS), NUM_KV_HEADS, CONTEXT)
    torch.testing.assert_close(verify(problem, q, scores, window=1), out, rtol=1e-5, atol=1e-6)


def test_verification_gives_the_log_sum_exp_of_every_query(problem: Problem) -> None:
    q = problem.queries(len(LENGTHS) * WINDOW)
    lse = torch.full((len(LENGTHS), WINDOW, q.shape[1]), float("nan"))
    attention = kernels_of(problem, empty_table()).plan_verify(problem.rows, problem.lengths, WINDOW)
    attention.run(q, problem.kv, torch.empty_like(q), lse=lse)
    for b, (row, length) in enumerate(zip(ROWS, LENGTHS, strict=True)):
        for i in range(WINDOW):
            for head in range(q.shape[1]):
                problem.probabilities(q[b * WINDOW + i], row, head, list(range(length + i + 1)))
                assert float(lse[b, i, head]) == pytest.approx(problem.lse, rel=1e-5)


@pytest.mark.parametrize(("context", "entries"), [(1, 64), (64, 64), (65, 128), (8192, 8192)])
def test_rows_of_scores_begin_at_multiples_of_128_bytes(context: int, entries: int) -> None:
    assert score_row(context) == entries


# ------------------------------------------------------------------------------ prefill


@pytest.mark.parametrize("extend", [1, 2, 3, 7], ids=lambda n: f"extend{n}")
def test_prefill_scores_are_those_of_the_last_queries_of_the_chunk(problem: Problem, extend: int) -> None:
    """Chunks shorter and longer than a window; the last chunk starts at the prompt's first token."""
    totals = [length + extend if length else extend for length in LENGTHS]
    q = problem.queries(len(LENGTHS) * extend)
    scores = torch.full((len(LENGTHS), NUM_KV_HEADS, CONTEXT), -1.0)
    starts, extend_lens = torch.arange(len(LENGTHS)) * extend, torch.full((len(LENGTHS),), extend)
    kernels = kernels_of(problem, empty_table())
    plan = kernels.plan_prefill_scores(problem.rows, torch.tensor(totals), starts, extend_lens, WINDOW)
    plan.run(q, problem.kv, scores)
    for b, (row, total) in enumerate(zip(ROWS, totals, strict=True)):
        num_queries = min(WINDOW, extend)
        scored = total - num_queries
        for kv_head in range(NUM_KV_HEADS):
            mass = torch.zeros(scored, dtype=torch.float64)
            for i in range(num_queries):
                query = q[(b + 1) * extend - num_queries + i]
                for head in range(kv_head * problem.group, (kv_head + 1) * problem.group):
                    visible = list(range(scored + i + 1))
                    mass += problem.probabilities(query, row, head, visible)[:scored]
            expected = mass / (num_queries * problem.group)
            torch.testing.assert_close(scores[b, kv_head, :scored].double(), expected, rtol=1e-4, atol=1e-6)
        assert (scores[b, :, scored:] == -1).all()


# ---------------------------------------------------------------------------- selection


def test_selection_is_the_top_k_of_each_kv_head_in_ascending_order(problem: Problem) -> None:
    table, scores = random_selection(problem, 0.1, 8)
    assert table.num_selected[torch.tensor(ROWS)].tolist() == [5, 0, 5, 5]  # 8 - 3, but all of a short one
    for b, (row, length) in enumerate(zip(ROWS, LENGTHS, strict=True)):
        for kv_head in range(NUM_KV_HEADS):
            selected = table.positions[0, row, kv_head, : table.num_selected[row]].tolist()
            ranked = sorted(range(length), key=lambda p: -float(scores[b, kv_head, p]))  # noqa: B023
            assert selected == sorted(ranked[: len(selected)])


def test_kv_heads_select_independently(problem: Problem) -> None:
    table, _ = random_selection(problem, 0.1, 8)
    assert not torch.equal(table.positions[0, ROWS[0], 0, :5], table.positions[0, ROWS[0], 1, :5])


def test_selection_leaves_other_rows_alone(problem: Problem) -> None:
    table, _ = random_selection(problem, 0.1, 8)
    others = [row for row in range(6) if row not in ROWS]
    assert (table.positions[0, others] == 0).all()


# ------------------------------------------------------------------------------- drafts


def test_draft_attention_reads_the_selected_tokens_and_the_tail(problem: Problem) -> None:
    table, _ = random_selection(problem, 0.1, 8)
    q = problem.queries(len(LENGTHS))
    lengths = torch.tensor([length + 2 if length else 0 for length in LENGTHS])
    lse = torch.full((len(LENGTHS), NUM_KV_HEADS * problem.group), float("nan"))
    out = draft(problem, q, table, lengths, lse)
    for b, (row, length) in enumerate(zip(ROWS, LENGTHS, strict=True)):
        if length == 0:
            continue
        tail = [length, length + 1]
        attended = [
            table.positions[0, row, kv_head, : table.num_selected[row]].tolist() + tail
            for kv_head in range(NUM_KV_HEADS)
        ]
        torch.testing.assert_close(out[b].double(), problem.attend(q[b], row, attended), rtol=1e-4, atol=1e-5)
        for head in range(q.shape[1]):
            problem.probabilities(q[b], row, head, attended[head // problem.group])
            assert float(lse[b, head]) == pytest.approx(problem.lse, rel=1e-5)


def test_padding_rows_of_a_draft_are_zero(problem: Problem) -> None:
    table, _ = random_selection(problem, 0.1, 8)
    out = draft(problem, problem.queries(len(LENGTHS)), table, torch.zeros(len(LENGTHS), dtype=torch.int64))
    assert (out == 0).all()


def test_draft_attention_is_full_attention_where_the_budget_covers_the_length(problem: Problem) -> None:
    """So the drafts of a short context are the target's own tokens."""
    table, _ = random_selection(problem, 0.05, 64)
    assert table.num_selected[problem.rows].tolist() == list(LENGTHS)
    q = problem.queries(len(LENGTHS) * WINDOW)
    full = verify(problem, q).view(len(LENGTHS), WINDOW, -1, HEAD_DIM)
    for step in range(WINDOW):
        queries = q.view(len(LENGTHS), WINDOW, -1, HEAD_DIM)[:, step].contiguous()
        sparse = draft(problem, queries, table, problem.lengths + step + 1)
        torch.testing.assert_close(sparse, full[:, step], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_selection_drafts_attend_to_everything(problem: Problem, dtype: torch.dtype) -> None:
    """As with the policy ``full``; the cache may be of another type."""
    table = empty_table()
    nothing = torch.zeros(len(LENGTHS), dtype=torch.int64)
    table.begin_selection(problem.rows, nothing, nothing)
    problem.k_cache, problem.v_cache = problem.k_cache.to(dtype), problem.v_cache.to(dtype)
    q = problem.queries(len(LENGTHS))
    out = draft(problem, q, table, problem.lengths)
    for b, (row, length) in enumerate(zip(ROWS, LENGTHS, strict=True)):
        expected = problem.attend_all(q[b], row, length) if length else torch.zeros_like(q[b]).double()
        torch.testing.assert_close(out[b].double(), expected, rtol=1e-4, atol=1e-5)


def test_draft_attention_differs_from_full_attention_where_the_budget_is_short(problem: Problem) -> None:
    """What makes the test above mean something."""
    table, _ = random_selection(problem, 0.1, 8)
    q = problem.queries(len(LENGTHS))
    sparse = draft(problem, q, table, problem.lengths + 1)
    assert (sparse[0].double() - problem.attend_all(q[0], ROWS[0], LENGTHS[0] + 1)).abs().max() > 0.05


def test_a_selection_survives_its_tokens_moving_to_other_slots(problem: Problem) -> None:
    """The table keeps positions: the radix cache may replace a request's slots by a shared prefix's."""
    table, _ = random_selection(problem, 0.1, 8)
    q = problem.queries(len(LENGTHS))
    before = draft(problem, q, table, problem.lengths + 1)
    moved = torch.randperm(len(problem.k_cache), generator=problem.generator)
    old_k, old_v = problem.k_cache.clone(), problem.v_cache.clone()
    problem.k_cache[moved], problem.v_cache[moved] = old_k, old_v
    problem.req_to_token = moved.int()[problem.req_to_token.long()]
    assert torch.equal(draft(problem, q, table, problem.lengths + 1), before)
