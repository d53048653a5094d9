"""The Triton kernels against the torch oracle.

Without a GPU a child process runs the cases of this folder in Triton's interpreter, see ``interpreter_child``; the same
checks run on CUDA with bfloat16, float16 and larger sizes under the ``gpu`` mark.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import pytest
import torch
from interpreter_child import assert_passes_in_the_interpreter
from kernel_problem import (
    HAS_CUDA,
    INTERPRETED,
    LONG,
    RAGGED,
    Case,
    Problem,
    check_draft,
    check_draft_follows_lengths,
    check_full,
    check_graphs_outlive_growth,
    check_growth,
    check_same_bits_on_every_replay,
    gpu_only,
    interpreter_only,
    make_kernels,
    poison_scratch,
    rel_error,
    run_case,
    tolerance,
)

from sglang_sparsespec.attention_backend.kernels import make_kernels as make_named_kernels
from sglang_sparsespec.attention_backend.kernels.interface import KernelShape, LayerKV
from sglang_sparsespec.attention_backend.kernels.reference import softmax_probabilities, weighted_values
from sglang_sparsespec.attention_backend.kernels.triton_kernels import TritonKernels
from sglang_sparsespec.attention_backend.kernels.triton_prefill_scores import Windows, window_scores
from sglang_sparsespec.attention_backend.page_table import SelectionTable
from sglang_sparsespec.attention_backend.sliding_window import SlidingWindow

CPU_CASES = [
    Case("draft", g=1, d=64, lens=RAGGED, splits=0.01),
    Case("draft", g=4, d=128, lens=RAGGED, splits=100),
    Case("draft", g=6, d=64, lens=(40, 0, 9), splits=100, hkv=1),
    Case("draft", g=16, d=64, lens=(33, 2), splits=0.01, hkv=1),
    Case("draft", g=4, d=64, lens=(300,), budget=120, splits=100, block_n=32),
    # No selected positions at all: every entry is of the tail.
    Case("draft", g=2, d=64, lens=(20, 0, 7), budget=0, splits=100, hkv=1),
    Case("draft", g=2, d=64, lens=(20, 9), splits=100, hkv=1, wide=True),
    # Tails of hundreds of tokens, in one part and in many.
    Case("full", g=2, d=64, lens=(300, 0, 20), budget=0, splits=0.01, hkv=1),
    Case("full", g=4, d=64, lens=(300, 0, 20), budget=0, splits=100, hkv=1),
    # Lists longer than the kernels were told.
    Case("long_lists", g=4, d=64, lens=(300, 0, 20), splits=100, hkv=1),
    Case("plain_step", g=4, d=64, lens=(300, 0, 20), hkv=1),
    Case("plain_step", g=6, d=64, lens=(40, 7), hkv=2),
    Case("single_query", g=4, d=64, lens=(37, 0, 90, 5), splits=100),
    Case("single_query", g=2, d=64, lens=(37, 90), splits=0.01, hkv=1, score_dtype="float16"),
    Case("verify", g=1, d=64, lens=RAGGED, programs=1),
    Case("verify", g=4, d=128, lens=(37, 0, 5), programs=4),
    Case("verify", g=4, d=64, lens=RAGGED, programs=7),
    Case("verify", g=6, d=64, lens=(150, 1), window=9, programs=5, hkv=1),
    Case("verify", g=16, d=64, lens=(33, 2), window=9, programs=3, hkv=1),
    Case("verify", g=4, d=64, lens=(50, 3), programs=50, score_dtype="float16", hkv=1),
    Case("verify", g=4, d=64, lens=(50, 3), programs=9, score_dtype="bfloat16", hkv=1),
    # Twenty requests: more than one power of two, several of them whole in one program.
    Case("verify", g=2, d=64, lens=tuple(range(0, 60, 3)), programs=6, hkv=1),
    Case("verify", g=2, d=64, lens=(20, 9), programs=3, hkv=1, wide=True),
    Case("exact", g=4, d=64, lens=(37, 0, 5), splits=100),
    Case("exact", g=1, d=128, lens=(33,), splits=0.01, hkv=1),
    Case("prefill", g=4, d=64, lens=(37, 2, 70), splits=100),
    Case("prefill", g=6, d=128, lens=(20, 1), splits=0.01, hkv=1),
    Case("prefill", g=2, d=64, lens=(20, 9), splits=100, hkv=1, wide=True),
    Case("rescored", g=4, d=64, lens=(37, 0, 5), splits=3),
    Case("rescored", g=6, d=128, lens=(20, 70), window=9, splits=0.01, hkv=1),
    Case("select", g=1, d=64, lens=(37, 0, 5, 600), budget=40),
    Case("select", g=1, d=64, lens=(300, 41), budget=40, values="ties"),
    Case("select", g=1, d=64, lens=(530, 20), budget=100, score_dtype="bfloat16", values="prob"),
    Case("select", g=1, d=64, lens=(300, 12), budget=100, score_dtype="float16", values="signed"),
    Case("select", g=1, d=64, lens=(257, 300), budget=1, score_dtype="bfloat16", values="ties"),
    Case("growth", g=2, d=64, lens=(37, 0, 5), splits=100, hkv=1),
    *[Case("draft", g=8, d=64, lens=(40, 0, 9), splits=s, hkv=1, sinks=True) for s in (0.01, 100)],
    Case("verify", g=8, d=64, lens=(37, 0, 5), programs=3, hkv=1, sinks=True),
    Case("exact", g=4, d=64, lens=(37, 0, 5), splits=100, sinks=True),
    Case("prefill", g=4, d=64, lens=(37, 2, 70), splits=100, sinks=True),
    # Windows shorter and longer than a block, in one part and in many; requests shorter than the window.
    Case("sliding", g=4, d=64, lens=RAGGED, programs=1, splits=0.01, reach=11),
    Case("sliding", g=6, d=64, lens=(150, 1), window=9, programs=5, splits=100, hkv=1, reach=40),
    Case("sliding", g=8, d=64, lens=(90, 0, 20), programs=9, splits=100, hkv=1, reach=63, sinks=True),
    Case("sliding", g=2, d=64, lens=(90, 20), programs=1, splits=0.01, hkv=1, reach=63, sinks=True),
    Case("draft", g=2, d=64, lens=(40, 9), splits=100, hkv=1, soft_cap=1.5),
    Case("verify", g=2, d=64, lens=(37, 5), programs=3, hkv=1, soft_cap=1.5),
    Case("prefill", g=2, d=64, lens=(37, 5), splits=100, hkv=1, soft_cap=1.5),
    Case("sliding", g=2, d=64, lens=(37, 5), programs=3, splits=100, hkv=1, reach=11, soft_cap=1.5),
]

GPU_CASES = [
    *[
        Case("draft", g=g, d=d, lens=LONG, budget=300, window=9, splits=s, hkv=h, block_n=0)
        for g, d, h, s in [(1, 128, 8, 6), (4, 128, 8, 6), (6, 128, 2, 6), (7, 64, 2, 6), (16, 128, 1, 6), (4, 128, 8, 0.01)]
    ],
    Case("draft", g=4, d=128, lens=(8192,) * 64, budget=410, window=9, splits=6, hkv=8, block_n=0),
    Case("draft", g=4, d=128, lens=(32768,), budget=1639, window=9, splits=6, hkv=8, block_n=0),
    Case("draft", g=4, d=128, lens=(131072, 5), budget=6554, window=9, splits=6, hkv=2, block_n=0),
    Case("draft", g=4, d=128, lens=(1000, 17), budget=300, window=9, splits=6, hkv=8, block_n=0, wide=True),
    Case("full", g=4, d=128, lens=LONG, budget=0, window=9, splits=4, hkv=8, block_n=0),
    Case("full", g=6, d=128, lens=(131072, 5), budget=0, window=9, splits=4, hkv=2, block_n=0),
    Case("long_lists", g=4, d=128, lens=LONG, budget=300, window=9, splits=4, hkv=8, block_n=0),
    Case("plain_step", g=4, d=128, lens=LONG, hkv=8, window=9, block_n=0),
    Case("plain_step", g=6, d=128, lens=(131072, 5), hkv=2, window=9, block_n=0),
    Case("long_lists", g=6, d=128, lens=(131072, 5), budget=128, window=9, splits=4, hkv=2, block_n=0),
    Case("single_query", g=4, d=128, lens=LONG, budget=300, window=9, splits=4, hkv=8, block_n=0, score_dtype="float16"),
    *[
        Case("verify", g=g, d=d, lens=LONG, window=w, programs=n, hkv=h, block_n=0, score_dtype=t)
        for g, d, h, w, n, t in [
            (1, 128, 4, 9, 66, "float32"),
            (2, 64, 4, 9, 66, "float16"),
            (4, 128, 8, 9, 33, "float16"),
            (4, 128, 8, 9, 1, "float32"),
            (4, 128, 2, 1, 132, "float32"),
            (6, 128, 2, 9, 132, "float16"),
            (7, 64, 2, 9, 132, "bfloat16"),
            (8, 128, 4, 9, 66, "float32"),
            (16, 128, 1, 9, 264, "float32"),
            (4, 128, 8, 17, 33, "float32"),
        ]
    ],
    Case("verify", g=4, d=128, lens=(8192,) * 40, window=9, programs=33, hkv=8, score_dtype="float16", block_n=0),
    Case("verify", g=4, d=128, lens=(131072, 5), window=9, programs=132, hkv=2, score_dtype="float16", block_n=0),
    Case("verify", g=4, d=128, lens=(1000, 17), window=9, programs=33, hkv=8, block_n=0, wide=True),
    Case("exact", g=4, d=128, lens=LONG, window=9, splits=4, programs=33, hkv=8, block_n=0),
    Case("exact", g=6, d=128, lens=LONG, window=9, splits=0.01, programs=132, hkv=2, block_n=0),
    Case("prefill", g=4, d=128, lens=(1000, 3, 17, 4096), window=9, splits=4, hkv=8, block_n=0),
    Case("prefill", g=7, d=64, lens=(1000, 3, 17, 4096), window=9, splits=0.01, hkv=2, block_n=0),
    Case("prefill", g=4, d=128, lens=(1000, 17), window=9, splits=4, hkv=8, block_n=0, wide=True),
    Case("rescored", g=4, d=128, lens=LONG, window=9, splits=4, hkv=8, block_n=0),
    Case("rescored", g=6, d=128, lens=LONG, window=9, splits=8, hkv=2, block_n=0),
    *[
        Case("select", g=1, d=64, lens=LONG, budget=300, hkv=8, score_dtype=t, values=v)
        for t, v in [
            ("float32", "prob"),
            ("bfloat16", "prob"),
            ("bfloat16", "ties"),
            ("float16", "signed"),
            ("float32", "ties"),
        ]
    ],
    Case("select", g=1, d=64, lens=(32768,) * 16, budget=1639, hkv=8, score_dtype="bfloat16", values="prob"),
    Case("growth", g=4, d=128, lens=LONG, budget=300, window=9, splits=4, hkv=8, block_n=0),
    Case("draft", g=8, d=64, lens=LONG, budget=300, window=9, splits=6, hkv=8, block_n=0, sinks=True),
    Case("draft", g=8, d=64, lens=LONG, budget=300, window=9, splits=0.01, hkv=8, block_n=0, sinks=True),
    Case("verify", g=8, d=64, lens=LONG, window=9, programs=33, hkv=8, score_dtype="float16", block_n=0, sinks=True),
    Case("exact", g=8, d=64, lens=LONG, window=9, splits=4, programs=33, hkv=8, block_n=0, sinks=True),
    Case("prefill", g=8, d=64, lens=(1000, 3, 17, 4096), window=9, splits=4, hkv=8, block_n=0, sinks=True),
    Case("sliding", g=8, d=64, lens=LONG, window=9, programs=33, splits=4, hkv=8, block_n=0, reach=127, sinks=True),
    Case("sliding", g=4, d=256, lens=LONG, window=9, programs=132, splits=4, hkv=1, block_n=0, reach=511),
    Case("sliding", g=2, d=128, lens=LONG, window=9, programs=33, splits=4, hkv=8, block_n=0, reach=1023),
    Case("draft", g=2, d=256, lens=LONG, budget=300, window=9, splits=6, hkv=4, block_n=0, soft_cap=2.0),
    Case("verify", g=2, d=256, lens=LONG, window=9, programs=33, hkv=4, score_dtype="float16", block_n=0, soft_cap=2.0),
    Case("prefill", g=2, d=256, lens=(1000, 3, 17, 4096), window=9, splits=4, hkv=4, block_n=0, soft_cap=2.0),
]



def check_long_lists(p: Problem, kernels: TritonKernels) -> None:
    """Lists longer than the kernels were told."""
    p.table.num_selected.zero_()
    p.table.tail_start.zero_()
    assert kernels.shape.longest_list < int(p.draft_lens.max())
    check_draft(p, kernels)


def check_plain_step(p: Problem, kernels: TritonKernels) -> None:
    """A plain step: a window of one, hinted by the last step."""
    ref = torch.empty_like(p.q1, dtype=torch.float32)
    exact = torch.empty(p.batch, 1, p.q1.shape[1], device=p.device)
    p.reference.plan_verify(p.rows, p.lens, 1).run(p.q1.float(), p.exact_kv(), ref, lse=exact)
    noise = torch.empty_like(exact).uniform_(-2, 2)
    # A useful hint, another request's, none at all.
    for hint in (exact + noise, exact.flip(0), torch.zeros_like(exact), torch.full_like(exact, float("nan"))):
        lse, out = hint.clone(), p.poison(*p.q1.shape, dtype=p.dtype)
        poison_scratch(kernels)
        kernels.plan_verify(p.rows, p.lens, 1).run(p.q1, p.kv, out, lse_hint=lse, lse=lse)
        assert rel_error(out, ref) < tolerance(p.dtype)
        assert (lse - exact).abs().max() < 0.02


def check_single_query(p: Problem, kernels: TritonKernels) -> None:
    """Scores of one query per request, of which some are empty, and a selection by them."""
    q = 2 * p.q1
    scores = p.poison(p.batch, p.case.hkv, p.req_to_token.shape[1], dtype=getattr(torch, p.case.score_dtype))
    poison_scratch(kernels)
    starts, live = torch.arange(p.batch, device=p.device), (p.draft_lens > 0).to(torch.int32)
    kernels.plan_prefill_scores(p.rows, p.draft_lens, starts, live, 1).run(q, p.kv, scores)
    chosen = p.table.positions[p.kv.index]
    chosen.fill_(-7)
    counts, tails = p.table.num_selected[p.rows.long()], p.table.tail_start[p.rows.long()]
    kernels.plan_selection(p.rows, tails, counts).run(scores, p.kv.index)
    for b, (row, length) in enumerate(zip(p.rows.tolist(), p.draft_lens.tolist(), strict=True)):
        n, tail = int(counts[b]), int(tails[b])
        if length == 0:
            assert (chosen[row] == -7).all(), "a padding row was selected for"
            continue
        slots = p.req_to_token[row, :length].long()
        probabilities, _ = softmax_probabilities(q[b : b + 1].float(), p.kv.k[slots].float(), p.kv.scaling, None)
        exact = probabilities.mean(dim=(1, 2))[:, :tail]
        for h in range(p.case.hkv):
            got = chosen[row, h, :n].long()
            assert got.unique().numel() == n and int(got.max()) < tail
            reached = float(exact[h][got].sum() / exact[h].topk(n).values.sum())
            assert reached > 1 - 2 * tolerance(p.dtype), f"request {b}, head {h}: {reached} of the best scores"
            if p.dtype == torch.float32 and p.case.score_dtype == "float32":
                assert set(got.tolist()) == set(exact[h].topk(n).indices.tolist())


def reference_scores(p: Problem, hint: torch.Tensor | None) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Window attention in float32: outputs, per-request scores [Hkv, L], and the rows' true LSE [B, W, Hq]."""
    w = p.case.window
    outs, scores = [], []
    lses = torch.zeros(p.batch, w, p.hq, device=p.device)
    for b, (row, length) in enumerate(zip(p.rows.tolist(), p.lens.tolist(), strict=True)):
        slots = p.req_to_token[row, : length + w].long()
        pos = torch.arange(length + w, device=p.device)
        mask = pos[None, :] <= pos[length:, None]
        q, k = p.qw[b * w : (b + 1) * w].float(), p.kv.k[slots].float()
        prob, lse = softmax_probabilities(q, k, p.kv.scaling, mask, p.kv.sinks, p.kv.soft_cap)
        outs.append(weighted_values(prob, p.kv.v[slots].float()))
        lses[b] = lse.permute(2, 0, 1).reshape(w, p.hq)
        if hint is not None:
            hint_b = hint[b].view(w, p.case.hkv, p.case.g).permute(1, 2, 0)
            prob = prob * torch.exp(lse - hint_b).unsqueeze(-1)
        scores.append(prob[..., :length].mean(dim=(1, 2)))
    return torch.cat(outs), scores, lses


def compare_scores(p: Problem, scores: torch.Tensor, ref: list[torch.Tensor]) -> None:
    # The interpreter truncates to bfloat16.
    rounding = {torch.float32: 0.0, torch.float16: 1e-3, torch.bfloat16: 8e-3}[scores.dtype]
    limit = max(tolerance(p.dtype), rounding)
    for b, length in enumerate(p.lens.tolist()):
        if length:
            assert rel_error(scores[b, :, :length], ref[b]) < limit, f"request {b}"


def check_verify(p: Problem, kernels: TritonKernels) -> None:
    ref, exact, lse = reference_scores(p, None)
    # A hint as draft steps give it: near the truth, usually below it.
    hint = lse + 0.3 * torch.randn(lse.shape, generator=p.gen).to(p.device) - 0.2
    _, hinted, _ = reference_scores(p, hint)
    compare_scores(p, verify(p, kernels, ref, hint), hinted)
    compare_scores(p, verify(p, kernels, ref, lse), exact)
    verify(p, kernels, ref, hint, with_scores=False)
    # Hints far off, none at all, or wrong for a single row must not disturb the attention itself, and only the rows'
    # own share of the scores.
    for useless in (-1e4, 1e4, float("nan")):
        scores = verify(p, kernels, ref, torch.full_like(hint, useless))
        if useless == useless:
            assert all(torch.isfinite(scores[b, :, :n]).all() for b, n in enumerate(p.lens.tolist()))
    single = hint.clone()
    single[0, 0, 0] = 1e4
    verify(p, kernels, ref, single)


def verify(
    p: Problem, kernels: TritonKernels, ref: torch.Tensor, hint: torch.Tensor | None, with_scores: bool = True
) -> torch.Tensor:
    """Run verification, compare its output with ``ref``, and return the scores."""
    max_len = p.req_to_token.shape[1] + 5
    scores = p.poison(p.batch, p.case.hkv, max_len, dtype=getattr(torch, p.case.score_dtype))
    out = p.poison(*p.qw.shape, dtype=p.dtype)
    poison_scratch(kernels)
    attention = kernels.plan_verify(p.rows, p.lens, p.case.window)
    attention.run(p.qw, p.kv, out, scores if with_scores else None, hint)
    assert rel_error(out, ref) < tolerance(p.dtype)
    per_row = (out.float() - ref).flatten(1).norm(dim=1) / ref.flatten(1).norm(dim=1)
    assert per_row.max() < 2 * tolerance(p.dtype)
    check_written(p, scores, with_scores)
    return scores


def check_written(p: Problem, scores: torch.Tensor, any_written: bool = True) -> None:
    for b, length in enumerate(p.lens.tolist()):
        beyond = scores[b, :, length if any_written else 0 :]
        assert torch.isnan(beyond).all(), "scores beyond the window start were written"


def check_exact(p: Problem, kernels: TritonKernels) -> None:
    """Without a hint."""
    ref, exact, _ = reference_scores(p, None)
    compare_scores(p, verify(p, kernels, ref, None), exact)
    verify(p, kernels, ref, None, with_scores=False)


def check_rescored(p: Problem, kernels: TritonKernels) -> None:
    """Scores from log-sum-exps of another kernel's."""
    _, exact, lse = reference_scores(p, None)
    scores = p.poison(p.batch, p.case.hkv, p.req_to_token.shape[1], dtype=getattr(torch, p.case.score_dtype))
    window_scores(
        q=p.qw,
        kv=p.kv,
        req_to_token=p.req_to_token,
        windows=Windows(p.rows, p.lens, p.case.window),
        lse2=(lse / math.log(2)).unsqueeze(0).contiguous(),
        scores=scores,
        splits=kernels.scores_splits(p.batch),
        config=kernels.scores_config,
    )
    compare_scores(p, scores, exact)
    check_written(p, scores)


def sliding_reference(p: Problem, window: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``window`` queries per request over their own windows, from whole requests: outputs and LSE [B, window, Hq]."""
    outs, lses = [], []
    for b, (row, length) in enumerate(zip(p.rows.tolist(), p.lens.tolist(), strict=True)):
        slots = p.req_to_token[row, : length + window].long()
        pos = torch.arange(length + window, device=p.device)
        mask = (pos[None, :] <= pos[length:, None]) & (pos[None, :] >= pos[length:, None] - p.case.reach)
        queries, k = q[b * window : (b + 1) * window].float(), p.kv.k[slots].float()
        prob, lse = softmax_probabilities(queries, k, p.kv.scaling, mask, p.kv.sinks, p.kv.soft_cap)
        outs.append(weighted_values(prob, p.kv.v[slots].float()))
        lses.append(lse.permute(2, 0, 1).flatten(1))
    return torch.cat(outs), torch.stack(lses)


def check_sliding(p: Problem, kernels: TritonKernels) -> None:
    """Layers with a sliding window: steps of one query, and verify windows."""
    for window, q in ((1, p.q1), (p.case.window, p.qw)):
        sliding = SlidingWindow(p.case.reach, p.req_to_token, object(), p.case.window)
        view = sliding.view(p.rows, p.lens, window)
        assert view.slots.shape == (p.batch, p.case.reach + window)
        ref, exact = sliding_reference(p, window, q)
        out, lse = torch.empty_like(ref), torch.empty_like(exact)
        p.reference.plan_sliding(view, window).run(q.float(), p.exact_kv(), out, lse=lse)
        assert rel_error(out, ref) < 1e-5 and (lse - exact).abs().max() < 1e-4
        p.reference.plan_sliding(view, window).run(q.float(), p.exact_kv(), out)
        assert rel_error(out, ref) < 1e-5
        noise = torch.empty_like(exact).uniform_(-2, 2)
        for hint in (exact + noise, torch.full_like(exact, -1e4), torch.full_like(exact, float("nan")), None):
            out, lse = p.poison(*q.shape, dtype=p.dtype), torch.empty_like(exact)
            poison_scratch(kernels)
            kernels.plan_sliding(view, window).run(q, p.kv, out, lse_hint=hint, lse=lse)
            assert rel_error(out, ref) < tolerance(p.dtype)
            assert (lse - exact).abs().max() < 0.02


def check_growth_of_all(p: Problem, kernels: TritonKernels) -> None:
    """Eager batches larger than the scratch was made for."""
    check_growth(p, kernels)
    check_exact(p, make_kernels(p, max_batch=1))


def check_prefill(p: Problem, kernels: TritonKernels) -> None:
    # Prompts of `lens` tokens, of which a random part is already cached (chunked prefill).
    case, total = p.case, p.lens.clone()
    extend = torch.tensor([1 + int(torch.randint(0, n, (1,), generator=p.gen)) for n in case.lens], device=p.device)
    extend[0] = total[0]
    starts = extend.cumsum(0) - extend
    q = (2 * torch.randn(int(extend.sum()), p.hq, case.d, generator=p.gen)).to(p.device, p.dtype)
    shape = (p.batch, case.hkv, p.req_to_token.shape[1])
    ref, out = p.poison(*shape, dtype=torch.float32), p.poison(*shape, dtype=torch.float32)
    batch = (p.rows, total, starts, extend, case.window)
    p.reference.plan_prefill_scores(*batch).run(q.float(), p.exact_kv(), ref)
    poison_scratch(kernels)
    kernels.plan_prefill_scores(*batch).run(q, p.kv, out)
    written = ~torch.isnan(ref)
    assert torch.equal(torch.isnan(out), ~written), "another set of positions was written"
    assert written.any()
    assert rel_error(out[written], ref[written]) < tolerance(p.dtype)


def check_select(p: Problem, kernels: TritonKernels) -> None:
    case = p.case
    shape = (p.batch, case.hkv, max(case.lens) + 7)
    if case.values == "ties":
        values = torch.randint(0, 3, shape, generator=p.gen).float()
    elif case.values == "prob":
        values = torch.softmax(4 * torch.randn(shape, generator=p.gen), dim=-1)
    else:
        values = torch.randn(shape, generator=p.gen)
    scores = values.to(p.device, getattr(torch, case.score_dtype))
    for b, length in enumerate(case.lens):
        scores[b, :, length:] = float("nan")  # undefined beyond the length
    out = p.table.positions[p.kv.index]
    out.fill_(-7)
    kernels.plan_selection(p.rows, p.lens, p.counts).run(scores, p.kv.index)
    written = torch.zeros_like(out, dtype=torch.bool)
    for b, row in enumerate(p.rows.tolist()):
        n, length = int(p.counts[b]), case.lens[b]
        if n == 0:
            continue
        written[row, :, :n] = True
        for h in range(case.hkv):
            got = out[row, h, :n].long()
            assert int(got.min()) >= 0 and int(got.max()) < length
            assert bool((got[1:] > got[:-1]).all()), "not strictly ascending"
            line = scores[b, h, :length].float()
            left = torch.ones(length, dtype=torch.bool, device=p.device)
            left[got] = False
            if left.any():
                assert float(line[got].min()) >= float(line[left].max()), "a better position was left out"
                threshold = line[got].min()
                ties = torch.nonzero(line == threshold).flatten()
                assert torch.equal(got[line[got] == threshold], ties[: int((line[got] == threshold).sum())])
    assert (out[~written] == -7).all(), "wrote outside the counted entries"
    assert (p.table.positions[: p.kv.index] == 1 << 30).all(), "wrote to another layer"


CHECKS = {
    "draft": check_draft,
    "full": check_full,
    "long_lists": check_long_lists,
    "plain_step": check_plain_step,
    "single_query": check_single_query,
    "verify": check_verify,
    "exact": check_exact,
    "prefill": check_prefill,
    "rescored": check_rescored,
    "select": check_select,
    "growth": check_growth_of_all,
    "sliding": check_sliding,
}


@interpreter_only
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda c: c.name)
def test_interpreted(case: Case) -> None:
    run_case(case, CHECKS[case.kernel], "cpu", torch.float32, seed=CPU_CASES.index(case))


not_in_the_child = pytest.mark.skipif(
    HAS_CUDA or INTERPRETED, reason="the GPU's cases run instead, or this is the child process"
)
OTHER_FILES = [Path(__file__).with_name(name) for name in ("test_flashinfer_kernels.py", "test_triton_select.py")]


@not_in_the_child
def test_every_case_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(__file__, at_least=88, together_with=OTHER_FILES)


@pytest.mark.nightly
@not_in_the_child
def test_every_nightly_case_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(__file__, at_least=36, together_with=OTHER_FILES, nightly=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [pytest.param(c, marks=gpu_only, id=c.name) for c in GPU_CASES])
def test_gpu(case: Case, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and (len(case.lens) > 8 or case.kernel == "select"):
        pytest.skip("bf16 covers it")
    run_case(case, CHECKS[case.kernel], "cuda", dtype, seed=zlib.crc32(case.name.encode()) % 1000)


FP8_CASES = [
    Case(kernel, 4, 128, (700, 3, 129, 2048), window=9, budget=100, programs=132, block_n=0)
    for kernel in ("draft", "verify", "prefill")
]


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("case", [pytest.param(c, marks=gpu_only, id=c.kernel) for c in FP8_CASES])
def test_gpu_fp8_caches_are_read_as_what_they_hold(case: Case, cache_dtype: torch.dtype) -> None:
    p = Problem(case, "cuda", torch.bfloat16)
    p.kv = LayerKV(p.kv.k.to(cache_dtype), p.kv.v.to(cache_dtype), p.kv.scaling, p.kv.index)
    CHECKS[case.kernel](p, make_kernels(p))


@pytest.mark.parametrize("hinted", [pytest.param(h, marks=gpu_only) for h in (False, True)])
def test_gpu_captured_verification_follows_lengths(hinted: bool) -> None:
    """A captured launch must follow lengths that change between replays."""
    case = Case("verify", g=4, d=128, lens=(1000, 2000, 700), hkv=8, window=9, budget=200, splits=6, programs=33, block_n=0)
    p = Problem(case, "cuda", torch.bfloat16)
    kernels = make_kernels(p)
    lens, out = p.lens.clone(), p.poison(*p.qw.shape, dtype=p.dtype)
    hint = torch.full((p.batch, case.window, p.hq), 7.0, device="cuda") if hinted else None

    def call() -> None:
        kernels.plan_verify(p.rows, lens, case.window).run(p.qw, p.kv, out, lse_hint=hint)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(2):
        out.fill_(float("nan"))
        graph.replay()
        ref = torch.zeros(p.qw.shape, device="cuda")
        p.reference.plan_verify(p.rows, lens, case.window).run(p.qw.float(), p.exact_kv(), ref)
        assert rel_error(out, ref) < 1e-2
        lens -= 650
        lens.clamp_(min=1)


@pytest.mark.parametrize("kernels", [pytest.param(TritonKernels, marks=gpu_only)])
def test_gpu_captured_draft_follows_lengths(kernels: type[TritonKernels]) -> None:
    check_draft_follows_lengths(kernels)


@pytest.mark.parametrize("kernels", [pytest.param(TritonKernels, marks=gpu_only)])
def test_gpu_draft_gives_the_same_bits_on_every_replay(kernels: type[TritonKernels]) -> None:
    check_same_bits_on_every_replay(kernels)


@pytest.mark.parametrize("kernels", [pytest.param(TritonKernels, marks=gpu_only)])
def test_gpu_graphs_outlive_the_scratch_they_were_captured_with(kernels: type[TritonKernels]) -> None:
    check_graphs_outlive_growth(kernels)


def test_limits_are_named() -> None:
    """Shapes the kernels cannot run are refused with a sentence, before any launch."""
    table = SelectionTable(1, 2, 2, 8, "cpu")
    common = {"max_batch": 1, "num_kv_heads": 2, "longest_list": 26, "dtype": torch.float32, "kv_dtype": torch.float32}
    slots = torch.zeros(2, 64, dtype=torch.int32)
    with pytest.raises(ValueError, match="head_dim 80"):
        TritonKernels(KernelShape(num_q_heads=4, head_dim=80, window=9, **common), table, slots)
    with pytest.raises(ValueError, match="packed rows"):
        TritonKernels(KernelShape(num_q_heads=64, head_dim=64, window=9, **common), table, slots)
    with pytest.raises(ValueError, match="not a multiple of 2 KV heads"):
        TritonKernels(KernelShape(num_q_heads=3, head_dim=64, window=9, **common), table, slots)
    kernels = TritonKernels(KernelShape(num_q_heads=4, head_dim=64, window=3, **common), table, slots)
    with pytest.raises(ValueError, match="window 4 exceeds the 3 rows"):
        kernels.plan_verify(torch.tensor([1]), torch.tensor([5]), 4)


@pytest.mark.parametrize(("name", "expected"), [("auto", "torch"), ("torch", "torch"), ("triton", "triton")])
def test_kernels_are_made_by_name(name: str, expected: str) -> None:
    shape = KernelShape(1, 4, 2, 64, 3, 14, torch.float32, torch.float32)
    kernels = make_named_kernels(name, shape, SelectionTable(1, 2, 2, 8, "cpu"), torch.zeros(2, 64, dtype=torch.int32))
    assert kernels.name == expected
    assert kernels.uses_lse_hints == (expected == "triton")


def test_unknown_kernels_are_refused() -> None:
    shape = KernelShape(1, 4, 2, 64, 3, 14, torch.float32, torch.float32)
    table, slots = SelectionTable(1, 2, 2, 8, "cpu"), torch.zeros(2, 64, dtype=torch.int32)
    with pytest.raises(ValueError, match="no kernels called 'cuda'"):
        make_named_kernels("cuda", shape, table, slots)
    with pytest.raises(ValueError, match="needs a CUDA GPU, not cpu"):
        make_named_kernels("flashinfer", shape, table, slots)
