"""Draft policies: which tokens a draft step attends to.

One class per value of ``--sparsespec-draft-policy``. Whatever a policy does, the output is the target's: the policy
decides how many drafts are accepted, not which tokens come out. What is known of a policy without a device (its default
budget, its help text) is in ``settings.POLICIES``.
"""

from __future__ import annotations

import torch

from sglang_sparsespec.attention_backend.page_table import SelectionTable, num_selected
from sglang_sparsespec.settings import POLICIES, Settings


class DraftPolicy:
    """Base of the policies: selects by scores (PillarAttn, arXiv 2512.01278).

    Attributes:
        facts: the policy's entry in ``settings.POLICIES``.
        memory: a selected position's score is its score by the last verification, and this share of the score that it was
            selected by before. One window's queries are few: what is read again and again is seen by several.

    Args:
        window: W = k + 1.
    """

    memory = 0.6

    def __init__(self, settings: Settings, window: int) -> None:
        self.settings = settings
        self.facts = POLICIES[settings.draft_policy]
        self.window = window

    def capacity(self, max_context: int) -> int:
        """Entries that a selection may have in requests of up to ``max_context`` tokens."""
        return SelectionTable.capacity_for(max_context, self.settings.budget_ratio, self.settings.min_budget)

    def longest_list(self, max_context: int) -> int:
        """Tokens that a draft query of the longest request attends to: its selection and its tail."""
        return self.capacity(max_context) + 2 * self.window

    def plan(
        self, lengths: torch.Tensor, capacity: int, least_budget: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sizes of the next selections, on the device.

        Args:
            lengths: int [batch], tokens before the verify window (0 for padding).
            capacity: of the table.
            least_budget: float [], tokens.

        Returns:
            counts int32 [batch] and tail starts int [batch]: the selection is ``counts`` of the positions below the tail
            start, and draft queries attend to all tokens from there on besides.
        """
        return self._budget(lengths, capacity, least_budget), lengths

    def _budget(self, lengths: torch.Tensor, capacity: int, least_budget: torch.Tensor) -> torch.Tensor:
        return num_selected(lengths, self.settings.budget_ratio, least_budget, self.window, capacity)

    def write(
        self, lengths: torch.Tensor, counts: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Write selections that do not depend on scores; arguments as in :func:`write_pattern`."""


class Window(DraftPolicy):
    """The newest tokens: the control of the other policies, with the same budget."""

    def write(
        self, lengths: torch.Tensor, counts: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
    ) -> None:
        write_pattern(lengths, counts, rows, 0, positions)


class Streaming(DraftPolicy):
    """Attention sinks and the newest tokens (StreamingLLM, arXiv 2309.17453; MagicDec, arXiv 2408.11049).

    MagicDec keeps a window of fixed size; here it grows with the request, as every budget does.
    """

    def write(
        self, lengths: torch.Tensor, counts: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
    ) -> None:
        write_pattern(lengths, counts, rows, self.settings.num_sinks, positions)


class Vegas(DraftPolicy):
    """The best tokens by the last verification, and the most recent ones (Vegas, arXiv 2602.07223).

    A share of the budget goes to the newest tokens before the verify window. Vegas ranks by the window's first and last
    query and has one list for all heads of a layer. Here scores are PillarAttn's, the mean over the window's queries, and
    each KV head has its own list.
    """

    memory = 0.0
    #: One token in so many of a budget is there for being recent.
    RECENT_PART = 4

    def plan(
        self, lengths: torch.Tensor, capacity: int, least_budget: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        counts = self._budget(lengths, capacity, least_budget)
        recent = counts // self.RECENT_PART
        # The tail begins that much earlier, so the selection cannot spend its share on the same tokens.
        return counts - recent, lengths - recent


class Full(DraftPolicy):
    """Full attention: k + 1 tokens a round at the price of plain decoding. Nothing is selected; the tail begins at 0."""

    def capacity(self, max_context: int) -> int:
        return 1

    def longest_list(self, max_context: int) -> int:
        return max_context

    def plan(
        self, lengths: torch.Tensor, capacity: int, least_budget: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nothing = torch.zeros_like(lengths)
        return nothing.to(torch.int32), nothing


#: ``triforce`` selects as ``pillar`` does; its n-gram proposals are a matter of rounds (``rounds.ngram``).
CLASSES: dict[str, type[DraftPolicy]] = {
    "pillar": DraftPolicy,
    "triforce": DraftPolicy,
    "window": Window,
    "streaming": Streaming,
    "vegas": Vegas,
    "full": Full,
}


def make_policy(settings: Settings, window: int) -> DraftPolicy:
    """The policy that ``settings`` name."""
    return CLASSES[settings.draft_policy](settings, window)


def write_pattern(
    lengths: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
    num_sinks: int,
    positions: torch.Tensor,
) -> None:
    """Select the first ``num_sinks`` and the newest positions of [0, length).

    With ``num_sinks`` 0 this is a sliding window; StreamingLLM and MagicDec keep 4 sinks or more.

    Args:
        lengths, counts, rows: int [B].
        positions: int32 [layers, rows, kv_heads, capacity]; the lists of ``rows`` are written. Entries past ``counts`` get
            values that are never read.
    """
    capacity = positions.shape[-1]
    index = torch.arange(capacity, device=positions.device).unsqueeze(0)
    newest = index + (lengths - counts).unsqueeze(1)
    pattern = torch.where(index < num_sinks, index, newest).clamp(min=0).to(positions.dtype)
    positions[:, rows.long()] = pattern[None, :, None, :]
