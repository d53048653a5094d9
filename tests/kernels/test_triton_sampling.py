"""The Triton kernels that draft and accept from logits: sums, draws and acceptance follow the torch definitions.

Without a GPU a child process runs this file in Triton's interpreter, with fewer draws: ``TRITON_INTERPRET`` must be set
before Triton is imported, and would break other tests of this process.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import fast_interpreter
import pytest
import torch
import triton
import triton.language as tl
from interpreter_child import assert_passes_in_the_interpreter
from sampling_checks import as_requests, batch_info, check_draws
from sampling_oracles import NO_TOP_K, accept_by_rejection_sglang
from scipy.stats import kstest
from tiny_model import Sampling

from sglang_sparsespec.sampling import triton_sampling
from sglang_sparsespec.sampling.parameters import RowParameters
from sglang_sparsespec.sampling.reference import accept_by_rejection, accept_matching
from sglang_sparsespec.sampling.sampler import Sampler
from sglang_sparsespec.sampling.triton_sampling import _uniform

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
kernels_run_here = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no CUDA GPU: test_every_case_in_the_interpreter runs it in a child process"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCAB, BLOCK = 11, 8  # a full block and a part of one
DRAWS = 200_000 if DEVICE == "cuda" else 120  # a multiple of 10
INF = float("inf")


def parameters(temperatures: list[float]) -> RowParameters:
    """Parameters without filters; 0 is greedy, as SGLang has it: temperature 1, top-k 1."""
    top_ks = [1 if t == 0 else NO_TOP_K for t in temperatures]
    given = torch.tensor([[t or 1.0] for t in temperatures], device=DEVICE)
    return RowParameters(given, torch.tensor(top_ks, dtype=torch.int32, device=DEVICE))


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def log2_sums(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(logits.double() / temperatures, -1) / math.log(2)


def drafted(
    logits: torch.Tensor, temperatures: list[float], dtype: torch.dtype = torch.float32, block: int = BLOCK, step: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, kept logits [batch, 2, vocab] and sums [batch, 2] of one draft step, with two entries for each row."""
    batch, vocab = logits.shape
    kept = torch.full((batch, 2, vocab), 77.0, dtype=dtype, device=DEVICE)
    lse = torch.full((batch, 2), 77.0, device=DEVICE)
    seeds = torch.tensor([123456789123456789, -5, 7], device=DEVICE)
    entries = 2 * torch.arange(batch, device=DEVICE) + step
    tokens = triton_sampling.draft(
        logits, parameters(temperatures), seeds, step, kept.flatten(0, 1), lse.flatten(), entries, block
    )
    return tokens, kept, lse


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


@pytest.mark.skipif(not INTERPRETED, reason="the child process runs it")
def test_the_interpreters_noise_is_tritons_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.tensor([2**63 - 12345]), 7
    fast, own = torch.empty(64), torch.empty(64)
    noise_kernel[(1,)](*given, fast, 2, 64)
    monkeypatch.setattr(tl.random, "philox_impl", fast_interpreter.PHILOX)
    noise_kernel[(1,)](*given, own, 2, 64)
    assert torch.equal(fast, own)


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
    rows = parameters(temperatures)
    batch, k = drafts.shape
    lse = log2_sums(draft, rows.temperatures.unsqueeze(1)).float() + lower_q
    slots = torch.arange(batch, device=DEVICE)
    return triton_sampling.accept(
        with_last_token(drafts), target.flatten(0, 1), rows, torch.tensor([0, 2**62 + 12345], device=DEVICE), 1,
        draft.flatten(0, 1).contiguous(), lse.flatten(), k, slots, torch.full_like(slots, k), BLOCK,
    )  # fmt: skip


def with_last_token(drafts: torch.Tensor) -> torch.Tensor:
    """Candidates int64 [batch, W] of drafts [batch, k]."""
    return torch.cat([torch.zeros_like(drafts[:, :1]), drafts], dim=1)


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
    """As ``reference.accept_matching`` of the first argmax, beside rows that sample; logits are often tied."""
    batch, width, vocab = 48, 4, 50
    target = random_logits(batch, width, vocab, seed=8).round()
    near = target[:, :-1] + random_logits(batch, width - 1, vocab, seed=9) / 5
    drafts = near.argmax(-1)
    tokens, lens = accepted(drafts, target, near, [0.0, 1.1] * (batch // 2))
    expected_tokens, expected_lens = accept_matching(with_last_token(drafts).cpu(), target.cpu().argmax(-1))
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
    """Requests of one forward are at different places of their windows, and in slots of their own."""
    logits, slots, places = random_logits(3, VOCAB), torch.tensor([5, 1, 4]), torch.tensor([1, 0, 2])
    expected, kept_there, lse_there = drafted(logits, [1.0, 0.0, 0.6], torch.bfloat16, step=1)
    kept = torch.full((6, 3, VOCAB), 77.0, dtype=torch.bfloat16, device=DEVICE)
    lse = torch.full((6, 3), 77.0, device=DEVICE)
    seeds = torch.tensor([123456789123456789, -5, 7], device=DEVICE)
    entries = (3 * slots + places).to(DEVICE)
    tokens = triton_sampling.draft(
        logits, parameters([1.0, 0.0, 0.6]), seeds, 1, kept.flatten(0, 1), lse.flatten(), entries, BLOCK
    )
    assert torch.equal(tokens, expected)
    assert torch.equal(kept[slots, places], kept_there[:, 1])
    assert torch.equal(lse[slots, places], lse_there[:, 1]), "a greedy row's is not written"
    kept[slots, places] = lse[slots, places] = 77.0
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
    slots = (torch.randperm(batch + 3, generator=torch.Generator().manual_seed(0))[:batch]).to(DEVICE)
    kept = torch.full((batch + 3, k + 1, VOCAB), math.nan, device=DEVICE)
    lse = torch.full((batch + 3, k + 1), math.nan, device=DEVICE)
    rows = parameters(temperatures)
    kept[slots, :k], lse[slots, :k] = draft, log2_sums(draft, rows.temperatures.unsqueeze(1)).float()
    seeds = torch.tensor([2**62 + 12345], device=DEVICE)
    for num_drafted in (k, k + 1):  # places of a slot may be more than drafts of a window
        tokens, lens = triton_sampling.accept(
            with_last_token(drafts), target.flatten(0, 1), rows, seeds, 0, kept.flatten(0, 1), lse.flatten(), k + 1,
            slots, torch.full_like(slots, num_drafted), BLOCK,
        )  # fmt: skip
        assert torch.equal(lens, expected_lens) and torch.equal(tokens, expected)


@kernels_run_here
def test_a_window_of_fewer_drafts_ends_with_a_token_of_the_target() -> None:
    """All drafts are right; neither a token that is no draft nor what is left of the target beside it comes after them."""
    batch = DRAWS
    target = random_logits(1, 3, VOCAB, seed=4)
    made = torch.arange(batch, device=DEVICE) % 2
    rows = parameters([0.0 if b % 10 == 7 else 0.8 for b in range(batch)])
    drafts = target[:, :2].argmax(-1).expand(batch, -1)
    kept = target[:, :2].repeat(batch, 1, 1)
    lse = log2_sums(kept, rows.temperatures.unsqueeze(1)).float() + 1e-5
    kept[:, 1], lse[:, 1] = math.nan, math.nan
    kept[made == 0, 0], lse[made == 0, 0] = 0.0, -20.0
    tokens, lens = triton_sampling.accept(
        with_last_token(drafts), target.expand(batch, -1, -1).flatten(0, 1), rows, torch.tensor([99], device=DEVICE), 0,
        kept.flatten(0, 1), lse.flatten(), 2, torch.arange(batch, device=DEVICE), made, BLOCK,
    )  # fmt: skip
    assert torch.equal(lens, made.to(torch.int32) + 1)
    probs = torch.softmax(target[0] / 0.8, -1)
    sampled = rows.top_ks != 1
    for count in (0, 1):
        check_draws(tokens[sampled & (made == count), count], probs[count])
    assert (tokens[~sampled, 1] == target[0, 1].argmax()).all()


@kernels_run_here
def test_columns_of_a_table_are_refused() -> None:
    """The kernels read parameters and kept logits without strides."""
    rows = parameters([1.0, 0.7])
    strided = RowParameters(torch.ones(2, 4, device=DEVICE)[:, :1], rows.top_ks)
    kept, lse = torch.empty(2, VOCAB, device=DEVICE), torch.empty(2, device=DEVICE)
    seeds, entries = torch.tensor([1], device=DEVICE), torch.arange(2, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous"):
        triton_sampling.draft(random_logits(2, VOCAB), strided, seeds, 0, kept, lse, entries, BLOCK)
    with pytest.raises(ValueError, match="unit stride"):
        triton_sampling.draft(random_logits(VOCAB, 2).t(), rows, seeds, 0, kept, lse, entries, BLOCK)
    candidates, logits = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE), random_logits(4, VOCAB)
    with pytest.raises(ValueError, match="do not belong together"):
        triton_sampling.accept(candidates, logits, rows, seeds, 0, kept, lse[:1], 1, entries, entries, BLOCK)


# ------------------------------------------------------------------------------ rounds


@kernels_run_here
def test_a_round_of_the_sampler_keeps_logits_that_are_overwritten() -> None:
    """Drafts from the target's own logits, in one buffer as a CUDA graph has it, are all accepted; rounds differ."""
    torch.manual_seed(0)
    batch, width, vocab = 4, 4, 5000  # two of the blocks of production
    requests = [Sampling(temperature=t) for t in (0.9, 1.0, 0.0, 1.4)]
    sampler = Sampler(width - 1, torch.float32, DEVICE, use_triton=True)
    target = random_logits(batch, width, vocab)
    positions = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    results = []
    for size in (batch, 1, batch):
        info = batch_info(requests[:size], vocab=vocab, device=DEVICE)
        sampler.begin_round(info, as_requests(requests[:size]), size, width)
        buffer = torch.empty(batch, vocab, device=DEVICE)
        columns = [positions[:size]]
        for step in range(width - 1):
            buffer[:size].copy_(target[:size, step])
            entries = (width - 1) * torch.arange(size, device=DEVICE) + step
            columns.append(sampler.draw(buffer[:size], entries, positions[:size]))
        tokens, lens = sampler.accept(torch.stack(columns, 1), target[:size].flatten(0, 1), positions)
        assert lens.tolist() == [width] * size
        assert torch.equal(tokens[:, :-1], torch.stack(columns[1:], 1))
        results.append(tokens)
    assert torch.equal(results[0][2], results[2][2]), "the greedy row"
    assert not torch.equal(results[0], results[2])


@kernels_run_here
def test_a_place_that_is_drawn_again_is_accepted_by_its_last_draw() -> None:
    """Two places a forward, as of ``triforce``; the second follows a wrong token half of the time."""
    torch.manual_seed(0)
    batch, width, places = 6, 3, 4
    requests = [Sampling(temperature=t) for t in (0.9, 1.0, 0.0, 1.4, 0.0, 0.7)]
    sampler = Sampler(places, torch.float32, DEVICE, use_triton=True)
    target = random_logits(batch, width, VOCAB)
    sampler.begin_round(batch_info(requests, vocab=VOCAB, device=DEVICE), as_requests(requests), batch, num_draws=3)
    candidates = torch.zeros((batch, places + 1), dtype=torch.int64, device=DEVICE)
    rows = torch.arange(batch, device=DEVICE)
    each = rows.repeat_interleave(2)
    for first in (0, 1):
        at = (first * torch.ones_like(rows)).unsqueeze(1) + torch.arange(2, device=DEVICE)
        logits = target[rows.unsqueeze(1), at.clamp(max=width - 1)]
        logits[:, 1] *= -3
        drawn = sampler.draw(logits.flatten(0, 1), each * places + at.flatten(), at.flatten(), each)
        candidates[rows.unsqueeze(1), at + 1] = drawn.view(batch, 2)
    made = torch.where(rows % 2 == 0, 2, 1)
    tokens, lens = sampler.accept(candidates[:, :width], target.flatten(0, 1), rows, num_drafted=made)
    # Place 0 is of the first forward, place 1 of the second; both are the target's own.
    assert torch.equal(lens, made.to(torch.int32) + 1)
    assert torch.equal(tokens[made == 2, :2], candidates[made == 2, 1:3])


@kernels_run_here
def test_what_is_kept_outlives_a_round_beside_other_requests() -> None:
    """The window is drafted in two rounds: beside a greedy request in the first, beside a top-k in the second."""
    torch.manual_seed(0)
    width, num_slots, kept_in = 3, 7, 5
    mine, others = Sampling(temperature=1.3, min_p=0.05), [Sampling(temperature=0.0), Sampling(top_k=3)]
    sampler = Sampler(width - 1, torch.float32, DEVICE, use_triton=True)
    for attempt in range(10):
        target = random_logits(1, width, VOCAB, seed=attempt)
        candidates = torch.zeros((1, width), dtype=torch.int64, device=DEVICE)
        for step in range(width - 1):
            batch = [others[step], mine]
            sampler.begin_round(batch_info(batch, vocab=VOCAB, device=DEVICE), as_requests(batch), num_slots, num_draws=4)
            logits = torch.cat([target[:, step], random_logits(1, VOCAB, seed=99)])
            entries = torch.tensor([kept_in, 2], device=DEVICE) * (width - 1) + step
            requests = torch.tensor([1, 0], device=DEVICE)
            candidates[0, step + 1] = sampler.draw(logits, entries, torch.zeros(2).long(), requests)[0]
        slots, requests = torch.tensor([kept_in], device=DEVICE), torch.tensor([1], device=DEVICE)
        tokens, lens = sampler.accept(candidates, target[0], torch.zeros(width).long(), slots, requests)
        assert lens.tolist() == [width] and torch.equal(tokens[:, :-1], candidates[:, 1:])


# ------------------------------------------------------------------------ SGLang's rule


def random_windows(batch: int, width: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Candidates int64 [batch, W], and the distributions of the target [batch, W, vocab] and the draft [batch, k, vocab]."""
    torch.manual_seed(0)
    target = torch.softmax(2 * torch.randn(batch, width, vocab), -1)
    draft = torch.softmax(torch.log(target[:, :-1]) + torch.randn(batch, width - 1, vocab), -1)
    drafts = torch.stack([torch.multinomial(draft[:, i], 1).squeeze(1) for i in range(width - 1)], 1)
    return with_last_token(drafts).to(DEVICE), target.to(DEVICE), draft.to(DEVICE)


@kernels_run_here
def test_sglangs_kernel_accepts_as_the_torch_rule() -> None:
    given = (*random_windows(96, 4, 12), torch.rand(96, 3).to(DEVICE), torch.rand(96).to(DEVICE))
    outputs = []
    for rule in (accept_by_rejection, accept_by_rejection_sglang):
        tokens, lens = rule(*given)
        outputs.append([row[:length] for row, length in zip(tokens.tolist(), lens.tolist(), strict=True)])
    assert outputs[0] == outputs[1]
    assert {len(tokens) for tokens in outputs[0]} == {1, 2, 3, 4}


@kernels_run_here
def test_sglangs_kernel_gives_no_impossible_token() -> None:
    """By itself it answers the last token of the vocabulary when rounding carries a coin past the sum."""
    candidates, target, draft = random_windows(60, 2, 20_000)
    target[..., -1] = 0
    target /= target.sum(-1, keepdim=True)
    last_coin = torch.full((60,), 1 - 2**-24, device=DEVICE)  # the largest that torch.rand gives
    tokens, lens = accept_by_rejection_sglang(candidates, target, draft, last_coin.unsqueeze(1), last_coin)
    row, last = torch.arange(60, device=DEVICE), (lens - 1).long()
    assert target[row, last, tokens[row, last]].min() > 0


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the other tests of this file run in this process")
def test_every_case_in_the_interpreter() -> None:
    """One child process runs the cases of filters and penalties, too."""
    others = [Path(__file__).with_name(f"test_triton_{name}.py") for name in ("filters", "penalties")]
    assert_passes_in_the_interpreter(__file__, at_least=56, together_with=others)
