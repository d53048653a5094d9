"""The Triton kernels that draft and accept from logits: sums, draws and acceptance follow the torch definitions.

Without a GPU a child process runs this file in Triton's interpreter, with fewer draws: ``TRITON_INTERPRET`` must be set
before Triton is imported, and would break other tests of this process.
"""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from interpreter_child import assert_passes_in_the_interpreter
from scipy.stats import chisquare, kstest

from sglang_sparsespec import triton_sampling
from sglang_sparsespec.triton_sampling import _uniform

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
kernels_run_here = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no CUDA GPU: test_every_case_in_the_interpreter runs it in a child process"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCAB, BLOCK = 11, 8  # a full block and a part of one
DRAWS = 200_000 if DEVICE == "cuda" else 120  # a multiple of 10
NO_TOP_K = 1 << 30
INF = float("inf")


def parameters(temperatures: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Temperatures [batch, 1] and top-ks [batch]; 0 is greedy, as SGLang has it: temperature 1, top-k 1."""
    top_ks = [1 if t == 0 else NO_TOP_K for t in temperatures]
    given = torch.tensor([[t or 1.0] for t in temperatures], device=DEVICE)
    return given, torch.tensor(top_ks, dtype=torch.int32, device=DEVICE)


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def log2_sums(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(logits.double() / temperatures, -1) / math.log(2)


def check_draws(tokens: torch.Tensor, probs: torch.Tensor) -> None:
    """Counts of ``tokens`` against ``probs`` [vocab]: none impossible, p-value above 1e-3 (seeds are fixed)."""
    counts = torch.bincount(tokens.cpu(), minlength=len(probs)).double()
    probs = probs.double().cpu()
    assert (counts[probs == 0] == 0).all()
    # Rare tokens together, as chi-square wants no small cells.
    rare = probs * len(tokens) < 5
    expected = torch.cat([probs[~rare], probs[rare].sum()[None]]) * len(tokens)
    found = torch.cat([counts[~rare], counts[rare].sum()[None]])
    full = expected > 0
    assert chisquare(found[full].numpy(), (expected / expected.sum() * found.sum())[full].numpy()).pvalue > 1e-3


def drafted(
    logits: torch.Tensor, temperatures: list[float], dtype: torch.dtype = torch.float32, block: int = BLOCK, step: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, kept logits [batch, 2, vocab] and sums [batch, 2] of one draft step."""
    batch, vocab = logits.shape
    kept = torch.full((batch, 2, vocab), 77.0, dtype=dtype, device=DEVICE)
    lse = torch.full((batch, 2), 77.0, device=DEVICE)
    seeds = torch.tensor([123456789123456789, -5, 7], device=DEVICE)
    return triton_sampling.draft(logits, *parameters(temperatures), seeds, step, kept, lse, block), kept, lse


# ------------------------------------------------------------------------------- noise


@triton.jit
def noise_kernel(seed_ptr, row, out_ptr, STREAM: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, _uniform(tl.load(seed_ptr), row, STREAM, i))


@kernels_run_here
def test_noise_is_uniform_and_differs_by_seed_row_and_stream() -> None:
    found = []
    for seed, row, stream in [(1, 0, 0), (1 + 2**33, 0, 0), (-1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 7, 2)]:
        out = torch.empty(4096, device=DEVICE)
        noise_kernel[(1,)](torch.tensor([seed], device=DEVICE), row, out, stream, 4096)
        assert out.min() > 0 and out.max() < 1
        assert kstest(out.cpu().numpy(), "uniform").pvalue > 1e-3
        found.append(out)
    correlations = torch.corrcoef(torch.stack(found)).cpu() - torch.eye(len(found))
    assert correlations.abs().max() < 0.08  # 5 standard deviations


# ---------------------------------------------------------------------------- drafting


@kernels_run_here
@pytest.mark.parametrize("vocab,block", [(VOCAB, BLOCK), (16, 16), (1000, 256), (5000, 4096)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_kept_with_their_sums(dtype: torch.dtype, vocab: int, block: int) -> None:
    given = 10 * random_logits(3, vocab)
    given[1, : vocab - 3] = -INF  # whole blocks without a possible token
    for logits in (given, given.to(dtype)):
        _, kept, lse = drafted(logits, [1.0, 0.3, 2.5], dtype, block, step=1)
        # Triton's interpreter truncates to bfloat16.
        eps = 2 * torch.finfo(dtype).eps if logits.dtype != dtype else 0.0
        torch.testing.assert_close(kept[:, 1].double(), logits.double(), rtol=eps, atol=0)
        expected = log2_sums(kept[:, 1], torch.tensor([[1.0], [0.3], [2.5]], device=DEVICE))
        torch.testing.assert_close(lse[:, 1].double(), expected, rtol=1e-6, atol=1e-5)
        assert (kept[:, 0] == 77).all() and (lse[:, 0] == 77).all(), "another step's"


@kernels_run_here
def test_rows_may_be_part_of_wider_ones() -> None:
    wide = random_logits(3, 20)
    narrow = drafted(wide[:, :VOCAB], [1.0, 0.7, 0.0])
    for ours, expected in zip(narrow, drafted(wide[:, :VOCAB].contiguous(), [1.0, 0.7, 0.0]), strict=True):
        assert torch.equal(ours, expected)


@kernels_run_here
def test_greedy_rows_draft_the_first_argmax() -> None:
    logits = random_logits(40, 50).round()
    logits[0] = 3.0
    logits[1, [9, 33]] = 50.0
    logits[2, [9, 33]] = torch.tensor([50.0, 50.001], device=DEVICE)  # equal once rounded to bfloat16
    tokens, _, _ = drafted(logits, [0.0, 0.0, 0.0, 1.0] * 10, torch.bfloat16)
    greedy = torch.arange(40, device=DEVICE) % 4 != 3
    # CPU's argmax is the first; CUDA's may be any.
    assert torch.equal(tokens[greedy].cpu(), logits.cpu().argmax(-1)[greedy.cpu()])


@kernels_run_here
def test_drafts_are_drawn_from_the_kept_logits_at_their_rows_temperature() -> None:
    logits = random_logits(1, VOCAB, seed=5)  # few are drawn from the second block
    logits[0, 4] = -INF
    temperatures = [0.6, 1.5]  # of neighbours
    tokens, kept, _ = drafted(logits.expand(DRAWS, -1), temperatures * (DRAWS // 2), torch.bfloat16)
    for first, temperature in enumerate(temperatures):
        check_draws(tokens[first::2], torch.softmax(kept[0, 0].float() / temperature, -1))


@kernels_run_here
def test_only_possible_tokens_are_drafted_wherever_they_are() -> None:
    logits = torch.full((VOCAB, VOCAB), -INF, device=DEVICE)
    logits.fill_diagonal_(-90.0)
    tokens, _, _ = drafted(logits, [0.2] * VOCAB)
    assert tokens.tolist() == list(range(VOCAB))


@kernels_run_here
def test_steps_have_noise_of_their_own() -> None:
    logits = torch.zeros(30, VOCAB, device=DEVICE)
    tokens = [drafted(logits, [1.0] * 30, step=step)[0] for step in (0, 1, 0)]
    assert torch.equal(tokens[0], tokens[2]) and not torch.equal(tokens[0], tokens[1])


@kernels_run_here
def test_round_seeds_follow_torchs_generator() -> None:
    torch.manual_seed(5)
    first, second = triton_sampling.round_seeds(9, DEVICE), triton_sampling.round_seeds(9, DEVICE)
    torch.manual_seed(5)
    assert torch.equal(triton_sampling.round_seeds(9, DEVICE), first)
    assert len(torch.cat([first, second]).unique()) == 18


# -------------------------------------------------------------------------- acceptance


def accepted(
    drafts: torch.Tensor, target: torch.Tensor, draft: torch.Tensor, temperatures: list[float], lower_q: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept ``drafts`` [batch, k] for logits ``target`` [batch, W, vocab] and ``draft`` [batch, k, vocab]."""
    given, top_ks = parameters(temperatures)
    lse = log2_sums(draft, given.unsqueeze(1)).float() + lower_q
    candidates = torch.cat([torch.zeros_like(drafts[:, :1]), drafts], dim=1)
    seed = torch.tensor([2**62 + 12345], device=DEVICE)
    return triton_sampling.accept(candidates, target.flatten(0, 1), given, top_ks, draft.contiguous(), lse, seed, BLOCK)


@kernels_run_here
@pytest.mark.parametrize(
    "zeros,dtype", [(False, torch.bfloat16), (True, torch.float32)], ids=["p and q everywhere", "zeros of p and of q"]
)
def test_the_output_follows_the_target_whatever_the_drafts_are(zeros: bool, dtype: torch.dtype) -> None:
    """Every row at its own temperature; some drafts are accepted and some are not."""
    torch.manual_seed(1)
    target, draft = random_logits(1, 3, VOCAB, seed=1), random_logits(1, 2, VOCAB, seed=2)
    if zeros:  # of each alone, of both, and of neither
        draft[:, :, ::2] = -INF
        target[:, :, ::3] = -INF
    target, draft = target.to(dtype), draft.to(dtype)
    temperature = 1.3
    q = torch.softmax(draft[0].float() / temperature, -1)
    p = torch.softmax(target[0].float() / temperature, -1)
    drafts = torch.stack([torch.multinomial(q[i], DRAWS, replacement=True) for i in range(2)], dim=1)
    # Every fifth row is of another temperature, for which these drafts are wrong.
    temperatures = [5.0 if i % 5 == 4 else temperature for i in range(DRAWS)]
    tokens, lens = accepted(drafts, target.expand(DRAWS, -1, -1), draft.expand(DRAWS, -1, -1), temperatures)
    ours = torch.arange(DRAWS, device=DEVICE) % 5 != 4
    check_draws(tokens[ours, 0], p[0])
    if DEVICE == "cuda":
        check_draws(tokens[ours & (lens > 1), 1], p[1])
        check_draws(tokens[ours & (lens > 2), 2], p[2])
    # The share that is accepted is the overlap of p and q.
    rate, share = float(torch.minimum(p[0], q[0]).sum()), float((lens[ours] > 1).double().mean())
    assert abs(share - rate) < 4.5 * math.sqrt(rate * (1 - rate) / int(ours.sum())) + 1e-9
    # SGLang looks up log-probabilities of the whole window.
    assert tokens.min() >= 0 and tokens.max() < VOCAB
    for i in range(2):
        kept = lens > i + 1
        assert torch.equal(tokens[kept, i], drafts[kept, i])


@kernels_run_here
def test_equal_distributions_accept_every_draft_and_end_with_the_target() -> None:
    rows = DRAWS // 2
    target = random_logits(1, 3, VOCAB, seed=4).expand(rows, -1, -1)
    drafts = torch.randint(0, VOCAB, (rows, 2), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    # The draft's sum is torch's: half an ulp may not reject.
    tokens, lens = accepted(drafts, target, target[:, :2], [0.8] * rows, lower_q=1e-5)
    assert (lens == 3).all() and torch.equal(tokens[:, :2], drafts)
    check_draws(tokens[:, 2], torch.softmax(target[0, 2] / 0.8, -1))


@kernels_run_here
def test_drafts_that_the_target_cannot_give_are_all_rejected() -> None:
    target, draft = random_logits(1, 3, VOCAB), random_logits(1, 2, VOCAB)
    target[:, :, :6] = -INF
    draft[:, :, 6:] = -INF
    rows = DRAWS // 2
    drafts = torch.zeros(rows, 2, dtype=torch.int64, device=DEVICE)
    tokens, lens = accepted(drafts, target.expand(rows, -1, -1), draft.expand(rows, -1, -1), [1.0] * rows)
    assert (lens == 1).all()
    check_draws(tokens[:, 0], torch.softmax(target[0, 0], -1))


@kernels_run_here
def test_without_a_residual_the_target_itself_is_drawn_from() -> None:
    """As where p == q up to rounding: here q is p times 2**30, so that drafts are rejected and nothing is left of p."""
    rows = DRAWS // 2
    target = random_logits(1, 2, VOCAB, seed=6)
    target[:, :, [0, 3, 10]] = -INF
    drafts = torch.full((rows, 1), 5, device=DEVICE)
    expanded = target.expand(rows, -1, -1)
    tokens, lens = accepted(drafts, expanded, expanded[:, :1], [1.0] * rows, lower_q=-30.0)
    assert (lens == 1).all()
    check_draws(tokens[:, 0], torch.softmax(target[0, 0], -1))


@kernels_run_here
def test_greedy_rows_of_a_mixed_batch_are_exact() -> None:
    """As ``sampling.accept_matching`` of the first argmax, beside rows that sample; logits are often tied."""
    from sglang_sparsespec.sampling import accept_matching

    batch, width, vocab = 48, 4, 50
    target = random_logits(batch, width, vocab, seed=8).round()
    near = target[:, :-1] + random_logits(batch, width - 1, vocab, seed=9) / 5
    drafts = near.argmax(-1)
    tokens, lens = accepted(drafts, target, near, [0.0, 1.1] * (batch // 2))
    candidates = torch.cat([torch.zeros_like(drafts[:, :1]), drafts], dim=1)
    expected_tokens, expected_lens = accept_matching(candidates.cpu(), target.cpu().argmax(-1))
    seen = set()
    for b in range(0, batch, 2):
        length = int(lens[b])
        seen.add(length)
        assert length == int(expected_lens[b])
        assert tokens[b, :length].tolist() == expected_tokens[b, :length].tolist()
    assert len(seen) == width, "every accept length should occur"


# ----------------------------------------------------------------------------- windows


@kernels_run_here
def test_drafts_may_be_kept_in_any_slots() -> None:
    """Requests of one forward are at different places of their windows, and in rows of their own."""
    logits, rows, places = random_logits(3, VOCAB), torch.tensor([5, 1, 4]), torch.tensor([1, 0, 2])
    expected, kept_there, lse_there = drafted(logits, [1.0, 0.0, 0.6], torch.bfloat16, step=1)
    kept = torch.full((6, 3, VOCAB), 77.0, dtype=torch.bfloat16, device=DEVICE)
    lse = torch.full((6, 3), 77.0, device=DEVICE)
    seeds = torch.tensor([123456789123456789, -5, 7], device=DEVICE)
    slots = (3 * rows + places).to(DEVICE)
    tokens = triton_sampling.draft(logits, *parameters([1.0, 0.0, 0.6]), seeds, 1, kept, lse, BLOCK, slots=slots)
    assert torch.equal(tokens, expected)
    assert torch.equal(kept[rows, places], kept_there[:, 1])
    assert torch.equal(lse[rows, places], lse_there[:, 1]), "a greedy row's is not written"
    kept[rows, places] = lse[rows, places] = 77.0
    assert (kept == 77).all() and (lse == 77).all(), "another slot's"


@kernels_run_here
def test_windows_are_accepted_wherever_their_drafts_are_kept() -> None:
    """The same noise, so the very same outcome; places that no draft belongs to hold NaN."""
    batch, k = 40, 2
    target, draft = random_logits(batch, k + 1, VOCAB, seed=1), random_logits(batch, k, VOCAB, seed=2)
    temperatures = [1.0, 0.6, 0.0, 2.0] * (batch // 4)
    drafts = (target[:, :-1] + draft).argmax(-1)
    expected, expected_lens = accepted(drafts, target, draft, temperatures)
    assert len(expected_lens.unique()) == k + 1
    rows = (torch.randperm(batch + 3, generator=torch.Generator().manual_seed(0))[:batch]).to(DEVICE)
    kept = torch.full((batch + 3, k + 1, VOCAB), math.nan, device=DEVICE)
    lse = torch.full((batch + 3, k + 1), math.nan, device=DEVICE)
    given, top_ks = parameters(temperatures)
    kept[rows, :k], lse[rows, :k] = draft, log2_sums(draft, given.unsqueeze(1)).float()
    candidates = torch.cat([torch.zeros_like(drafts[:, :1]), drafts], dim=1)
    tokens, lens = triton_sampling.accept(
        candidates, target.flatten(0, 1), given, top_ks, kept, lse, torch.tensor([2**62 + 12345], device=DEVICE), BLOCK,
        rows=rows, num_drafted=torch.full((batch,), k, device=DEVICE),
    )  # fmt: skip
    assert torch.equal(lens, expected_lens) and torch.equal(tokens, expected)


@kernels_run_here
def test_a_window_of_fewer_drafts_ends_with_a_token_of_the_target() -> None:
    """All drafts are right; neither a token that is no draft nor what is left of the target beside it comes after them."""
    batch = DRAWS
    target = random_logits(1, 3, VOCAB, seed=4)
    made = torch.arange(batch, device=DEVICE) % 2
    temperatures = [0.0 if b % 10 == 7 else 0.8 for b in range(batch)]
    drafts = target[:, :2].argmax(-1).expand(batch, -1)
    kept = target[:, :2].repeat(batch, 1, 1)
    given, top_ks = parameters(temperatures)
    lse = log2_sums(kept, given.unsqueeze(1)).float() + 1e-5
    kept[:, 1], lse[:, 1] = math.nan, math.nan
    kept[made == 0, 0], lse[made == 0, 0] = 0.0, -20.0
    candidates = torch.cat([torch.zeros_like(drafts[:, :1]), drafts], dim=1)
    tokens, lens = triton_sampling.accept(
        candidates, target.expand(batch, -1, -1).flatten(0, 1), given, top_ks, kept, lse,
        torch.tensor([99], device=DEVICE), BLOCK, rows=torch.arange(batch, device=DEVICE), num_drafted=made,
    )  # fmt: skip
    assert torch.equal(lens, made.to(torch.int32) + 1)
    probs = torch.softmax(target[0] / 0.8, -1)
    sampled = top_ks != 1
    for count in (0, 1):
        check_draws(tokens[sampled & (made == count), count], probs[count])
    assert (tokens[~sampled, 1] == target[0, 1].argmax()).all()


# ------------------------------------------------------------------------------ rounds


def without_filters(temperatures: torch.Tensor, top_ks: torch.Tensor) -> SimpleNamespace:
    """SGLang's sampling parameters of a batch, some of whose requests sample."""
    return SimpleNamespace(
        temperatures=temperatures, top_ks=top_ks, top_ps=None, min_ps=None, sampling_seed=None, is_all_greedy=False,
        need_top_k_sampling=False, need_top_p_sampling=False, need_min_p_sampling=False,
    )  # fmt: skip


@kernels_run_here
def test_a_round_of_the_sampler_keeps_logits_that_are_overwritten() -> None:
    """Drafts from the target's own logits, in one buffer as a CUDA graph has it, are all accepted; rounds differ."""
    from sglang_sparsespec.sampling import DraftSampler

    torch.manual_seed(0)
    batch, width, vocab = 4, 4, 5000  # two of the blocks of production
    temperatures, top_ks = parameters([0.9, 1.0, 0.0, 1.4])
    info = without_filters(temperatures, top_ks)
    sampler = DraftSampler(torch.float32, use_triton=True)
    target = random_logits(batch, width, vocab)
    positions = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    results = []
    for size in (batch, 1, batch):
        info.temperatures, info.top_ks = temperatures[:size], top_ks[:size]
        sampler.begin_round(info, [], width - 1)
        buffer = torch.empty(batch, vocab, device=DEVICE)
        columns = [positions[:size]]
        for step in range(width - 1):
            buffer[:size].copy_(target[:size, step])
            columns.append(sampler.draw(buffer[:size], positions[:size]))
        tokens, lens = sampler.accept(torch.stack(columns, 1), target[:size].flatten(0, 1), positions)
        assert lens.tolist() == [width] * size
        assert torch.equal(tokens[:, :-1], torch.stack(columns[1:], 1))
        results.append(tokens)
    assert torch.equal(results[0][2], results[2][2]), "the greedy row"
    assert not torch.equal(results[0], results[2])


@kernels_run_here
def test_a_place_that_is_drawn_again_is_accepted_by_its_last_draw() -> None:
    """Two places a forward, as of ``triforce``; the second follows a wrong token half of the time."""
    from sglang_sparsespec.sampling import DraftSampler

    torch.manual_seed(0)
    batch, width, places = 6, 3, 4
    temperatures, top_ks = parameters([0.9, 1.0, 0.0, 1.4, 0.0, 0.7])
    info = without_filters(temperatures, top_ks)
    sampler = DraftSampler(torch.float32, use_triton=True)
    target = random_logits(batch, width, VOCAB)
    sampler.begin_round(info, [], places)
    candidates = torch.zeros((batch, places + 1), dtype=torch.int64, device=DEVICE)
    rows = torch.arange(batch, device=DEVICE)
    for first in (0, 1):
        at = (first * torch.ones_like(rows)).unsqueeze(1) + torch.arange(2, device=DEVICE)
        logits = target[rows.unsqueeze(1), at.clamp(max=width - 1)]
        logits[:, 1] *= -3
        candidates[rows.unsqueeze(1), at + 1] = sampler.draw_at(logits.flatten(0, 1), at.flatten(), at)
    made = torch.where(rows % 2 == 0, 2, 1)
    tokens, lens = sampler.accept(candidates[:, :width], target.flatten(0, 1), rows, num_drafted=made)
    # Place 0 is of the first forward, place 1 of the second; both are the target's own.
    assert torch.equal(lens, made.to(torch.int32) + 1)
    assert torch.equal(tokens[made == 2, :2], candidates[made == 2, 1:3])


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the other tests of this file run in this process")
def test_every_case_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(__file__, at_least=30)
