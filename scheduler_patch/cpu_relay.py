"""Overlap scheduling with speculation on CPU.

SGLang's ``FutureMap`` relays a round's results to the next round. On CPU everything runs
in program order, but its gather calls ``Tensor.record_stream``, which CPU tensors lack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.managers.overlap_utils import FutureMap

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


class CpuFutureMap(FutureMap):
    """``FutureMap`` whose gather of relayed tokens needs no stream."""

    def _resolve_spec_extras(self, batch: ScheduleBatch) -> None:
        draft_input = batch.spec_info
        if draft_input is None or draft_input.future_indices.shape[0] == 0:
            return
        draft_input.bonus_tokens = self.output_tokens_buf[draft_input.future_indices]
