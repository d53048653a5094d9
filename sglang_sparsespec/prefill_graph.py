"""CUDA graphs of prompts' first selections: one per number of prompts that are prefilled together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.attention_backend.backend import SparseSpecAttnBackend
from sglang_sparsespec.attention_backend.prefill_selection import PrefillSelection
from sglang_sparsespec.step_graphs import StepGraphs

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


class PrefillSelectionGraphs(StepGraphs):
    """Captured :meth:`PrefillSelection.run`; from now on it is replayed for batches of the captured sizes.

    Args:
        selection: the backend's.
    """

    name = "prefill selection"
    SIZES = (1, 2, 4, 8, PrefillSelection.MOST)

    def __init__(self, model_runner: ModelRunner, backend: SparseSpecAttnBackend, selection: PrefillSelection) -> None:
        super().__init__(model_runner, backend, [size for size in self.SIZES if size <= backend.max_bs])
        self._selection = selection
        self._capture()
        selection.replay = self._replay_batch

    def _prepare(self, batch_size: int) -> Callable[[], torch.Tensor]:
        self._selection.clear()

        def select() -> torch.Tensor:
            self._selection.run(batch_size)
            return self.attn_backend.table.positions

        return select

    def _replay_batch(self, batch_size: int) -> bool:
        bucket = self.bucket(batch_size)
        if bucket is not None:
            self._replay(bucket)
        return bucket is not None
