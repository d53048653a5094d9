"""Verify windows that outlive a round: the device state of the unified schedule, and the forwards that work on it.

What a request carries from one round to the next, its drafts since its last verification, is kept by row of
``req_to_token``. Row 0 is SGLang's padding row: it has length 0, and the padding of a captured forward works on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sglang_sparsespec.rounds.base import RoundContext
from sglang_sparsespec.rounds.forward_batch import decode_forward_batch
from sglang_sparsespec.rounds.graphs import shared_logits_buffer
from sglang_sparsespec.rounds.unified_schedule import StaggeredForward, forward_capacity
from sglang_sparsespec.sampling.reference import accept_matching

Accepted = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class ForwardWork:
    """Device side of a :class:`StaggeredForward`, padded or not; all int64.

    Attributes:
        draft_rows, draft_offsets: [D], requests, and which of the window's tokens is fed; padding is row 0, offset -1.
        verify_rows, num_drafted: [V], requests, and drafts in their windows; padding is row 0 with 0 drafts.
    """

    draft_rows: torch.Tensor
    draft_offsets: torch.Tensor
    verify_rows: torch.Tensor
    num_drafted: torch.Tensor

    @classmethod
    def split(cls, packed: torch.Tensor, drafts: int, verifications: int) -> ForwardWork:
        """The parts of one entry of :func:`pack_round`."""
        return cls(*packed.split([drafts, drafts, verifications, verifications]))

    def live(self, drafts: int, verifications: int) -> ForwardWork:
        """Without padding, which stands last."""
        return ForwardWork(
            self.draft_rows[:drafts],
            self.draft_offsets[:drafts],
            self.verify_rows[:verifications],
            self.num_drafted[:verifications],
        )


def pack_round(forwards: Sequence[StaggeredForward], drafts: int, verifications: int) -> list[list[int]]:
    """One list of 2 * ``drafts`` + 2 * ``verifications`` numbers per forward (:class:`ForwardWork`), padded."""
    packed = []
    for forward in forwards:
        draft_padding = drafts - len(forward.drafts)
        verify_padding = verifications - len(forward.verifications)
        packed.append(
            [row for row, _ in forward.drafts]
            + [0] * draft_padding
            + [offset for _, offset in forward.drafts]
            + [-1] * draft_padding
            + [row for row, _ in forward.verifications]
            + [0] * verify_padding
            + [drafted for _, drafted in forward.verifications]
            + [0] * verify_padding
        )
    return packed


class Windows:
    """Device state of all requests' windows, by row, and the forwards that work on it.

    Every method can be captured in a CUDA graph.

    Attributes:
        start_lens: int64 [rows], committed lengths before the round.
        lens: int64 [rows], committed lengths now.
        candidates: int64 [rows, W], the last committed token and the drafts since, from column 0 on. Columns that are not
            drafted yet hold old tokens.
        tokens: int64 [rows, W], what the round's verification gave; the first ``accept_lens`` count.
        accept_lens: int32 [rows].
    """

    def __init__(self, context: RoundContext) -> None:
        self.context = context
        self.window = context.window
        self.req_to_token: torch.Tensor = context.backend.req_to_token_pool.req_to_token
        self.num_rows = self.req_to_token.shape[0]
        with torch.device(context.device):
            self._window_offsets = torch.arange(self.window)
            self.start_lens = torch.zeros(self.num_rows, dtype=torch.int64)
            self.lens = torch.zeros(self.num_rows, dtype=torch.int64)
            self.candidates = torch.zeros((self.num_rows, self.window), dtype=torch.int64)
            self.tokens = torch.zeros((self.num_rows, self.window), dtype=torch.int64)
            self.accept_lens = torch.ones(self.num_rows, dtype=torch.int32)

    def load(self, rows: torch.Tensor, seq_lens: torch.Tensor, bonus_tokens: torch.Tensor) -> None:
        """Begin a round with the batch's committed lengths and last tokens (all int64 [batch])."""
        self.start_lens[rows] = seq_lens
        self.lens[rows] = seq_lens
        self.candidates[rows, 0] = bonus_tokens

    def draft_positions(self, work: ForwardWork) -> torch.Tensor:
        """int64 [D], positions of the tokens that are fed; 0 for padding."""
        return (self.lens[work.draft_rows] + work.draft_offsets).clamp(min=0)

    def verify_positions(self, work: ForwardWork) -> torch.Tensor:
        """int64 [V, W], positions of the windows."""
        return self.start_lens[work.verify_rows].unsqueeze(1) + self._window_offsets

    def forward(self, work: ForwardWork, logits_buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Run the model: logits [D + V * W, vocab], drafts first; in the buffer (float32) if given."""
        backend = self.context.backend
        draft_positions, verify_positions = self.draft_positions(work), self.verify_positions(work)
        live = work.draft_offsets >= 0
        draft_lens = torch.where(live, draft_positions + 1, 0)
        positions = torch.cat([draft_positions, verify_positions.flatten()])
        rows = torch.cat([work.draft_rows, work.verify_rows.unsqueeze(1).expand(-1, self.window).flatten()])
        drafted = self.candidates[work.draft_rows, work.draft_offsets.clamp(min=0)]
        forward_batch = decode_forward_batch(
            torch.cat([drafted, self.candidates[work.verify_rows].flatten()]),
            rows,
            positions,
            torch.cat([draft_lens, verify_positions.flatten() + 1]),
            self.req_to_token[rows, positions].long(),
            self.context.model_runner.spec_algorithm,
            logits_buffer=logits_buffer,
        )
        backend.count_draft_queries(work.draft_rows, draft_lens)
        verify_lens = self.start_lens[work.verify_rows]
        plan = backend.plan_mixed(work.draft_rows, draft_lens, work.verify_rows, verify_lens, work.num_drafted)
        logits = self.context.forward(plan, forward_batch)
        if backend.hints is not None and plan.draft is not None:
            backend.hints.keep(work.draft_rows, work.draft_offsets, live)
        return logits

    def commit_drafts(self, work: ForwardWork, tokens: torch.Tensor) -> None:
        """Keep the tokens (int64 [D]) that the drafts gave."""
        self.candidates[work.draft_rows, work.draft_offsets + 1] = tokens

    def commit_verifications(self, work: ForwardWork, accepted: Accepted) -> None:
        """Commit what was accepted: tokens int64 [V, W] and lengths int32 [V]."""
        tokens, accept_lens = accepted
        verified = work.verify_rows
        self.tokens[verified] = tokens
        self.accept_lens[verified] = accept_lens
        self.lens[verified] = self.start_lens[verified] + accept_lens
        self.candidates[verified, 0] = tokens.gather(1, (accept_lens - 1).long().unsqueeze(1)).squeeze(1)
        self.lens[:1] = 0

    def step(self, work: ForwardWork, logits_buffer: torch.Tensor | None = None) -> torch.Tensor:
        """:meth:`forward`, then draft and accept greedily (or as simulated); returns the logits."""
        logits = self.forward(work, logits_buffer)
        tokens = logits.argmax(dim=-1)
        drafts = len(work.draft_rows)
        candidates = self.candidates[work.verify_rows]
        target = tokens[drafts:].view(-1, self.window)
        self.commit_drafts(work, tokens[:drafts])
        accepted = self.simulate(candidates, work)
        if accepted is None:
            accepted = accept_matching(candidates, target, work.num_drafted)
        self.commit_verifications(work, accepted)
        return logits

    def simulate(self, candidates: torch.Tensor, work: ForwardWork) -> Accepted | None:
        """SIMULATED acceptance of no more drafts than were made; None if acceptance is the target's."""
        simulated = self.context.simulated
        if simulated is None:
            return None
        return simulated.accept(candidates, work.num_drafted)


class CapturedForward:
    """A staggered round's forward as a step that is captured: the recorded forward counts the round's forwards itself.

    The sizes of a level batch's forwards do not depend on the forward (:func:`forward_capacity`), so one graph serves all
    W of them.
    """

    def __init__(self, windows: Windows, max_bs: int) -> None:
        self._windows = windows
        self._window = windows.window
        most = 2 * sum(forward_capacity(max_bs, self._window))
        with torch.device(windows.context.device):
            self._packed = torch.zeros(self._window * most, dtype=torch.int64)
            self._index = torch.zeros(1, dtype=torch.int64)

    def _packed_for(self, graph_size: int) -> torch.Tensor:
        """int64 [W, 2D + 2V], the static round as graphs of ``graph_size`` see it."""
        columns = 2 * sum(forward_capacity(graph_size, self._window))
        return self._packed[: self._window * columns].view(self._window, columns)

    def prepare(self, batch_size: int) -> Callable[[], torch.Tensor]:
        """See ``graphs.CapturedStep``."""
        drafts, verifications = forward_capacity(batch_size, self._window)
        packed = self._packed_for(batch_size)
        (padding,) = pack_round([StaggeredForward(drafts=(), verifications=())], drafts, verifications)
        packed.copy_(torch.tensor(padding).expand_as(packed))
        self._index.zero_()
        model_runner = self._windows.context.model_runner
        logits_buffer = shared_logits_buffer(model_runner, drafts + verifications * self._window)

        def step() -> torch.Tensor:
            # Warm-up and capture run the step more than once, without a round.
            entry = packed.index_select(0, self._index.clamp(max=self._window - 1)).squeeze(0)
            logits = self._windows.step(ForwardWork.split(entry, drafts, verifications), logits_buffer)
            self._index.add_(1)
            return logits

        return step

    def load(self, packed: torch.Tensor, graph_size: int) -> None:
        """Begin a round (int64 [W, 2D + 2V] on the device, padded for ``graph_size``)."""
        self._packed_for(graph_size).copy_(packed)
        self._index.zero_()
