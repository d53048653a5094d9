"""Simulated acceptance, for throughput measurements with dummy weights only.

SGLang's environment variable ``SGLANG_SIMULATE_ACC_LEN`` sets the mean accept length (drafts
plus bonus token, as in SGLang's own algorithms). The text is meaningless then; a number measured
so must be called simulated. Lengths are drawn per request on the device, so that acceptance stays
as uneven as real acceptance is, and no host synchronisation is added.

Each draft is accepted with the same probability if the one before it was, as was measured with real weights (the rates
by position in the records of ``benchmarks/results``). So a round with fewer drafts yields what it would with a real model,
and the planner gains nothing from the simulation.
"""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)


def rate_for(accept_length: float, window: int) -> float:
    """The probability of each draft, on condition that those before it are accepted, that gives a mean accept length.

    Args:
        accept_length: mean of drafts plus bonus token, in [1, window]: 1 + rate + rate^2 + ... + rate^(window - 1).
        window: W.
    """
    low, high = 0.0, 1.0
    for _ in range(50):
        rate = (low + high) / 2
        if sum(rate**drafts for drafts in range(window)) < accept_length:
            low = rate
        else:
            high = rate
    return high


class SimulatedAcceptance:
    """Draws accept lengths whose mean is ``accept_length`` where all drafts are made.

    Args:
        accept_length: mean of drafts plus bonus token, in [1, window].
        window: W.

    Attributes:
        rate: see :func:`rate_for`.

    Raises:
        ValueError: ``accept_length`` is out of range.
    """

    def __init__(self, accept_length: float, window: int) -> None:
        if not 1 <= accept_length <= window:
            raise ValueError(
                f"SGLANG_SIMULATE_ACC_LEN={accept_length} must be between 1 and {window} "
                "(--speculative-num-draft-tokens); unset it to serve real text."
            )
        self.rate = rate_for(accept_length, window)
        self.accept_length = accept_length
        logger.warning(
            "SGLANG_SIMULATE_ACC_LEN=%g: acceptance is SIMULATED and the output is not the model's; "
            "for performance measurements with dummy weights only.",
            accept_length,
        )

    @classmethod
    def from_environment(cls, window: int) -> SimulatedAcceptance | None:
        """None unless SGLang's variable is set to a positive number."""
        from sglang.srt.environ import envs

        accept_length = float(envs.SGLANG_SIMULATE_ACC_LEN.get())
        return cls(accept_length, window) if accept_length > 0 else None

    def accept(
        self, candidates: torch.Tensor, num_drafted: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Accept drafts up to the first that a coin of :attr:`rate` rejects, but no more than were made.

        Args:
            candidates: int64 [batch, W].
            num_drafted: int [batch], how many drafts were made; None: all k.

        Returns:
            as ``reference.accept_matching``; the bonus token is the first candidate again.
        """
        batch, width = candidates.shape
        coins = torch.rand((batch, width - 1), device=candidates.device)
        accept_lens = (coins < self.rate).cumprod(dim=1, dtype=torch.int32).sum(dim=1, dtype=torch.int32) + 1
        if num_drafted is not None:
            accept_lens = torch.minimum(accept_lens, num_drafted.to(torch.int32) + 1)
        return torch.cat([candidates[:, 1:], candidates[:, :1]], dim=1), accept_lens
