"""Floors of top-k, top-p and min-p by the Triton kernel against their definition, and what is drawn above them.

Without a GPU the child process of ``test_triton_sampling.py`` runs this file in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sampling_checks import as_requests, batch_info, check_draws
from sampling_oracles import INF, NO_TOP_K, filtered_probabilities, flashinfer_probabilities, kept_tokens
from tiny_model import Sampling

from sglang_sparsespec.sampling import triton_filters, triton_rows, triton_sampling
from sglang_sparsespec.sampling.parameters import RowParameters
from sglang_sparsespec.sampling.sampler import Sampler

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
kernels_run_here = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no CUDA GPU: the child process of test_triton_sampling.py runs it"
)
gpu_only = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA GPU: float32 runs in the interpreter")]
BLOCK, ROOM = 64, 32
Rule = Callable[..., Any]


def found_floors(
    logits: torch.Tensor,
    temperatures: list[float],
    top_ks: list[int],
    top_ps: list[float],
    min_ps: list[float] | None = None,
    block: int = BLOCK,
    room: int = ROOM,
) -> torch.Tensor:
    rows = RowParameters(
        temperatures=torch.tensor([[t] for t in temperatures], device=DEVICE),
        top_ks=torch.tensor(top_ks, dtype=torch.int32, device=DEVICE),
        top_ps=torch.tensor(top_ps, device=DEVICE),
        min_ps=torch.tensor(min_ps or [0.0] * len(top_ps), device=DEVICE),
    )
    logits = logits.to(DEVICE)
    maxima, sums = triton_rows.row_sums(logits, rows.temperatures, rows.top_ks, block=block)
    return triton_filters.floors(logits, rows, maxima, sums, block, room).cpu()


def random_logits(*shape: int, spread: float, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


#: Top-k, top-p and min-p.
CASES = [
    (20, 1.0, 0.0),
    (NO_TOP_K, 0.95, 0.0),
    (20, 0.95, 0.0),
    (3, 0.5, 0.0),
    (NO_TOP_K, 0.01, 0.0),
    (1000, 0.999, 0.0),
    (2, 1.0, 0.0),
    (NO_TOP_K, 1.0, 0.1),
    (NO_TOP_K, 1.0, 1.0),
    (NO_TOP_K, 0.9, 0.05),
    (NO_TOP_K, 0.6, 1e-8),
    (20, 1.0, 0.3),
    (20, 0.9, 0.01),
    (5, 0.8, 1e-8),
    (3, 0.75, 0.5),
    (100, 0.95, 0.02),
    (1000, 0.9, 0.2),
]
TEMPERATURES = [0.6, 1.0, 1.7, 0.3, 0.8, 1.0, 1.2]


@kernels_run_here
@pytest.mark.parametrize("spread", [6.0, 1.0, 0.1], ids=["peaked", "flat", "flatter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_floors_keep_what_the_definition_keeps(spread: float, dtype: torch.dtype) -> None:
    """Peaked rows are decided among the collected logits, flat ones over the whole row; bfloat16 logits are often tied."""
    temperatures = [TEMPERATURES[i % len(TEMPERATURES)] for i in range(len(CASES))]
    logits = random_logits(len(CASES), 140, spread=spread).to(dtype).float()
    floors = found_floors(logits, temperatures, *(list(column) for column in zip(*CASES, strict=True)))
    for row, (temperature, case) in enumerate(zip(temperatures, CASES, strict=True)):
        expected = kept_tokens(logits[row], temperature, *case)
        assert torch.equal(logits[row] >= floors[row], expected), (row, int(expected.sum()))


@kernels_run_here
def test_rows_without_filters_and_greedy_rows_have_no_floor() -> None:
    floors = found_floors(
        random_logits(4, 100, spread=3.0), [1.0] * 4, [NO_TOP_K, 1, 100, 1], [1.0, 0.9, 1.0, 1.0], [0.0, 0.0, 0.0, 0.5]
    )
    assert floors.tolist() == [-INF] * 4


@kernels_run_here
def test_every_request_has_its_own_filters_in_all_of_its_rows() -> None:
    logits = random_logits(8, 100, spread=4.0, seed=2)
    cases = [(0.7, 5, 1.0, 0.0), (1.3, NO_TOP_K, 0.8, 0.0), (1.1, NO_TOP_K, 1.0, 0.05), (0.9, 4, 0.7, 0.01)]
    floors = found_floors(logits, *(list(column) for column in zip(*cases, strict=True)))
    for row in range(8):
        temperature, *filters = cases[row // 2]
        assert torch.equal(logits[row] >= floors[row], kept_tokens(logits[row], temperature, *filters))


@kernels_run_here
def test_all_tokens_tied_at_the_edge_stay_and_impossible_ones_go() -> None:
    """Three of the largest and two ties around the second place of a top-k of 2; negative zero equals zero."""
    logits = torch.full((3, 70), -INF)
    logits[0, [3, 68, 40]] = torch.tensor([2.0, 1.0, 1.0])
    logits[1, [0, 1, 2]] = torch.tensor([0.0, -0.0, -1.0])
    logits[2, [5, 66, 7]] = torch.tensor([2.0, 2.0, 1.9])
    kept = logits >= found_floors(
        logits, [1.0] * 3, [2, 2, NO_TOP_K], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]
    ).unsqueeze(1)
    assert kept[0].nonzero().flatten().tolist() == [3, 40, 68]
    assert kept[1].nonzero().flatten().tolist() == [0, 1]
    assert kept[2].nonzero().flatten().tolist() == [5, 66], "all of the likeliest, and nothing else"


@kernels_run_here
@pytest.mark.parametrize("third,second_stays", [(4.5e-6, True), (1e-12, False)])
def test_what_top_k_holds_far_below_the_largest_counts_for_top_p(third: float, second_stays: bool) -> None:
    """Beside a min-p, top-p looks at the mass of top-k, of which the third token has a millionth and is not collected."""
    assert third < math.exp(-triton_filters.REACH.value)
    logits = torch.full((1, 70), -40.0)
    logits[0, [3, 68, 40]] = torch.tensor([0.0, math.log(0.25), math.log(third)])
    top_p = 1 / (1.25 + 2.2e-6)  # the second token stays if top-k has more mass than 1.25 + 2.2e-6
    floors = found_floors(logits, [1.0], [3], [top_p], [0.1])
    expected = kept_tokens(logits[0], 1.0, 3, top_p, 0.1)
    assert int(expected.sum()) == 1 + second_stays
    assert torch.equal(logits[0] >= floors[0], expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA GPU")
@pytest.mark.parametrize("spread", [4.0, 1.0], ids=["peaked", "flat"])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3])
def test_floors_keep_what_sglangs_filters_keep(spread: float, min_p: float) -> None:
    """FlashInfer's joint filter without a min-p, and its chain of renormalisations with one."""
    generator = torch.Generator().manual_seed(3)
    rows, vocab = 64, 20_000
    logits = random_logits(rows, vocab, spread=spread, seed=4).to(DEVICE)
    temperatures = (0.5 + torch.rand(rows, generator=generator)).tolist()
    top_ks = [NO_TOP_K if i % 4 == 0 else 2 + 3 * i for i in range(rows)]
    # FlashInfer's top-p of 1 drops a row's least likely tokens; rows without a top-p are checked by definition above.
    top_ps = [0.3 + 0.6 * i / rows for i in range(rows)]
    floors = found_floors(logits, temperatures, top_ks, top_ps, [min_p] * rows, block=4096, room=2048).to(DEVICE)
    scaled = logits / torch.tensor(temperatures, device=DEVICE).unsqueeze(1)
    theirs = flashinfer_probabilities(
        torch.softmax(scaled, -1),
        torch.tensor(top_ks, dtype=torch.int32, device=DEVICE).clamp(max=vocab),
        torch.tensor(top_ps, device=DEVICE),
        torch.full((rows,), min_p, device=DEVICE) if min_p else None,
    )
    ours = torch.softmax(scaled.masked_fill(logits < floors.unsqueeze(1), -INF), -1)
    # Rounding may decide about a token at the edge: not more than one per row, and it weighs as little as rounding does.
    assert ((ours > 0) != (theirs > 0)).sum(1).max() <= 1
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------- distributions

#: Requests of one batch. What top-p looks at makes a difference for "joint" and for "chain", see ``BROKEN``.
KINDS = {
    "plain": Sampling(),
    "greedy": Sampling(temperature=0.0, top_p=0.5, min_p=0.2),
    "top-k": Sampling(temperature=0.8, top_k=4),
    "top-p": Sampling(temperature=1.4, top_p=0.7),
    "joint": Sampling(top_k=2, top_p=0.5),
    "min-p": Sampling(temperature=1.2, min_p=0.3),
    "chain": Sampling(top_k=3, top_p=0.7, min_p=0.05),
}
#: The first rows' target probabilities of 11 tokens, of which a block has 8.
TARGET = torch.tensor([0.34, 0.24, 0.16, 0.10, 0.05, 0.04, 0.03, 0.02, 0.01, 0.006, 0.004])
#: Windows of each kind.
WINDOWS = 20_000 if DEVICE == "cuda" else 24


def target_distribution(kind: str, logits: torch.Tensor) -> torch.Tensor:
    """What a request of the kind samples from, float64 [vocab]."""
    request = KINDS[kind]
    if kind == "greedy":
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    top_k = NO_TOP_K if request.top_k < 0 else request.top_k
    return filtered_probabilities(logits, request.temperature, top_k, request.top_p, request.min_p)


def run_windows(kinds: list[str], dtype: torch.dtype, noise: float = 0.8) -> dict[str, Any]:
    """Draft and accept ``WINDOWS`` windows of each kind, all in one batch, from the same logits.

    Args:
        noise: by how much the draft's logits differ from the target's.

    Returns:
        "target" [W, vocab] and "draft" [k, vocab] logits; "drafts" [k], "tokens" [W] and "lens" [] of each window, by kind.
    """
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(5)
    k, vocab = 2, len(TARGET)
    target = torch.stack([TARGET.log()[torch.randperm(vocab, generator=generator)] for _ in range(k + 1)])
    near = target[:k] + noise * torch.randn(k, vocab, generator=generator)
    # As a head of the kept type computes them.
    target, near = target.to(dtype).float(), near.to(dtype).float()
    kind_of = [kind for _ in range(WINDOWS) for kind in kinds]
    requests, batch = [KINDS[kind] for kind in kind_of], len(kind_of)
    sampler = Sampler(k + 1, dtype, DEVICE, use_triton=True)
    sampler.begin_round(batch_info(requests, vocab=vocab, device=DEVICE), as_requests(requests), batch + 1, k + 1)
    # Drafts and windows come in other orders than the batch, and drafts are kept in slots of their own.
    shuffled = torch.randperm(batch, generator=generator).to(DEVICE)
    slots = torch.arange(batch, 0, -1, device=DEVICE)
    candidates = torch.zeros((batch, k + 1), dtype=torch.int64, device=DEVICE)
    for step in range(k):
        logits = near[step].expand(batch, -1).contiguous().to(DEVICE)
        drawn = sampler.draw(logits, slots[shuffled] * (k + 1) + step, torch.zeros_like(shuffled), shuffled)
        candidates[shuffled, step + 1] = drawn
    given = target.expand(batch, -1, -1).flatten(0, 1).contiguous().to(DEVICE)
    positions = torch.zeros(batch * (k + 1), dtype=torch.int64, device=DEVICE)
    tokens, lens = sampler.accept(candidates[shuffled], given, positions, slots[shuffled], shuffled)
    order = shuffled.argsort()
    by_kind = {kind: torch.tensor([i for i, name in enumerate(kind_of) if name == kind], device=DEVICE) for kind in kinds}
    return {
        "target": target,
        "draft": near,
        "drafts": {kind: candidates[index, 1:].cpu() for kind, index in by_kind.items()},
        "tokens": {kind: tokens[order[index]].cpu() for kind, index in by_kind.items()},
        "lens": {kind: lens[order[index]].cpu() for kind, index in by_kind.items()},
    }


def check_windows(found: dict[str, Any], kind: str) -> None:
    """Drafts and output follow the kind's distributions: its own filters of the draft's and of the target's logits."""
    tokens, lens = found["tokens"][kind], found["lens"][kind]
    for step in range(2):
        check_draws(found["drafts"][kind][:, step], target_distribution(kind, found["draft"][step]))
    for step in range(3):
        reached = lens > step
        if reached.any():
            check_draws(tokens[reached, step], target_distribution(kind, found["target"][step]))


def floors_of_distinct_rows(
    logits: torch.Tensor, rows: RowParameters, maxima: torch.Tensor, sums: torch.Tensor, block: int
) -> torch.Tensor:
    """``triton_filters.floors``, whose kernel runs once for all rows with the same logits and parameters."""
    columns = [rows.temperatures, *(column.unsqueeze(1) for column in (rows.top_ks, rows.top_ps, rows.min_ps))]
    table = torch.cat(columns, 1).repeat_interleave(len(logits) // len(rows.top_ks), 0)
    _, which = torch.cat([logits, table], 1).unique(dim=0, return_inverse=True)
    first = torch.tensor([which.tolist().index(number) for number in range(int(which.max()) + 1)])
    temperatures, top_ks, top_ps, min_ps = table[first].t().contiguous()
    distinct = RowParameters(temperatures.unsqueeze(1), top_ks.int(), top_ps, min_ps)
    return FLOORS(logits[first], distinct, maxima[first], sums[first], block)[which]


FLOORS = triton_filters.floors


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several blocks, as in production; in the interpreter, which is slow, floors are found once for equal rows."""
    for name in ("draft", "accept"):
        monkeypatch.setattr(triton_sampling, name, functools.partial(getattr(triton_sampling, name), block=8))
    if INTERPRETED:
        monkeypatch.setattr(triton_filters, "floors", floors_of_distinct_rows)


@kernels_run_here
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=gpu_only)], ids=str)
def test_drafts_and_output_follow_the_filtered_distributions(dtype: torch.dtype, small_blocks: None) -> None:
    """Every kind of request beside all others; drafts are not the target's."""
    found = run_windows(list(KINDS), dtype)
    for kind in KINDS:
        check_windows(found, kind)
        if kind != "greedy":
            assert 1 < found["lens"][kind].float().mean() < 3, "drafts are neither all accepted nor all rejected"


def without_min_p(original: Rule, logits: Any, rows: RowParameters, *rest: Any) -> Any:
    return original(logits, dataclasses.replace(rows, min_ps=torch.zeros_like(rows.temperatures).squeeze(1)), *rest)


def top_p_of_the_whole_row(original: Rule, logits: Any, rows: RowParameters, *rest: Any) -> Any:
    top_ks = rows.top_ks.where(rows.top_ks == 1, NO_TOP_K)
    min_p_alone = dataclasses.replace(rows, top_ks=top_ks, top_ps=torch.ones_like(rows.temperatures).squeeze(1))
    return torch.maximum(without_min_p(original, logits, rows, *rest), original(logits, min_p_alone, *rest))


def top_p_of_what_top_k_leaves(original: Rule, logits: Any, rows: RowParameters, *rest: Any) -> Any:
    return original(logits, dataclasses.replace(rows, min_ps=rows.min_ps.clamp(min=1e-20)), *rest)


def accept_every_draft(original: Rule, *args: Any) -> Any:
    *before, lse, places, slots, num_drafted = args
    return original(*before, lse + 30, places, slots, num_drafted)


def accept_without_filters(original: Rule, candidates: Any, logits: Any, rows: Any, *rest: Any) -> Any:
    return original(candidates, logits, dataclasses.replace(rows, top_ps=None, min_ps=None), *rest)


#: Rules that are wrong: the function that they wrap, and the kind of request that shows it.
BROKEN: dict[Rule, tuple[Any, str, str]] = {
    without_min_p: (triton_filters, "floors", "min-p"),
    top_p_of_the_whole_row: (triton_filters, "floors", "chain"),
    top_p_of_what_top_k_leaves: (triton_filters, "floors", "joint"),
    accept_every_draft: (triton_sampling, "accept", "plain"),
    accept_without_filters: (triton_sampling, "accept", "top-k"),
}


@kernels_run_here
@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_a_broken_rule_is_found(rule: Rule, small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, kind = BROKEN[rule]
    monkeypatch.setattr(module, name, functools.partial(rule, getattr(module, name)))
    found = run_windows([kind], torch.float32, noise=2.5)
    with pytest.raises(AssertionError, match="an impossible token|another distribution"):
        check_windows(found, kind)
