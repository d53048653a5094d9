"""Requests of sampling tests, and the check of drawn tokens, for the CPU's path and the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from scipy.stats import chisquare
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import TOP_K_ALL
from tiny_model import Sampling


def batch_info(
    requests: Sequence[Sampling], seeds: Sequence[int] | None = None, vocab: int = 12, device: str = "cpu"
) -> SamplingBatchInfo:
    """SGLang's sampling parameters of a batch, normalised as ``SamplingParams`` does (greedy is top-k 1)."""
    greedy = [r.temperature == 0 for r in requests]
    top_ks = [1 if g else TOP_K_ALL if r.top_k == -1 else r.top_k for r, g in zip(requests, greedy, strict=True)]
    with torch.device(device):
        return SamplingBatchInfo(
            temperatures=torch.tensor([[r.temperature or 1.0] for r in requests]),
            top_ps=torch.tensor([r.top_p for r in requests]),
            top_ks=torch.tensor(top_ks, dtype=torch.int32),
            min_ps=torch.tensor([r.min_p for r in requests]),
            is_all_greedy=all(greedy),
            is_any_greedy=any(greedy),
            need_top_p_sampling=any(r.top_p != 1.0 for r in requests),
            need_top_k_sampling=any(k != TOP_K_ALL for k in top_ks),
            need_min_p_sampling=any(r.min_p > 0 for r in requests),
            vocab_size=vocab,
            sampling_seed=None if seeds is None else torch.tensor(list(seeds)),
            device=device,
        )


def as_requests(requests: Sequence[Sampling]) -> list[Any]:
    """The requests of a batch, as far as the sampler looks at them."""
    top_ks = batch_info(requests).top_ks.tolist()
    return [
        SimpleNamespace(sampling_params=SimpleNamespace(top_k=k, top_p=r.top_p, min_p=r.min_p))
        for k, r in zip(top_ks, requests, strict=True)
    ]


def check_draws(tokens: torch.Tensor, probs: torch.Tensor) -> None:
    """Counts of ``tokens`` against ``probs`` [vocab]: none impossible, p-value above 1e-3 (seeds are fixed)."""
    counts = torch.bincount(tokens.cpu(), minlength=len(probs)).double()
    probs = probs.double().cpu()
    assert (counts[probs == 0] == 0).all(), "an impossible token"
    # Rare tokens together, as chi-square wants no small cells.
    rare = probs * len(tokens) < 5
    expected = torch.cat([probs[~rare], probs[rare].sum()[None]]) * len(tokens)
    found = torch.cat([counts[~rare], counts[rare].sum()[None]])
    full = expected > 0
    if full.sum() == 1:
        return
    p_value = chisquare(found[full].numpy(), (expected / expected.sum() * found.sum())[full].numpy()).pvalue
    assert p_value > 1e-3, "another distribution"
