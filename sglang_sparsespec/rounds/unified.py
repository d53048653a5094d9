"""The unified schedule (arXiv 2512.01278, section 4.2): k + 1 forwards in which drafts and verifications are spread evenly.

:mod:`unified_schedule` says which request does what in which forward; :mod:`windows` does it on the device.
``docs/design.md`` has the reasons.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.speculative.spec_utils import record_stream_for_v2_verify

from sglang_sparsespec.rounds.base import Publish, RoundContext, RoundOutcome
from sglang_sparsespec.rounds.graphs import StepGraphs, decode_batch_sizes
from sglang_sparsespec.rounds.unified_schedule import StaggeredForward, UnifiedSchedule, forward_capacity
from sglang_sparsespec.rounds.windows import CapturedForward, ForwardWork, Windows, pack_round
from sglang_sparsespec.sampling.sampler import Sampler
from sglang_sparsespec.sglang_compat import compute_logprobs, kv_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


class UnifiedRounds:
    """Runs staggered rounds: every request verifies once in each, in the forward of its phase."""

    kind = "unified"

    def __init__(self, context: RoundContext) -> None:
        self.context = context
        self.window = context.window
        self.schedule = UnifiedSchedule(context.window)
        self.windows = Windows(context)
        num_rows = self.windows.num_rows
        self._num_places = context.window - 1
        self._sampler = Sampler(self._num_places, context.logits_dtype, context.device, context.use_triton)
        self._batch_index = torch.zeros(num_rows, dtype=torch.int64, device=context.device)
        self._pool = context.backend.req_to_token_pool
        self._tp_size = get_tp_group().world_size
        self._vocab_size: int = context.model_runner.model_config.vocab_size
        self._uploaded: tuple[tuple[StaggeredForward, ...], torch.Tensor] | None = None
        self._captured: CapturedForward | None = None
        self.graphs: StepGraphs | None = None
        if context.adapters is not None:
            context.adapters.use_none()
        if context.capture:
            sizes = decode_batch_sizes(context.model_runner)
            self._captured = CapturedForward(self.windows, sizes[-1])
            self.graphs = StepGraphs("unified", self._captured, sizes, context.model_runner, context.backend)

    # --------------------------------------------------------------------- host

    def forget(self, batch: ScheduleBatch) -> None:
        """The requests of a prefill batch have no drafts."""
        self.schedule.forget(kv_of(req).req_pool_idx for req in batch.reqs)

    def lose_drafts(self, reqs: Iterable[Req]) -> None:
        """The KV of these requests' drafts is gone; they begin a new window, in the phase that they had."""
        self.schedule.lose_drafts(kv_of(req).req_pool_idx for req in reqs)

    @staticmethod
    def lockstep_reason(batch: ScheduleBatch) -> str | None:
        """What the batch asks for that staggered rounds cannot do, for the log; None if they can."""
        if batch.has_grammar:
            return "a grammar (its mask needs the whole window on the host before the verification)"
        if batch.return_hidden_states:
            return "hidden states"
        if any(req.lora_id is not None for req in batch.reqs):
            return "LoRA adapters (its forwards mix drafts and verifications in changing numbers)"
        return None

    def _forwards(self, batch: ScheduleBatch) -> tuple[StaggeredForward, ...]:
        rows = [kv_of(req).req_pool_idx for req in batch.reqs]
        # The generation tells a request from itself before a retraction, should no prefill be between.
        generations = self._pool.req_generation[rows].tolist()
        owners = zip((req.rid for req in batch.reqs), generations, strict=True)
        return self.schedule.plan_round(list(zip(rows, owners, strict=True)))

    def _upload(self, forwards: tuple[StaggeredForward, ...], size: int) -> tuple[torch.Tensor, int, int]:
        """The round on the device, padded for ``size`` requests: int64 [W, 2D + 2V], D and V."""
        drafts, verifications = forward_capacity(size, self.window)
        if self._uploaded is None or self._uploaded[0] is not forwards:
            pinned = self.context.device.type == "cuda"
            packed = torch.tensor(pack_round(forwards, drafts, verifications), pin_memory=pinned)
            self._uploaded = (forwards, packed.to(self.context.device, non_blocking=True))
        return self._uploaded[1], drafts, verifications

    # ------------------------------------------------------------------- device

    def run(self, batch: ScheduleBatch, publish: Publish) -> RoundOutcome:
        """Run one staggered round of ``batch``."""
        context, windows, size = self.context, self.windows, len(batch.reqs)
        if context.adapters is not None:
            context.adapters.use_none()
        record_stream_for_v2_verify(batch, None, context.stream)
        rows = batch.req_pool_indices.long()
        forwards = self._forwards(batch)
        graph_size = self.graphs.size_for(size) if self.graphs is not None else None
        packed, drafts, verifications = self._upload(forwards, graph_size or size)
        windows.load(rows, batch.seq_lens, batch.spec_info.bonus_tokens.long())
        samples = self._needs_sampler(batch)
        window_logits = self._begin_sampling(batch, rows) if samples else None
        if self._captured is not None and graph_size is not None:
            self._captured.load(packed, graph_size)
        for index, forward in enumerate(forwards):
            live = (len(forward.drafts), len(forward.verifications))
            if not any(live) and graph_size is None:
                continue
            work = ForwardWork.split(packed[index], drafts, verifications).live(*live)
            context.metrics.note_forward(draft_tokens=live[0], verify_tokens=self.window * live[1])
            if self.graphs is not None and graph_size is not None:
                logits = self.graphs.replay(graph_size)
                verified = logits[drafts : drafts + self.window * live[1]]
            else:
                logits = windows.forward(work) if samples else windows.step(work)
                verified = logits[live[0] :]
            if samples and live[0]:
                self._draw(batch, work, logits[: live[0]])
            if samples and live[1]:
                self._accept(batch, work, verified, window_logits)
        return self._outcome(batch, rows, window_logits, graph_size is not None, publish)

    def _needs_sampler(self, batch: ScheduleBatch) -> bool:
        """Whether tokens are chosen outside of :meth:`Windows.step`, which is greedy."""
        info = batch.sampling_info
        # Simulated lengths are random: with tensor parallelism they must be the first rank's.
        simulated_on_ranks = self.context.simulated is not None and self._tp_size > 1
        changed = info.logit_bias is not None or self.context.penalties.is_active
        return not info.is_all_greedy or changed or batch.return_logprob or simulated_on_ranks

    def _begin_sampling(self, batch: ScheduleBatch, rows: torch.Tensor) -> torch.Tensor | None:
        """Tell the sampler of the round; float32 [batch, W, vocab] for the windows' logits, if the batch wants them."""
        size = len(rows)
        self._batch_index[rows] = torch.arange(size, device=rows.device)
        # Every forward draws drafts and acceptance.
        self._sampler.begin_round(
            batch.sampling_info, batch.reqs, num_slots=self.windows.num_rows, num_draws=2 * self.window
        )
        if not batch.return_logprob:
            return None
        return torch.empty((size, self.window, self._vocab_size), device=rows.device)

    def _draw(self, batch: ScheduleBatch, work: ForwardWork, logits: torch.Tensor) -> None:
        entries = work.draft_rows * self._num_places + work.draft_offsets
        requests = self._batch_index[work.draft_rows]
        positions, candidates = self.windows.draft_positions(work), self.windows.candidates[work.draft_rows]
        self.context.penalties.apply(logits, work.draft_rows, positions, candidates, work.draft_offsets)
        drawn = self._sampler.draw(logits, entries, positions, requests)
        (tokens,) = self.context.from_first_rank(batch.sampling_info.is_all_greedy, drawn)
        self.windows.commit_drafts(work, tokens)

    def _accept(
        self, batch: ScheduleBatch, work: ForwardWork, logits: torch.Tensor, window_logits: torch.Tensor | None
    ) -> None:
        windows, info = self.windows, batch.sampling_info
        requests = self._batch_index[work.verify_rows]
        candidates, positions = windows.candidates[work.verify_rows], windows.verify_positions(work).flatten()
        self.context.penalties.apply(logits, work.verify_rows, positions, candidates)
        if info.logit_bias is not None:
            logits = logits + torch.repeat_interleave(info.logit_bias[requests], self.window, dim=0)
        accepted = windows.simulate(candidates, work)
        if accepted is None:
            accepted = self._sampler.accept(
                candidates, logits, positions, work.verify_rows, requests, work.num_drafted
            )
        tokens, accept_lens = self.context.from_first_rank(info.is_all_greedy, *accepted)
        windows.commit_verifications(work, (tokens, accept_lens))
        self.context.penalties.commit(work.verify_rows, tokens, accept_lens)
        if window_logits is not None:
            window_logits[requests] = logits.view(-1, *window_logits.shape[1:]).to(window_logits.dtype)

    def _outcome(
        self,
        batch: ScheduleBatch,
        rows: torch.Tensor,
        window_logits: torch.Tensor | None,
        used_graph: bool,
        publish: Publish,
    ) -> RoundOutcome:
        # These are copies: the state is overwritten by the next round, launched before this one's results are read.
        windows = self.windows
        tokens, new_seq_lens = windows.tokens[rows], windows.lens[rows]
        publish(new_seq_lens)
        logits = window_logits.flatten(0, 1) if window_logits is not None else None
        logits_output = LogitsProcessorOutput(next_token_logits=logits)
        if batch.return_logprob:
            compute_logprobs(batch, logits_output, tokens)
        return RoundOutcome(
            kind=self.kind,
            tokens=tokens,
            accept_lens=windows.accept_lens[rows],
            new_seq_lens=new_seq_lens,
            bonus_tokens=windows.candidates[rows, 0],
            logits_output=logits_output,
            used_graph=used_graph,
            drafted=self.window - 1,
        )
