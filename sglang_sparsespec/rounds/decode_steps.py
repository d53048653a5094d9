"""Forwards of one token per request, all requests in step: the drafts of a lock-step round, and the steps of a plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from sglang.srt.layers import sampler as sglang_sampler

from sglang_sparsespec.attention_backend.forward_plan import Draft, Plain
from sglang_sparsespec.rounds.base import RoundContext, pad_window
from sglang_sparsespec.rounds.forward_batch import decode_forward_batch
from sglang_sparsespec.rounds.graphs import StepGraphs, decode_batch_sizes, shared_logits_buffer
from sglang_sparsespec.sampling.sampler import Sampler

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


class DecodeSteps:
    """Runs steps from the last committed tokens, by replaying one captured step or eagerly.

    A captured step holds everything from one token to the next: the KV slot of the current token, the model, the greedy
    next token and the state of the following step. So decoding greedily needs no other launch; for batches that sample or
    that have penalties, the drawn tokens replace the greedy ones between two replays.

    Args:
        plain: the steps attend to all tokens; else over the sparse page table.
        sampler: chooses the tokens; drafts are kept in its entries request * k + step.
    """

    def __init__(self, context: RoundContext, sampler: Sampler, plain: bool) -> None:
        self._context = context
        self._sampler = sampler
        self._plain = plain
        self._req_to_token: torch.Tensor = context.backend.req_to_token_pool.req_to_token
        most, steps = context.backend.num_rows, context.window - 1
        with torch.device(context.device):
            # Row j holds the entries of step j, for each request of the batch.
            self._entries = (torch.arange(most) * steps + torch.arange(steps).unsqueeze(1)).contiguous()
            self._step_numbers = torch.arange(steps)
        self._captured: CapturedDecodeStep | None = None
        self.graphs: StepGraphs | None = None
        if context.capture:
            sizes = decode_batch_sizes(context.model_runner)
            self._captured = CapturedDecodeStep(context, sizes[-1], plain)
            name = "plain" if plain else "draft"
            self.graphs = StepGraphs(name, self._captured, sizes, context.model_runner, context.backend)

    def synthetic(self, tokens: torch.Tensor, rows: torch.Tensor, seq_lens: torch.Tensor) -> SyntheticSteps:
        """Steps of made-up requests (int64 [batch] each), see :class:`SyntheticSteps`."""
        graph_size = self.graphs.size_for(len(rows)) if self.graphs is not None else None
        if self.graphs is None or self._captured is None or graph_size is None:
            return EagerSyntheticSteps(self._context, self._plain, tokens, rows, seq_lens)
        self._captured.load(tokens, rows, seq_lens, graph_size)
        return ReplayedSyntheticSteps(self._captured, self.graphs, graph_size, len(rows))

    def run(self, batch: ScheduleBatch, steps: int) -> tuple[torch.Tensor, bool]:
        """Run ``steps`` steps, at most k.

        Returns:
            int64 [batch, steps + 1], the last committed tokens and the new ones; and whether graphs were replayed.
        """
        size = len(batch.seq_lens)
        self._sampler.begin_round(batch.sampling_info, batch.reqs, num_slots=size, num_draws=steps + 1)
        if self._context.adapters is not None:
            self._context.adapters.use([req.lora_id for req in batch.reqs])
        graph_size = self.graphs.size_for(size) if self.graphs is not None else None
        if graph_size is not None:
            return self._replay(batch, steps, graph_size), True
        return self._run_eagerly(batch, steps), False

    def _draw(self, batch: ScheduleBatch, step: int, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The next tokens, int64 [batch], by the logits after ``tokens`` (int64 [batch, n]), the first step + 1 of them."""
        positions = batch.seq_lens + step
        seen = self._step_numbers[step].expand(len(positions))
        self._context.penalties.apply(logits, batch.req_pool_indices.long(), positions, tokens, seen)
        if self._plain and batch.sampling_info.has_custom_logit_processor:
            sglang_sampler.apply_custom_logit_processor(logits, batch.sampling_info)
        drawn = self._sampler.draw(logits, self._entries[step, : len(positions)], positions)
        (tokens,) = self._context.from_first_rank(self._sampler.is_all_greedy, drawn)
        return tokens

    def _run_eagerly(self, batch: ScheduleBatch, steps: int) -> torch.Tensor:
        context, rows = self._context, batch.req_pool_indices
        tokens = batch.spec_info.bonus_tokens.long().unsqueeze(1).repeat(1, steps + 1)
        for step in range(steps):
            positions = batch.seq_lens + step
            context.metrics.note_forward(draft_tokens=len(rows), verify_tokens=0)
            context.note_step(step)
            logits = run_step(context, self._plain, tokens[:, step].contiguous(), rows, positions, batch.spec_info)
            tokens[:, step + 1] = self._draw(batch, step, logits, tokens)
            if context.backend.hints is not None and not self._plain:
                offsets = self._step_numbers[step].expand(len(rows))
                context.backend.hints.keep(rows, offsets, positions >= 0)
        return tokens

    def _replay(self, batch: ScheduleBatch, steps: int, graph_size: int) -> torch.Tensor:
        assert self.graphs is not None and self._captured is not None
        captured, size = self._captured, len(batch.seq_lens)
        # The captured step takes the largest of the model's own logits.
        has_processor = self._plain and batch.sampling_info.has_custom_logit_processor
        chosen_here = not self._sampler.is_all_greedy or self._context.penalties.is_active or has_processor
        captured.load(batch.spec_info.bonus_tokens, batch.req_pool_indices, batch.seq_lens, graph_size)
        for step in range(steps):
            self._context.metrics.note_forward(draft_tokens=size, verify_tokens=0)
            self._context.note_step(step)
            logits = self.graphs.replay(graph_size)
            if chosen_here:
                captured.replace_tokens(step, self._draw(batch, step, logits[:size], captured.tokens[:size]))
        # The static tokens are overwritten by the next round, which may be launched before this one's results are read.
        return captured.tokens[:size, : steps + 1].clone()


def run_step(
    context: RoundContext,
    plain: bool,
    tokens: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    spec_info: object = None,
    logits_buffer: torch.Tensor | None = None,
) -> torch.Tensor:
    """One forward of one token per request: logits [batch, vocab]. Recordable.

    Args:
        tokens, rows, positions: int64 [batch]; position -1 is padding.
        logits_buffer: float32 [batch, vocab] that the logits are written to, if given.
    """
    backend = context.backend
    seq_lens, places = positions + 1, positions.clamp(min=0)
    slots = backend.req_to_token_pool.req_to_token[rows, places].long()
    forward_batch = decode_forward_batch(
        tokens, rows, places, seq_lens, slots, context.model_runner.spec_algorithm, spec_info, logits_buffer
    )
    plan: Draft | Plain
    if plain:
        plan = backend.plan_plain(rows, places)
    else:
        plan = backend.plan_draft(rows, seq_lens)
    return context.forward(plan, forward_batch)


class SyntheticSteps(Protocol):
    """Greedy steps of made-up requests, to be timed: no metric counts them, and no sampler is told.

    Log-sum-exp hints are kept as for real drafts.
    """

    def step(self) -> None:
        """Run a step, at the position after the last one's. There may be more than k."""
        ...

    def window(self) -> torch.Tensor:
        """int64 [batch, W], the tokens that the steps were fed and gave so far."""
        ...

    def end(self) -> None:
        """Leave nothing of the requests behind in what is captured."""
        ...


class EagerSyntheticSteps:
    """:class:`SyntheticSteps` without graphs."""

    def __init__(
        self, context: RoundContext, plain: bool, tokens: torch.Tensor, rows: torch.Tensor, seq_lens: torch.Tensor
    ) -> None:
        self._context, self._plain = context, plain
        self._tokens, self._rows, self._seq_lens = [tokens], rows, seq_lens

    def step(self) -> None:
        """See :meth:`SyntheticSteps.step`."""
        number, hints = len(self._tokens) - 1, self._context.backend.hints
        positions = self._seq_lens + number
        logits = run_step(self._context, self._plain, self._tokens[-1], self._rows, positions)
        self._tokens.append(logits.argmax(dim=-1))
        if hints is not None and not self._plain:
            offsets = torch.full_like(self._rows, min(number, self._context.window - 2))
            hints.keep(self._rows, offsets, positions >= 0)

    def window(self) -> torch.Tensor:
        """See :meth:`SyntheticSteps.window`."""
        window = self._context.window
        return pad_window(torch.stack(self._tokens[:window], dim=1), window)

    def end(self) -> None:
        """Nothing is captured."""


class ReplayedSyntheticSteps:
    """:class:`SyntheticSteps` that replay graphs; the captured step has been loaded with the requests."""

    def __init__(self, captured: CapturedDecodeStep, graphs: StepGraphs, graph_size: int, size: int) -> None:
        self._captured, self._graphs, self._graph_size, self._size = captured, graphs, graph_size, size

    def step(self) -> None:
        """See :meth:`SyntheticSteps.step`."""
        self._graphs.replay(self._graph_size)

    def window(self) -> torch.Tensor:
        """See :meth:`SyntheticSteps.window`."""
        return self._captured.tokens[: self._size].clone()

    def end(self) -> None:
        """See :meth:`SyntheticSteps.end`."""
        self._captured.prepare(self._graph_size)


class CapturedDecodeStep:
    """The static tensors of a captured draft or plain step, and what is recorded.

    Attributes:
        tokens: int64 [max_bs, W], the round's tokens so far; column 0 holds the last committed ones.
    """

    def __init__(self, context: RoundContext, max_bs: int, plain: bool) -> None:
        self._context = context
        self._plain = plain
        with torch.device(context.device):
            self._current = torch.zeros(max_bs, dtype=torch.int64)
            self._rows = torch.zeros(max_bs, dtype=torch.int64)
            # Position of the current token; -1 in padding, which then has length 0.
            self._positions = torch.full((max_bs,), -1, dtype=torch.int64)
            self.tokens = torch.zeros((max_bs, context.window), dtype=torch.int64)
            self._step = torch.zeros(1, dtype=torch.int64)

    def prepare(self, batch_size: int) -> Callable[[], torch.Tensor]:
        """See ``graphs.CapturedStep``."""
        self._current[:batch_size] = 0
        self._rows[:batch_size] = 0
        self._positions[:batch_size] = -1
        self._step.zero_()
        if self._context.adapters is not None:
            self._context.adapters.use([None] * batch_size)
        logits_buffer = shared_logits_buffer(self._context.model_runner, batch_size)
        return lambda: self._record(batch_size, logits_buffer)

    def _record(self, batch_size: int, logits_buffer: torch.Tensor | None) -> torch.Tensor:
        """One step on the static tensors; logits [batch, vocab]."""
        context, hints = self._context, self._context.backend.hints
        current, rows = self._current[:batch_size], self._rows[:batch_size]
        positions = self._positions[:batch_size]
        live = positions >= 0
        # Capture runs the step more than once, without a round: the count may have run past the window.
        step = self._step.clamp(max=context.window - 2)
        logits = run_step(context, self._plain, current, rows, positions, logits_buffer=logits_buffer)
        token = logits.argmax(dim=-1)
        current.copy_(token)
        self.tokens[:batch_size].index_copy_(1, step + 1, token.unsqueeze(1))
        if hints is not None and not self._plain:
            hints.keep(rows, step.expand(batch_size), live)
        positions.add_(live)
        self._step.add_(1)
        return logits

    def load(
        self, bonus_tokens: torch.Tensor, rows: torch.Tensor, seq_lens: torch.Tensor, graph_size: int
    ) -> None:
        """Begin a round of a batch (int [batch] each, on the device) that replays graphs of ``graph_size``."""
        size = len(rows)
        self._current[:size].copy_(bonus_tokens)
        self._rows[:size].copy_(rows)
        self._positions[:size].copy_(seq_lens)
        if graph_size > size:
            self._rows[size:graph_size].zero_()
            self._positions[size:graph_size].fill_(-1)
        self.tokens[:size, 0].copy_(bonus_tokens)
        self._step.zero_()

    def replace_tokens(self, step: int, tokens: torch.Tensor) -> None:
        """Put drawn ``tokens`` (int64 [batch]) in place of the greedy ones of step ``step``."""
        size = len(tokens)
        self._current[:size].copy_(tokens)
        self.tokens[:size, step + 1].copy_(tokens)
