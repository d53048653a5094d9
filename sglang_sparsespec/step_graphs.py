"""Capture and replay of one step as a CUDA graph per batch size."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.distributed.parallel_state import get_tp_group, graph_capture
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.runner.base_cuda_graph_runner import get_batch_sizes_to_capture
from sglang.srt.model_executor.runner.shape_key import ShapeKey
from sglang.srt.model_executor.runner_backend.full_cuda_graph_backend import FullCudaGraphBackend
from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode
from sglang.srt.utils import get_available_gpu_memory

from sglang_sparsespec.attention_backend.backend import SparseSpecAttnBackend

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class StepGraphs:
    """Graphs of a step for each of SGLang's decode batch sizes; subclasses say what the step is.

    Args:
        sizes: ascending, in place of SGLang's.

    Attributes:
        capture_bs: batch sizes, ascending.
        memory_usage_gb: device memory that capturing took.
    """

    #: For the log.
    name: str

    def __init__(
        self, model_runner: ModelRunner, backend: SparseSpecAttnBackend, sizes: list[int] | None = None
    ) -> None:
        self.model_runner = model_runner
        self.attn_backend = backend
        self.device = model_runner.device
        self.device_module = torch.get_device_module(self.device)
        self.capture_bs = sizes or get_batch_sizes_to_capture(model_runner, 1)[0]
        self.max_bs = max(self.capture_bs)
        self._backend = FullCudaGraphBackend(self)
        self.memory_usage_gb = 0.0

    def _prepare(self, batch_size: int) -> Callable[[], torch.Tensor]:
        """Make the static state harmless, and return the step of ``batch_size`` requests to record."""
        raise NotImplementedError

    def _capture(self) -> None:
        before = get_available_gpu_memory(self.device, self.model_runner.gpu_id, empty_cache=False)
        with model_capture_mode(), graph_capture() as context:
            with self._backend.capture_session(context.stream):
                # Largest first: smaller graphs reuse its memory.
                for batch_size in reversed(self.capture_bs):
                    step = self._prepare(batch_size)
                    with forward_context(ForwardContext(attn_backend=self.attn_backend)):
                        self._backend.capture_one(ShapeKey(size=batch_size), step)
        self._prepare(self.max_bs)
        after = get_available_gpu_memory(self.device, self.model_runner.gpu_id, empty_cache=False)
        self.memory_usage_gb = before - after
        if get_tp_group().rank_in_group == 0:
            logger.info("Captured %d %s graphs, %.2f GB.", len(self.capture_bs), self.name, self.memory_usage_gb)

    def _logits_buffer(self, rows: int) -> torch.Tensor | None:
        """Float32 [rows, vocab] that all graphs of SGLang write their logits to, or None if it has fewer rows.

        Without it every graph keeps logits of its own: gigabytes with a large vocabulary.
        """
        shared = self.model_runner.graph_shared_output
        if shared is None or rows > shared.max_rows:
            return None
        return shared.get_logits_buffer(self.model_runner.model_config.vocab_size, rows=rows)

    def bucket(self, batch_size: int) -> int | None:
        """The captured size that fits ``batch_size``, or None."""
        index = bisect.bisect_left(self.capture_bs, batch_size)
        return self.capture_bs[index] if index < len(self.capture_bs) else None

    def _replay(self, bucket: int) -> Any:
        return self._backend.replay(ShapeKey(size=bucket), None)
