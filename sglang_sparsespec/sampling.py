"""Drafting and acceptance: exact for greedy, seeded and random sampling.

- Greedy rows accept while the draft is the target's argmax.
- Seeded rows (``--enable-deterministic-inference``): SGLang's sampler is a function of
  (probabilities, seed, position), so the target's token at each position is known; drafts
  use the same noise on the draft's probabilities and are accepted while they are equal.
  The output is the one plain SGLang gives for that seed.
- Other rows: rejection sampling (Leviathan et al. 2023; Chen et al. 2023): accept draft x
  with probability min(1, p(x) / q(x)), else sample from max(p - q, 0); after k accepted
  drafts sample from p. Any draft distribution q keeps the target's distribution.

Logits are float32 here: SGLang's ``LogitsProcessor`` converts what the head computed, into a static buffer where there
is one. On CUDA, batches without min-p and seeds are drafted and accepted from them (``logit_draws``), and no probability is
written; other batches, and the CPU, go through distributions of torch and FlashInfer. (In staggered rounds each
request of a batch goes its own way: ``window_sampling``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sglang_sparsespec.logit_draws import LogitDraws, with_min_p

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo


@dataclass(frozen=True)
class SamplingRows:
    """Sampling parameters of ``rows`` logits rows, each request's repeated ``repeats`` times.

    Attributes:
        temperatures: float [rows, 1]; 1 for greedy rows.
        top_ks: int [rows]; 1 for greedy rows.
        top_ps, min_ps: float [rows].
        seeds: int [rows] or None.
        is_all_greedy, need_top_k, need_top_p, need_min_p: over the whole batch.
    """

    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor
    seeds: torch.Tensor | None
    is_all_greedy: bool
    need_top_k: bool
    need_top_p: bool
    need_min_p: bool

    @classmethod
    def of(cls, info: SamplingBatchInfo, repeats: int = 1, index: torch.Tensor | None = None) -> SamplingRows:
        """Expand SGLang's per-request parameters to ``repeats`` rows per request.

        Args:
            index: int64 [requests], the batch's requests to take and their order; None: all.
        """

        def expand(tensor: torch.Tensor | None) -> Any:
            if tensor is not None and index is not None:
                tensor = tensor[index]
            if tensor is None or repeats == 1:
                return tensor
            return torch.repeat_interleave(tensor, repeats, dim=0)

        return cls(
            temperatures=expand(info.temperatures),
            top_ks=expand(info.top_ks),
            top_ps=expand(info.top_ps),
            min_ps=expand(info.min_ps),
            seeds=expand(info.sampling_seed),
            is_all_greedy=info.is_all_greedy,
            need_top_k=info.need_top_k_sampling,
            need_top_p=info.need_top_p_sampling,
            need_min_p=info.need_min_p_sampling,
        )


def target_probabilities(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """The distribution that SGLang's sampler draws from, float32 [rows, vocab].

    Same filters in the same order as ``sampler.Sampler``: on CPU
    ``top_k_top_p_min_p_sampling_from_probs_torch``, on CUDA FlashInfer's joint top-k and
    top-p, or its chain of renormalisations when min-p is in use.

    Args:
        logits: [rows, vocab], not changed.
    """
    probs = torch.softmax(logits.float() / rows.temperatures, dim=-1)
    if not (rows.need_top_k or rows.need_top_p or rows.need_min_p):
        return probs
    if probs.is_cuda:
        return _filter_flashinfer(probs, rows)
    return _filter_torch(probs, rows)


def _filter_torch(probs: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    sorted_probs, order = probs.sort(dim=-1, descending=True)
    mass_before = sorted_probs.cumsum(dim=-1) - sorted_probs
    rank = torch.arange(probs.shape[-1], device=probs.device)
    keep = (rank < rows.top_ks.view(-1, 1)) & (mass_before <= rows.top_ps.view(-1, 1))
    if rows.need_min_p:
        keep &= sorted_probs >= sorted_probs[:, :1] * rows.min_ps.view(-1, 1)
    kept = torch.where(keep, sorted_probs, 0.0)
    kept /= kept.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, order, kept)


def _filter_flashinfer(probs: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    from flashinfer.sampling import top_k_renorm_probs, top_p_renorm_probs

    if rows.need_min_p:
        probs = top_k_renorm_probs(probs, rows.top_ks)
        probs = top_p_renorm_probs(probs, rows.top_ps)
        probs = torch.where(probs >= probs.amax(-1, keepdim=True) * rows.min_ps.view(-1, 1), probs, 0.0)
    else:
        # "joint": both filters look at the unfiltered distribution.
        by_p = top_p_renorm_probs(probs, rows.top_ps) > 0 if rows.need_top_p else True
        if rows.need_top_k:
            probs = top_k_renorm_probs(probs, rows.top_ks)
        if rows.need_top_p:
            probs = torch.where(by_p, probs, 0.0)
    return probs / probs.sum(dim=-1, keepdim=True)


def make_greedy_rows_exact(probs: torch.Tensor, logits: torch.Tensor, rows: SamplingRows) -> None:
    """Put all mass of greedy rows (top-k 1) on the argmax, in place, whatever ties exist."""
    greedy = (rows.top_ks == 1).view(-1, 1)
    one_hot = torch.zeros_like(probs).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    torch.where(greedy, one_hot, probs, out=probs)


def sample_seeded(logits: torch.Tensor, rows: SamplingRows, positions: torch.Tensor) -> torch.Tensor:
    """SGLang's seeded sampler: int64 [rows], a function of logits, seed and position.

    Args:
        logits: [rows, vocab].
        positions: int64 [rows], position of each row's input token.
    """
    from sglang.srt.layers.sampler import (
        sampling_from_probs_torch,
        top_k_top_p_min_p_sampling_from_probs_torch,
    )

    probs = torch.softmax(logits.float() / rows.temperatures, dim=-1)
    if not (rows.need_top_k or rows.need_top_p or rows.need_min_p):
        return sampling_from_probs_torch(probs, sampling_seed=rows.seeds, positions=positions).long()
    return top_k_top_p_min_p_sampling_from_probs_torch(
        probs, rows.top_ks, rows.top_ps, rows.min_ps, rows.need_min_p, rows.seeds, positions
    ).long()


def sample_draft(
    logits: torch.Tensor, rows: SamplingRows, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sample one draft token per request.

    Args:
        logits: [batch, vocab] of a draft step.
        positions: int64 [batch], position of the step's input token.

    Returns:
        tokens int64 [batch], and the distribution they were drawn from (float32 [batch,
        vocab]) where acceptance needs it, else None.
    """
    if rows.is_all_greedy:
        return logits.argmax(dim=-1), None
    if rows.seeds is not None:
        return sample_seeded(logits, rows, positions), None
    probs = target_probabilities(logits, rows)
    make_greedy_rows_exact(probs, logits, rows)
    # Exponential race: as torch.multinomial, without its host-side checks.
    noise = torch.empty_like(probs).exponential_(1.0)
    return (probs / noise).argmax(dim=-1), probs


def made_drafts(num_drafted: torch.Tensor, width: int) -> torch.Tensor:
    """bool [batch, W - 1], which drafts of the windows were made: the first ``num_drafted`` (int [batch])."""
    return torch.arange(width - 1, device=num_drafted.device) < num_drafted.unsqueeze(1)


def accept_matching(
    candidates: torch.Tensor, target: torch.Tensor, num_drafted: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept drafts while they equal the target's tokens.

    Args:
        candidates: int64 [batch, W], the last committed token and k drafts.
        target: int64 [batch, W], the target's token after each of them.
        num_drafted: int [batch], how many drafts were made; None: all k.

    Returns:
        tokens int64 [batch, W] whose first ``accept_lens`` are the output, and accept_lens
        int32 [batch], drafts plus the bonus token (1 to W).
    """
    matches = candidates[:, 1:] == target[:, :-1]
    if num_drafted is not None:
        matches &= made_drafts(num_drafted, candidates.shape[1])
    return target, matches.to(torch.int32).cumprod(dim=1).sum(dim=1, dtype=torch.int32) + 1


def _final_distribution(
    target_probs: torch.Tensor, draft_probs: torch.Tensor, accepted: torch.Tensor
) -> torch.Tensor:
    """What the token after the accepted drafts is drawn from, unnormalised: float32 [batch, vocab].

    Args:
        target_probs: float32 [batch, W, vocab]. draft_probs: float32 [batch, k, vocab].
        accepted: int [batch], accepted drafts.
    """
    batch, width = target_probs.shape[:2]
    row = torch.arange(batch, device=target_probs.device)
    final = target_probs[row, accepted]
    residual = (final - draft_probs[row, accepted.clamp(max=width - 2)]).clamp(min=0)
    # p == q up to rounding leaves no residual; then the target itself is the residual.
    use_residual = (accepted < width - 1) & (residual.sum(dim=-1) > 0)
    return torch.where(use_residual.unsqueeze(-1), residual, final)


def _last_possible(final: torch.Tensor) -> torch.Tensor:
    """Last token with mass in each row of ``final``: int64 [batch]."""
    return final.shape[-1] - 1 - (final > 0).flip(-1).to(torch.int8).argmax(dim=-1)


def accept_by_rejection(
    candidates: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    coins: torch.Tensor,
    final_coins: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rejection sampling of one chain per request, in torch.

    Args:
        candidates: int64 [batch, W].
        target_probs: float32 [batch, W, vocab].
        draft_probs: float32 [batch, k, vocab].
        coins: float32 [batch, k] in [0, 1).
        final_coins: float32 [batch] in [0, 1), for the token after the accepted drafts.

    Returns:
        as :func:`accept_matching`.
    """
    batch, width = candidates.shape
    drafts = candidates[:, 1:].unsqueeze(-1)
    p = target_probs[:, :-1].gather(-1, drafts).squeeze(-1)
    q = draft_probs.gather(-1, drafts).squeeze(-1)
    accepted = (coins * q < p).to(torch.int32).cumprod(dim=1).sum(dim=1)
    final = _final_distribution(target_probs, draft_probs, accepted)
    cdf = final.double().cumsum(dim=-1)
    bonus = torch.searchsorted(cdf, (final_coins.double() * cdf[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    # Rounding may carry a coin past the last token with mass.
    bonus = torch.minimum(bonus, _last_possible(final))
    tokens = torch.cat([candidates[:, 1:], candidates[:, :1]], dim=1)
    tokens.scatter_(1, accepted.unsqueeze(-1).long(), bonus.unsqueeze(-1))
    return tokens, accepted.to(torch.int32) + 1


def accept_by_rejection_sglang(
    candidates: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    coins: torch.Tensor,
    final_coins: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`accept_by_rejection` by SGLang's Triton kernel (CUDA)."""
    from sglang.kernels.ops.speculative.reject_sampling import chain_speculative_sampling_triton

    batch, width = candidates.shape
    device = candidates.device
    index = torch.arange(batch * width, device=device).view(batch, width)
    predicts = torch.zeros(batch * width, dtype=torch.int32, device=device)
    accept_index = torch.full((batch, width), -1, dtype=torch.int32, device=device)
    accepted = torch.empty(batch, dtype=torch.int32, device=device)
    unused = torch.full((batch, width), -1, dtype=torch.int64, device=device)
    chain_speculative_sampling_triton(
        predicts=predicts,
        accept_index=accept_index,
        accept_token_num=accepted,
        candidates=candidates,
        retrive_index=index,
        retrive_next_token=unused,
        retrive_next_sibling=unused,
        uniform_samples=coins,
        uniform_samples_for_final_sampling=final_coins,
        target_probs=target_probs,
        draft_probs=draft_probs,
        threshold_single=1.0,
        threshold_acc=1.0,
        deterministic=True,
    )
    tokens = predicts.view(batch, width).long()
    # The kernel answers the vocabulary's last token where rounding carries the coin past the
    # sum, or where no residual is left: a token that the target may never give.
    at = accepted.long().unsqueeze(-1)
    final = _final_distribution(target_probs, draft_probs, accepted.long())
    bonus = tokens.gather(1, at)
    possible = final.gather(1, bonus) > 0
    tokens.scatter_(1, at, torch.where(possible, bonus, _last_possible(final).unsqueeze(-1)))
    return tokens, accepted + 1


def accept(
    candidates: torch.Tensor,
    logits: torch.Tensor,
    info: SamplingBatchInfo,
    positions: torch.Tensor,
    draft_probs: torch.Tensor | None,
    index: torch.Tensor | None = None,
    num_drafted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept drafts of a verified window.

    Args:
        candidates: int64 [batch, W].
        logits: [batch * W, vocab] of the verification, after biases and masks.
        info: SGLang's sampling parameters of the batch.
        positions: int64 [batch * W].
        draft_probs: float32 [batch, k, vocab] from :func:`sample_draft`, or None if it gave none.
        index: int64 [batch], which of ``info``'s requests these are; None: all of them.
        num_drafted: int [batch], how many drafts were made; None: all k.

    Returns:
        as :func:`accept_matching`.
    """
    batch, width = candidates.shape
    if info.is_all_greedy:
        return accept_matching(candidates, logits.argmax(dim=-1).view(batch, width), num_drafted)
    rows = SamplingRows.of(info, repeats=width, index=index)
    if rows.seeds is not None:
        target = sample_seeded(logits, rows, positions).view(batch, width)
        return accept_matching(candidates, target, num_drafted)
    assert draft_probs is not None
    probs = target_probabilities(logits, rows)
    make_greedy_rows_exact(probs, logits, rows)
    coins = torch.rand((batch, width - 1), device=probs.device)
    if num_drafted is not None:
        # A coin that is no number accepts nothing (coin * q < p is false), and without draft mass the
        # residual is the target: a window of fewer drafts ends with a token of the target.
        made = made_drafts(num_drafted, width)
        coins = torch.where(made, coins, torch.nan)
        draft_probs = torch.where(made.unsqueeze(-1), draft_probs, 0.0)
    final_coins = torch.rand((batch,), device=probs.device)
    rule = accept_by_rejection_sglang if probs.is_cuda else accept_by_rejection
    return rule(candidates, probs.view(batch, width, -1), draft_probs, coins, final_coins)


def draft_logits_dtype(model_runner: ModelRunner) -> torch.dtype:
    """The narrowest type that holds the model's logits as they are.

    They are computed in the model's type, unless the head or a soft cap after it works in float32. (A type that rounds
    would be lossless as well: drafts are drawn from what is kept. But fewer would be accepted.)
    """
    config = model_runner.model_config.hf_text_config
    in_float32 = model_runner.server_args.enable_fp32_lm_head or getattr(config, "final_logit_softcapping", None)
    return torch.float32 if in_float32 else model_runner.dtype


class DraftSampler:
    """Draws the drafts of a round, keeps what they were drawn from, and accepts them.

    Args:
        logits_dtype: see :func:`draft_logits_dtype`.
        use_triton: see ``LogitDraws``; a batch with a min-p goes through distributions as a whole.

    Attributes:
        rows: the sampling parameters of the round.
    """

    def __init__(self, logits_dtype: torch.dtype, use_triton: bool) -> None:
        self.logits_dtype = logits_dtype
        self.use_triton = use_triton
        # Draft logits of all rounds: a graph's are overwritten by its next replay, before they can be compared.
        self._buffer = torch.empty(0, dtype=logits_dtype)
        self._probs: list[torch.Tensor] = []
        self._placed: torch.Tensor | None = None

    def begin_round(self, info: SamplingBatchInfo, reqs: Sequence[Req], num_steps: int) -> None:
        """Start a round of a batch with the parameters ``info``; forgets the round before.

        Args:
            num_steps: drafts per request; with :meth:`draw_at` the places of a request, at least as many.
        """
        self.info = info
        self.num_steps = num_steps
        self.rows = SamplingRows.of(info)
        self._step = 0
        self._probs = []
        self._placed = None
        use_triton = self.use_triton and not with_min_p(info, reqs)
        self._draws = LogitDraws.of(use_triton, info, reqs, num_steps + 1)

    def draw(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Draft tokens int64 [batch] of the next step; arguments as :func:`sample_draft`."""
        if self._draws is not None:
            return self._draw_from_logits(self._draws, logits, self.rows, logits.shape[0], None)
        tokens, probs = sample_draft(logits, self.rows, positions)
        if probs is not None:
            self._probs.append(probs)
        return tokens

    def draw_at(self, logits: torch.Tensor, positions: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Draw tokens at several places of each request; what was drawn there before is forgotten.

        Args:
            logits: [batch * n, vocab]. positions: int64 [batch * n].
            places: int64 [batch, n], below the round's ``num_steps`` and different in each row.

        Returns:
            int64 [batch, n].
        """
        batch, count = places.shape
        parameters = SamplingRows.of(self.info, repeats=count)
        requests = torch.arange(batch, device=places.device).unsqueeze(1)
        if self._draws is not None:
            slots = (requests * self.num_steps + places).flatten()
            tokens = self._draw_from_logits(self._draws, logits, parameters, batch, slots)
        else:
            tokens, probs = sample_draft(logits, parameters, positions)
            if probs is not None:
                if self._placed is None:
                    self._placed = probs.new_zeros(batch, self.num_steps, probs.shape[-1])
                self._placed[requests, places] = probs.view(batch, count, -1)
        return tokens.view(batch, count)

    def accept(
        self,
        candidates: torch.Tensor,
        logits: torch.Tensor,
        positions: torch.Tensor,
        num_drafted: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Accept the round's drafts; arguments and result as :func:`accept`."""
        if self._draws is None:
            probs = torch.stack(self._probs, dim=1) if self._probs else self._placed
            if probs is not None:
                probs = probs[:, : candidates.shape[1] - 1]
            return accept(candidates, logits, self.info, positions, probs, num_drafted=num_drafted)
        return self._draws.accept(
            candidates, logits, self.rows, self.num_steps, self._kept, self._lse, None, num_drafted
        )

    def _draw_from_logits(
        self,
        draws: LogitDraws,
        logits: torch.Tensor,
        parameters: SamplingRows,
        batch: int,
        slots: torch.Tensor | None,
    ) -> torch.Tensor:
        vocab = logits.shape[1]
        if self._step == 0:
            self._kept = self._reserve(batch, vocab, logits.device)
            self._lse = torch.empty((batch, self.num_steps), dtype=torch.float32, device=logits.device)
        tokens = draws.draft(logits, parameters, self._step, self._kept, self._lse, slots)
        self._step += 1
        return tokens

    def _reserve(self, batch: int, vocab: int, device: torch.device) -> torch.Tensor:
        """The buffer's [batch, k, vocab]. It is grown by doubling, so that batches of all sizes share one allocation."""
        wanted = batch * self.num_steps * vocab
        if self._buffer.numel() < wanted:
            room = (1 << (batch - 1).bit_length()) * self.num_steps * vocab
            self._buffer = torch.empty(0)  # freed first: the two need not fit together
            self._buffer = torch.empty(room, dtype=self.logits_dtype, device=device)
        return self._buffer[:wanted].view(batch, self.num_steps, vocab)
