"""Draft policies: which tokens a draft step attends to, and how many tokens a round drafts.

One class per value of ``--sparsespec-draft-policy``. Whatever a policy does, the output is the
target's: it decides how many drafts are accepted, not which tokens come out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sglang_sparsespec.attention_backend.page_table import SelectionTable, num_selected
from sglang_sparsespec.draft_length import AcceptanceHistory

if TYPE_CHECKING:
    from sglang_sparsespec.config import SparseSpecConfig


class DraftPolicy:
    """Base of the policies.

    Attributes:
        name, summary: value of the flag, and what its help says of it.
        default_budget_ratio, default_num_steps: settings that the user did not give.
        uses_scores: prefill and verification score the tokens, and the best are selected.
        rescores_each_step: every draft step scores and selects anew, for its own query.
        lockstep_only: rounds of the unified schedule cannot have it.
        num_proposals: n-gram proposals that a draft forward checks beside its current token.
        warning: logged at start-up if not empty.

    Args:
        config: the plugin's settings.
        window: W = k + 1.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    default_budget_ratio: ClassVar[float] = 0.05
    default_num_steps: ClassVar[int] = 8
    uses_scores: ClassVar[bool] = False
    rescores_each_step: ClassVar[bool] = False
    lockstep_only: ClassVar[bool] = False
    num_proposals: ClassVar[int] = 0
    warning: ClassVar[str] = ""

    def __init__(self, config: SparseSpecConfig, window: int) -> None:
        self.config = config
        self.window = window

    def capacity(self, max_context: int) -> int:
        """Entries that a selection may have in requests of up to ``max_context`` tokens."""
        return SelectionTable.capacity_for(max_context, self.config.budget_ratio, self.config.min_budget)

    def longest_list(self, max_context: int) -> int:
        """Tokens that a draft step of the longest request attends to: selection and tail."""
        return self.capacity(max_context) + 2 * self.window

    def plan(self, lengths: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sizes of the next selections, on the device.

        Args:
            lengths: int [batch], tokens before the verify window (0 for padding).
            capacity: of the table.

        Returns:
            counts int32 [batch] and tail starts int [batch]: the selection is ``counts`` of the
            positions [0, tail start), and all tokens from there on are attended to besides.
        """
        return self._budget(lengths, capacity), lengths

    def _budget(self, lengths: torch.Tensor, capacity: int) -> torch.Tensor:
        config = self.config
        return num_selected(lengths, config.budget_ratio, config.min_budget, self.window, capacity)

    def write(
        self, lengths: torch.Tensor, counts: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Write selections that do not depend on scores; arguments as in :func:`write_pattern`."""

    def next_draft_length(self) -> int:
        """Tokens to draft in the next round, 1 to k. Known on the host without waiting for the device."""
        return self.window - 1

    def note_acceptance(self, accepted: list[int], drafted: int) -> None:
        """Learn, a round late, how many drafts of each request were accepted of ``drafted``."""


class Pillar(DraftPolicy):
    """PillarAttn (arXiv 2512.01278): the best of the last verification's attention scores."""

    name = "pillar"
    summary = "by the attention scores of the last verification"
    uses_scores = True


class Window(DraftPolicy):
    """The newest tokens: the control of the others, with the same budget."""

    name = "window"
    summary = "the newest ones (a control for measurements)"

    def write(
        self, lengths: torch.Tensor, counts: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
    ) -> None:
        write_pattern(lengths, counts, rows, 0, positions)


class Streaming(DraftPolicy):
    """Attention sinks and the newest tokens (StreamingLLM, arXiv 2309.17453; MagicDec, 2408.11049).

    MagicDec keeps a window of fixed size; here it grows with the request, as every budget does.
    """

    name = "streaming"
    summary = "sinks and the newest ones"

    def write(
        self, lengths: torch.Tensor, counts: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
    ) -> None:
        write_pattern(lengths, counts, rows, self.config.num_sinks, positions)


class Vegas(Pillar):
    """The best by the last verification, and the most recent tokens (Vegas, arXiv 2602.07223).

    A share of the budget goes to the newest tokens before the verify window, which Vegas keeps beside
    its best ones; k and ratio are those of its examples. Differences: Vegas ranks by its window's
    first and last query and has one list for all heads of a layer. Here scores are PillarAttn's, the
    mean over the window's queries, and each KV head has its list.
    """

    name = "vegas"
    summary = "by the same scores, a quarter of the budget being kept for the newest tokens"
    default_budget_ratio = 0.07
    default_num_steps = 6
    #: One token in so many of a selection is there for being recent.
    RECENT_PART = 4

    def plan(self, lengths: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        counts = self._budget(lengths, capacity)
        recent = counts // self.RECENT_PART
        # The tail begins that much earlier, so selection cannot spend its share on the same tokens.
        return counts - recent, lengths - recent


class Full(DraftPolicy):
    """Full attention: k + 1 tokens a round, at the price of plain decoding. For study.

    Nothing is selected and the tail begins at position 0.
    """

    name = "full"
    summary = "all of them (for study: every draft is accepted, nothing is saved)"
    warning = "Draft steps read the whole KV cache (policy full): for study, slower than no speculation."

    def capacity(self, max_context: int) -> int:
        return 1

    def longest_list(self, max_context: int) -> int:
        return max_context

    def plan(self, lengths: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        nothing = torch.zeros_like(lengths)
        return nothing.to(torch.int32), nothing


class Oracle(DraftPolicy):
    """The best tokens for the very query of each draft step: what selection can reach. For study.

    Every step and layer scores all tokens before the tail with its own query, which costs more than
    full attention, and then attends to as many of them as ``pillar`` would.
    """

    name = "oracle"
    summary = "by the scores of each draft step's own query (for study: slow)"
    rescores_each_step = True
    warning = "Draft steps score the whole KV cache (policy oracle): for study, slower than no speculation."


class Adaptive(Pillar):
    """PillarAttn with a draft length by acceptance history (SparseSpec-L, arXiv 2607.27735).

    SparseSpec-L's finding is that a longer draft is slower once its marginal probability of acceptance
    falls below the relative cost of drafting. That rule is applied here to whole rounds, since a draft
    step is one forward of the whole batch: :class:`AcceptanceHistory` says how. What differs: the
    evidence is the batch's acceptance in recent rounds, not the entropy of the draft being made; no
    request stops on its own; and nothing of its selection is taken over. The verify window keeps its W
    tokens, so the scores are means over the queries of its filling too.
    """

    name = "adaptive"
    lockstep_only = True
    summary = "as pillar, drafting fewer tokens than k while further ones would not pay"

    def __init__(self, config: SparseSpecConfig, window: int) -> None:
        super().__init__(config, window)
        self._history = AcceptanceHistory(window - 1, config.draft_cost)

    def next_draft_length(self) -> int:
        return self._history.best_length()

    def note_acceptance(self, accepted: list[int], drafted: int) -> None:
        self._history.add(accepted, drafted)


class TriForce(Pillar):
    """Hierarchical drafts (TriForce, arXiv 2404.11912): n-grams, then sparse attention, then full.

    TriForce has a small model draft for the target with a retrieved part of its cache, which drafts
    for the target with all of it. Here prompt lookup takes the small model's place, as in the
    comparison of SparseSpec's authors, and PillarAttn that of chunk retrieval. One forward of sparse
    attention checks several proposals (``sglang_sparsespec.ngram_draft``).
    """

    name = "triforce"
    lockstep_only = True
    summary = "as pillar, checking n-gram proposals so that a step may yield several drafts (for study)"
    num_proposals = 3
    warning = "Draft steps run without CUDA graphs (policy triforce): for study."


POLICIES: dict[str, type[DraftPolicy]] = {
    policy.name: policy for policy in (Pillar, Window, Streaming, Vegas, Full, Oracle, Adaptive, TriForce)
}


def write_pattern(
    lengths: torch.Tensor,
    counts: torch.Tensor,
    req_pool_indices: torch.Tensor,
    num_sinks: int,
    positions: torch.Tensor,
) -> None:
    """Select the first ``num_sinks`` and the newest positions of [0, length).

    ``num_sinks`` 0 is the sliding window; StreamingLLM and MagicDec keep 4 or more.

    Args:
        lengths, counts, req_pool_indices: int [B].
        positions: int32 [layers, rows, kv_heads, capacity]; the rows' lists are written,
            entries past ``counts`` with values that are never read.
    """
    capacity = positions.shape[-1]
    index = torch.arange(capacity, device=positions.device).unsqueeze(0)
    newest = index + (lengths - counts).unsqueeze(1)
    pattern = torch.where(index < num_sinks, index, newest).clamp(min=0).to(positions.dtype)
    positions[:, req_pool_indices.long()] = pattern[None, :, None, :]
