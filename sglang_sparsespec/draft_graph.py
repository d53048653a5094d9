"""CUDA graphs of a draft step, and of a step of plain rounds.

One graph per batch size holds one draft step with everything around it: slots of the
current token, the model with sparse attention, the greedy next token, and the state of
the following step. A round replays it k times, so drafting greedily needs no other launch.
Sampled batches replace the next token between two replays.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.dp_attention import set_is_extend_in_batch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from sglang_sparsespec.attention_backend.backend import SparseSpecAttnBackend
from sglang_sparsespec.draft_batch import draft_forward_batch
from sglang_sparsespec.step_graphs import StepGraphs

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


class DraftGraphs(StepGraphs):
    """Captured draft steps, or steps of plain rounds, and their static state.

    Args:
        plain: the steps attend to all tokens.

    Attributes:
        tokens: int64 [max_bs], input of the next step.
        candidates: int64 [max_bs, W], the round's window as drafted so far.
    """

    def __init__(
        self, model_runner: ModelRunner, backend: SparseSpecAttnBackend, window: int, plain: bool = False
    ) -> None:
        super().__init__(model_runner, backend)
        self.name = "plain" if plain else "draft"
        self.window = window
        self._plain = plain
        with torch.device(self.device):
            self.tokens = torch.zeros(self.max_bs, dtype=torch.int64)
            self.rows = torch.zeros(self.max_bs, dtype=torch.int64)
            # Position of the current token; -1 in padding rows, which then have length 0.
            self.positions = torch.full((self.max_bs,), -1, dtype=torch.int64)
            self.candidates = torch.zeros((self.max_bs, window), dtype=torch.int64)
            self.step = torch.zeros(1, dtype=torch.int64)
        self._capture()

    def _prepare(self, batch_size: int) -> Callable[[], torch.Tensor]:
        self.tokens[:batch_size] = 0
        self.rows[:batch_size] = 0
        self.positions[:batch_size] = -1
        self.step.zero_()
        forward_batch = self._forward_batch(batch_size)
        return lambda: self._step(batch_size, forward_batch)

    def _forward_batch(self, batch_size: int) -> ForwardBatch:
        rows, positions = self.rows[:batch_size], self.positions[:batch_size]
        # _step replaces what it computes from these: positions, lengths and slots.
        forward_batch = draft_forward_batch(
            self.tokens[:batch_size], rows, positions, positions, rows, self.model_runner.spec_algorithm
        )
        forward_batch.next_token_logits_buffer = self._logits_buffer(batch_size)
        return forward_batch

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
        with backend.plain_steps() if self._plain else nullcontext():
            output = self.model_runner.model.forward(
                forward_batch.input_ids, forward_batch.positions, forward_batch
            )
        logits = output.next_token_logits
        token = logits.argmax(dim=-1)
        self.tokens[:bs].copy_(token)
        self.candidates[:bs].index_copy_(1, step + 1, token.unsqueeze(1))
        if not self._plain:
            backend.store_lse_hint(bs, step)
        position.add_(live)
        self.step.add_(1)
        return logits

    def begin_round(self, bonus_tokens: torch.Tensor, rows: torch.Tensor, seq_lens: torch.Tensor) -> int:
        """Load a batch (all [batch], device) and return the captured size to replay."""
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
        return bucket

    def replay(self, bucket: int) -> torch.Tensor:
        """Run one step; logits [bucket, vocab], valid until the next replay of any graph."""
        return self._replay(bucket)

    def override_token(self, step: int, tokens: torch.Tensor) -> None:
        """Put sampled ``tokens`` (int64 [batch]) in place of step ``step``'s greedy ones."""
        batch = tokens.shape[0]
        self.tokens[:batch].copy_(tokens)
        self.candidates[:batch, step + 1].copy_(tokens)
