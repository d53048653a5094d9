"""Rounds that draft fewer tokens than k: how many are worth it, and how they are verified.

The verify window keeps its W tokens, since the CUDA graph of verification has that shape; what was
not drafted is filled up and never accepted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

#: ``rule(candidates, logits, positions=...)``, see ``sampling.accept``: tokens and accept_lens.
AcceptRule = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class AcceptanceHistory:
    """Which draft length would have been fastest, by the acceptance of recent rounds.

    Draft i + 1 is counted as tried where the i before it were accepted and it was drafted, so shorter
    rounds (and rejections) censor later drafts instead of biasing them (Kaplan-Meier). A draft position
    with little recent evidence is taken to be accepted as often as all drafts are: lengths that were
    not tried for a while are tried again when acceptance rises.

    The best length maximises expected tokens per time, (1 + sum of P(i accepted)) / (1 + n * cost). A
    further draft pays while its P(accepted) / cost exceeds that ratio; as P falls with i, the first
    one that does not pay ends the search.

    Args:
        max_steps: k.
        cost: time of a draft step, relative to a verification.
    """

    #: Weight of a round falls to this much per later round: about the last 20 count.
    DECAY = 0.95
    #: Tries of the pooled rate that a draft position's own tries are added to.
    PRIOR_TRIES = 2.0

    def __init__(self, max_steps: int, cost: float) -> None:
        self.max_steps = max_steps
        self.cost = cost
        self._tried = [0.0] * max_steps
        self._accepted = [0.0] * max_steps

    def add(self, accepted: list[int], drafted: int) -> None:
        """Count one round: the accepted drafts of each request, of ``drafted``."""
        for i in range(self.max_steps):
            reached = sum(count >= i for count in accepted) if i < drafted else 0
            passed = sum(count > i for count in accepted) if i < drafted else 0
            self._tried[i] = self.DECAY * self._tried[i] + reached
            self._accepted[i] = self.DECAY * self._accepted[i] + passed

    def best_length(self) -> int:
        """Tokens to draft, 1 to k; k before anything is known."""
        tried = sum(self._tried)
        pooled = sum(self._accepted) / tried if tried else 1.0
        survival, tokens, time = 1.0, 1.0, 1.0
        for i in range(self.max_steps):
            own = self._accepted[i] + self.PRIOR_TRIES * pooled
            survival *= own / (self._tried[i] + self.PRIOR_TRIES)
            # At least one is drafted, or acceptance would never be seen again.
            if i > 0 and survival * time < self.cost * tokens:
                return i
            tokens += survival
            time += self.cost
        return self.max_steps


def fill_window(candidates: torch.Tensor, window: int) -> torch.Tensor:
    """``candidates`` (int64 [batch, 1 + drafted]) with the last one repeated: int64 [batch, W]."""
    missing = window - candidates.shape[1]
    if missing == 0:
        return candidates
    return torch.cat([candidates, candidates[:, -1:].expand(-1, missing)], dim=1)


def accept_drafted(
    candidates: torch.Tensor, logits: torch.Tensor, positions: torch.Tensor, rule: AcceptRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept by ``rule`` what was drafted of a window of W tokens.

    Args:
        candidates: int64 [batch, 1 + drafted], without the filling.
        logits: [batch * W, vocab]. positions: int64 [batch, W].

    Returns:
        tokens int64 [batch, W] and accept_lens int32 [batch] of at most 1 + drafted.
    """
    batch, width = candidates.shape
    window = positions.shape[1]
    if width < window:
        logits = logits.view(batch, window, -1)[:, :width].flatten(0, 1)
        positions = positions[:, :width]
    tokens, accept_lens = rule(candidates, logits, positions=positions.flatten())
    return fill_window(tokens, window), accept_lens
