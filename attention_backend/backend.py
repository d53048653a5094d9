"""The SGLang attention backend ``sparsespec``: dispatch of forwards by their plan (:mod:`forward_plan`).

- Prefill is run by an SGLang backend, unchanged; the scores of a prompt's last queries give the first selection.
- A draft step attends with one query per request over the sparse page table (PillarAttn, arXiv 2512.01278, section 4.1).
- Verification attends to everything with W queries per request, scores all tokens, and selects for the next round.
- A plain step attends to everything with one query per request.
- A mixed forward, of the unified schedule, holds draft steps of some requests and verify windows of others.

Layers with a sliding window attend to their window in all of these, and select nothing (:mod:`sliding_window`).

SGLang plans prefill and verification through ``init_forward_metadata``; rounds plan all other forwards themselves, with
:meth:`SparseSpecAttnBackend.begin`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention import base_attn_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_context import get_forward_context, has_forward_context

from sglang_sparsespec.attention_backend.forward_plan import Draft, ForwardPlan, Mixed, Plain, Prefill, PromptChunks, Verify
from sglang_sparsespec.attention_backend.kernels import make_kernels, reference, triton_inputs
from sglang_sparsespec.attention_backend.kernels.interface import (
    KernelShape,
    LayerKV,
    PillarKernels,
    VerifyAttention,
    score_row,
)
from sglang_sparsespec.attention_backend.kernels.triton_common import has_early_start
from sglang_sparsespec.attention_backend.layers import (
    attention_layers,
    attention_sinks,
    check_sinks,
    kv_descales,
    window_reach,
)
from sglang_sparsespec.attention_backend.lse_hints import LseHints
from sglang_sparsespec.attention_backend.page_table import SelectionTable
from sglang_sparsespec.attention_backend.policy import make_policy
from sglang_sparsespec.attention_backend.prefill_selection import PrefillSelection
from sglang_sparsespec.attention_backend.side_stream import SideStream
from sglang_sparsespec.attention_backend.sliding_window import SlidingWindow
from sglang_sparsespec.draft_weights.copies import DraftWeights, draft_weights_of
from sglang_sparsespec.settings import settings_of
from sglang_sparsespec.sglang_compat import in_force

if TYPE_CHECKING:
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

#: What SGLang asks a backend about the prefills that it runs, where it has such a property.
PREFILL_PROPERTIES = ("extend_attention_block_m", "extend_dummy_seqs_capped_by_req_pool")


class SparseSpecAttnBackend(AttentionBackend):
    """See the module's docstring.

    Args:
        base: SGLang's backend that runs prefill.

    Attributes:
        layer_ids: of all layers, as SGLang's KV pool numbers them.
        sliding: the window of the layers that have one; None for a model without.
        policy: what drafts attend to.
        table: the selections of all requests.
        kernels: see ``kernels.interface``.
        prefill_selection: makes the first selections; None if the policy needs no scores.
        hints: log-sum-exps of drafts for their verification; None if the kernels take none.
        kv_read: float64 [2]; KV tokens that draft queries attended to, and those that full attention would have, summed
            over requests and steps.
    """

    def __init__(self, model_runner: ModelRunner, base: AttentionBackend) -> None:
        super().__init__()
        settings = settings_of(model_runner.server_args)
        self.base = base
        for name in PREFILL_PROPERTIES:
            if hasattr(base, name):
                setattr(self, name, getattr(base, name))
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.window: int = in_force(model_runner.server_args).speculative_num_draft_tokens
        self.device = torch.device(model_runner.device)
        # Draft and verify read lengths on the device; only the reference kernels and the CPU's prefill read them on the
        # host, where that costs nothing.
        self.needs_cpu_seq_lens = self.device.type == "cpu"

        all_layers = attention_layers(model_runner.model)
        layers = [layer for layer in all_layers if window_reach(layer) is None]
        windowed = [layer for layer in all_layers if window_reach(layer) is not None]
        self.layer_ids = [layer.layer_id for layer in all_layers]
        self._sinks = attention_sinks(model_runner.model)
        # Layers with full attention are counted first, since only they have selections.
        self._index = {layer.layer_id: index for index, layer in enumerate([*layers, *windowed])}
        self.dtype: torch.dtype = model_runner.dtype
        self.num_rows, max_context = self.req_to_token_pool.req_to_token.shape
        self.sliding: SlidingWindow | None = None
        if windowed:
            reach = window_reach(windowed[0])
            assert reach is not None
            self._first_windowed = windowed[0].layer_id
            self._windowed_slots: torch.Tensor | None = None
            tokens = self.req_to_token_pool.req_to_token
            self.sliding = SlidingWindow(reach, tokens, self.token_to_kv_pool, self.window)
        self.policy = make_policy(settings, self.window)
        self.table = SelectionTable(
            num_layers=len(layers),
            num_rows=self.num_rows,
            num_kv_heads=layers[0].tp_k_head_num,
            capacity=self.policy.capacity(max_context),
            device=self.device,
            memory=self.policy.memory,
        )
        self._first_layer = layers[0]
        shape = KernelShape(
            max_batch=self.num_rows * (1 + self.policy.facts.num_proposals),
            num_q_heads=layers[0].tp_q_head_num,
            num_kv_heads=layers[0].tp_k_head_num,
            head_dim=layers[0].head_dim,
            window=self.window,
            longest_list=self.policy.longest_list(max_context),
            dtype=self.dtype,
            kv_dtype=self.token_to_kv_pool.get_key_buffer(layers[0].layer_id).dtype,
        )
        self._longest_list = shape.longest_list
        tables = (self.table, self.req_to_token_pool.req_to_token)
        self.kernels = make_kernels(settings.kernels, shape, *tables)
        # What runs beside other kernels has scratch of its own, and starts by events alone.
        unified = settings.schedule == "unified"
        self._side_stream = SideStream(self.device, enabled=unified)
        self._side_kernels = self.kernels
        if unified:
            self._side_kernels = make_kernels(settings.kernels, shape, *tables, early_start=False)
        # Scores live from a layer's attention to its selection, so one layer's worth is kept.
        self.scores = torch.empty(
            (self.num_rows, shape.num_kv_heads, score_row(max_context)),
            dtype=self.kernels.score_dtype,
            device=self.device,
        )
        self.prefill_selection: PrefillSelection | None = None
        if self.policy.facts.uses_scores:
            self.prefill_selection = PrefillSelection(
                layers, self.window, self.dtype, self.kernels, self.scores, self._kv_of
            )
        self.hints: LseHints | None = None
        # With several queries of a request in one step, the step's values would not be those of the window's tokens.
        if self.kernels.uses_lse_hints and not self.policy.facts.num_proposals:
            self.hints = LseHints(len(all_layers), self.num_rows, self.window, shape.num_q_heads, self.device)
        self.kv_read = torch.zeros(2, dtype=torch.float64, device=self.device)
        # Drafts in each window of the next lock-step verification; captured verifications read it.
        self._num_drafted = self.window - 1
        self._all_drafted = torch.full((self.num_rows,), self._num_drafted, dtype=torch.int64, device=self.device)
        # Read by captured verifications, too.
        self._least_budget = settings.min_budget
        self._least_budget_on_device = torch.tensor(float(settings.min_budget), device=self.device)
        self._plan: ForwardPlan = Prefill()
        self._draft_weights = draft_weights_of(model_runner)
        self._attention_inputs: Callable[..., torch.Tensor] = reference.attention_inputs
        if self.device.type == "cuda":
            self._attention_inputs = partial(triton_inputs.attention_inputs, pdl=has_early_start(self.device))
        logger.info(
            "SPARSESPEC: k=%d, budget max(%d, %g x length), policy %s, prefill by %s, kernels %s, page table %.2f GB.",
            self.window - 1,
            settings.min_budget,
            settings.budget_ratio,
            settings.draft_policy,
            type(base).__name__,
            self.kernels.name,
            self.table.nbytes / 1e9,
        )
        if self.sliding is not None:
            logger.info(
                "SPARSESPEC: %d of %d layers have a sliding window, which drafts attend to as it is.",
                len(windowed),
                len(all_layers),
            )
        if self.policy.facts.for_study:
            logger.warning("%s", self.policy.facts.for_study)

    def warm_up(self) -> None:
        """Compile what prefill batches of any size need, with requests of no length; else the first ones would wait.

        Prefill runs outside of CUDA graphs, whose capture compiles all other kernels.
        """
        if self.prefill_selection is None:
            return
        kv = self._kv_of(self._first_layer)
        queries = (1, self._first_layer.tp_q_head_num, self._first_layer.head_dim)
        q = torch.zeros(queries, dtype=self.dtype, device=self.device)
        # Few requests are split often, many seldom: what is compiled for splits is compiled by the extremes.
        for batch in (1, self.num_rows):
            # The types are those of SGLang's batches: others would compile other kernels.
            nothing = torch.zeros(batch, dtype=torch.int64, device=self.device)
            none = nothing.int()
            self.kernels.plan_prefill_scores(nothing, nothing, none, none, self.window).run(q, kv, self.scores)
        self.kernels.plan_selection(nothing, nothing, none).run(self.scores, kv.index)

    # ------------------------------------------------------- plans of SGLang's forwards

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan an eager forward."""
        mode = forward_batch.forward_mode
        rows, seq_lens = forward_batch.req_pool_indices, forward_batch.seq_lens
        if mode.is_target_verify():
            self._begin_verify(forward_batch)
        elif mode.is_extend():
            self.base.init_forward_metadata(forward_batch)
            self.begin(self._plan_prefill(forward_batch))
        elif mode.is_decode():
            # SGLang's own decode forwards (warm-ups) are not the rounds' draft steps.
            self.begin(replace(self.plan_draft(rows, seq_lens), weights=None))

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Host part of a captured forward: nothing, everything is read on the device."""

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Device part of a captured forward."""
        if forward_batch.forward_mode.is_target_verify():
            self._begin_verify(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """All buffers are static already."""
        if max_bs > self.num_rows:
            raise ValueError(f"CUDA graph batch size {max_bs} exceeds the {self.num_rows} rows of the page table.")

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of padding rows: nothing committed, so nothing is selected or read."""
        return 0

    def _begin_verify(self, forward_batch: ForwardBatch) -> None:
        rows, lengths = forward_batch.req_pool_indices, forward_batch.seq_lens
        if not self.policy.facts.num_proposals:  # rounds with proposals account their queries themselves
            self._count_round(rows, lengths)
        self.begin(self.plan_verify(rows, lengths, self._all_drafted[: len(rows)]))

    def begin_lockstep_round(self, num_drafted: int, least_budget: int | None = None) -> None:
        """The verifications that SGLang launches after this are of ``num_drafted`` drafts per request.

        Args:
            least_budget: of selections from now on; None: as configured.
        """
        least_budget = self.policy.settings.min_budget if least_budget is None else least_budget
        if least_budget != self._least_budget:
            self._least_budget = least_budget
            self._least_budget_on_device.fill_(float(least_budget))
        if num_drafted != self._num_drafted:
            self._num_drafted = num_drafted
            self._all_drafted.fill_(num_drafted)

    def _plan_prefill(self, forward_batch: ForwardBatch) -> Prefill:
        rows, seq_lens = forward_batch.req_pool_indices, forward_batch.seq_lens
        num_queries = forward_batch.extend_seq_lens.clamp(max=self.window)
        # The rows may have been other requests'.
        lengths, counts = self._begin_selection(rows, seq_lens - num_queries.to(seq_lens.dtype), remember=False)
        if self.prefill_selection is None:
            return Prefill()
        starts, extend_lens = forward_batch.extend_start_loc, forward_batch.extend_seq_lens
        return self.prefill_selection.plan(PromptChunks(rows, seq_lens, starts, extend_lens, lengths, counts))

    # ------------------------------------------------------------ plans of rounds

    def begin(self, plan: ForwardPlan) -> None:
        """The layers' next forwards run ``plan``."""
        self._plan = plan

    def end(self) -> None:
        """The layers have run: what follows waits for all that they launched. Recordable."""
        self._side_stream.join()
        self._plan = Prefill()

    @property
    def weights_in_use(self) -> DraftWeights | None:
        """What the linear layers of the forward that runs multiply with; None: the model's own weights."""
        return self._plan.weights if isinstance(self._plan, Draft) else None

    def plan_draft(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> Draft:
        """A draft step: int [B] each; lengths include the query's own token, and are 0 for padding. Recordable."""
        return self._plan_draft(rows, seq_lens, self.kernels, self._draft_weights)

    def plan_plain(self, rows: torch.Tensor, lengths: torch.Tensor) -> Plain:
        """A plain step: int [B] each; ``lengths`` are the tokens before the query's own. Recordable.

        Contexts of one batch can differ by a factor of a hundred. Draft attention, made for budgets, would not share them
        evenly between multiprocessors; verification does.
        """
        attention = self.kernels.plan_verify(rows, lengths, 1)
        return Plain(attention, self._plan_sliding(rows, lengths, 1, self.kernels), len(rows))

    def plan_verify(self, rows: torch.Tensor, lengths: torch.Tensor, num_drafted: torch.Tensor) -> Verify:
        """Verify windows: int [B] each. Begins the requests' next selection. Recordable.

        Args:
            lengths: committed tokens (0 for padding).
            num_drafted: drafts in each window.
        """
        return self._plan_verify(rows, lengths, num_drafted, self.kernels)

    def plan_mixed(
        self,
        draft_rows: torch.Tensor,
        draft_lens: torch.Tensor,
        verify_rows: torch.Tensor,
        verify_lens: torch.Tensor,
        num_drafted: torch.Tensor,
    ) -> Mixed:
        """A draft step of some requests (int [D] each) beside the verify windows of others (int [V] each). Recordable.

        Args as for :meth:`plan_draft` and :meth:`plan_verify`.
        """
        draft = verify = None
        if len(draft_rows):
            draft = self._plan_draft(draft_rows, draft_lens, self._side_kernels, None)
        if len(verify_rows):
            verify = self._plan_verify(verify_rows, verify_lens, num_drafted, self._side_kernels)
        return Mixed(draft, verify)

    def _plan_draft(
        self, rows: torch.Tensor, seq_lens: torch.Tensor, kernels: PillarKernels, weights: DraftWeights | None
    ) -> Draft:
        sliding = self._plan_sliding(rows, seq_lens - 1, 1, kernels)
        return Draft(kernels.plan_draft(rows, seq_lens), sliding, len(rows), weights)

    def _plan_sliding(
        self, rows: torch.Tensor, lengths: torch.Tensor, num_queries: int, kernels: PillarKernels
    ) -> VerifyAttention | None:
        """Args as for :meth:`SlidingWindow.view`."""
        if self.sliding is None:
            return None
        return kernels.plan_sliding(self.sliding.view(rows, lengths, num_queries), num_queries)

    def _plan_verify(
        self, rows: torch.Tensor, lengths: torch.Tensor, num_drafted: torch.Tensor, selecting: PillarKernels
    ) -> Verify:
        attention = self.kernels.plan_verify(rows, lengths, self.window)
        selected_from, counts = self._begin_selection(rows, lengths, remember=True)
        selection = None
        if self.policy.facts.uses_scores:
            selection = selecting.plan_selection(rows, selected_from, counts)
        sliding = self._plan_sliding(rows, lengths, self.window, self.kernels)
        hints = self.hints.of(rows, num_drafted) if self.hints is not None else None
        return Verify(attention, sliding, selection, hints)

    def _begin_selection(
        self, rows: torch.Tensor, lengths: torch.Tensor, remember: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decide the sizes of the next selections: where they end (int [B]), and their counts (int32 [B])."""
        counts, tail_start = self.policy.plan(lengths, self.table.positions.shape[-1], self._least_budget_on_device)
        self.table.begin_selection(rows, counts, tail_start, remember)
        self.policy.write(lengths, counts, rows, self.table.positions)
        return tail_start, counts

    def end_plain_round(self, rows: torch.Tensor, lengths: torch.Tensor) -> None:
        """Plain tokens have extended the tails of ``rows`` up to ``lengths`` (int [B] each).

        The next draft queries attend to no more than the kernels were told: of a longer tail they see the newest part.
        """
        self.table.bound_tails(rows, lengths + self.window, self._longest_list)

    # ---------------------------------------------------------------- accounting

    def count_draft_queries(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """Account draft queries (int64 [queries]; length 0: none) that no lock-step verification accounts."""
        live = (seq_lens > 0).to(torch.float64)
        skipped = (self.table.tail_start[rows] - self.table.num_selected[rows]) * live
        full = seq_lens.sum(dtype=torch.float64)
        self.kv_read[0] += full - skipped.sum()
        self.kv_read[1] += full

    def _count_round(self, rows: torch.Tensor, lengths: torch.Tensor) -> None:
        """Account the draft steps before a lock-step verification: step j (1-based) saw length + j tokens."""
        steps = self._all_drafted[: len(rows)]
        live = (lengths > 0).to(torch.float64)
        full = (lengths * steps + steps * (steps + 1) // 2) * live
        skipped = (self.table.tail_start[rows] - self.table.num_selected[rows]) * steps * live
        self.kv_read[0] += (full - skipped).sum()
        self.kv_read[1] += full.sum()

    # ------------------------------------------------------------------- forward

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Prefill by the base backend, or a verification.

        Args:
            q: [tokens, Hq * D]; k, v: [tokens, Hkv * D].

        Returns:
            [tokens, Hq * D].
        """
        check_sinks(kwargs.get("sinks"), self._sinks.get(layer.layer_id), layer.layer_id)
        plan = self._plan
        if forward_batch.forward_mode.is_target_verify():
            assert isinstance(plan, Verify)
            return self._forward_planned(plan, q, k, v, layer, forward_batch, save_kv_cache)
        out = self.base.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if self.prefill_selection is not None and isinstance(plan, Prefill) and window_reach(layer) is None:
            self.prefill_selection.note(plan, layer, self._heads(q, layer))
        return out

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """A draft step, a plain step or a mixed forward: [tokens, Hq * D]."""
        check_sinks(kwargs.get("sinks"), self._sinks.get(layer.layer_id), layer.layer_id)
        return self._forward_planned(self._plan, q, k, v, layer, forward_batch, save_kv_cache)

    def _forward_planned(
        self,
        plan: ForwardPlan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        if save_kv_cache:
            self._save_kv(k, v, layer, forward_batch)
        return self._attention(plan, self._heads(q, layer), layer)

    def takes_products(self, rotary: torch.nn.Module, layer: RadixAttention) -> bool:
        """Whether the forward that runs is a draft step whose attention can begin at the QKV product.

        Args:
            rotary: the rotary embedding of the layer's queries and keys.
        """
        return (
            isinstance(self._plan, Draft)
            and isinstance(rotary, RotaryEmbedding)
            and type(rotary).forward_cuda is RotaryEmbedding.forward_cuda
            and type(rotary).forward_native is RotaryEmbedding.forward_native
            and rotary.is_neox_style
            and rotary.rotary_dim == layer.head_dim
            and self.token_to_kv_pool.get_key_buffer(layer.layer_id).dtype == self.dtype
        )

    def attend_to_product(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        rotary: RotaryEmbedding,
        norms: tuple[RMSNorm, RMSNorm] | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """The attention of a draft step from a layer's QKV product on, if :meth:`takes_products`.

        Args:
            qkv: [tokens, (Hq + 2 Hkv) * D], overwritten.
            positions: int64 [tokens].
            norms: of query and key heads; None for a model without them.

        Returns:
            [tokens, Hq * D].
        """
        q = self._attention_inputs(
            qkv=qkv,
            positions=positions,
            cos_sin=rotary.cos_sin_cache,
            norms=(norms[0].weight, norms[1].weight) if norms is not None else None,
            eps=norms[0].variance_epsilon if norms is not None else 0.0,
            kv=self._kv_of(layer),
            slots=self._slots_to_write(layer, forward_batch),
        )
        return self._attention(self._plan, q, layer)

    def _attention(self, plan: ForwardPlan, q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        """[tokens, Hq * D] of q [tokens, Hq, D]."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._attend(plan, q, self._kv_of(layer), out)
        _, v_descale = kv_descales(layer)
        if v_descale != 1.0:
            out.mul_(v_descale)
        return out.flatten(1)

    def _attend(self, plan: ForwardPlan, q: torch.Tensor, kv: LayerKV, out: torch.Tensor) -> None:
        """q, out: [tokens, Hq, D]."""
        windowed = self._is_windowed(kv)
        if isinstance(plan, Draft):
            attention = plan.sliding if windowed else plan.attention
            assert attention is not None
            attention.run(q, kv, out, lse=self._step_lse(kv, plan.num_queries))
        elif isinstance(plan, Plain):
            # The last step's log-sum-exps serve as hints, and become this one's. After a change of the batch a request
            # finds another's there, which serve nearly always as well.
            lse = self._step_lse(kv, plan.num_queries)
            window_lse = lse.unsqueeze(1) if lse is not None else None
            attention = plan.sliding if windowed else plan.attention
            assert attention is not None
            attention.run(q, kv, out, lse_hint=window_lse, lse=window_lse)
        elif isinstance(plan, Verify):
            self._verify(plan, q, kv, out, self.scores)
            if plan.selection is not None and not windowed:
                plan.selection.run(self.scores, kv.index)
        elif isinstance(plan, Mixed):
            self._attend_mixed(plan, q, kv, out)
        else:
            raise AssertionError("a decode forward has no plan")

    def _verify(self, plan: Verify, q: torch.Tensor, kv: LayerKV, out: torch.Tensor, scores: torch.Tensor) -> None:
        hint = plan.hints[kv.index] if plan.hints is not None else None
        if self._is_windowed(kv):
            assert plan.sliding is not None
            plan.sliding.run(q, kv, out, lse_hint=hint)
        else:
            plan.attention.run(q, kv, out, scores if plan.selection is not None else None, hint)

    def _attend_mixed(self, plan: Mixed, q: torch.Tensor, kv: LayerKV, out: torch.Tensor) -> None:
        """Draft attention beside verification.

        The selection runs beside the rest of the layer, and the next layer's draft attention comes after it.
        """
        drafts = plan.draft.num_queries if plan.draft is not None else 0
        if plan.draft is not None:
            with self._side_stream.beside():
                self._attend(plan.draft, q[:drafts], kv, out[:drafts])
        if plan.verify is None:
            self._side_stream.join()
            return
        # Layers take turns in two halves of the scores: the selection of the layer before may still read its half. That
        # of two layers before is done, since the draft attention of the layer before ran after it, and was joined.
        half = len(self.scores) // 2
        assert len(q) - drafts <= half * self.window, f"{half} windows are the most of a mixed forward"
        scores = self.scores[half * (kv.index % 2) :]
        self._verify(plan.verify, q[drafts:], kv, out[drafts:], scores)
        self._side_stream.join()
        if plan.verify.selection is not None and not self._is_windowed(kv):
            with self._side_stream.beside():
                plan.verify.selection.run(scores, kv.index)

    def _is_windowed(self, kv: LayerKV) -> bool:
        return kv.index >= len(self.table.positions)

    def _step_lse(self, kv: LayerKV, num_queries: int) -> torch.Tensor | None:
        """float32 [B, Hq]: where a step's log-sum-exps go."""
        return self.hints.last_step[kv.index, :num_queries] if self.hints is not None else None

    @staticmethod
    def _heads(q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        return q.reshape(-1, layer.tp_q_head_num, layer.head_dim)

    def _kv_of(self, layer: RadixAttention) -> LayerKV:
        k, v = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        k_descale, _ = kv_descales(layer)
        sinks = self._sinks.get(layer.layer_id)
        index = self._index[layer.layer_id]
        return LayerKV(k, v, layer.scaling * k_descale, index, sinks, float(layer.logit_cap or 0))

    def _slots_to_write(self, layer: RadixAttention, forward_batch: ForwardBatch) -> torch.Tensor:
        """int64 [tokens]: where the layer's keys and values of the forward's tokens go, in the pool of its layers."""
        loc = forward_batch.out_cache_loc
        if self.sliding is None or window_reach(layer) is None:
            return loc
        if layer.layer_id == self._first_windowed:
            self._windowed_slots = self.sliding.slots_of(loc)
        return self._windowed_slots if self._windowed_slots is not None else loc

    def _save_kv(self, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch) -> None:
        self.token_to_kv_pool.set_kv_buffer(
            layer,
            KVWriteLoc(forward_batch.out_cache_loc, self._slots_to_write(layer, forward_batch)),
            k.view(-1, layer.tp_k_head_num, layer.head_dim),
            v.view(-1, layer.tp_k_head_num, layer.head_dim),
            layer.k_scale,
            layer.v_scale,
        )

    def support_triton(self) -> bool:
        return self.base.support_triton()

    def shared_read_ends(self, mode: Any) -> Any:
        """Unknown: SGLang must wait for the end of a forward before it writes to ``req_to_token``.

        All layers read it. SGLang takes for granted that attention of verifications reads it for its plan alone.
        """
        return base_attn_backend.SharedReadEnds.UNKNOWN


def backend_in_use() -> SparseSpecAttnBackend | None:
    """The backend of the forward that runs; None outside of forwards, and in those of other backends."""
    if not has_forward_context():
        return None
    backend = get_forward_context().attn_backend
    return backend if isinstance(backend, SparseSpecAttnBackend) else None
