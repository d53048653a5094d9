"""What tests of sampling compare with: the filters' definitions, and other implementations of filters and of acceptance."""

from __future__ import annotations

import torch

from sglang_sparsespec.sampling.reference import final_distribution, last_possible

NO_TOP_K = 1 << 30
INF = float("inf")


def kept_tokens(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> torch.Tensor:
    """bool [vocab], which tokens of a row the filters of SGLang's sampler on CUDA keep, token by token in float64.

    Without a min-p, top-k and top-p look at the unfiltered distribution. With one, top-p looks at what top-k leaves.

    Args:
        logits: [vocab].

    Raises:
        AssertionError: a token is so near the edge of a filter that rounding may decide.
    """
    probs = torch.softmax(logits.double() / temperature, -1)
    likelier = logits.unsqueeze(0) > logits.unsqueeze(1)
    in_top_k = likelier.sum(1) < top_k
    mass = (likelier * probs).sum(1)
    wanted = top_p * probs[in_top_k].sum() if min_p > 0 else torch.tensor(top_p, dtype=torch.float64)
    assert top_p >= 1 or ((mass - wanted).abs() > 1e-6)[in_top_k].all(), "a case at the edge of top-p"
    ratios = probs / probs.max()
    assert min_p <= 0 or ((ratios / min_p - 1).abs() > 1e-5)[logits < logits.max()].all(), "a case at the edge of min-p"
    return in_top_k & ((mass < wanted) | (top_p >= 1)) & ((ratios >= min_p) | (logits == logits.max()))


def filtered_probabilities(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> torch.Tensor:
    """The distribution that SGLang's sampler draws from on CUDA, float64 [vocab]; arguments as :func:`kept_tokens`."""
    kept = kept_tokens(logits, temperature, top_k, top_p, min_p)
    return torch.softmax(logits.double().masked_fill(~kept, -INF) / temperature, -1)


def flashinfer_probabilities(
    probs: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor | None
) -> torch.Tensor:
    """What SGLang's sampler makes of a batch's distributions by FlashInfer's kernels, float32 [rows, vocab] (CUDA).

    Args:
        probs: float32 [rows, vocab].
        min_ps: float32 [rows]: the chain of a batch with a min-p; None: the joint filter of one without.
    """
    from flashinfer.sampling import top_k_renorm_probs, top_p_renorm_probs

    if min_ps is None:
        by_p = top_p_renorm_probs(probs, top_ps) > 0
        probs = torch.where(by_p, top_k_renorm_probs(probs, top_ks), 0.0)
    else:
        probs = top_p_renorm_probs(top_k_renorm_probs(probs, top_ks), top_ps)
        # As ``MinPSamplingFromProbKernel``.
        probs = torch.where(probs >= probs.amax(-1, keepdim=True) * min_ps.view(-1, 1), probs, 0.0)
    return probs / probs.sum(-1, keepdim=True)


def accept_by_rejection_sglang(
    candidates: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    coins: torch.Tensor,
    final_coins: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``reference.accept_by_rejection`` by SGLang's Triton kernel (CUDA, or Triton's interpreter)."""
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
    # The kernel answers the vocabulary's last token where rounding carries the coin past the sum, or where no residual is
    # left: a token that the target may never give.
    at = accepted.long().unsqueeze(-1)
    final = final_distribution(target_probs, draft_probs, accepted.long())
    bonus = tokens.gather(1, at)
    possible = final.gather(1, bonus) > 0
    tokens.scatter_(1, at, torch.where(possible, bonus, last_possible(final).unsqueeze(-1)))
    return tokens, accepted + 1
