"""Custom logit processors of tests; engines find this module by its name."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor, ThinkingBudgetLogitProcessor

BUDGET = 12


class ThinkingProcessor(ThinkingBudgetLogitProcessor):
    """SGLang's thinking budget, for a vocabulary of 97 tokens."""

    THINKING_START_TOKEN_ID = 90
    THINKING_END_TOKEN_ID = 91
    NEW_LINE_TOKEN_ID = 92


class CountingProcessor(CustomLogitProcessor):
    """Favours a token that depends on how often the processor was called for its request."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        for row, params in enumerate(custom_param_list or []):
            params["calls"] += 1
            logits[row, 7 * params["calls"] % logits.shape[1]] += 4
        return logits
