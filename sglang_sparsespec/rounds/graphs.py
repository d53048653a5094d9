"""Capture and replay of rounds' steps as CUDA graphs, one per batch size.

What a step is, and the static tensors that it works on, belong to the rounds; how steps are captured is here only.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from sglang.srt.distributed.parallel_state import get_tp_group, graph_capture
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.runner.base_cuda_graph_runner import get_batch_sizes_to_capture
from sglang.srt.model_executor.runner.shape_key import ShapeKey
from sglang.srt.model_executor.runner_backend.full_cuda_graph_backend import FullCudaGraphBackend
from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode
from sglang.srt.utils import get_available_gpu_memory

from sglang_sparsespec.attention_backend.backend import SparseSpecAttnBackend
from sglang_sparsespec.attention_backend.prefill_selection import PrefillSelection

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

#: Numbers of prompts whose first selections are captured together.
PREFILL_SIZES = (1, 2, 4, 8, PrefillSelection.MOST)


class CapturedStep(Protocol):
    """A step that can be recorded for any batch size."""

    def prepare(self, batch_size: int) -> Callable[[], torch.Tensor]:
        """Make the static tensors harmless (padding only), and return the step of ``batch_size`` requests to record."""
        ...


def decode_batch_sizes(model_runner: ModelRunner) -> list[int]:
    """The batch sizes that SGLang captures decode graphs for, ascending."""
    return list(get_batch_sizes_to_capture(model_runner, 1)[0])


def shared_logits_buffer(model_runner: ModelRunner, num_tokens: int) -> torch.Tensor | None:
    """Float32 [tokens, vocab] that all graphs of SGLang write their logits to, or None if it has fewer rows.

    Without it every graph keeps logits of its own: gigabytes with a large vocabulary.
    """
    shared = model_runner.graph_shared_output
    if shared is None or num_tokens > shared.max_rows:
        return None
    return shared.get_logits_buffer(model_runner.model_config.vocab_size, rows=num_tokens)


class StepGraphs:
    """Graphs of one kind of step.

    Args:
        name: for the log.
        step: what is recorded.
        sizes: batch sizes to capture, ascending.
        nested: whether it is replayed while a graph of SGLang is half-way. Then it may not work in the memory that SGLang's
            graphs share, because what that graph computed so far lies there.

    Attributes:
        memory_usage_gb: device memory that capturing took.
    """

    def __init__(
        self,
        name: str,
        step: CapturedStep,
        sizes: Sequence[int],
        model_runner: ModelRunner,
        backend: SparseSpecAttnBackend,
        nested: bool = False,
    ) -> None:
        # FullCudaGraphBackend reads these two by name.
        self.model_runner = model_runner
        self.device_module = torch.get_device_module(model_runner.device)
        self._attn_backend = backend
        self._sizes = list(sizes)
        self._backend = FullCudaGraphBackend(self)
        if nested:
            # Unless it has a pool, it takes the shared one.
            self._backend._pool = self.device_module.graph_pool_handle()
        self.memory_usage_gb = self._capture(name, step)

    def _capture(self, name: str, step: CapturedStep) -> float:
        before = get_available_gpu_memory(self.model_runner.device, self.model_runner.gpu_id, empty_cache=False)
        with model_capture_mode(), graph_capture() as context:
            with self._backend.capture_session(context.stream):
                # Largest first: smaller graphs reuse its memory.
                for batch_size in reversed(self._sizes):
                    recorded = step.prepare(batch_size)
                    with forward_context(ForwardContext(attn_backend=self._attn_backend)):
                        self._backend.capture_one(ShapeKey(size=batch_size), recorded)
        step.prepare(self._sizes[-1])
        memory = before - get_available_gpu_memory(self.model_runner.device, self.model_runner.gpu_id, empty_cache=False)
        if get_tp_group().rank_in_group == 0:
            logger.info("Captured %d %s graphs, %.2f GB.", len(self._sizes), name, memory)
        return memory

    def size_for(self, batch_size: int) -> int | None:
        """The captured size that fits ``batch_size``, or None."""
        index = bisect.bisect_left(self._sizes, batch_size)
        return self._sizes[index] if index < len(self._sizes) else None

    def replay(self, size: int) -> Any:
        """Run the step of a captured size; what it returns is valid until the next replay of any graph."""
        return self._backend.replay(ShapeKey(size=size), None)


class PrefillSelectionStep:
    """A prompt batch's first selections as a step (``PrefillSelection.run``)."""

    def __init__(self, selection: PrefillSelection, positions: torch.Tensor) -> None:
        self._selection = selection
        self._positions = positions

    def prepare(self, batch_size: int) -> Callable[[], torch.Tensor]:
        """See :class:`CapturedStep`; ``batch_size`` is a number of prompts."""
        self._selection.clear()

        def select() -> torch.Tensor:
            self._selection.run(batch_size)
            return self._positions

        return select


def capture_prefill_selection(model_runner: ModelRunner, backend: SparseSpecAttnBackend) -> StepGraphs | None:
    """Capture the backend's prefill selections and have it replay them; None if the policy makes none."""
    selection = backend.prefill_selection
    if selection is None:
        return None
    sizes = [size for size in PREFILL_SIZES if size <= backend.num_rows]
    step = PrefillSelectionStep(selection, backend.table.positions)
    # SGLang's breakable prefill graphs are interrupted by each layer's attention, the last of which replays this.
    graphs = StepGraphs("prefill selection", step, sizes, model_runner, backend, nested=True)

    def replay(num_prompts: int) -> bool:
        size = graphs.size_for(num_prompts)
        if size is not None:
            graphs.replay(size)
        return size is not None

    selection.use_graphs(replay)
    return graphs
