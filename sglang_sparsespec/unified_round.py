"""Staggered rounds: k + 1 forwards in which drafts and verifications are spread evenly.

:class:`UnifiedSchedule` says which request does what in which forward; here that is done on the
device. What a request carries from one round to the next (its drafts since its last
verification) is kept by row of ``req_to_token``. Row 0 is SGLang's padding row: it has length 0,
and padding of a captured forward works on it.

``docs/unified-batches.md`` has the reasons.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.dp_attention import set_is_extend_in_batch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from sglang_sparsespec import sampling
from sglang_sparsespec.attention_backend.backend import MixedRows, SparseSpecAttnBackend
from sglang_sparsespec.draft_batch import draft_forward_batch
from sglang_sparsespec.scheduler_patch.unified_schedule import StaggeredForward, UnifiedSchedule, forward_capacity
from sglang_sparsespec.window_sampling import WindowSampler

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_sparsespec.simulation import SimulatedAcceptance
    from sglang_sparsespec.unified_graph import UnifiedGraphs

logger = logging.getLogger(__name__)

Accepted = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class ForwardRows:
    """Device side of a :class:`StaggeredForward`, padded or not; all int64.

    Attributes:
        draft_rows, draft_offsets: [D]; padding is row 0, offset -1.
        verify_rows, num_drafted: [V]; padding is row 0 with 0 drafts.
    """

    draft_rows: torch.Tensor
    draft_offsets: torch.Tensor
    verify_rows: torch.Tensor
    num_drafted: torch.Tensor

    @classmethod
    def split(cls, packed: torch.Tensor, drafts: int, verifications: int) -> ForwardRows:
        """The parts of one row of :func:`pack_plan`."""
        return cls(*packed.split([drafts, drafts, verifications, verifications]))

    def live(self, drafts: int, verifications: int) -> ForwardRows:
        """Without padding, which stands last."""
        return ForwardRows(
            self.draft_rows[:drafts],
            self.draft_offsets[:drafts],
            self.verify_rows[:verifications],
            self.num_drafted[:verifications],
        )


def pack_plan(plan: Sequence[StaggeredForward], drafts: int, verifications: int) -> list[list[int]]:
    """One list of 2 * ``drafts`` + 2 * ``verifications`` numbers per forward (:class:`ForwardRows`), padded."""
    packed = []
    for forward in plan:
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


class WindowState:
    """Device state of all requests' windows, by row, and the forwards that work on it.

    Every method can be captured in a CUDA graph.

    Attributes:
        start_lens: int64 [rows], committed lengths before the round.
        lens: int64 [rows], committed lengths now.
        candidates: int64 [rows, W], the last committed token and the drafts since, from column 0 on.
            Columns that are not drafted yet hold old tokens.
        tokens: int64 [rows, W], what the round's verification gave; the first ``accept_lens`` count.
        accept_lens: int32 [rows].
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        backend: SparseSpecAttnBackend,
        window: int,
        simulated: SimulatedAcceptance | None,
    ) -> None:
        self.model_runner = model_runner
        self.attn_backend = backend
        self.window = window
        self._simulated = simulated
        self.req_to_token: torch.Tensor = backend.req_to_token_pool.req_to_token
        self.num_rows = self.req_to_token.shape[0]
        with torch.device(self.req_to_token.device):
            self._window_offsets = torch.arange(window)
            self.start_lens = torch.zeros(self.num_rows, dtype=torch.int64)
            self.lens = torch.zeros(self.num_rows, dtype=torch.int64)
            self.candidates = torch.zeros((self.num_rows, window), dtype=torch.int64)
            self.tokens = torch.zeros((self.num_rows, window), dtype=torch.int64)
            self.accept_lens = torch.ones(self.num_rows, dtype=torch.int32)

    def begin_round(self, rows: torch.Tensor, seq_lens: torch.Tensor, bonus_tokens: torch.Tensor) -> None:
        """Load the batch's committed lengths and last tokens (all int64 [batch])."""
        self.start_lens[rows] = seq_lens
        self.lens[rows] = seq_lens
        self.candidates[rows, 0] = bonus_tokens

    def draft_positions(self, rows: ForwardRows) -> torch.Tensor:
        """int64 [D], positions of the tokens that are fed; 0 for padding."""
        return (self.lens[rows.draft_rows] + rows.draft_offsets).clamp(min=0)

    def verify_positions(self, rows: ForwardRows) -> torch.Tensor:
        """int64 [V, W], positions of the windows."""
        return self.start_lens[rows.verify_rows].unsqueeze(1) + self._window_offsets

    def forward(self, rows: ForwardRows, logits_buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Run the model: logits [D + V * W, vocab], drafts first; in the buffer (float32) if given."""
        draft_positions = self.draft_positions(rows)
        draft_lens = torch.where(rows.draft_offsets >= 0, draft_positions + 1, 0)
        verify_positions = self.verify_positions(rows)
        positions = torch.cat([draft_positions, verify_positions.flatten()])
        all_rows = torch.cat(
            [rows.draft_rows, rows.verify_rows.unsqueeze(1).expand(-1, self.window).flatten()]
        )
        forward_batch = draft_forward_batch(
            torch.cat(
                [
                    self.candidates[rows.draft_rows, rows.draft_offsets.clamp(min=0)],
                    self.candidates[rows.verify_rows].flatten(),
                ]
            ),
            all_rows,
            positions,
            torch.cat([draft_lens, verify_positions.flatten() + 1]),
            self.req_to_token[all_rows, positions].long(),
            self.model_runner.spec_algorithm,
        )
        forward_batch.next_token_logits_buffer = logits_buffer
        set_is_extend_in_batch(False)
        backend = self.attn_backend
        backend.begin_mixed(
            MixedRows(
                draft_rows=rows.draft_rows,
                draft_lens=draft_lens,
                draft_offsets=rows.draft_offsets,
                verify_rows=rows.verify_rows,
                verify_lens=self.start_lens[rows.verify_rows],
                num_drafted=rows.num_drafted,
            )
        )
        # The model is called directly: ModelRunner.forward would take this for SGLang's own decode batch.
        with forward_context(ForwardContext(attn_backend=backend)):
            output = self.model_runner.model.forward(forward_batch.input_ids, positions, forward_batch)
        backend.end_mixed()
        return output.next_token_logits

    def commit_drafts(self, rows: ForwardRows, tokens: torch.Tensor) -> None:
        """Keep the tokens (int64 [D]) that the drafts gave."""
        self.candidates[rows.draft_rows, rows.draft_offsets + 1] = tokens

    def commit_verifications(self, rows: ForwardRows, accepted: Accepted) -> None:
        """Commit what was accepted: tokens int64 [V, W] and lengths int32 [V]."""
        tokens, accept_lens = accepted
        verified = rows.verify_rows
        self.tokens[verified] = tokens
        self.accept_lens[verified] = accept_lens
        self.lens[verified] = self.start_lens[verified] + accept_lens
        self.candidates[verified, 0] = tokens.gather(1, (accept_lens - 1).long().unsqueeze(1)).squeeze(1)
        self.lens[:1] = 0

    def step(self, rows: ForwardRows, logits_buffer: torch.Tensor | None = None) -> torch.Tensor:
        """:meth:`forward`, then draft and accept greedily (or as simulated); returns the logits."""
        logits = self.forward(rows, logits_buffer)
        tokens = logits.argmax(dim=-1)
        drafts = len(rows.draft_rows)
        candidates = self.candidates[rows.verify_rows]
        target = tokens[drafts:].view(-1, self.window)
        self.commit_drafts(rows, tokens[:drafts])
        if self._simulated is not None:
            accepted = self.simulate(self._simulated, candidates, rows)
        else:
            accepted = sampling.accept_matching(candidates, target, rows.num_drafted)
        self.commit_verifications(rows, accepted)
        return logits

    @staticmethod
    def simulate(simulated: SimulatedAcceptance, candidates: torch.Tensor, rows: ForwardRows) -> Accepted:
        """Simulated acceptance, of no more drafts than were made."""
        tokens, accept_lens = simulated.accept(candidates)
        return tokens, torch.minimum(accept_lens, rows.num_drafted.to(torch.int32) + 1)


@dataclass(frozen=True)
class RoundResult:
    """Of one round, by request of the batch.

    Attributes:
        tokens: int64 [batch, W]. accept_lens: int32 [batch].
        new_seq_lens, bonus_tokens: int64 [batch].
        logits_output: with logits [batch * W, vocab] if the batch wants log-probabilities, else None.
        used_graph: the forwards were replayed.
    """

    tokens: torch.Tensor
    accept_lens: torch.Tensor
    new_seq_lens: torch.Tensor
    bonus_tokens: torch.Tensor
    logits_output: LogitsProcessorOutput
    used_graph: bool


class UnifiedRounds:
    """Runs staggered rounds.

    Args:
        from_first_rank: ``SparseSpecWorker._from_first_rank``.
        count_forward: called before each forward with its draft and verification tokens.
        logits_dtype, use_triton: see ``WindowSampler``.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        backend: SparseSpecAttnBackend,
        window: int,
        simulated: SimulatedAcceptance | None,
        from_first_rank: Callable[..., tuple[torch.Tensor, ...]],
        count_forward: Callable[[int, int], None],
        logits_dtype: torch.dtype,
        use_triton: bool,
    ) -> None:
        self.window = window
        self.schedule = UnifiedSchedule(window)
        self.state = WindowState(model_runner, backend, window, simulated)
        self.graphs: UnifiedGraphs | None = None
        self._pool = backend.req_to_token_pool
        self._simulated = simulated
        self._from_first_rank = from_first_rank
        self._count_forward = count_forward
        self._tp_size = get_tp_group().world_size
        self._vocab_size: int = model_runner.model_config.vocab_size
        device = self.state.lens.device
        self._batch_index = torch.zeros(self.state.num_rows, dtype=torch.int64, device=device)
        self._sampler = WindowSampler(self.state.num_rows, window, logits_dtype, use_triton, device)
        self._uploaded: tuple[Any, torch.Tensor] | None = None
        self._fallbacks_logged: set[str] = set()
        #: Rounds that ran in lock-step because of what their batch asked for.
        self.fallbacks = 0

    # --------------------------------------------------------------------- host

    def forget(self, batch: ScheduleBatch) -> None:
        """The requests of a prefill batch have no drafts."""
        self.schedule.forget(req.req_pool_idx for req in batch.reqs)

    def lose_drafts(self, reqs: Iterable[Req]) -> None:
        """The KV of these requests' drafts is gone; they begin a new window, in the phase that they had."""
        self.schedule.lose_drafts(req.req_pool_idx for req in reqs)

    def must_run_in_lockstep(self, batch: ScheduleBatch) -> bool:
        """Whether the batch asks for what staggered rounds cannot do; counted and logged, its drafts are dropped."""
        reason = None
        if batch.has_grammar:
            reason = "a grammar (its mask needs the whole window on the host before the verification)"
        elif batch.return_hidden_states:
            reason = "hidden states"
        if reason is None:
            return False
        if reason not in self._fallbacks_logged:
            self._fallbacks_logged.add(reason)
            logger.info("Rounds of batches with %s run in lock-step; logged once.", reason)
        self.fallbacks += 1
        self.lose_drafts(batch.reqs)
        return True

    def _plan(self, batch: ScheduleBatch, last: frozenset[int]) -> tuple[StaggeredForward, ...]:
        """The round's forwards; requests of the rows ``last`` stand last in each."""
        rows = [req.req_pool_idx for req in batch.reqs]
        # The generation tells a request from itself before a retraction, should no prefill be between.
        generations = self._pool.req_generation[rows].tolist()
        owners = zip((req.rid for req in batch.reqs), generations, strict=True)
        requests = list(zip(rows, owners, strict=True))
        if last:
            requests.sort(key=lambda request: request[0] in last)
        return self.schedule.plan_round(requests)

    def _upload(self, plan: tuple[StaggeredForward, ...], size: int) -> tuple[torch.Tensor, int, int]:
        """The plan on the device, padded for ``size`` requests: int64 [W, 2D + 2V], D and V."""
        drafts, verifications = forward_capacity(size, self.window)
        if self._uploaded is None or self._uploaded[0] is not plan:
            device = self.state.lens.device
            packed = torch.tensor(pack_plan(plan, drafts, verifications), pin_memory=device.type == "cuda")
            self._uploaded = (plan, packed.to(device, non_blocking=True))
        return self._uploaded[1], drafts, verifications

    # ------------------------------------------------------------------- device

    def run(self, batch: ScheduleBatch, bonus_tokens: torch.Tensor) -> RoundResult:
        """One staggered round: every request verifies once.

        Args:
            bonus_tokens: int [batch], the last committed tokens.
        """
        state, size = self.state, len(batch.reqs)
        batch_rows = batch.req_pool_indices.long()
        with_min_p = self._sampler.rows_with_min_p(batch.sampling_info, batch.reqs)
        plan = self._plan(batch, with_min_p)
        bucket = self.graphs.bucket(size) if self.graphs is not None else None
        packed, drafts, verifications = self._upload(plan, bucket or size)
        state.begin_round(batch_rows, batch.seq_lens, bonus_tokens.long())
        by_hand = self._needs_sampler(batch)
        logits_of_windows = None
        if by_hand:
            self._batch_index[batch_rows] = torch.arange(size, device=batch_rows.device)
            self._sampler.begin_round(batch.sampling_info, batch.reqs, with_min_p)
            if batch.return_logprob:
                shape = (size, self.window, self._vocab_size)
                logits_of_windows = torch.empty(shape, device=batch_rows.device)
        if self.graphs is not None and bucket is not None:
            self.graphs.begin_round(bucket, packed)
        for index, forward in enumerate(plan):
            live = (len(forward.drafts), len(forward.verifications))
            rows = ForwardRows.split(packed[index], drafts, verifications).live(*live)
            if self.graphs is not None and bucket is not None:
                self._count_forward(live[0], self.window * live[1])
                logits = self.graphs.replay(bucket)
                window_logits = logits[drafts : drafts + self.window * live[1]]
            elif forward.tokens(self.window) > 0:
                self._count_forward(live[0], self.window * live[1])
                logits = state.forward(rows) if by_hand else state.step(rows)
                window_logits = logits[live[0] :]
            else:
                continue
            if by_hand:
                self._sampler.begin_forward(index, forward)
            if by_hand and live[0]:
                self._sample_drafts(batch, rows, logits[: live[0]])
            if by_hand and live[1]:
                self._accept(batch, rows, window_logits, logits_of_windows)
        return self._result(batch_rows, logits_of_windows, bucket is not None)

    def _needs_sampler(self, batch: ScheduleBatch) -> bool:
        """Whether tokens are chosen outside of :meth:`WindowState.step`, which is greedy."""
        info = batch.sampling_info
        # Simulated lengths are random: with tensor parallelism they must be the first rank's.
        simulated_on_ranks = self._simulated is not None and self._tp_size > 1
        return not info.is_all_greedy or info.logit_bias is not None or batch.return_logprob or simulated_on_ranks

    def _sample_drafts(self, batch: ScheduleBatch, rows: ForwardRows, logits: torch.Tensor) -> None:
        index = self._batch_index[rows.draft_rows]
        drawn = self._sampler.draw(rows, index, self.state.draft_positions(rows), logits)
        (tokens,) = self._from_first_rank(batch.sampling_info.is_all_greedy, drawn)
        self.state.commit_drafts(rows, tokens)

    def _accept(
        self, batch: ScheduleBatch, rows: ForwardRows, logits: torch.Tensor, logits_of_windows: torch.Tensor | None
    ) -> None:
        state, info = self.state, batch.sampling_info
        index = self._batch_index[rows.verify_rows]
        if info.logit_bias is not None:
            logits = logits + torch.repeat_interleave(info.logit_bias[index], self.window, dim=0)
        candidates = state.candidates[rows.verify_rows]
        if self._simulated is not None:
            accepted = state.simulate(self._simulated, candidates, rows)
        else:
            accepted = self._sampler.accept(rows, index, candidates, state.verify_positions(rows), logits)
        tokens, accept_lens = self._from_first_rank(info.is_all_greedy, *accepted)
        state.commit_verifications(rows, (tokens, accept_lens))
        if logits_of_windows is not None:
            logits_of_windows[index] = logits.view(-1, *logits_of_windows.shape[1:]).to(logits_of_windows.dtype)

    def _result(self, rows: torch.Tensor, logits_of_windows: torch.Tensor | None, used_graph: bool) -> RoundResult:
        state = self.state
        logits = logits_of_windows.flatten(0, 1) if logits_of_windows is not None else None
        # Copies: the state is overwritten by the next round, launched before this one's results are read.
        return RoundResult(
            tokens=state.tokens[rows],
            accept_lens=state.accept_lens[rows],
            new_seq_lens=state.lens[rows],
            bonus_tokens=state.candidates[rows, 0],
            logits_output=LogitsProcessorOutput(next_token_logits=logits),
            used_graph=used_graph,
        )
