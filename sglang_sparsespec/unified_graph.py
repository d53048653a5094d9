"""CUDA graphs of a staggered round's forward.

One graph per batch size holds one forward with everything around it: the rows that this forward
of the round works on, inputs, the model with draft and verify attention, greedy tokens, acceptance
and the state that the next forward reads. A round replays it W times; the graph itself counts them.
The sizes of a level batch's forwards do not depend on the forward (:func:`forward_capacity`), so
one graph serves them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.attention_backend.backend import SparseSpecAttnBackend
from sglang_sparsespec.scheduler_patch.unified_schedule import StaggeredForward, forward_capacity
from sglang_sparsespec.step_graphs import StepGraphs
from sglang_sparsespec.unified_round import ForwardRows, WindowState, pack_plan

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

_NOTHING = StaggeredForward(drafts=(), verifications=())


class UnifiedGraphs(StepGraphs):
    """Captured forwards of staggered rounds.

    Args:
        state: what the forwards work on.

    Attributes:
        index: int64 [1], the round's next forward.
    """

    name = "unified"

    def __init__(self, model_runner: ModelRunner, backend: SparseSpecAttnBackend, state: WindowState) -> None:
        super().__init__(model_runner, backend)
        self.state = state
        self.window = state.window
        drafts, verifications = forward_capacity(self.max_bs, self.window)
        with torch.device(self.device):
            self._plans = torch.zeros(self.window * 2 * (drafts + verifications), dtype=torch.int64)
            self.index = torch.zeros(1, dtype=torch.int64)
        self._capture()

    def _plan_of(self, bucket: int) -> torch.Tensor:
        """int64 [W, 2D + 2V], the static plan as graphs of ``bucket`` see it."""
        columns = 2 * sum(forward_capacity(bucket, self.window))
        return self._plans[: self.window * columns].view(self.window, columns)

    def _prepare(self, batch_size: int) -> Callable[[], torch.Tensor]:
        capacity = forward_capacity(batch_size, self.window)
        plan = self._plan_of(batch_size)
        (padding,) = pack_plan([_NOTHING], *capacity)
        plan.copy_(torch.tensor(padding).expand_as(plan))
        self.index.zero_()
        drafts, verifications = capacity
        logits_buffer = self._logits_buffer(drafts + verifications * self.window)

        def step() -> torch.Tensor:
            # Warm-up and capture run the step more than once, without a round.
            row = plan.index_select(0, self.index.clamp(max=self.window - 1)).squeeze(0)
            logits = self.state.step(ForwardRows.split(row, *capacity), logits_buffer)
            self.index.add_(1)
            return logits

        return step

    def begin_round(self, bucket: int, packed: torch.Tensor) -> None:
        """Load a round's plan, padded for ``bucket`` (int64 [W, 2D + 2V] on the device)."""
        self._plan_of(bucket).copy_(packed)
        self.index.zero_()

    def replay(self, bucket: int) -> torch.Tensor:
        """Run the round's next forward; logits [D + V * W, vocab], valid until the next replay of any graph."""
        return self._replay(bucket)
