"""Short sequences that a tiny random model samples, and the check that they follow the target's distribution.

The target's exact sequence probabilities are computed by transformers (tiny_model.py). The check is Pearson's chi-square
over sequences, rare ones merged until each cell expects 10 or more. It passes at a p-value of at least ``BOUND``. An
engine's random seed is fixed, but the order in which requests arrive is not, so this bound is what keeps the tests from
failing by chance: once in 10^6 runs of a check.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from scipy.stats import chi2
from tiny_model import VOCAB, Sampling

BOUND = 1e-6
NUM_STEPS = 3
LENGTH = 4

#: Sampling parameters and prompt length of each kind of request.
KINDS: dict[str, tuple[Sampling, int]] = {
    "temperature 1": (Sampling(), 60),
    "top_p": (Sampling(top_p=0.8), 45),
    "top_k": (Sampling(temperature=1.3, top_k=3), 33),
    "min_p": (Sampling(temperature=0.9, min_p=0.1), 52),
    "all filters": (Sampling(temperature=1.2, top_k=5, top_p=0.9, min_p=0.02), 41),
    "greedy": (Sampling(temperature=0.0), 57),
    "frequency penalty": (Sampling(frequency_penalty=2.0), 38),
    "presence penalty": (Sampling(presence_penalty=-1.5, top_p=0.9), 50),
    "repetition penalty": (Sampling(repetition_penalty=0.5), 47),
    # The first round's window has a row in which the text must not end, and rows in which it may.
    "min_new_tokens": (Sampling(min_new_tokens=2, stop_token_ids=(1, 4)), 43),
}


def prompt_of(kind: str) -> list[int]:
    """A fixed random prompt of the kind's length."""
    generator = torch.Generator().manual_seed(list(KINDS).index(kind))
    return torch.randint(0, VOCAB, (KINDS[kind][1],), generator=generator).tolist()


def engine_args(checkpoint: Path, **more: Any) -> dict[str, Any]:
    return {
        "model_path": str(checkpoint),
        "device": "cpu",
        "dtype": "float32",  # "auto" would make it half precision
        "skip_tokenizer_init": True,
        "speculative_algorithm": "SPARSESPEC",
        "sparsespec_speculate": "always",
        "speculative_num_steps": NUM_STEPS,
        # One selected token and the tail: far less than the prompts.
        "sparsespec_min_budget": NUM_STEPS + 2,
        "sparsespec_budget_ratio": 0.01,
        "random_seed": 1,
        "max_running_requests": 256,
        "max_total_tokens": 40_000,
        "log_level": "error",
        **more,
    }


def p_value(found: Counter[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> float:
    """Chi-square p-value of sequence counts; 0 if an impossible sequence occurred."""
    if not set(found) <= set(exact):
        return 0.0
    total = sum(found.values())
    cells: list[list[float]] = [[0.0, 0.0]]  # expected, observed
    for sequence in sorted(exact, key=lambda s: -exact[s]):
        if cells[-1][0] >= 10:
            cells.append([0.0, 0.0])
        cells[-1][0] += exact[sequence] * total
        cells[-1][1] += found[sequence]
    if cells[-1][0] < 10:
        expected, observed = cells.pop()
        cells[-1][0] += expected
        cells[-1][1] += observed
    assert len(cells) > 10, "too few samples to tell distributions apart"
    statistic = sum((observed - expected) ** 2 / expected for expected, observed in cells)
    return float(chi2.sf(statistic, len(cells) - 1))
