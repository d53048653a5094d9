"""Plain rounds: several steps of plain decoding in one scheduler iteration.

Their tokens are the target's own, so nothing is verified. Selections are left as they are: the tokens of plain rounds
extend each request's tail, and the next round that drafts attends to its last selection and to the newest part of that
tail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.speculative.spec_utils import record_stream_for_v2_verify

from sglang_sparsespec.rounds.base import Publish, RoundContext, RoundOutcome, pad_window
from sglang_sparsespec.rounds.decode_steps import DecodeSteps
from sglang_sparsespec.sampling.sampler import Sampler

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


class PlainRounds:
    """Runs plain rounds of at most k steps.

    Args:
        sampler: of lock-step rounds; what it keeps of their drafts is not needed any more when a round begins.
    """

    kind = "plain"

    def __init__(self, context: RoundContext, sampler: Sampler) -> None:
        self.context = context
        self.steps = DecodeSteps(context, sampler, plain=True)

    def run(self, batch: ScheduleBatch, steps: int, publish: Publish) -> RoundOutcome:
        """Run one round of ``batch``."""
        context = self.context
        record_stream_for_v2_verify(batch, None, context.stream)
        tokens, used_graph = self.steps.run(batch, steps)
        accept_lens = torch.full((len(tokens),), steps, dtype=torch.int32, device=context.device)
        context.penalties.commit(batch.req_pool_indices.long(), tokens[:, 1:], accept_lens)
        new_seq_lens = batch.seq_lens + steps
        publish(new_seq_lens)
        context.backend.end_plain_round(batch.req_pool_indices, new_seq_lens)
        return RoundOutcome(
            kind=self.kind,
            tokens=pad_window(tokens[:, 1:], context.window),
            accept_lens=accept_lens,
            new_seq_lens=new_seq_lens,
            bonus_tokens=tokens[:, -1],
            logits_output=LogitsProcessorOutput(next_token_logits=None),
            used_graph=used_graph,
            plain_steps=steps,
        )
