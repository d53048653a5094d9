"""Log-sum-exps of draft queries, kept as softmax references for the verification of the same tokens.

A draft query's log-sum-exp over its selected tokens is close to the one over all tokens. With it as a reference the
verification takes one pass over K instead of two.
"""

from __future__ import annotations

import torch


class LseHints:
    """The hints of all requests, by row of ``req_to_token``.

    Args:
        window: W.

    Attributes:
        last_step: float32 [layers, rows, Hq], what the last draft or plain step wrote, by place in its batch.
    """

    def __init__(
        self, num_layers: int, num_rows: int, window: int, num_q_heads: int, device: torch.device | str
    ) -> None:
        self.last_step = torch.zeros((num_layers, num_rows, num_q_heads), dtype=torch.float32, device=device)
        self._hints = torch.zeros((num_layers, num_rows, window, num_q_heads), dtype=torch.float32, device=device)
        self._offsets = torch.arange(window, device=device)

    def clear(self) -> None:
        """Forget all hints."""
        self.last_step.zero_()
        self._hints.zero_()

    def keep(self, rows: torch.Tensor, offsets: torch.Tensor, live: torch.Tensor) -> None:
        """Keep the last step's values for the verification.

        Args:
            rows, offsets: int64 [B], the requests, and which of the window's tokens each query was.
            live: bool [B]; padding is kept as zeros, since its own log-sum-exp is not a number.
        """
        step = self.last_step[:, : len(rows)]
        self._hints[:, rows, offsets] = torch.where(live.view(1, -1, 1), step, 0.0)

    def of(self, rows: torch.Tensor, num_drafted: torch.Tensor) -> torch.Tensor:
        """The hints of the windows of ``rows`` (int64 [B]): float32 [layers, B, W, Hq].

        The last of the ``num_drafted`` (int [B]) drafts stands in for the tokens that were never draft queries.
        """
        columns = torch.minimum(self._offsets, (num_drafted - 1).clamp(min=0).unsqueeze(1))
        return self._hints[:, rows.unsqueeze(1), columns]
