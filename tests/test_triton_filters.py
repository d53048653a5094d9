"""Floors of top-k and top-p by the Triton kernel against their definition.

Without a GPU a child process runs this file in Triton's interpreter, as ``test_triton_sampling.py``.
"""

from __future__ import annotations

import os

import pytest
import torch
from interpreter_child import assert_passes_in_the_interpreter
from test_triton_sampling import check_draws

from sglang_sparsespec import triton_filters, triton_rows, triton_sampling

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
kernels_run_here = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no CUDA GPU: test_every_case_in_the_interpreter runs it in a child process"
)
BLOCK, ROOM = 64, 32
NO_TOP_K = 1 << 30
INF = float("inf")
DRAWS = 150_000 if DEVICE == "cuda" else 90


def found_floors(
    logits: torch.Tensor, temperatures: list[float], top_ks: list[int], top_ps: list[float], room: int = ROOM
) -> torch.Tensor:
    given = torch.tensor([[t] for t in temperatures], device=DEVICE)
    ks = torch.tensor(top_ks, dtype=torch.int32, device=DEVICE)
    ps = torch.tensor(top_ps, device=DEVICE)
    logits = logits.to(DEVICE)
    maxima, sums = triton_rows.row_sums(logits, given, ks, block=BLOCK)
    return triton_filters.floors(logits, given, ks, ps, maxima, sums, BLOCK, room).cpu()


def kept_by_definition(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """bool [vocab], token by token; the mass of likelier tokens may lie at the edge up to rounding (None of these cases)."""
    probs = torch.softmax(logits.double() / temperature, -1)
    likelier = logits.unsqueeze(0) > logits.unsqueeze(1)
    count = likelier.sum(1)
    mass = (likelier * probs).sum(1)
    assert top_p >= 1 or ((mass - top_p).abs() > 1e-6).all(), "a case at the edge"
    return (count < top_k) & ((mass < top_p) | (top_p >= 1))


def random_logits(*shape: int, spread: float, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


#: Top-k and top-p; the interpreter takes half a minute for each.
FILTERS = [(4, 0.8)] if DEVICE == "cpu" else [(3, 1.0), (NO_TOP_K, 0.7), (4, 0.8)]
CASES = [(20, 1.0), (NO_TOP_K, 0.95), (20, 0.95), (3, 0.5), (NO_TOP_K, 0.01), (1000, 0.999), (2, 1.0)]


@kernels_run_here
@pytest.mark.parametrize("spread", [6.0, 1.0, 0.1], ids=["peaked", "flat", "flatter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_floors_keep_what_the_definition_keeps(spread: float, dtype: torch.dtype) -> None:
    """Peaked rows are decided among the collected logits, flat ones over the whole row; bfloat16 logits are often tied."""
    temperatures = [0.6, 1.0, 1.7, 0.3, 0.8, 1.0, 1.2]
    logits = random_logits(len(CASES), 300, spread=spread).to(dtype).float()
    floors = found_floors(logits, temperatures, [k for k, _ in CASES], [p for _, p in CASES])
    for row, (temperature, (top_k, top_p)) in enumerate(zip(temperatures, CASES, strict=True)):
        expected = kept_by_definition(logits[row], temperature, top_k, top_p)
        assert torch.equal(logits[row] >= floors[row], expected), (row, int(expected.sum()))


@kernels_run_here
def test_rows_without_filters_and_greedy_rows_have_no_floor() -> None:
    floors = found_floors(random_logits(3, 100, spread=3.0), [1.0, 1.0, 1.0], [NO_TOP_K, 1, 100], [1.0, 0.9, 1.0])
    assert floors.tolist() == [-INF] * 3


@kernels_run_here
def test_every_request_has_its_own_filters_in_all_of_its_rows() -> None:
    logits = random_logits(6, 100, spread=4.0, seed=2)
    floors = found_floors(logits, [0.7, 1.3], [5, NO_TOP_K], [1.0, 0.8])
    for row in range(6):
        top_k, top_p, temperature = ((5, 1.0, 0.7), (NO_TOP_K, 0.8, 1.3))[row // 3]
        assert torch.equal(logits[row] >= floors[row], kept_by_definition(logits[row], temperature, top_k, top_p))


@kernels_run_here
def test_all_tokens_tied_at_the_edge_stay_and_impossible_ones_go() -> None:
    """Three of the largest and two ties around the second place of a top-k of 2; negative zero equals zero."""
    logits = torch.full((2, 70), -INF)
    logits[0, [3, 68, 40]] = torch.tensor([2.0, 1.0, 1.0])
    logits[1, [0, 1, 2]] = torch.tensor([0.0, -0.0, -1.0])
    kept = logits >= found_floors(logits, [1.0, 1.0], [2, 2], [1.0, 1.0]).unsqueeze(1)
    assert kept[0].nonzero().flatten().tolist() == [3, 40, 68]
    assert kept[1].nonzero().flatten().tolist() == [0, 1]


def filtered_probs(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    kept = kept_by_definition(logits, temperature, top_k, top_p)
    return torch.softmax(logits.double().masked_fill(~kept, -INF) / temperature, -1)


@kernels_run_here
@pytest.mark.parametrize("case", FILTERS)
def test_drafts_and_output_follow_the_filtered_distributions(case: tuple[int, float]) -> None:
    """A request with the filter beside one without and a greedy one, over and over; drafts are not the target's."""
    temperature, vocab = 0.8, 11
    target = random_logits(1, 3, vocab, spread=0.8, seed=5)
    near = target[:, :2] + random_logits(1, 2, vocab, spread=0.5, seed=6)
    batch = 3 * (DRAWS // 3)
    temperatures = torch.tensor([temperature, 1.0, 1.0]).repeat(batch // 3).unsqueeze(1).to(DEVICE)
    top_ks = torch.tensor([case[0], NO_TOP_K, 1], dtype=torch.int32).repeat(batch // 3).to(DEVICE)
    top_ps = torch.tensor([case[1], 1.0, 0.5]).repeat(batch // 3).to(DEVICE)
    kept = torch.empty((batch, 2, vocab), device=DEVICE)
    lse = torch.empty((batch, 2), device=DEVICE)
    seeds = torch.tensor([3, 2**40 + 1, -17], device=DEVICE)
    columns = [torch.zeros(batch, dtype=torch.int64, device=DEVICE)]
    for step in range(2):
        logits = near[:, step].expand(batch, -1).contiguous().to(DEVICE)
        columns.append(
            triton_sampling.draft(logits, temperatures, top_ks, seeds, step, kept, lse, block=8, top_ps=top_ps)
        )
    given = target.expand(batch, -1, -1).flatten(0, 1).contiguous().to(DEVICE)
    candidates = torch.stack(columns, 1)
    tokens, lens = triton_sampling.accept(
        candidates, given, temperatures, top_ks, kept, lse, seeds[2:], block=8, top_ps=top_ps
    )
    check_draws(columns[1][::3], filtered_probs(near[0, 0], temperature, *case))
    check_draws(tokens[::3, 0], filtered_probs(target[0, 0], temperature, *case))
    check_draws(tokens[1::3, 0], torch.softmax(target[0, 0], -1))
    assert (tokens[2::3, 0] == target[0, 0].argmax()).all()
    second = tokens[::3, 1][lens[::3] > 1]
    check_draws(second, filtered_probs(target[0, 1], temperature, *case))
    assert 1 < lens[::3].float().mean() < 3


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the other tests of this file run in this process")
def test_every_case_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(__file__, at_least=10)
