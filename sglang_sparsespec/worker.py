"""The speculative worker: one round is k sparse draft forwards and one full verification.

With ``--sparsespec-schedule unified`` the requests' verifications are spread over the round's
forwards instead (:mod:`unified_round`). Follows SGLang's spec-V2 schema (``BaseSpecWorker``; ``ngram_worker.py`` and
``eagle_worker_v2.py`` are the models): committed lengths and the token to draft from are
relayed on the device, and the scheduler reads what was accepted one iteration late.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from sglang.srt.speculative.spec_utils import (
    GrammarTree,
    build_grammar_vocab_mask,
    record_stream_each,
    record_stream_for_v2_verify,
)

from sglang_sparsespec import sampling
from sglang_sparsespec.attention_backend.backend import SparseSpecAttnBackend
from sglang_sparsespec.config import ALWAYS, get_config
from sglang_sparsespec.draft_batch import draft_forward_batch
from sglang_sparsespec.draft_graph import DraftGraphs
from sglang_sparsespec.draft_length import AcceptRule, accept_drafted, fill_window
from sglang_sparsespec.forward_stats import ForwardStats, ForwardTrace
from sglang_sparsespec.metrics import DraftMetrics
from sglang_sparsespec.ngram_draft import NgramDrafter
from sglang_sparsespec.prefill_graph import PrefillSelectionGraphs
from sglang_sparsespec.round_choice import Speculation
from sglang_sparsespec.round_progress import RoundProgress, set_current
from sglang_sparsespec.scheduler_patch.hooks import assert_hooks_applied
from sglang_sparsespec.simulation import SimulatedAcceptance
from sglang_sparsespec.spec_input import SparseSpecDraftInput, SparseSpecVerifyInput
from sglang_sparsespec.unified_graph import UnifiedGraphs
from sglang_sparsespec.unified_round import UnifiedRounds
from sglang_sparsespec.warm_up import compile_sampling, compile_slot_assignment

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


class SparseSpecWorker(BaseSpecWorker):
    """Self-speculation with the target model.

    Raises:
        RuntimeError: the plugin's hooks are not all in force in this process.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        gpu_id: int,
        ps: Any,
        nccl_port: int,
        target_worker: TpModelWorker,
    ) -> None:
        super().__init__()
        assert_hooks_applied()
        self.server_args = server_args
        self._target_worker = target_worker
        self.model_runner = target_worker.model_runner
        self.device = server_args.device
        self.num_steps: int = server_args.speculative_num_steps
        self.window: int = server_args.speculative_num_draft_tokens
        self.speculative_num_draft_tokens = self.window
        self.speculative_num_steps = self.num_steps
        self.draft_graphs: DraftGraphs | None = None
        self.plain_graphs: DraftGraphs | None = None
        self.ngram_drafter: NgramDrafter | None = None
        self.unified: UnifiedRounds | None = None
        is_first_rank = ps.tp_rank == 0 and not ps.dp_rank  # one of several ranks and replicas writes the trace
        late_launch = get_config(server_args).late_launch
        self.progress = RoundProgress.on_device(self.device if late_launch else "", self.window)
        set_current(self.progress)
        self.forward_stats = ForwardStats(ForwardTrace.from_environment(self.device, is_first_rank), self.progress)
        self.speculation = Speculation(get_config(server_args).speculate, self.num_steps, self.device)
        self._simulated = SimulatedAcceptance.from_environment(self.window)
        self._window_offsets = torch.arange(self.window, device=self.device)
        self._logits_dtype = sampling.draft_logits_dtype(self.model_runner)
        self._sampler = sampling.DraftSampler(self._logits_dtype, use_triton=self.device == "cuda")

    # ------------------------------------------------------------ worker interface

    @property
    def draft_worker(self) -> None:
        """None: the target drafts for itself."""
        return None

    @property
    def attn_backend(self) -> SparseSpecAttnBackend:
        """The backend of the target's model runner."""
        return self.model_runner.attn_backend

    def init_attention_backends(self) -> None:
        """The target's backend exists now; its counters become the worker's metrics."""
        self.sparsespec_metrics = DraftMetrics(
            self.num_steps, self.attn_backend.kv_read, self.forward_stats, self.speculation, self.progress
        )
        if get_config(self.server_args).schedule == "unified":
            self.unified = UnifiedRounds(
                self.model_runner,
                self.attn_backend,
                self.window,
                self._simulated,
                self._from_first_rank,
                self.forward_stats.count,
                self._logits_dtype,
                use_triton=self.device == "cuda",
            )
            self.sparsespec_metrics.unified = self.unified
        if self.attn_backend.policy.num_proposals:
            self.ngram_drafter = NgramDrafter(
                self.model_runner,
                self.attn_backend,
                self.window,
                self._from_first_rank,
                self.forward_stats.count,
                self._sampler,
            )

    def init_cuda_graphs(self) -> None:
        """Capture the draft graphs; SGLang has captured the verify graphs before.

        Staggered rounds have graphs of their own. The others are captured all the same, for the
        rounds that run in lock-step because of what their batch asks for.
        """
        from sglang.srt.model_executor.cuda_graph_config import Backend
        from sglang.srt.model_executor.runner import DecodeCudaGraphRunner

        self.attn_backend.warm_up()
        if self.device == "cuda":
            pool = self.req_to_token_pool.req_to_token
            compile_slot_assignment(pool, most_requests=pool.shape[0] - 1)
            compile_sampling(self.model_runner.model_config.vocab_size, self.window, self._logits_dtype, self.device)
        runner = self.model_runner.decode_cuda_graph_runner
        if self.device != "cuda" or not isinstance(runner, DecodeCudaGraphRunner) or self.ngram_drafter:
            return
        if self.server_args.cuda_graph_config.decode.backend != Backend.FULL:
            logger.warning("Draft steps run without CUDA graphs; use --cuda-graph-backend-decode full.")
            return
        if self.attn_backend.prefill_selection is not None:
            graphs = PrefillSelectionGraphs(self.model_runner, self.attn_backend, self.attn_backend.prefill_selection)
            self._additional_graph_memory_usage["prefill_selection"] = graphs.memory_usage_gb
        if self.unified is not None:
            self.unified.graphs = UnifiedGraphs(self.model_runner, self.attn_backend, self.unified.state)
            self._additional_graph_memory_usage["unified"] = self.unified.graphs.memory_usage_gb
        self.draft_graphs = DraftGraphs(self.model_runner, self.attn_backend, self.window)
        self._additional_graph_memory_usage["draft_decode"] = self.draft_graphs.memory_usage_gb
        if get_config(self.server_args).speculate != ALWAYS:
            self.plain_graphs = DraftGraphs(self.model_runner, self.attn_backend, self.window, plain=True)
            self._additional_graph_memory_usage["plain_decode"] = self.plain_graphs.memory_usage_gb

    def lose_drafts(self, reqs: list[Req]) -> None:
        """``reqs`` leave the device: their slots beyond the committed lengths are freed, with what was drafted into them.

        In lock-step no round leaves drafts behind; staggered rounds do. Drafting on from them, the
        next drafts would attend to KV that is not theirs: the output would not change (drafts are
        verified), the accept length would.
        """
        if self.unified is not None:
            self.unified.lose_drafts(reqs)

    def clear_cache_pool(self) -> None:
        """Nothing to clear: selections are rewritten by the next prefill of their row."""

    def update_weights_from_disk(self, recv_req: Any) -> tuple[bool, str]:
        """The target's weights are the draft's; SGLang has updated them already."""
        return True, "Succeeded to update model weights."

    def update_weights_from_ipc(self, recv_req: Any) -> tuple[bool, str]:
        """See :meth:`update_weights_from_disk`."""
        return True, "Succeeded to update model weights."

    def update_weights_from_tensor(self, recv_req: Any) -> Any:
        """SGLang calls the speculative worker instead of the target here."""
        return self.target_worker.update_weights_from_tensor(recv_req)

    def forward_batch_generation(
        self, batch: ScheduleBatch, on_publish: Callable[[torch.Tensor], None] | None = None
    ) -> GenerationBatchResult:
        """Run a prefill batch, or one round of a decode batch.

        Args:
            batch: SGLang's batch; edits are rolled back by the scheduler.
            on_publish: to be called with the new committed lengths (int64 [batch]) as soon
                as they exist on the device (overlap scheduling).
        """
        # SGLang advances a grammar by the last round's tokens before it launches the next.
        self.progress.begin(follows_results=batch.has_grammar)
        if not batch.forward_mode.is_decode():
            return self._prefill(batch, on_publish)
        if plain_steps := self.speculation.begin_round(batch):
            result = self._plain_round(batch, plain_steps, on_publish)
        elif self.unified is None or self.unified.must_run_in_lockstep(batch):
            result = self._round(batch, on_publish)
        else:
            result = self._staggered_round(self.unified, batch, on_publish)
        result.is_typical = self.speculation.is_typical
        self.speculation.end_round()
        self.forward_stats.end_of_round()
        return result

    def _prefill(
        self, batch: ScheduleBatch, on_publish: Callable[[torch.Tensor], None] | None
    ) -> GenerationBatchResult:
        if self.unified is not None:
            self.unified.forget(batch)
        if self.ngram_drafter is not None:
            self.ngram_drafter.note_prompts(batch)
        result = self.target_worker.forward_batch_generation(batch)
        new_seq_lens = batch.seq_lens.clone()
        if on_publish is not None:
            on_publish(new_seq_lens)
        result.accept_lens = torch.ones(len(batch.seq_lens), dtype=torch.int32, device=self.device)
        result.new_seq_lens = new_seq_lens
        result.speculative_num_draft_tokens = self.window
        result.next_draft_input = SparseSpecDraftInput(result.next_token_ids.long(), new_seq_lens)
        return result

    # ----------------------------------------------------------------------- round

    @property
    def _stream(self) -> Any:
        """The stream that rounds are launched on."""
        return torch.get_device_module(self.device).current_stream()

    def _plain_round(
        self, batch: ScheduleBatch, steps: int, on_publish: Callable[[torch.Tensor], None] | None
    ) -> GenerationBatchResult:
        """``steps`` steps of plain decoding: draft steps that attend to everything, so that their tokens are the target's.

        The next round that speculates drafts so too, having no selection: a round with every draft accepted.
        """
        if self.unified is not None:
            self.unified.lose_drafts(batch.reqs)
        self.attn_backend.attend_to_all(batch.req_pool_indices)
        positions, slots = self._begin_window(batch)
        drafted, used_graph = self._run_draft_steps(batch, positions, slots, steps, plain=True)
        new_seq_lens = batch.seq_lens + steps
        if on_publish is not None:
            on_publish(new_seq_lens)
        result = self._result(
            tokens=fill_window(drafted[:, 1:], self.window),
            accept_lens=torch.full((len(drafted),), steps, dtype=torch.int32, device=self.device),
            new_seq_lens=new_seq_lens,
            bonus_tokens=drafted[:, -1],
            logits_output=LogitsProcessorOutput(next_token_logits=None),
            used_graph=used_graph,
        )
        result.num_plain_steps = steps
        return result

    def _staggered_round(
        self, unified: UnifiedRounds, batch: ScheduleBatch, on_publish: Callable[[torch.Tensor], None] | None
    ) -> GenerationBatchResult:
        """Each request drafts in k of W forwards and verifies in one, not all in the same."""
        record_stream_for_v2_verify(batch, None, self._stream)
        done = unified.run(batch, batch.spec_info.bonus_tokens)
        if on_publish is not None:
            on_publish(done.new_seq_lens)
        if batch.return_logprob:
            self._compute_logprobs(batch, done.logits_output, done.tokens)
        result = self._result(
            tokens=done.tokens,
            accept_lens=done.accept_lens,
            new_seq_lens=done.new_seq_lens,
            bonus_tokens=done.bonus_tokens,
            logits_output=done.logits_output,
            used_graph=done.used_graph,
        )
        result.num_drafted = self.num_steps
        return result

    def _round(
        self, batch: ScheduleBatch, on_publish: Callable[[torch.Tensor], None] | None
    ) -> GenerationBatchResult:
        seq_lens = batch.seq_lens
        positions, slots = self._begin_window(batch)
        drafted, rule = self._draft(batch, positions, slots)
        candidates = fill_window(drafted, self.window)
        record_stream_each((candidates,), self._stream)

        grammar_tree = GrammarTree.from_linear_chain(candidates) if batch.has_grammar else None
        logits_output, can_run_graph = self._verify(batch, candidates, positions, slots)
        logits = logits_output.next_token_logits
        self._apply_bias_and_grammar(batch, logits, grammar_tree)
        if self._simulated is not None:
            tokens, accept_lens = self._simulated.accept(drafted)
            tokens = fill_window(tokens, self.window)
        else:
            tokens, accept_lens = accept_drafted(drafted, logits, positions, rule)
        tokens, accept_lens = self._from_first_rank(batch.sampling_info.is_all_greedy, tokens, accept_lens)
        new_seq_lens = seq_lens + accept_lens
        if on_publish is not None:
            on_publish(new_seq_lens)
        if batch.return_logprob:
            self._compute_logprobs(batch, logits_output, tokens)
        result = self._result(
            tokens=tokens,
            accept_lens=accept_lens,
            new_seq_lens=new_seq_lens,
            bonus_tokens=tokens.gather(1, (accept_lens - 1).long().unsqueeze(1)).squeeze(1),
            logits_output=logits_output,
            used_graph=can_run_graph,
        )
        result.num_drafted = drafted.shape[1] - 1
        return result

    def _result(
        self,
        tokens: torch.Tensor,
        accept_lens: torch.Tensor,
        new_seq_lens: torch.Tensor,
        bonus_tokens: torch.Tensor,
        logits_output: LogitsProcessorOutput,
        used_graph: bool,
    ) -> GenerationBatchResult:
        """What a round of either kind tells SGLang.

        Args:
            tokens: int64 [batch, W], of which the first ``accept_lens`` (int32 [batch]) count.
            new_seq_lens, bonus_tokens: int64 [batch].
        """
        result = GenerationBatchResult(
            logits_output=logits_output,
            next_token_ids=tokens.flatten(),
            can_run_cuda_graph=used_graph,
            accept_lens=accept_lens,
            new_seq_lens=new_seq_lens,
            next_draft_input=SparseSpecDraftInput(bonus_tokens, new_seq_lens),
            speculative_num_draft_tokens=self.window,
        )
        # Read when the round's acceptance is known on the host (metrics_hooks.count_verifications).
        result.num_drafted = result.num_plain_steps = 0
        return result

    def _begin_window(self, batch: ScheduleBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions and KV slots of the next W tokens: int64 [batch, W] each."""
        record_stream_for_v2_verify(batch, None, self._stream)
        positions = batch.seq_lens.unsqueeze(1) + self._window_offsets
        # Slots of the window: allocated by eagle_prepare_for_decode (reserve of 2W per
        # request), in position order.
        slots = self.req_to_token_pool.req_to_token[batch.req_pool_indices.unsqueeze(1), positions].long()
        record_stream_each((positions, slots), self._stream)
        return positions, slots

    def _draft(
        self, batch: ScheduleBatch, positions: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, AcceptRule]:
        """Draft n tokens per request with sparse attention; n is k, or less where the policy says so.

        Args:
            positions, slots: int64 [batch, W].

        Returns:
            candidates int64 [batch, n + 1], and how they are accepted.
        """
        if self.ngram_drafter is not None:
            self.attn_backend.set_draft_length(0)  # the drafter counts its queries itself
            drafted, num_drafted = self.ngram_drafter.draft(batch, batch.spec_info.bonus_tokens)
            return drafted, partial(self._sampler.accept, num_drafted=num_drafted)
        steps = self.attn_backend.policy.next_draft_length()
        self.attn_backend.set_draft_length(steps)
        drafted, _ = self._run_draft_steps(batch, positions, slots, steps)
        self.attn_backend.fill_lse_hint(len(batch.seq_lens), steps)
        return drafted, self._sampler.accept

    def _run_draft_steps(
        self, batch: ScheduleBatch, positions: torch.Tensor, slots: torch.Tensor, steps: int, plain: bool = False
    ) -> tuple[torch.Tensor, bool]:
        """``steps`` draft steps from the last committed tokens, at the first of the given places (int64 [batch, W]).

        Args:
            plain: they attend to all tokens.

        Returns:
            candidates int64 [batch, steps + 1], and whether graphs were replayed.
        """
        self._sampler.begin_round(batch.sampling_info, batch.reqs, steps)
        graphs = self.plain_graphs if plain else self.draft_graphs
        if graphs is not None and graphs.bucket(len(batch.seq_lens)) is not None:
            return self._draft_by_graph(graphs, batch, positions, steps), True
        with self.attn_backend.plain_steps() if plain else nullcontext():
            return self._draft_eagerly(batch, positions, slots, steps), False

    def _draft_eagerly(
        self, batch: ScheduleBatch, positions: torch.Tensor, slots: torch.Tensor, steps: int
    ) -> torch.Tensor:
        """:meth:`_run_draft_steps` without graphs."""
        is_all_greedy = self._sampler.rows.is_all_greedy
        backend = self.attn_backend
        tokens = [batch.spec_info.bonus_tokens.long()]
        forward_batch = draft_forward_batch(
            tokens[0],
            batch.req_pool_indices,
            positions[:, 0],
            positions[:, 0] + 1,
            slots[:, 0],
            batch.spec_algorithm,
            batch.spec_info,
        )
        # The model is called directly: ModelRunner.forward would replay the verify graph for
        # a DECODE batch, and leave an event that lets the scheduler write to req_to_token
        # before verification has read it (war_fastpath_read_done_event).
        with forward_context(ForwardContext(attn_backend=backend)):
            for step in range(steps):
                self.forward_stats.count(len(tokens[-1]), 0)
                forward_batch.input_ids = tokens[-1]
                forward_batch.positions = positions[:, step].contiguous()
                forward_batch.seq_lens = positions[:, step] + 1
                forward_batch.out_cache_loc = slots[:, step].contiguous()
                output = self.model_runner.model.forward(
                    forward_batch.input_ids, forward_batch.positions, forward_batch
                )
                token = self._sampler.draw(output.next_token_logits, forward_batch.positions)
                (token,) = self._from_first_rank(is_all_greedy, token)
                backend.store_lse_hint(len(token), self._window_offsets[step : step + 1])
                tokens.append(token)
        return torch.stack(tokens, dim=1)

    def _draft_by_graph(
        self, graphs: DraftGraphs, batch: ScheduleBatch, positions: torch.Tensor, steps: int
    ) -> torch.Tensor:
        """:meth:`_run_draft_steps` by replaying the captured step."""
        size = len(batch.seq_lens)
        is_all_greedy = self._sampler.rows.is_all_greedy
        key = graphs.begin_round(batch.spec_info.bonus_tokens, batch.req_pool_indices, batch.seq_lens)
        for step in range(steps):
            self.forward_stats.count(size, 0)
            logits = graphs.replay(key)
            if not is_all_greedy:
                (token,) = self._from_first_rank(False, self._sampler.draw(logits[:size], positions[:, step]))
                graphs.override_token(step, token)
        # The static candidates are overwritten by the next round, which may be launched
        # before this one's results are read.
        return graphs.candidates[:size, : steps + 1].clone()

    def _verify(
        self,
        batch: ScheduleBatch,
        candidates: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
    ) -> tuple[Any, bool]:
        """Run the target on the window with full attention; drafts' KV is rewritten."""
        self.forward_stats.count(0, candidates.numel())
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        batch.input_ids = candidates.flatten()
        batch.out_cache_loc = slots.flatten()
        batch.spec_info = SparseSpecVerifyInput(self.window, positions.flatten())
        result = self.target_worker.forward_batch_generation(batch, is_verify=True)
        return result.logits_output, result.can_run_cuda_graph

    def _apply_bias_and_grammar(
        self, batch: ScheduleBatch, logits: torch.Tensor, grammar_tree: GrammarTree | None
    ) -> None:
        """Apply logit biases and grammar masks to the verification's logits, in place.

        Penalties are refused at the request (``scheduler_patch.hooks``).
        """
        info = batch.sampling_info
        if info.logit_bias is not None:
            logits.add_(torch.repeat_interleave(info.logit_bias, self.window, dim=0))
        if grammar_tree is not None:
            mask = build_grammar_vocab_mask(
                reqs=batch.reqs, tree=grammar_tree, sampling_info=info, device=logits.device, barrier=None
            )
            if mask is not None:
                mask.apply(logits)

    def _from_first_rank(self, is_all_greedy: bool, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors of tensor-parallel rank 0: what was drawn at random must not differ between ranks."""
        from sglang.srt.distributed import get_tp_group

        group = get_tp_group()
        if group.world_size == 1 or (is_all_greedy and self._simulated is None):
            return tensors
        return tuple(group.broadcast(tensor.contiguous(), src=0) for tensor in tensors)

    def _compute_logprobs(self, batch: ScheduleBatch, logits_output: Any, tokens: torch.Tensor) -> None:
        from sglang.srt.layers.logprob_processor import compute_spec_v2_logprobs

        # A chain's accepted tokens are its first ones, so every row is its own index.
        index = torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape)
        compute_spec_v2_logprobs(batch, logits_output, tokens.flatten(), index, self.num_steps)
