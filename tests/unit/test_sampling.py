"""Drafting and acceptance, rule by rule, on the CPU path."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sampling_checks import as_requests, batch_info
from scipy.stats import chisquare
from sglang.srt.layers import sampler as sglang_sampler
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from tiny_model import Sampling

from sglang_sparsespec.sampling import reference, sampler, triton_sampling
from sglang_sparsespec.sampling.parameters import RowParameters, has_filters
from sglang_sparsespec.sampling.sampler import Sampler, draft_logits_dtype
from sglang_sparsespec.sampling.simulated import SimulatedAcceptance

VOCAB = 12
GREEDY = Sampling(temperature=0.0)
REQUESTS = {
    "plain": [Sampling(), Sampling(temperature=0.6), Sampling(temperature=1.7)],
    "top_k": [Sampling(top_k=3), Sampling(top_k=1), Sampling(temperature=2.0, top_k=VOCAB)],
    "top_p": [Sampling(top_p=0.5), Sampling(top_p=0.01), Sampling(temperature=1.5, top_p=0.9)],
    "min_p": [Sampling(min_p=0.1), Sampling(min_p=1.0), Sampling(temperature=1.5, min_p=0.02)],
    "mixed": [
        GREEDY,
        Sampling(),
        Sampling(top_k=4, top_p=0.8),
        Sampling(temperature=1.3, top_p=0.9, min_p=0.05),
        Sampling(top_k=5, top_p=0.95, min_p=0.1),
        GREEDY,
    ],
    "greedy": [GREEDY, GREEDY],
}


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def sglang_distribution(
    logits: torch.Tensor, info: SamplingBatchInfo, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """What SGLang's ``Sampler`` draws from: float64 [rows, vocab].

    ``torch.multinomial`` is made to return each index in turn, and its weights are read.
    """
    own = sglang_sampler.Sampler.__new__(sglang_sampler.Sampler)
    torch.nn.Module.__init__(own)
    own.rl_on_policy_target = None
    own.enable_deterministic = own.use_log_softmax_logprob = own.use_ascend_backend = False
    pytorch_backend = SimpleNamespace(kernel=SimpleNamespace(sampling_backend="pytorch"))
    monkeypatch.setattr(sglang_sampler, "get_exec", lambda: pytorch_backend)
    monkeypatch.setenv("SGLANG_OPT_USE_GUMBEL_SAMPLE", "0")
    rows = torch.arange(len(logits))
    found = torch.zeros(len(logits), VOCAB, dtype=torch.float64)
    for index in range(VOCAB):
        drawn: dict[str, torch.Tensor] = {}

        def multinomial(
            weights: torch.Tensor, num_samples: int, index: int = index, drawn: Any = drawn
        ) -> Any:
            drawn["weights"] = weights.double()[:, index]
            return torch.full((len(weights), 1), index)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "multinomial", multinomial)
            output = SimpleNamespace(next_token_logits=logits.clone())
            tokens = own(output, info, False, [], [], torch.zeros(len(logits), dtype=torch.int64))
        found[rows, tokens.long()] = drawn["weights"]
    return found / found.sum(dim=-1, keepdim=True)


# ----------------------------------------------------------------- target distribution


@pytest.mark.parametrize("name", [n for n in REQUESTS if n != "greedy"])
def test_target_probabilities_are_what_sglangs_sampler_draws_from(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, logits = batch_info(REQUESTS[name]), random_logits(len(REQUESTS[name]))
    ours = reference.target_probabilities(logits, RowParameters.of(info))
    expected = sglang_distribution(logits, info, monkeypatch)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(ours > 0, expected > 0), "a filter keeps other tokens"


@pytest.mark.parametrize("name", [n for n in REQUESTS if n != "greedy"])
def test_target_probabilities_follow_the_definitions_of_the_filters(name: str) -> None:
    requests = REQUESTS[name]
    logits = random_logits(len(requests), seed=1)
    ours = reference.target_probabilities(logits, RowParameters.of(batch_info(requests)))
    for request, row_logits, row in zip(requests, logits, ours, strict=True):
        torch.testing.assert_close(row.double(), request.distribution(row_logits), rtol=1e-5, atol=1e-7)


def test_logits_are_left_unchanged() -> None:
    logits = random_logits(6)
    before = logits.clone()
    reference.target_probabilities(logits, RowParameters.of(batch_info(REQUESTS["mixed"])))
    assert torch.equal(logits, before)


def test_parameters_are_repeated_for_each_row_of_a_window() -> None:
    requests = REQUESTS["mixed"]
    logits = random_logits(3 * len(requests))
    repeated = reference.target_probabilities(
        logits, RowParameters.of(batch_info(requests), repeats=3)
    )
    one_by_one = [request for request in requests for _ in range(3)]
    expected = reference.target_probabilities(logits, RowParameters.of(batch_info(one_by_one)))
    assert torch.equal(repeated, expected)


def test_greedy_rows_have_all_mass_on_the_argmax_even_at_ties() -> None:
    requests = [GREEDY, Sampling(), GREEDY]
    logits = random_logits(3)
    logits[0, [4, 7]] = logits[0].max() + 1
    rows = RowParameters.of(batch_info(requests))
    probs = reference.target_probabilities(logits, rows)
    sampled_row = probs[1].clone()
    reference.make_greedy_rows_exact(probs, logits, rows)
    assert probs[0].argmax() == logits[0].argmax() and probs[0].max() == 1 and probs[0].sum() == 1
    assert probs[2].argmax() == logits[2].argmax() and probs[2].max() == 1
    assert torch.equal(probs[1], sampled_row)


# ---------------------------------------------------------------------------- drafting


def test_a_greedy_batch_drafts_the_argmax_and_needs_no_distribution() -> None:
    logits = random_logits(2)
    tokens, probs = reference.sample_draft(
        logits, RowParameters.of(batch_info(REQUESTS["greedy"])), torch.zeros(2, dtype=torch.int64)
    )
    assert torch.equal(tokens, logits.argmax(-1)) and probs is None


def test_drafts_are_drawn_from_the_distribution_that_is_returned() -> None:
    torch.manual_seed(0)
    draws = 20_000
    logits = random_logits(1).expand(draws, -1)
    rows = RowParameters.of(batch_info([Sampling(top_k=6)] * draws))
    tokens, probs = reference.sample_draft(logits, rows, torch.zeros(draws, dtype=torch.int64))
    assert probs is not None
    kept = probs[0] > 0
    counts = torch.bincount(tokens, minlength=VOCAB)
    assert int(kept.sum()) == 6 and (counts[~kept] == 0).all()
    assert (
        chisquare(
            counts[kept].numpy(), (probs[0, kept].double() / probs[0, kept].double().sum() * draws)
        ).pvalue
        > 1e-3
    )


# -------------------------------------------------------------------------- acceptance


@pytest.mark.parametrize(
    ("drafts", "target", "accept_len"),
    [
        ([5, 6, 7], [5, 6, 7, 8], 4),
        ([5, 6, 7], [5, 6, 1, 8], 3),
        ([5, 6, 7], [1, 6, 7, 8], 1),  # later matches do not count
        ([5, 6, 7], [5, 1, 7, 8], 2),
    ],
)
def test_matching_accepts_the_common_prefix_and_one_token_of_the_target(
    drafts: list[int], target: list[int], accept_len: int
) -> None:
    tokens, accept_lens = reference.accept_matching(torch.tensor([[0, *drafts]]), torch.tensor([target]))
    assert accept_lens.tolist() == [accept_len] and accept_lens.dtype == torch.int32
    assert tokens[0, :accept_len].tolist() == target[:accept_len]


def reject(
    target: torch.Tensor,
    draft: torch.Tensor,
    drafts: list[int],
    coins: torch.Tensor,
    final_coins: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``accept_by_rejection`` of the same drafts for each row of coins ([n, k] and [n])."""
    rows = len(coins)
    candidates = torch.tensor([[0, *drafts]]).expand(rows, -1)
    return reference.accept_by_rejection(
        candidates, target.expand(rows, -1, -1), draft.expand(rows, -1, -1), coins, final_coins
    )


def random_distributions(rows: int, seed: int, zeros: bool = False) -> torch.Tensor:
    """float32 [1, rows, vocab]; with ``zeros`` about half of the tokens are impossible."""
    logits = random_logits(rows, seed)
    if zeros:
        logits[logits < logits.median(dim=-1, keepdim=True).values] = float("-inf")
    return torch.softmax(logits, -1).unsqueeze(0)


GRID = 20_000
MIDPOINTS = (torch.arange(GRID) + 0.5) / GRID


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_draft_is_accepted_with_probability_min_1_p_over_q(seed: int, zeros: bool) -> None:
    """Over an even grid of coins, so without sampling error."""
    target, draft = random_distributions(2, seed, zeros), random_distributions(1, seed + 50)
    for token in range(VOCAB):
        _, accept_lens = reject(target, draft, [token], MIDPOINTS.unsqueeze(1), MIDPOINTS)
        expected = min(1.0, float(target[0, 0, token]) / float(draft[0, 0, token]))
        assert float((accept_lens == 2).double().mean()) == pytest.approx(expected, abs=2 / GRID)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_after_a_rejection_the_token_comes_from_the_residual(seed: int, zeros: bool) -> None:
    target, draft = random_distributions(2, seed, zeros), random_distributions(1, seed + 50)
    residual = (target[0, 0].double() - draft[0, 0].double()).clamp(min=0)
    token = int((draft[0, 0] - target[0, 0]).argmax())  # sure to be rejected by a coin near 1
    coins = torch.full((GRID, 1), 1 - 2**-24)
    tokens, accept_lens = reject(target, draft, [token], coins, MIDPOINTS)
    assert (accept_lens == 1).all()
    share = torch.bincount(tokens[:, 0], minlength=VOCAB).double() / GRID
    torch.testing.assert_close(share, residual / residual.sum(), rtol=0, atol=3 / GRID)


def test_after_k_accepted_drafts_the_token_comes_from_the_target() -> None:
    target, draft = random_distributions(3, 0), random_distributions(2, 50)
    coins = torch.zeros(GRID, 2)
    tokens, accept_lens = reject(target, draft, [3, 4], coins, MIDPOINTS)
    assert (accept_lens == 3).all() and (tokens[:, 0] == 3).all() and (tokens[:, 1] == 4).all()
    share = torch.bincount(tokens[:, 2], minlength=VOCAB).double() / GRID
    torch.testing.assert_close(share, target[0, 2].double(), rtol=0, atol=3 / GRID)


def test_nothing_after_the_first_rejected_draft_is_accepted() -> None:
    target, draft = random_distributions(4, 0), random_distributions(3, 50)
    token = int((draft[0, 0] - target[0, 0]).argmax())
    coins = torch.tensor([[1 - 2**-24, 0.0, 0.0]])
    _, accept_lens = reject(target, draft, [token, 1, 2], coins, torch.tensor([0.5]))
    assert accept_lens.tolist() == [1]


def test_an_impossible_token_is_never_the_output() -> None:
    """Not even for the first and the last coin, where sums are rounded."""
    edge_coins = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])
    for seed in range(20):
        target, draft = random_distributions(2, seed, zeros=True), random_distributions(1, seed + 50)
        for token in range(VOCAB):
            coins = edge_coins.repeat_interleave(4).unsqueeze(1)
            tokens, accept_lens = reject(target, draft, [token], coins, edge_coins.repeat(4))
            assert (target[0, 0, tokens[:, 0]] > 0).all()
            both = accept_lens == 2
            assert (target[0, 1, tokens[both, 1]] > 0).all()


def test_equal_distributions_accept_every_draft() -> None:
    target = random_distributions(3, 0)
    draft = target[:, :2]
    for first in range(VOCAB):
        _, accept_lens = reject(target, draft, [first, 5], MIDPOINTS.unsqueeze(1).expand(-1, 2), MIDPOINTS)
        assert (accept_lens == 3).all()


@pytest.mark.parametrize("seed", range(2))
def test_drafting_and_acceptance_together_give_the_target_distribution(seed: int) -> None:
    """First and second output token over random drafts (p-value above 1e-3, fixed seed)."""
    torch.manual_seed(seed)
    rounds = 100_000
    target, draft = random_distributions(3, seed), random_distributions(2, seed + 50)
    drafts = torch.stack([torch.multinomial(draft[0, i], rounds, replacement=True) for i in range(2)], dim=1)
    candidates = torch.cat([torch.zeros(rounds, 1, dtype=torch.int64), drafts], dim=1)
    tokens, accept_lens = reference.accept_by_rejection(
        candidates,
        target.expand(rounds, -1, -1),
        draft.expand(rounds, -1, -1),
        torch.rand(rounds, 2),
        torch.rand(rounds),
    )
    for position in (0, 1):
        reached = accept_lens > position
        counts = torch.bincount(tokens[reached, position], minlength=VOCAB)
        expected = target[0, position].double()
        assert chisquare(counts.numpy(), (expected / expected.sum() * counts.sum()).numpy()).pvalue > 1e-3


# ----------------------------------------------------------------------- mixed batches


def test_greedy_rows_of_a_mixed_batch_are_exact() -> None:
    """Greedy requests get the argmax and as many drafts as match it, whatever their neighbours sample.

    Logits are whole numbers of a larger vocabulary, so that the argmax is often tied.
    """
    torch.manual_seed(0)
    requests = [GREEDY, Sampling(temperature=1.5), GREEDY, Sampling(top_p=0.7, min_p=0.05)] * 50
    batch, width = len(requests), 4
    info = batch_info(requests)
    logits = random_logits(batch * width, seed=3, vocab=200).round()
    argmax = logits.argmax(-1).view(batch, width)
    rows = RowParameters.of(info)
    columns, probs = [], []
    for step in range(width - 1):
        # Draft logits near the target's, so that some drafts match.
        near = logits.view(batch, width, -1)[:, step] + random_logits(batch, seed=10 + step, vocab=200) / 4
        token, prob = reference.sample_draft(near, rows, torch.zeros(batch, dtype=torch.int64))
        assert prob is not None
        columns.append(token)
        probs.append(prob)
    candidates = torch.stack([torch.zeros(batch, dtype=torch.int64), *columns], dim=1)
    tokens, accept_lens = reference.accept(
        candidates, logits, info, torch.zeros(batch * width, dtype=torch.int64), torch.stack(probs, 1)
    )
    expected_tokens, expected_lens = reference.accept_matching(candidates, argmax)
    seen = set()
    for b, request in enumerate(requests):
        if request is GREEDY:
            length = int(accept_lens[b])
            seen.add(length)
            assert length == int(expected_lens[b])
            assert tokens[b, :length].tolist() == expected_tokens[b, :length].tolist()
    assert len(seen) == width, "every accept length should occur"


def test_a_greedy_batch_is_accepted_by_its_argmax() -> None:
    logits = random_logits(6)
    target = logits.argmax(-1).view(2, 3)
    candidates = torch.tensor([[0, int(target[0, 0]), -1], [0, -1, -1]])
    tokens, accept_lens = reference.accept(
        candidates, logits, batch_info(REQUESTS["greedy"]), torch.zeros(6, dtype=torch.int64), None
    )
    assert torch.equal(tokens, target) and accept_lens.tolist() == [2, 1]


# ---------------------------------------------------------------------- round's sampler


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([Sampling(), Sampling(temperature=0.5)], False),
        ([GREEDY, Sampling()], False),
        ([Sampling(temperature=0.0, top_p=0.9, min_p=0.1), Sampling()], False),  # greedy has no use for them
        ([Sampling(), Sampling(top_k=5)], True),
        ([GREEDY, Sampling(top_p=0.9)], True),
        ([GREEDY, Sampling(min_p=0.1)], True),
    ],
)
def test_only_filters_of_requests_that_sample_count(requests: list[Sampling], expected: bool) -> None:
    assert has_filters(batch_info(requests), as_requests(requests)) is expected


@pytest.mark.parametrize("name", ["plain", "mixed", "greedy"])
def test_the_samplers_rounds_are_independent(name: str) -> None:
    """Drafts from the target's own logits are all accepted, again after a round of another batch that was dropped."""
    torch.manual_seed(0)
    requests, width = REQUESTS[name], 3
    batch = len(requests)
    sampler = Sampler(width - 1, torch.float32, "cpu", use_triton=False)
    other = [Sampling(top_k=2)]
    sampler.begin_round(batch_info(other), as_requests(other), 1, width)
    sampler.draw(random_logits(1), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    entries = (width - 1) * torch.arange(batch)
    for seed in range(2):
        logits = random_logits(batch * width, seed)
        sampler.begin_round(batch_info(requests), as_requests(requests), batch, width)
        assert sampler.is_all_greedy == (name == "greedy")
        positions = torch.zeros(batch, dtype=torch.int64)
        columns = [positions]
        columns += [sampler.draw(logits[step::width], entries + step, positions) for step in range(width - 1)]
        tokens, accept_lens = sampler.accept(torch.stack(columns, 1), logits, positions.repeat_interleave(width))
        assert accept_lens.tolist() == [width] * batch
        assert torch.equal(tokens[:, :-1], torch.stack(columns[1:], 1))


@pytest.mark.parametrize("name", ["plain", "mixed", "greedy"])
def test_a_place_that_is_drawn_again_is_accepted_by_its_last_draw(name: str) -> None:
    """Two places a forward, as of ``triforce``; requests get on at different speeds."""
    torch.manual_seed(0)
    requests, width, places = REQUESTS[name], 4, 5
    batch = len(requests)
    target = random_logits(batch * width, 1).view(batch, width, -1)
    sampler = Sampler(places, torch.float32, "cpu", use_triton=False)
    sampler.begin_round(batch_info(requests), as_requests(requests), batch, num_draws=4)
    candidates = torch.zeros((batch, places + 1), dtype=torch.int64)
    rows, first, made = torch.arange(batch), torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
    for _ in range(3):
        at = first.unsqueeze(1) + torch.arange(2)
        logits = target[rows.unsqueeze(1), at.clamp(max=width - 1)]
        # The second token of every other request is of no use: it follows a wrong one.
        good = rows % 2 == 0
        logits[:, 1] = torch.where(good.unsqueeze(1), logits[:, 1], -3 * logits[:, 1])
        entries, each = (rows.unsqueeze(1) * places + at).flatten(), rows.repeat_interleave(2)
        drawn = sampler.draw(logits.flatten(0, 1), entries, torch.zeros(2 * batch).long(), each)
        candidates[rows.unsqueeze(1), at + 1] = drawn.view(batch, 2)
        first = (first + 1 + good.long()).clamp(max=width - 1)
        made = first
    positions = torch.zeros(batch * width, dtype=torch.int64)
    tokens, lens = sampler.accept(candidates[:, :width], target.flatten(0, 1), positions, num_drafted=made)
    assert lens.tolist() == [width] * batch
    assert torch.equal(tokens[:, :-1], candidates[:, 1:width])


@pytest.mark.parametrize("name", ["plain", "mixed", "greedy"])
def test_a_window_may_be_drafted_in_several_rounds_beside_other_requests(name: str) -> None:
    """Its drafts are kept by slot, and requests of a forward are any of the batch, in any order."""
    torch.manual_seed(0)
    requests, width, num_slots = REQUESTS[name], 3, 11
    batch = len(requests)
    target = random_logits(batch * width, 1).view(batch, width, -1)
    sampler = Sampler(width - 1, torch.float32, "cpu", use_triton=False)
    slots = torch.arange(10, 10 - batch, -1)
    candidates = torch.zeros((batch, width), dtype=torch.int64)
    for step in range(width - 1):
        # The round's batch has the request at another place, and other requests before it.
        given = [Sampling(top_k=2)] * (step + 1) + requests
        sampler.begin_round(batch_info(given), as_requests(given), num_slots, num_draws=4)
        order = torch.arange(batch).flip(0)
        entries = slots[order] * (width - 1) + step
        drawn = sampler.draw(target[order, step], entries, torch.zeros(batch).long(), order + step + 1)
        candidates[order, step + 1] = drawn
        sampler.draw(random_logits(1, 9), torch.tensor([3]), torch.zeros(1).long(), torch.tensor([0]))
    order = torch.arange(batch).roll(1)
    positions = torch.zeros(batch * width, dtype=torch.int64)
    made = torch.tensor([width - 1, 1] * batch)[:batch]
    tokens, lens = sampler.accept(
        candidates[order], target[order].flatten(0, 1), positions, slots[order], order + width - 1, made
    )
    assert torch.equal(lens, made.to(torch.int32) + 1)
    for row, length in enumerate(lens.tolist()):
        assert torch.equal(tokens[row, : length - 1], candidates[order][row, 1:length])


def test_the_buffer_grows_with_the_slots_of_rounds_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is made for what the first round names, and at least doubles; a large one is logged."""
    monkeypatch.setattr(sampler, "WORTH_LOGGING", 4 * 2 * 9 * VOCAB)
    drawer, sizes = Sampler(2, torch.bfloat16, "cpu", use_triton=False), []
    with caplog.at_level("INFO"):
        for num_slots in (4, 3, 5, 8, 40):
            requests = [Sampling()]
            drawer.begin_round(batch_info(requests), as_requests(requests), num_slots, num_draws=1)
            drawer.draw(random_logits(1), torch.tensor([2 * num_slots - 1]), torch.tensor([0]))
            sizes.append(drawer._kept.shape)
    assert sizes == [(2 * n, VOCAB) for n in (4, 4, 8, 8, 40)]
    assert drawer._kept.dtype == torch.float32, "distributions"
    assert [record.message for record in caplog.records] == ["What sampled drafts are drawn from is kept in 0.00 GB."]


def test_only_batches_that_sample_without_seeds_are_drawn_from_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A min-p, too; each call has a seed of its own, and a round's seeds are one tensor."""
    calls: list[tuple[str, int, bool]] = []

    def draft(logits: Any, rows: RowParameters, seeds: torch.Tensor, number: int, *rest: Any) -> torch.Tensor:
        calls.append(("draft", number, rows.top_ps is not None))
        assert len(seeds) == 3
        return logits.argmax(-1)

    def accept(candidates: Any, logits: Any, rows: RowParameters, seeds: Any, number: int, *rest: Any) -> Any:
        *_, places, slots, num_drafted = rest
        calls.append(("accept", number, rows.top_ps is not None))
        assert places == 2 and slots.tolist() == [0, 1] and (num_drafted >= 2).all()
        return candidates, torch.ones(len(candidates), dtype=torch.int32)

    monkeypatch.setattr(triton_sampling, "draft", draft)
    monkeypatch.setattr(triton_sampling, "accept", accept)
    drawer = Sampler(2, torch.float32, "cpu", use_triton=True)

    def run_round(requests: list[Sampling], seeds: list[int] | None = None) -> None:
        drawer.begin_round(batch_info(requests, seeds), as_requests(requests), num_slots=2, num_draws=3)
        zeros = torch.zeros(2, dtype=torch.int64)
        for step in range(2):
            drawer.draw(random_logits(2), torch.tensor([0, 2]) + step, zeros)
        drawer.accept(torch.zeros(2, 3, dtype=torch.int64), random_logits(6), zeros.repeat(3))

    run_round([GREEDY, GREEDY])
    assert not calls
    batches = [[Sampling(), GREEDY], [Sampling(min_p=0.1), GREEDY], [Sampling(top_k=4), Sampling(top_p=0.9)]]
    for requests, filtered in zip(batches, (False, True, True), strict=True):
        calls.clear()
        run_round(requests)
        assert calls == [("draft", 0, filtered), ("draft", 1, filtered), ("accept", 2, filtered)]
    with pytest.raises(AssertionError, match="more draws"):
        drawer.draw(random_logits(2), torch.tensor([0, 2]), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("fp32_head", "soft_cap", "expected"),
    [(False, None, torch.bfloat16), (True, None, torch.float32), (False, 30.0, torch.float32)],
)
def test_kept_logits_are_as_wide_as_what_the_model_computes(
    fp32_head: bool, soft_cap: float | None, expected: torch.dtype
) -> None:
    runner: Any = SimpleNamespace(
        dtype=torch.bfloat16,
        server_args=SimpleNamespace(enable_fp32_lm_head=fp32_head),
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(final_logit_softcapping=soft_cap)),
    )
    assert draft_logits_dtype(runner) is expected


# ------------------------------------------------------------------------------- seeds


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """Stand-in for SGLang's Triton hash, which needs a GPU: another function of the same three numbers."""
    mixed = (
        seed.to(torch.int64).view(-1, 1) * 0x9E3779B1
        + positions.to(torch.int64).view(-1, 1) * 0x85EBCA6B
        + col_indices.to(torch.int64).view(1, -1) * 0xC2B2AE35
    )
    for shift in (15, 13, 16):
        mixed = ((mixed ^ (mixed >> shift)) * 0x27D4EB2F) & 0xFFFFFFFFFF
    return (mixed & 0xFFFFFFFF).to(torch.uint32)


@pytest.fixture
def seeded_sampler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's seeded sampler with the stand-in hash, uncompiled."""
    eager = getattr(sglang_sampler.multinomial_with_seed, "_torchdynamo_orig_callable", None)
    assert eager is not None, "multinomial_with_seed is no longer compiled; use it as it is"
    monkeypatch.setattr(sglang_sampler, "murmur_hash32", murmur_hash32)
    monkeypatch.setattr(sglang_sampler, "multinomial_with_seed", eager)
    return sglang_sampler


@pytest.mark.parametrize("name", ["plain", "top_k", "top_p"])
def test_a_seeded_request_gets_the_tokens_of_sglangs_seeded_sampler(name: str, seeded_sampler: Any) -> None:
    """Whatever was drafted: position by position the tokens are a function of logits, seed and position."""
    requests = REQUESTS[name]
    seeds, width = [1, 2, 3], 4
    info = batch_info(requests, seeds)
    logits = random_logits(len(requests) * width, seed=5)
    positions = (torch.tensor([[10], [200], [7]]) + torch.arange(width)).flatten()
    expected = torch.empty(len(requests), width, dtype=torch.int64)
    for b, request in enumerate(requests):
        for i in range(width):
            row = b * width + i
            one = batch_info([request], [seeds[b]])
            probs = torch.softmax(logits[row : row + 1] / one.temperatures, -1)
            if name == "plain":
                drawn = seeded_sampler.sampling_from_probs_torch(
                    probs, one.sampling_seed, positions[row : row + 1]
                )
            else:
                drawn = seeded_sampler.top_k_top_p_min_p_sampling_from_probs_torch(
                    probs,
                    one.top_ks,
                    one.top_ps,
                    one.min_ps,
                    False,
                    one.sampling_seed,
                    positions[row : row + 1],
                )
            expected[b, i] = drawn[0]
    for matching in range(width):
        candidates = torch.cat([torch.zeros(len(requests), 1, dtype=torch.int64), expected[:, :-1]], dim=1)
        candidates[:, matching + 1 :] = -1  # no token
        tokens, accept_lens = reference.accept(candidates, logits, info, positions, None)
        assert accept_lens.tolist() == [matching + 1] * len(requests)
        assert torch.equal(tokens[:, : matching + 1], expected[:, : matching + 1])


def test_seeded_drafts_use_the_noise_of_their_position(seeded_sampler: Any) -> None:
    """A draft from the target's own logits is the target's token, so it is accepted."""
    info = batch_info([Sampling(), Sampling(temperature=2.0)], [11, 12])
    rows = RowParameters.of(info)
    logits = random_logits(2)
    positions = torch.tensor([33, 44])
    tokens, probs = reference.sample_draft(logits, rows, positions)
    assert probs is None
    assert torch.equal(tokens, reference.sample_seeded(logits, rows, positions))
    others = [reference.sample_draft(logits, rows, positions + i)[0].tolist() for i in range(1, 30)]
    assert any(other != tokens.tolist() for other in others), "the position must matter"
    reseeded = RowParameters.of(batch_info([Sampling(), Sampling(temperature=2.0)], [13, 14]))
    changed = [
        reference.sample_draft(logits, reseeded, positions + i)[0].tolist()
        != reference.sample_draft(logits, rows, positions + i)[0].tolist()
        for i in range(30)
    ]
    assert any(changed), "the seed must matter"


@pytest.mark.parametrize(("wanted", "window"), [(1.0, 5), (2.5, 5), (7.02, 9), (9.0, 9)])
def test_simulated_lengths_have_the_wanted_mean(wanted: float, window: int) -> None:
    torch.manual_seed(0)
    candidates = torch.zeros(50_000, window, dtype=torch.int64)
    _, lengths = SimulatedAcceptance(wanted, window).accept(candidates)
    assert lengths.float().mean().item() == pytest.approx(wanted, abs=0.05)


def test_a_simulated_draft_is_as_likely_accepted_at_each_position_and_however_many_are_made() -> None:
    """Else rounds of fewer drafts would yield more, or less, than with a real model, and the planner take them for it."""
    torch.manual_seed(0)
    simulated = SimulatedAcceptance(7.02, 9)
    candidates = torch.zeros(50_000, 9, dtype=torch.int64)
    accepted = simulated.accept(candidates)[1] - 1
    for position in range(8):
        reached = int((accepted >= position).sum())
        assert int((accepted > position).sum()) / reached == pytest.approx(simulated.rate, abs=0.01)
    fewer = simulated.accept(candidates, torch.full((50_000,), 4))[1]
    assert fewer.float().mean().item() == pytest.approx(sum(simulated.rate**drafts for drafts in range(5)), abs=0.05)
