"""SGLang's speculative worker: builds the rounds, picks one for each batch, and returns its result.

Follows SGLang's spec-V2 schema (``BaseSpecWorker``; ``ngram_worker.py`` and ``eagle_worker_v2.py`` are the models).
Delayed verification (arXiv 2512.01278, section 4.3) is SGLang's overlap scheduler: committed lengths and the token to
draft from are relayed on the device, and the scheduler reads what was accepted one iteration late.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker

from sglang_sparsespec.attention_backend.backend import SparseSpecAttnBackend
from sglang_sparsespec.draft_weights.copies import draft_weights_of
from sglang_sparsespec.hook_registry import assert_hooks_applied
from sglang_sparsespec.metrics import DraftMetrics
from sglang_sparsespec.rounds.adapters import Adapters
from sglang_sparsespec.rounds.base import Publish, RoundContext, RoundOutcome, SparseSpecResult
from sglang_sparsespec.rounds.graphs import StepGraphs, capture_prefill_selection, decode_batch_sizes
from sglang_sparsespec.rounds.lockstep import LockstepRounds, SparseDrafter
from sglang_sparsespec.rounds.measurement import measure_rounds
from sglang_sparsespec.rounds.ngram import NgramDrafter
from sglang_sparsespec.rounds.plain import PlainRounds
from sglang_sparsespec.rounds.planner import Planner, needs_verification
from sglang_sparsespec.rounds.unified import UnifiedRounds
from sglang_sparsespec.rounds.warm_up import compile_slot_assignment
from sglang_sparsespec.sampling.penalties import PenalisedPrompts, Penalties
from sglang_sparsespec.sampling.sampler import compile_kernels, draft_logits_dtype
from sglang_sparsespec.sampling.simulated import SimulatedAcceptance
from sglang_sparsespec.settings import settings_of
from sglang_sparsespec.sglang_compat import in_force
from sglang_sparsespec.spec_input import SparseSpecDraftInput

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


class SparseSpecWorker(BaseSpecWorker):
    """Self-speculation with the target model.

    SGLang builds a worker in phases: the constructor, then :meth:`init_attention_backends`, then :meth:`init_cuda_graphs`.

    Attributes:
        metrics: of drafting.
        planner: decides which rounds speculate.
        penalties: of the requests.

    Raises:
        RuntimeError: the plugin's hooks are not all in force in this process.
    """

    metrics: DraftMetrics
    planner: Planner
    penalties: Penalties

    def __init__(self, server_args: ServerArgs, target_worker: TpModelWorker, **placement: Any) -> None:
        """SGLang also says which GPU and ports a draft worker would have."""
        super().__init__()
        assert_hooks_applied()
        self.server_args = server_args
        self._target_worker = target_worker
        self.model_runner = target_worker.model_runner
        args = in_force(server_args)
        self.device = args.device
        # SGLang reads these two by name.
        self.speculative_num_steps: int = args.speculative_num_steps
        self.speculative_num_draft_tokens: int = args.speculative_num_draft_tokens
        self._lockstep: LockstepRounds | None = None
        self._plain: PlainRounds | None = None
        self._unified: UnifiedRounds | None = None
        self._ngram: NgramDrafter | None = None
        self._logged_reasons: set[str] = set()

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
        steps = self.speculative_num_steps
        self.metrics = DraftMetrics(steps, self.attn_backend.kv_read)
        settings = settings_of(self.server_args)
        any_number = settings.schedule != "unified" and not self.attn_backend.policy.facts.num_proposals
        self.planner = Planner(
            settings,
            steps,
            on_gpu=self.device == "cuda",
            any_number=any_number,
            most_budget=self.attn_backend.table.positions.shape[-1],
        )

    def init_cuda_graphs(self) -> None:
        """Make the rounds, which capture their steps; SGLang has captured the verify graphs before."""
        settings = settings_of(self.server_args)
        num_rows, vocab_size = self.req_to_token_pool.req_to_token.shape[0], self.model_runner.model_config.vocab_size
        self.penalties = Penalties(num_rows, vocab_size, self.device, use_triton=self.device == "cuda")
        capture = self._captures_steps()
        most_captured = decode_batch_sizes(self.model_runner)[-1] if capture else None
        context = RoundContext(
            target_worker=self._target_worker,
            model_runner=self.model_runner,
            backend=self.attn_backend,
            window=self.speculative_num_draft_tokens,
            metrics=self.metrics,
            simulated=SimulatedAcceptance.from_environment(self.speculative_num_draft_tokens),
            logits_dtype=draft_logits_dtype(self.model_runner),
            penalties=self.penalties,
            capture=capture,
            adapters=Adapters.of(self.model_runner, most_captured),
            note_step=self.planner.late_choice.note_step,
        )
        self._compile(context)
        self._choose_draft_weights()
        graphs: dict[str, StepGraphs | None] = {}
        if context.capture:
            graphs["prefill_selection"] = capture_prefill_selection(self.model_runner, self.attn_backend)
        # Batches that ask for what staggered rounds cannot do run in lock-step, so those rounds exist in any case.
        if settings.schedule == "unified":
            self._unified = UnifiedRounds(context)
            graphs["unified"] = self._unified.graphs
        if self.attn_backend.policy.facts.num_proposals:
            self._ngram = NgramDrafter(context)
            self._lockstep = LockstepRounds(context, self._ngram)
        else:
            drafter = SparseDrafter(context)
            self._lockstep = LockstepRounds(context, drafter)
            graphs["draft_decode"] = drafter.steps.graphs
        # An operator may switch speculation off in a running server.
        self._plain = PlainRounds(context, self._lockstep.drafter.sampler)
        graphs["plain_decode"] = self._plain.steps.graphs
        for name, captured in graphs.items():
            if captured is not None:
                self._additional_graph_memory_usage[name] = captured.memory_usage_gb

    def measure_rounds(self) -> None:
        """Give the planner its table of times, once the KV pool has its final size, and before any request."""
        assert self._lockstep is not None and self._plain is not None
        drafter = self._lockstep.drafter
        # With policies for study every round speculates, so nothing is ever compared.
        if isinstance(drafter, SparseDrafter) and not self.attn_backend.policy.facts.for_study:
            self.planner.times = measure_rounds(self._lockstep.context, drafter.steps, self._plain.steps)

    def _captures_steps(self) -> bool:
        from sglang.srt.model_executor.cuda_graph_config import Backend
        from sglang.srt.model_executor.runner import DecodeCudaGraphRunner

        if self.device != "cuda" or self.attn_backend.policy.facts.num_proposals:
            return False
        if not isinstance(self.model_runner.decode_cuda_graph_runner, DecodeCudaGraphRunner):
            return False
        if in_force(self.server_args).cuda_graph_config.decode.backend != Backend.FULL:
            logger.warning("Draft steps run without CUDA graphs; use --cuda-graph-backend-decode full.")
            return False
        return True

    def _compile(self, context: RoundContext) -> None:
        """Compile what would be compiled while requests wait."""
        self.attn_backend.warm_up()
        if self.device == "cuda":
            pool = self.req_to_token_pool.req_to_token
            compile_slot_assignment(pool, most_requests=pool.shape[0] - 1)
            vocab_size = self.model_runner.model_config.vocab_size
            compile_kernels(vocab_size, context.window, context.logits_dtype, self.device)
            self.penalties.compile_kernels(context.window)

    def _choose_draft_weights(self) -> None:
        """Time products with the copied weights, if there are any: what is faster is captured."""
        weights = draft_weights_of(self.model_runner)
        if weights is None or self.device != "cuda":
            return
        found = weights.choose(most_rows=decode_batch_sizes(self.model_runner)[-1])
        # A pool that is sized after the capture of graphs has no memory yet.
        pool_bytes = max(1, sum(self.model_runner.token_to_kv_pool.get_kv_size_bytes()))
        tokens = self.model_runner.max_total_num_tokens * weights.nbytes // pool_bytes
        logger.info("FP8 draft weights: %s; they take the memory of %d KV tokens.", found, tokens)

    def lose_drafts(self, reqs: list[Req]) -> None:
        """``reqs`` leave the device: their slots beyond the committed lengths are freed, with what was drafted into them.

        In lock-step no round leaves drafts behind; staggered rounds do. Drafting on from them, the
        next drafts would attend to KV that is not theirs: the output would not change (drafts are
        verified), the accept length would.
        """
        if self._unified is not None:
            self._unified.lose_drafts(reqs)

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

    # ------------------------------------------------------------------------ batches

    def forward_batch_generation(
        self,
        batch: ScheduleBatch,
        on_publish: Callable[[torch.Tensor], None] | None = None,
        pp_proxy_tensors: None = None,
    ) -> GenerationBatchResult:
        """Run a prefill batch, or one round of a decode batch.

        Args:
            batch: SGLang's batch; edits are rolled back by the scheduler.
            on_publish: to be called with the new committed lengths (int64 [batch]) as soon
                as they exist on the device (overlap scheduling).
            pp_proxy_tensors: of pipeline parallelism, which is refused at start-up.
        """
        publish = on_publish or (lambda new_seq_lens: None)
        if not batch.forward_mode.is_decode():
            return self._prefill(batch, publish)
        outcome = self._run_round(batch, publish)
        self.planner.note_launch()
        self.metrics.note_round(outcome.drafted)
        return SparseSpecResult.of(outcome)

    def _prefill(self, batch: ScheduleBatch, publish: Publish) -> GenerationBatchResult:
        if self._unified is not None:
            self._unified.forget(batch)
        if self._ngram is not None:
            self._ngram.note_prompts(batch)
        self.penalties.begin_prefill(batch.reqs)
        batch.sampling_info.reqs = batch.reqs  # for errors of custom logit processors
        rows = batch.req_pool_indices.long()
        if self.penalties.is_active:
            batch.sampling_info.penalizer_orchestrator = PenalisedPrompts(self.penalties, rows, batch.seq_lens.long())
        result = self.target_worker.forward_batch_generation(batch)
        new_seq_lens = batch.seq_lens.clone()
        publish(new_seq_lens)
        result.accept_lens = torch.ones(len(batch.seq_lens), dtype=torch.int32, device=self.device)
        # A chunk of a prompt gives a token, too; its row is begun anew by the next chunk.
        self.penalties.commit(rows, result.next_token_ids.long().unsqueeze(1), result.accept_lens)
        result.new_seq_lens = new_seq_lens
        result.speculative_num_draft_tokens = self.speculative_num_draft_tokens
        result.next_draft_input = SparseSpecDraftInput(result.next_token_ids.long(), new_seq_lens)
        return result

    def _run_round(self, batch: ScheduleBatch, publish: Publish) -> RoundOutcome:
        assert self._lockstep is not None and self._plain is not None
        self.penalties.begin_round(batch.reqs)
        if batch.sampling_info.has_custom_logit_processor:
            return self._run_single_step(batch, publish)
        choice = self.planner.next_round(batch)
        reason = self._unified.lockstep_reason(batch) if self._unified is not None else None
        if self._unified is not None and choice.drafts and reason is None:
            return self._unified.run(batch, publish)
        # Rounds of the other kinds begin new windows.
        self.lose_drafts(batch.reqs)
        if not choice.drafts:
            return self._plain.run(batch, choice.plain_steps, publish)
        if reason is not None:
            self._note_lockstep(reason)
        return self._lockstep.run(batch, publish, choice.drafts, choice.least_budget)

    def _run_single_step(self, batch: ScheduleBatch, publish: Publish) -> RoundOutcome:
        """Run a round that decodes one token, for batches with a custom logit processor.

        A processor is any function with any state. It is called as in plain decoding: once for each token of the output, in
        order, and never for a draft.
        """
        assert self._lockstep is not None and self._plain is not None
        self.lose_drafts(batch.reqs)
        batch.sampling_info.reqs = batch.reqs
        self.metrics.note_single_step()
        if "processor" not in self._logged_reasons:
            self._logged_reasons.add("processor")
            logger.info("Batches with a custom logit processor are decoded one token at a time; logged once.")
        if needs_verification(batch):
            return self._lockstep.run(batch, publish, 0)
        return self._plain.run(batch, 1, publish)

    def _note_lockstep(self, reason: str) -> None:
        self.metrics.note_lockstep_round()
        if reason not in self._logged_reasons:
            self._logged_reasons.add(reason)
            logger.info("Rounds of batches with %s run in lock-step; logged once.", reason)
