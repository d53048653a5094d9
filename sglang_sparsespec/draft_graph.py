"""CUDA graphs of a draft step.

One graph per batch size holds one draft step with everything around it: slots of the
current token, the model with sparse attention, the greedy next token, and the state of
the following step. A round replays it k times, so drafting greedily needs no other launch.
Sampled batches replace the next token between two replays.
"""

from __future__ import annotations

import bisect
import logging
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.distributed.parallel_state import get_tp_group, graph_capture
from sglang.srt.layers.dp_attention import set_is_extend_in_batch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.runner.base_cuda_graph_runner import get_batch_sizes_to_capture
from sglang.srt.model_executor.runner.shape_key import ShapeKey
from sglang.srt.model_executor.runner_backend.full_cuda_graph_backend import FullCudaGraphBackend
from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode
from sglang.srt.utils import get_available_gpu_memory

from sglang_sparsespec.attention_backend.backend import SparseSpecAttnBackend
from sglang_sparsespec.draft_batch import draft_forward_batch

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class DraftGraphs:
    """Captured draft steps and their static state.

    Attributes:
        tokens: int64 [max_bs], input of the next step.
        candidates: int64 [max_bs, W], the round's window as drafted so far.
    """

    def __init__(self, model_runner: ModelRunner, backend: SparseSpecAttnBackend, window: int) -> None:
        self.model_runner = model_runner
        self.attn_backend = backend
        self.window = window
        self.device = model_runner.device
        self.device_module = torch.get_device_module(self.device)
        self.capture_bs, _ = get_batch_sizes_to_capture(model_runner, 1)
        self.max_bs = max(self.capture_bs)
        with torch.device(self.device):
            self.tokens = torch.zeros(self.max_bs, dtype=torch.int64)
            self.rows = torch.zeros(self.max_bs, dtype=torch.int64)
            # Position of the current token; -1 in padding rows, which then have length 0.
            self.positions = torch.full((self.max_bs,), -1, dtype=torch.int64)
            self.candidates = torch.zeros((self.max_bs, window), dtype=torch.int64)
            self.step = torch.zeros(1, dtype=torch.int64)
        self._backend = FullCudaGraphBackend(self)
        self._capture()

    def _capture(self) -> None:
        before = get_available_gpu_memory(self.device, self.model_runner.gpu_id, empty_cache=False)
        with model_capture_mode(), graph_capture() as context:
            with self._backend.capture_session(context.stream):
                # Largest first: smaller graphs reuse its memory.
                for batch_size in reversed(self.capture_bs):
                    self._reset(batch_size)
                    forward_batch = self._forward_batch(batch_size)
                    with forward_context(ForwardContext(attn_backend=self.attn_backend)):
                        self._backend.capture_one(
                            ShapeKey(size=batch_size),
                            lambda bs=batch_size, fb=forward_batch: self._step(bs, fb),
                        )
        self._reset(self.max_bs)
        after = get_available_gpu_memory(self.device, self.model_runner.gpu_id, empty_cache=False)
        self.memory_usage_gb = before - after
        if get_tp_group().rank_in_group == 0:
            logger.info("Captured %d draft graphs, %.2f GB.", len(self.capture_bs), self.memory_usage_gb)

    def _reset(self, batch_size: int) -> None:
        self.tokens[:batch_size] = 0
        self.rows[:batch_size] = 0
        self.positions[:batch_size] = -1
        self.step.zero_()

    def _forward_batch(self, batch_size: int) -> ForwardBatch:
        rows, positions = self.rows[:batch_size], self.positions[:batch_size]
        # _step replaces what it computes from these: positions, lengths and slots.
        return draft_forward_batch(
            self.tokens[:batch_size], rows, positions, positions, rows, self.model_runner.spec_algorithm
        )

    def _step(self, bs: int, forward_batch: ForwardBatch) -> torch.Tensor:
        """One draft step on the static state; returns logits [bs, vocab]. Recorded."""
        backend = self.attn_backend
        position = self.positions[:bs]
        live = position >= 0
        # The graphs are captured before any request exists: step may have run past the window.
        step = self.step.clamp(max=self.window - 2)
        forward_batch.positions = position.clamp(min=0)
        forward_batch.seq_lens = position + 1
        forward_batch.out_cache_loc = backend.req_to_token_pool.req_to_token[
            self.rows[:bs], forward_batch.positions
        ].long()
        set_is_extend_in_batch(False)
        output = self.model_runner.model.forward(
            forward_batch.input_ids, forward_batch.positions, forward_batch
        )
        logits = output.next_token_logits
        token = logits.argmax(dim=-1)
        self.tokens[:bs].copy_(token)
        self.candidates[:bs].index_copy_(1, step + 1, token.unsqueeze(1))
        backend.store_lse_hint(bs, step)
        position.add_(live)
        self.step.add_(1)
        return logits

    def bucket(self, batch_size: int) -> int | None:
        """The captured size that fits ``batch_size``, or None."""
        index = bisect.bisect_left(self.capture_bs, batch_size)
        return self.capture_bs[index] if index < len(self.capture_bs) else None

    def begin_round(self, bonus_tokens: torch.Tensor, rows: torch.Tensor, seq_lens: torch.Tensor) -> Any:
        """Load a batch (all [batch], device) and return the graph's key."""
        batch = rows.shape[0]
        bucket = self.bucket(batch)
        assert bucket is not None
        self.tokens[:batch].copy_(bonus_tokens)
        self.rows[:batch].copy_(rows)
        self.positions[:batch].copy_(seq_lens)
        if bucket > batch:
            self.rows[batch:bucket].zero_()
            self.positions[batch:bucket].fill_(-1)
        self.candidates[:batch, 0].copy_(bonus_tokens)
        self.step.zero_()
        return ShapeKey(size=bucket)

    def replay(self, key: Any) -> torch.Tensor:
        """Run one step; logits [bucket, vocab], valid until the next replay of any graph."""
        return self._backend.replay(key, None)

    def override_token(self, step: int, tokens: torch.Tensor) -> None:
        """Put sampled ``tokens`` (int64 [batch]) in place of step ``step``'s greedy ones."""
        batch = tokens.shape[0]
        self.tokens[:batch].copy_(tokens)
        self.candidates[:batch, step + 1].copy_(tokens)
