"""Rounds in lock-step: all requests draft up to k tokens, then all verify (arXiv 2512.01278, section 4.1).

A verification always takes W = k + 1 tokens per request, the width of SGLang's captured graph. With fewer drafts the rest
of a window is padding, which is never accepted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from sglang.srt.layers import sampler as sglang_sampler
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.spec_utils import (
    GrammarTree,
    build_grammar_vocab_mask,
    record_stream_each,
    record_stream_for_v2_verify,
)

from sglang_sparsespec.rounds.base import Publish, RoundContext, RoundOutcome, pad_window
from sglang_sparsespec.rounds.decode_steps import DecodeSteps
from sglang_sparsespec.sampling.sampler import Sampler
from sglang_sparsespec.sglang_compat import compute_logprobs
from sglang_sparsespec.spec_input import SparseSpecVerifyInput

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


class Drafter(Protocol):
    """Makes the drafts of lock-step rounds.

    Attributes:
        kind: of the rounds, see ``RoundOutcome``.
        sampler: has drawn the drafts, and accepts them.
    """

    kind: str
    sampler: Sampler

    def draft(self, batch: ScheduleBatch, num_drafts: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft for a batch.

        Args:
            num_drafts: tokens to draft per request, 1 to k.

        Returns:
            candidates int64 [batch, W], the last committed tokens and the drafts; and how many drafts were made, int64
            [batch], or None for k each. Candidates after these mean nothing.
        """
        ...


class SparseDrafter:
    """Drafts with the policy's sparse attention, one forward for each token."""

    kind = "lockstep"

    def __init__(self, context: RoundContext) -> None:
        self.sampler = Sampler(context.window - 1, context.logits_dtype, context.device, context.use_triton)
        self.steps = DecodeSteps(context, self.sampler, plain=False)
        self._window = context.window

    def draft(self, batch: ScheduleBatch, num_drafts: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :meth:`Drafter.draft`."""
        candidates, _ = self.steps.run(batch, num_drafts)
        num_drafted = None
        if num_drafts < self._window - 1:
            num_drafted = torch.full((len(candidates),), num_drafts, dtype=torch.int64, device=candidates.device)
        return pad_window(candidates, self._window), num_drafted


class LockstepRounds:
    """Draft, verify, accept, publish."""

    def __init__(self, context: RoundContext, drafter: Drafter) -> None:
        self.context = context
        self.drafter = drafter
        self._window_offsets = torch.arange(context.window, device=context.device)

    def run(
        self, batch: ScheduleBatch, publish: Publish, num_drafts: int, least_budget: int | None = None
    ) -> RoundOutcome:
        """Run one round of ``batch`` with so many drafts per request.

        Args:
            num_drafts: 0 to k. Without a draft the round is one step of plain decoding that has all that verifications have.
            least_budget: of the selections that it makes; None: as configured.
        """
        context = self.context
        record_stream_for_v2_verify(batch, None, context.stream)
        seq_lens = batch.seq_lens
        positions = seq_lens.unsqueeze(1) + self._window_offsets
        candidates, num_drafted = self.drafter.draft(batch, num_drafts) if num_drafts else self._undrafted(batch)
        record_stream_each((positions, candidates), context.stream)

        grammar_tree = GrammarTree.from_linear_chain(candidates) if batch.has_grammar else None
        context.backend.begin_lockstep_round(num_drafts, least_budget)
        logits_output, used_graph = self._verify(batch, candidates, positions)
        logits = logits_output.next_token_logits
        rows = batch.req_pool_indices.long()
        context.penalties.apply(logits, rows, positions.flatten(), candidates)
        apply_bias_and_grammar(batch, logits, grammar_tree, context.window)
        if batch.sampling_info.has_custom_logit_processor:
            assert num_drafts == 0, "a processor may be called for tokens of the output alone"
            first = logits.view(len(rows), context.window, -1)[:, 0]
            sglang_sampler.apply_custom_logit_processor(first, batch.sampling_info)
        tokens, accept_lens = self._accept(batch, candidates, logits, positions, num_drafted)
        context.penalties.commit(rows, tokens, accept_lens)
        new_seq_lens = seq_lens + accept_lens
        publish(new_seq_lens)
        if batch.return_logprob:
            compute_logprobs(batch, logits_output, tokens)
        return RoundOutcome(
            kind=self.drafter.kind,
            tokens=tokens,
            accept_lens=accept_lens,
            new_seq_lens=new_seq_lens,
            bonus_tokens=tokens.gather(1, (accept_lens - 1).long().unsqueeze(1)).squeeze(1),
            logits_output=logits_output,
            used_graph=used_graph,
            drafted=num_drafts,
            plain_steps=0 if num_drafts else 1,
        )

    def _undrafted(self, batch: ScheduleBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`Drafter.draft`: windows without a draft."""
        size = len(batch.seq_lens)
        self.drafter.sampler.begin_round(batch.sampling_info, batch.reqs, num_slots=size, num_draws=1)
        candidates = pad_window(batch.spec_info.bonus_tokens.long().unsqueeze(1), self.context.window)
        return candidates, torch.zeros(size, dtype=torch.int64, device=candidates.device)

    def _verify(self, batch: ScheduleBatch, candidates: torch.Tensor, positions: torch.Tensor) -> tuple[Any, bool]:
        """Run the target on the windows with full attention; the drafts' KV is rewritten.

        Args:
            candidates, positions: int64 [batch, W].
        """
        context = self.context
        context.metrics.note_forward(draft_tokens=0, verify_tokens=candidates.numel())
        # Slots of the window were allocated by eagle_prepare_for_decode (a reserve of 2W per request), in position order.
        req_to_token = context.backend.req_to_token_pool.req_to_token
        slots = req_to_token[batch.req_pool_indices.unsqueeze(1), positions].long()
        record_stream_each((slots,), context.stream)
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        batch.input_ids = candidates.flatten()
        batch.out_cache_loc = slots.flatten()
        batch.spec_info = SparseSpecVerifyInput(context.window, positions.flatten())
        result = context.target_worker.forward_batch_generation(batch, is_verify=True)
        return result.logits_output, result.can_run_cuda_graph

    def _accept(
        self,
        batch: ScheduleBatch,
        candidates: torch.Tensor,
        logits: torch.Tensor,
        positions: torch.Tensor,
        num_drafted: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens int64 [batch, W] and accept_lens int32 [batch]."""
        context = self.context
        if context.simulated is not None:
            accepted = context.simulated.accept(candidates, num_drafted)
        else:
            accepted = self.drafter.sampler.accept(candidates, logits, positions.flatten(), num_drafted=num_drafted)
        tokens, accept_lens = context.from_first_rank(batch.sampling_info.is_all_greedy, *accepted)
        return tokens, accept_lens


def apply_bias_and_grammar(
    batch: ScheduleBatch, logits: torch.Tensor, grammar_tree: GrammarTree | None, window: int
) -> None:
    """Apply logit biases and grammar masks to a verification's logits ([batch * W, vocab]), in place."""
    info = batch.sampling_info
    if info.logit_bias is not None:
        logits.add_(torch.repeat_interleave(info.logit_bias, window, dim=0))
    if grammar_tree is not None:
        mask = build_grammar_vocab_mask(
            reqs=batch.reqs, tree=grammar_tree, sampling_info=info, device=logits.device, barrier=None
        )
        if mask is not None:
            mask.apply(logits)
