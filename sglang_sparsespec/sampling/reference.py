"""Drafting and acceptance in torch, through distributions: the CPU's path, and the oracle of the Triton kernels' tests.

- Greedy rows accept while the draft is the target's argmax.
- Seeded rows (``--enable-deterministic-inference``): SGLang's sampler is a function of (probabilities, seed, position), so
  the target's token at each position is known. Drafts use the same noise on the draft's probabilities and are accepted
  while they are equal. The output is the one that plain SGLang gives for that seed.
- Other rows: rejection sampling (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318): accept draft
  x with probability min(1, p(x) / q(x)), else sample from max(p - q, 0); after k accepted drafts sample from p. Any draft
  distribution q keeps the target's distribution.

Greedy and seeded batches take this path on CUDA, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.sampling.parameters import RowParameters

if TYPE_CHECKING:
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo


def target_probabilities(logits: torch.Tensor, rows: RowParameters) -> torch.Tensor:
    """The distribution that SGLang's sampler draws from on CPU, float32 [rows, vocab].

    Its filters are those of ``top_k_top_p_min_p_sampling_from_probs_torch`` in ``sglang.srt.layers.sampler``: each looks at
    the unfiltered distribution.

    Args:
        logits: [rows, vocab], not changed.
    """
    probs = torch.softmax(logits.float() / rows.temperatures, dim=-1)
    if rows.top_ps is None or rows.min_ps is None:
        return probs
    sorted_probs, order = probs.sort(dim=-1, descending=True)
    mass_before = sorted_probs.cumsum(dim=-1) - sorted_probs
    rank = torch.arange(probs.shape[-1], device=probs.device)
    keep = (rank < rows.top_ks.view(-1, 1)) & (mass_before <= rows.top_ps.view(-1, 1))
    if rows.need_min_p:
        keep &= sorted_probs >= sorted_probs[:, :1] * rows.min_ps.view(-1, 1)
    kept = torch.where(keep, sorted_probs, 0.0)
    kept /= kept.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, order, kept)


def make_greedy_rows_exact(probs: torch.Tensor, logits: torch.Tensor, rows: RowParameters) -> None:
    """Put all mass of greedy rows (top-k 1) on the argmax, in place, whatever ties exist."""
    greedy = (rows.top_ks == 1).view(-1, 1)
    one_hot = torch.zeros_like(probs).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    torch.where(greedy, one_hot, probs, out=probs)


def sample_seeded(logits: torch.Tensor, rows: RowParameters, positions: torch.Tensor) -> torch.Tensor:
    """SGLang's seeded sampler: int64 [rows], a function of logits, seed and position.

    Args:
        logits: [rows, vocab].
        positions: int64 [rows], position of each row's input token.
    """
    from sglang.srt.layers.sampler import sampling_from_probs_torch, top_k_top_p_min_p_sampling_from_probs_torch

    probs = torch.softmax(logits.float() / rows.temperatures, dim=-1)
    if rows.top_ps is None:
        return sampling_from_probs_torch(probs, sampling_seed=rows.seeds, positions=positions).long()
    return top_k_top_p_min_p_sampling_from_probs_torch(
        probs, rows.top_ks, rows.top_ps, rows.min_ps, rows.need_min_p, rows.seeds, positions
    ).long()


def sample_draft(
    logits: torch.Tensor, rows: RowParameters, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sample one draft token per row.

    Args:
        logits: [rows, vocab] of a draft step.
        positions: int64 [rows], position of each row's input token.

    Returns:
        tokens int64 [rows], and the distribution they were drawn from (float32 [rows, vocab]) where acceptance needs it,
        else None.
    """
    if rows.is_all_greedy:
        return logits.argmax(dim=-1), None
    if rows.seeds is not None:
        return sample_seeded(logits, rows, positions), None
    probs = target_probabilities(logits, rows)
    make_greedy_rows_exact(probs, logits, rows)
    # An exponential race draws as torch.multinomial does, without its host-side checks.
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
        tokens int64 [batch, W] whose first ``accept_lens`` are the output, and accept_lens int32 [batch], drafts plus the
        bonus token (1 to W).
    """
    matches = candidates[:, 1:] == target[:, :-1]
    if num_drafted is not None:
        matches &= made_drafts(num_drafted, candidates.shape[1])
    return target, matches.to(torch.int32).cumprod(dim=1).sum(dim=1, dtype=torch.int32) + 1


def final_distribution(
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


def last_possible(final: torch.Tensor) -> torch.Tensor:
    """Last token with mass in each row of ``final`` (float32 [batch, vocab]): int64 [batch]."""
    return final.shape[-1] - 1 - (final > 0).flip(-1).to(torch.int8).argmax(dim=-1)


def accept_by_rejection(
    candidates: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    coins: torch.Tensor,
    final_coins: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rejection sampling of one chain per request.

    Args:
        candidates: int64 [batch, W].
        target_probs: float32 [batch, W, vocab].
        draft_probs: float32 [batch, k, vocab].
        coins: float32 [batch, k] in [0, 1).
        final_coins: float32 [batch] in [0, 1), for the token after the accepted drafts.

    Returns:
        as :func:`accept_matching`.
    """
    drafts = candidates[:, 1:].unsqueeze(-1)
    p = target_probs[:, :-1].gather(-1, drafts).squeeze(-1)
    q = draft_probs.gather(-1, drafts).squeeze(-1)
    accepted = (coins * q < p).to(torch.int32).cumprod(dim=1).sum(dim=1)
    final = final_distribution(target_probs, draft_probs, accepted)
    cdf = final.double().cumsum(dim=-1)
    bonus = torch.searchsorted(cdf, (final_coins.double() * cdf[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    # Rounding may carry a coin past the last token with mass.
    bonus = torch.minimum(bonus, last_possible(final))
    tokens = torch.cat([candidates[:, 1:], candidates[:, :1]], dim=1)
    tokens.scatter_(1, accepted.unsqueeze(-1).long(), bonus.unsqueeze(-1))
    return tokens, accepted.to(torch.int32) + 1


def accept(
    candidates: torch.Tensor,
    logits: torch.Tensor,
    info: SamplingBatchInfo,
    positions: torch.Tensor,
    draft_probs: torch.Tensor | None,
    requests: torch.Tensor | None = None,
    num_drafted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept drafts of a verified window.

    Args:
        candidates: int64 [batch, W].
        logits: [batch * W, vocab] of the verification, after biases and masks.
        info: SGLang's sampling parameters of the batch.
        positions: int64 [batch * W].
        draft_probs: float32 [batch, k, vocab] from :func:`sample_draft`, or None if it gave none.
        requests: int64 [batch], which of ``info``'s requests these are; None: all of them.
        num_drafted: int [batch], how many drafts were made; None: all k.

    Returns:
        as :func:`accept_matching`.
    """
    batch, width = candidates.shape
    if info.is_all_greedy:
        return accept_matching(candidates, logits.argmax(dim=-1).view(batch, width), num_drafted)
    rows = RowParameters.of(info, repeats=width, requests=requests)
    if rows.seeds is not None:
        target = sample_seeded(logits, rows, positions).view(batch, width)
        return accept_matching(candidates, target, num_drafted)
    assert draft_probs is not None
    probs = target_probabilities(logits, rows)
    make_greedy_rows_exact(probs, logits, rows)
    coins = torch.rand((batch, width - 1), device=probs.device)
    if num_drafted is not None:
        # A coin that is no number accepts nothing (coin * q < p is false), and without draft mass the residual is the
        # target: a window of fewer drafts ends with a token of the target.
        made = made_drafts(num_drafted, width)
        coins = torch.where(made, coins, torch.nan)
        draft_probs = torch.where(made.unsqueeze(-1), draft_probs, 0.0)
    final_coins = torch.rand((batch,), device=probs.device)
    return accept_by_rejection(candidates, probs.view(batch, width, -1), draft_probs, coins, final_coins)
