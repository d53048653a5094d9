"""The SGLang attention backend ``sparsespec``.

Three kinds of forward, told apart by SGLang's forward mode:

- EXTEND (prefill): run by an SGLang backend, unchanged; the scores of the prompt's last
  queries give the first selection (:mod:`prefill_selection`).
- DECODE (a draft step): one query per request over the sparse page table.
- TARGET_VERIFY: full attention of the verify window with scores, then the selection for
  the next round, layer by layer.

A staggered round's forwards hold draft steps of some requests and windows of others
(:class:`MixedRows`): a DECODE forward whose tokens are split between the two kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_sparsespec import ALGORITHM, ATTENTION_BACKEND
from sglang_sparsespec.attention_backend.interface import PillarKernels, score_row
from sglang_sparsespec.attention_backend.page_table import SelectionTable
from sglang_sparsespec.attention_backend.policy import POLICIES
from sglang_sparsespec.attention_backend.prefill_selection import PrefillSelection, QueryRows
from sglang_sparsespec.attention_backend.side_stream import SideStream
from sglang_sparsespec.attention_backend.torch_kernels import TorchPillarKernels
from sglang_sparsespec.config import get_config

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


def register_backend() -> None:
    """Register ``sparsespec`` with SGLang's attention registry."""
    from sglang.srt.layers.attention.attention_registry import (
        ATTENTION_BACKENDS,
        register_attention_backend,
    )

    @register_attention_backend(ATTENTION_BACKEND)
    def create(model_runner: ModelRunner) -> SparseSpecAttnBackend:
        if not isinstance(model_runner.spec_algorithm, _algorithm_class()):
            raise ValueError(
                f"--attention-backend {ATTENTION_BACKEND} works only with --speculative-algorithm "
                f"{ALGORITHM}; give both or neither."
            )
        name = get_config(model_runner.server_args).base_attention_backend
        assert name is not None  # resolved and validated at start-up (config.py)
        return SparseSpecAttnBackend(model_runner, ATTENTION_BACKENDS[name](model_runner))


def _algorithm_class() -> type:
    from sglang_sparsespec.algorithm import SparseSpecAlgorithm

    return SparseSpecAlgorithm


def attention_layers(model: torch.nn.Module) -> list[RadixAttention]:
    """The model's attention layers in order, refused if one of them is not plain GQA.

    Raises:
        ValueError: a layer has a window, a soft cap, cross attention, or different key and value
            dims. (Models with attention sinks are found at their first forward: ``refuse_sinks``.)
    """
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
    layers.sort(key=lambda layer: layer.layer_id)

    def refuse(layer: RadixAttention, what: str) -> None:
        raise ValueError(
            f"Layer {layer.layer_id} of this model has {what}, which {ALGORITHM} does not support; serve the "
            "model without --speculative-algorithm."
        )

    for layer in layers:
        if (layer.sliding_window_size or -1) > 0:
            refuse(layer, f"a sliding window of {layer.sliding_window_size} tokens")
        if layer.logit_cap:
            refuse(layer, f"a logit soft cap of {layer.logit_cap}")
        if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
            refuse(layer, f"{layer.attn_type} or cross attention")
        if layer.qk_head_dim != layer.v_head_dim:
            refuse(layer, f"head dims {layer.qk_head_dim} and {layer.v_head_dim}")
        if layer.tp_q_head_num % layer.tp_k_head_num:
            refuse(layer, f"{layer.tp_q_head_num} query heads for {layer.tp_k_head_num} KV heads")
    if not layers:
        raise ValueError(f"{ALGORITHM} found no attention layers in this model; serve it without it.")
    return layers


def refuse_sinks(kwargs: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a model that passes attention sinks to its layers' forward."""
    if kwargs.get("sinks") is not None:
        raise ValueError(
            f"This model has attention sinks, which {ALGORITHM} does not support; serve the model without "
            "--speculative-algorithm."
        )


def kv_descales(layer: RadixAttention) -> tuple[float, float]:
    """What the entries of the layer's K and V caches are to be multiplied by (FP8 checkpoints have scales)."""
    if layer.k_scale is None or layer.v_scale is None:
        return 1.0, 1.0
    return float(layer.k_scale_float), float(layer.v_scale_float)


def make_kernels(name: str, device: torch.device, **sizes: Any) -> PillarKernels:
    """The kernel implementation ``name`` (``auto``: by device)."""
    if name == "torch" or (name == "auto" and device.type == "cpu"):
        return TorchPillarKernels()
    from sglang_sparsespec.attention_backend.cuda_kernels import CudaPillarKernels

    return CudaPillarKernels(device=device, **sizes)


@dataclass(frozen=True)
class MixedRows:
    """How the tokens of a mixed forward are attended: D draft tokens, then V windows of W tokens.

    Attributes:
        draft_rows, draft_lens: int64 [D], rows of ``req_to_token`` and lengths with the current token
            (0 for padding).
        draft_offsets: int64 [D], which of the window's tokens the current one is (-1 for padding).
        verify_rows, verify_lens: int64 [V], rows and committed lengths (row 0 of length 0 for padding).
        num_drafted: int64 [V], drafts in the window; the tokens after them mean nothing.
    """

    draft_rows: torch.Tensor
    draft_lens: torch.Tensor
    draft_offsets: torch.Tensor
    verify_rows: torch.Tensor
    verify_lens: torch.Tensor
    num_drafted: torch.Tensor


class SparseSpecAttnBackend(AttentionBackend):
    """See the module's docstring.

    Attributes:
        policy: what drafts attend to, and how many of them a round makes.
        table: the sparse page table of all requests.
        prefill_selection: makes the first selections; None if the policy needs no scores.
        lse_step: float32 [layers, rows, Hq], log-sum-exp of the draft step just run.
        lse_hint: float32 [layers, rows, W, Hq], those of the window's drafts: by batch index in
            lock-step rounds, by row of ``req_to_token`` in staggered ones.
        kv_read: float64 [2]; KV tokens that draft steps attended to, and those that full
            attention would have, summed over requests and steps.
    """

    def __init__(self, model_runner: ModelRunner, base: AttentionBackend) -> None:
        super().__init__()
        self.base = base
        self.config = get_config(model_runner.server_args)
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.window = model_runner.server_args.speculative_num_draft_tokens
        self.device = torch.device(model_runner.device)
        # Draft and verify read lengths on the device; only the torch kernels and the CPU
        # prefill read them on the host, where that costs nothing.
        self.needs_cpu_seq_lens = self.device.type == "cpu"

        layers = attention_layers(model_runner.model)
        self.dtype: torch.dtype = model_runner.dtype
        self.first_layer = layers[0].layer_id
        self.num_layers = layers[-1].layer_id + 1
        self.num_kv_heads = layers[0].tp_k_head_num
        self.num_q_heads = layers[0].tp_q_head_num
        num_rows, max_context = self.req_to_token_pool.req_to_token.shape
        self.policy = POLICIES[self.config.draft_policy](self.config, self.window)
        capacity = self.policy.capacity(max_context)
        # Where drafts make scores of their own, they and the verification take turns.
        self._side_stream = SideStream(self.device, enabled=not self.policy.rescores_each_step)
        self.table = SelectionTable(self.num_layers, num_rows, self.num_kv_heads, capacity, self.device)
        self.max_context = max_context
        self.max_bs = num_rows
        sizes = {
            "max_batch": num_rows * (1 + self.policy.num_proposals),
            "num_q_heads": self.num_q_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": layers[0].head_dim,
            "window": self.window,
            "capacity": capacity,
            "max_context": max_context,
            "longest_list": self.policy.longest_list(max_context),
        }
        # An early start would read the selection that the kernel just before is writing.
        early_start = not self.policy.rescores_each_step
        self.kernels = make_kernels(self.config.kernels, self.device, early_start=early_start, **sizes)
        # For mixed forwards' work beside: with scratch of its own, and started by events alone.
        self._side_kernels = self.kernels
        if self.config.schedule == "unified":
            self._side_kernels = make_kernels(self.config.kernels, self.device, early_start=False, **sizes)
        reference = isinstance(self.kernels, TorchPillarKernels)
        # Scores are compared, not summed: 16 bits rank 32K positions well (probabilities
        # down to 6e-8), and halve what selection reads.
        score_dtype = torch.float32 if reference else torch.float16
        # Scores live from a layer's attention to its selection, so one layer's worth is kept.
        shape = (num_rows, self.num_kv_heads, score_row(max_context))
        self.scores = torch.empty(shape, dtype=score_dtype, device=self.device)
        self.prefill_selection: PrefillSelection | None = None
        if self.policy.uses_scores:
            select = partial(self._score_and_select, window=self.window, lookahead=self.config.lookahead)
            self.prefill_selection = PrefillSelection(layers, self.window, self.dtype, self.device, select)
        # Log-sum-exp of the draft steps' queries over their selected sets: close to the full
        # ones that verification takes as its softmax reference, so it takes one pass over K.
        self.lse_hint: torch.Tensor | None = None
        self.lse_step: torch.Tensor | None = None
        # With several queries of a request in one step, these would not be the steps' ones.
        if not reference and not self.policy.num_proposals:
            hints = (self.num_layers, num_rows, self.window, self.num_q_heads)
            self.lse_hint = torch.zeros(hints, dtype=torch.float32, device=self.device)
            self.lse_step = torch.zeros(
                (self.num_layers, num_rows, self.num_q_heads), dtype=torch.float32, device=self.device
            )
        self.kv_read = torch.zeros(2, dtype=torch.float64, device=self.device)
        # On the device, since the captured verification reads it; the host knows it too.
        self._draft_length = torch.tensor(self.window - 1, dtype=torch.float64, device=self.device)
        self._draft_length_set = self.window - 1
        self._counts: torch.Tensor | None = None
        self._lengths: torch.Tensor | None = None
        self._mixed: MixedRows | None = None
        self._plain = False
        self._hints: torch.Tensor | None = None
        logger.info(
            "SPARSESPEC: k=%d, budget max(%d, %g x length), policy %s, prefill by %s, kernels %s, page "
            "table %.2f GB.",
            self.window - 1,
            self.config.min_budget,
            self.config.budget_ratio,
            self.config.draft_policy,
            type(base).__name__,
            type(self.kernels).__name__,
            SelectionTable.bytes_for(self.num_layers, num_rows, self.num_kv_heads, capacity) / 1e9,
        )
        if self.policy.warning:
            logger.warning("%s", self.policy.warning)

    def warm_up(self) -> None:
        """Compile what prefill batches of any size need, with requests of no length; else the first ones would wait.

        Prefill runs outside of CUDA graphs, whose capture compiles all other kernels.
        """
        if not self.policy.uses_scores:
            return
        keys = self.token_to_kv_pool.get_key_buffer(self.first_layer)
        table = self.req_to_token_pool.req_to_token
        q = torch.zeros((1, self.num_q_heads, keys.shape[-1]), dtype=self.dtype, device=self.device)
        # Of few requests each is split often, of many seldom: what is compiled for splits is compiled by the extremes.
        for batch in (1, self.max_bs):
            # Of the types that SGLang's batches have: others would compile other kernels.
            nothing = torch.zeros(batch, dtype=torch.int64, device=self.device)
            none = nothing.int()
            self.kernels.prefill_scores(q, keys, table, nothing, nothing, none, none, self.window, 1.0, self.scores)
        positions = self.table.positions[self.first_layer]
        self.kernels.select(self.scores, nothing, nothing, none, positions, self.config.lookahead)

    # ------------------------------------------------------------------ metadata

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan an eager forward."""
        mode = forward_batch.forward_mode
        if mode.is_target_verify():
            self._begin_verify(forward_batch)
        elif mode.is_extend():
            self.base.init_forward_metadata(forward_batch)
            self._begin_prefill(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Host part of a captured forward: nothing, everything is read on the device."""

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Device part of a captured forward."""
        if forward_batch.forward_mode.is_target_verify():
            self._begin_verify(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """All buffers are static already."""
        if max_bs > self.max_bs:
            raise ValueError(f"CUDA graph batch size {max_bs} exceeds the {self.max_bs} rows of the page table.")

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of padding rows: nothing committed, so nothing is selected or read."""
        return 0

    def _begin_verify(self, forward_batch: ForwardBatch) -> None:
        lengths, rows = forward_batch.seq_lens, forward_batch.req_pool_indices
        self._count_kv_read(lengths, rows)
        self._begin_selection(lengths, rows)

    def begin_mixed(self, mixed: MixedRows) -> None:
        """Plan a mixed forward; the DECODE forward up to :meth:`end_mixed` is taken as one. Recordable."""
        self._mixed = mixed
        self.count_draft_queries(mixed.draft_rows, mixed.draft_lens)
        self._begin_selection(mixed.verify_lens, mixed.verify_rows)
        if self.lse_hint is not None:
            # A window's token was a draft query if its offset is below the number of drafts; the last
            # of these stands in for the tokens after it. (Without any: an old one.)
            offsets = torch.arange(self.window, device=self.device)
            columns = torch.minimum(offsets, (mixed.num_drafted - 1).clamp(min=0).unsqueeze(1))
            self._hints = self.lse_hint[:, mixed.verify_rows.unsqueeze(1), columns]

    def end_mixed(self) -> None:
        """Keep the log-sum-exps of the forward's drafts for their verifications. Recordable."""
        mixed = self._mixed
        assert mixed is not None
        self._side_stream.join()
        if self.lse_hint is not None and self.lse_step is not None:
            step = self.lse_step[:, : len(mixed.draft_rows)]
            # Padding writes to row 0: zeros, since its own log-sum-exp is no number.
            live = (mixed.draft_lens > 0).view(1, -1, 1)
            self.lse_hint[:, mixed.draft_rows, mixed.draft_offsets] = torch.where(live, step, 0.0)
        self._mixed = None

    def _begin_prefill(self, forward_batch: ForwardBatch) -> None:
        num_queries = forward_batch.extend_seq_lens.clamp(max=self.window)
        lengths = forward_batch.seq_lens - num_queries.to(forward_batch.seq_lens.dtype)
        rows = forward_batch.req_pool_indices
        self._begin_selection(lengths, rows)
        if self.prefill_selection is not None:
            assert self._counts is not None and self._lengths is not None
            starts, extend_lens = forward_batch.extend_start_loc, forward_batch.extend_seq_lens
            batch = QueryRows(rows, forward_batch.seq_lens, starts, extend_lens, self._lengths, self._counts)
            self.prefill_selection.begin(batch)

    def _begin_selection(self, lengths: torch.Tensor, rows: torch.Tensor) -> None:
        """Decide the sizes of the next selection, made from positions of [0, length)."""
        counts, tail_start = self.policy.plan(lengths, self.table.positions.shape[-1])
        self._counts, self._lengths = counts, tail_start
        self.table.set_window(rows, counts, tail_start)
        self.policy.write(lengths, counts, rows, self.table.positions)

    @contextmanager
    def plain_steps(self) -> Iterator[None]:
        """Decode forwards within attend to all tokens. Recordable.

        Contexts of one batch can differ by a factor of a hundred, which draft attention, made for budgets, would not
        share evenly between multiprocessors; verification does, and a token is a window of one.
        """
        self._plain = True
        try:
            yield
        finally:
            self._plain = False

    def attend_to_all(self, rows: torch.Tensor) -> None:
        """Let draft steps of ``rows`` (int [batch]) attend to every token, until the next selection.

        Lists longer than the kernels were told to expect are right all the same; they are only split less.
        """
        nothing = torch.zeros_like(rows)
        self.table.set_window(rows, nothing, nothing)

    def set_draft_length(self, steps: int) -> None:
        """Say how many tokens the round drafts, before its verification."""
        if steps != self._draft_length_set:
            self._draft_length.fill_(steps)
            self._draft_length_set = steps

    def count_draft_queries(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """Account draft queries (int64 [queries]; length 0: none) that no lock-step verification accounts."""
        live = (seq_lens > 0).to(torch.float64)
        skipped = (self.table.tail_start[rows] - self.table.num_selected[rows]) * live
        full = seq_lens.sum(dtype=torch.float64)
        self.kv_read[0] += full - skipped.sum()
        self.kv_read[1] += full

    def _count_kv_read(self, lengths: torch.Tensor, rows: torch.Tensor) -> None:
        """Account the round's draft steps: step j (1-based) saw length + j tokens."""
        steps = self._draft_length
        live = (lengths > 0).to(torch.float64)
        later = steps * (steps + 1) / 2
        full = (lengths * steps + later) * live
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
        """Prefill by the base backend, or verification by ours.

        Args:
            q: [tokens, Hq * D]; k, v: [tokens, Hkv * D].

        Returns:
            [tokens, Hq * D].
        """
        refuse_sinks(kwargs)
        if forward_batch.forward_mode.is_target_verify():
            return self._forward_verify(q, k, v, layer, forward_batch, save_kv_cache)
        out = self.base.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if self.prefill_selection is not None:
            self.prefill_selection.note(layer, q.reshape(-1, layer.tp_q_head_num, layer.head_dim))
        return out

    def _score_and_select(
        self, layer: RadixAttention, queries: torch.Tensor, batch: QueryRows, window: int, lookahead: int
    ) -> None:
        """Select in a layer by the scores of the last ``window`` queries ([tokens, Hq, D]) of each request."""
        k_descale, _ = kv_descales(layer)
        self.kernels.prefill_scores(
            queries,
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            batch.rows,
            batch.seq_lens,
            batch.starts,
            batch.extend_lens,
            window,
            layer.scaling * k_descale,
            self.scores,
        )
        positions = self.table.positions[layer.layer_id]
        self.kernels.select(self.scores, batch.lengths, batch.rows, batch.counts, positions, lookahead)

    def _forward_verify(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        if save_kv_cache:
            self._save_kv(k, v, layer, forward_batch)
        out = torch.empty_like(q)
        hint = self.lse_hint[layer.layer_id, : forward_batch.batch_size] if self.lse_hint is not None else None
        rows = forward_batch.req_pool_indices
        self._verify_attention(q, layer, rows, forward_batch.seq_lens, hint, self.scores, out)
        if self.policy.uses_scores:
            self._select(self.kernels, self.scores, layer.layer_id, rows)
        return out

    def _verify_attention(
        self,
        q: torch.Tensor,
        layer: RadixAttention,
        rows: torch.Tensor,
        lengths: torch.Tensor,
        hint: torch.Tensor | None,
        scores: torch.Tensor | None,
        out: torch.Tensor,
        window: int | None = None,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Full attention of the windows, with scores if given and the policy uses them.

        Args:
            q, out: [batch * W, Hq * D]. rows, lengths: int [batch].
            hint: float32 [batch, W, Hq]; one that is far off costs time, not exactness.
            scores: as :attr:`scores`, at least ``batch`` of its rows.
            window: W, if not :attr:`window`.
            lse: float32 [batch, W, Hq], written if given; it may be ``hint``.
        """
        if not len(rows):
            return
        k_cache, v_cache = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        k_descale, v_descale = kv_descales(layer)
        self.kernels.verify_attention(
            q.reshape(-1, layer.tp_q_head_num, layer.head_dim),
            k_cache,
            v_cache,
            self.req_to_token_pool.req_to_token,
            rows,
            lengths,
            window or self.window,
            layer.scaling * k_descale,
            out.view(-1, layer.tp_q_head_num, layer.head_dim),
            scores if self.policy.uses_scores else None,
            hint,
            lse,
        )
        if v_descale != 1.0:
            out.mul_(v_descale)

    def _select(self, kernels: PillarKernels, scores: torch.Tensor, layer_id: int, rows: torch.Tensor) -> None:
        assert self._counts is not None and self._lengths is not None
        positions = self.table.positions[layer_id]
        kernels.select(scores, self._lengths, rows, self._counts, positions, self.config.lookahead)

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
        """One draft step: [batch, Hq * D] over the sparse page table; or a mixed forward."""
        if save_kv_cache:
            self._save_kv(k, v, layer, forward_batch)
        q = q.reshape(-1, layer.tp_q_head_num * layer.head_dim)
        out = torch.empty_like(q)
        if self._mixed is not None:
            self._mixed_attention(q, layer, self._mixed, out)
        elif self._plain and self.lse_step is not None:
            self._plain_attention(q, layer, forward_batch, self.lse_step[layer.layer_id], out)
        else:
            rows = forward_batch.req_pool_indices
            self._draft_attention(self.kernels, q, layer, rows, forward_batch.seq_lens, out)
        return out

    def _plain_attention(
        self, q: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch, lse: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Full attention of one token per request; ``lse`` (float32 [rows, Hq]) is the last step's, and becomes this one's.

        After a change of the batch a request finds another's log-sum-exps there, which serve nearly always as well.
        """
        hint = lse[: len(q)].unsqueeze(1)
        # The position of a request's next token: how many there are before it.
        lengths = forward_batch.positions
        self._verify_attention(q, layer, forward_batch.req_pool_indices, lengths, hint, None, out, window=1, lse=hint)

    def _mixed_attention(self, q: torch.Tensor, layer: RadixAttention, mixed: MixedRows, out: torch.Tensor) -> None:
        """Draft attention of the first D tokens beside verification of the V windows after them.

        The selection runs beside the rest of the layer and joins with the next layer's draft attention.
        """
        drafts, windows = len(mixed.draft_rows), len(mixed.verify_rows)
        with self._side_stream.beside():
            kernels = self._side_kernels
            self._draft_attention(kernels, q[:drafts], layer, mixed.draft_rows, mixed.draft_lens, out[:drafts])
        scores = self._scores_of(layer.layer_id, windows)
        hint = self._hints[layer.layer_id] if self._hints is not None else None
        self._verify_attention(q[drafts:], layer, mixed.verify_rows, mixed.verify_lens, hint, scores, out[drafts:])
        self._side_stream.join()
        if self.policy.uses_scores and windows:
            with self._side_stream.beside():
                self._select(self._side_kernels, scores, layer.layer_id, mixed.verify_rows)

    def _scores_of(self, layer_id: int, windows: int) -> torch.Tensor:
        """Where a layer of a mixed forward keeps scores: the layers take turns in two halves of the buffer.

        The selection of the layer before may still read its half. That of two layers before is done: draft attention
        of the layer before ran after it, and was joined.
        """
        half = len(self.scores) // 2
        assert windows <= half, f"{windows} windows in a mixed forward, room for the scores of {half}"
        return self.scores[half * (layer_id % 2) :]

    def _draft_attention(
        self,
        kernels: PillarKernels,
        q: torch.Tensor,
        layer: RadixAttention,
        rows: torch.Tensor,
        seq_lens: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """q, out: [batch, Hq * D]; rows, seq_lens (with the current token): int [batch]."""
        if not len(rows):
            return
        if self.policy.rescores_each_step:
            self._select_for_query(q, layer, rows, seq_lens)
        lse = self.lse_step[layer.layer_id, : len(rows)] if self.lse_step is not None else None
        k_cache, v_cache = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        k_descale, v_descale = kv_descales(layer)
        kernels.draft_attention(
            q.view(-1, layer.tp_q_head_num, layer.head_dim),
            k_cache,
            v_cache,
            self.table.positions[layer.layer_id],
            self.table.num_selected,
            self.table.tail_start,
            self.req_to_token_pool.req_to_token,
            rows,
            seq_lens,
            layer.scaling * k_descale,
            out.view(-1, layer.tp_q_head_num, layer.head_dim),
            lse,
        )
        if v_descale != 1.0:
            out.mul_(v_descale)

    def _select_for_query(
        self, q: torch.Tensor, layer: RadixAttention, rows: torch.Tensor, seq_lens: torch.Tensor
    ) -> None:
        """Select the best tokens before the tail for the queries of a draft step: a window of one row.

        Args:
            q: [batch, Hq * D]. rows, seq_lens (with the current token): int [batch].
        """
        starts, num_queries = torch.arange(len(rows), device=self.device), (seq_lens > 0).to(torch.int32)
        lengths, counts = self.table.tail_start[rows], self.table.num_selected[rows]
        batch = QueryRows(rows, seq_lens, starts, num_queries, lengths, counts)
        queries = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        self._score_and_select(layer, queries, batch, window=1, lookahead=0)

    def fill_lse_hint(self, batch_size: int, steps: int) -> None:
        """Let the last of ``steps`` drafts stand in for the window's tokens that were not drafted."""
        if self.lse_hint is not None and steps < self.window - 1:
            hint = self.lse_hint[:, :batch_size]
            hint[:, :, steps:] = hint[:, :, steps - 1 : steps]

    def store_lse_hint(self, batch_size: int, step: torch.Tensor) -> None:
        """Keep the log-sum-exps of draft step ``step`` (int64 [1]) for the verification."""
        if self.lse_hint is not None and self.lse_step is not None:
            hint = self.lse_hint[:, :batch_size]
            hint.index_copy_(2, step, self.lse_step[:, :batch_size].unsqueeze(2))
            # The last window token is never a draft query; its neighbour stands in.
            hint[:, :, -1] = self.lse_step[:, :batch_size]

    def _save_kv(self, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch) -> None:
        self.token_to_kv_pool.set_kv_buffer(
            layer,
            KVWriteLoc(forward_batch.out_cache_loc, None),
            k.view(-1, layer.tp_k_head_num, layer.head_dim),
            v.view(-1, layer.tp_k_head_num, layer.head_dim),
            layer.k_scale,
            layer.v_scale,
        )

    def support_triton(self) -> bool:
        return self.base.support_triton()
