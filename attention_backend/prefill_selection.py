"""A prompt's first selection, made for all layers after the last one.

Scoring and selecting take three launches a layer, each next to nothing on the GPU. Launched from prefill's eager forward,
they would take a quarter to half of its time on the host. So a layer only keeps the queries that score, those of the
prompt's last tokens. What they score is still in the KV cache after the last layer, and then all launches follow at once,
as one CUDA graph where there is one (``rounds.graphs``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.attention_backend.forward_plan import Prefill, PromptChunks
from sglang_sparsespec.attention_backend.kernels.interface import LayerKV, PillarKernels

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention


class PrefillSelection:
    """Selects for prefill batches: after the last layer, or layer by layer for more than :attr:`MOST` prompts.

    Args:
        layers: the model's, in order.
        window: W; the last min(W, extend length) queries of a prompt score.
        dtype: of queries.
        scores: where scores are written, see ``PillarKernels.plan_prefill_scores``.
        kv_of: a layer's KV cache.
    """

    #: With larger batches the GPU's work outlasts the host's, and the queries of all layers would take much memory.
    MOST = 16

    def __init__(
        self,
        layers: Sequence[RadixAttention],
        window: int,
        dtype: torch.dtype,
        kernels: PillarKernels,
        scores: torch.Tensor,
        kv_of: Callable[[RadixAttention], LayerKV],
    ) -> None:
        self._layers = list(layers)
        self._index = {layer.layer_id: index for index, layer in enumerate(self._layers)}
        self._window = window
        self._kernels = kernels
        self._scores = scores
        self._kv_of = kv_of
        self._replay: Callable[[int], bool] = lambda batch_size: False
        heads, head_dim = self._layers[0].tp_q_head_num, self._layers[0].head_dim
        with torch.device(scores.device):
            self._queries = torch.zeros((len(self._layers), self.MOST * window, heads, head_dim), dtype=dtype)
            # What the graphs read. Places past those of a batch have no length.
            self._long = torch.zeros((3, self.MOST), dtype=torch.int64)
            self._int = torch.zeros((2, self.MOST), dtype=torch.int32)
            self._starts = torch.arange(0, self.MOST * window, window, dtype=torch.int32)
            self._offsets = torch.arange(window)

    def use_graphs(self, replay: Callable[[int], bool]) -> None:
        """Replay :meth:`run` from now on. SGLang makes attention backends before graphs can be captured.

        Args:
            replay: takes a number of prompts; returns whether there is a graph for it, which it has replayed then.
        """
        self._replay = replay

    def plan(self, prompts: PromptChunks) -> Prefill:
        """Begin a forward of ``prompts``."""
        self.clear()
        size = len(prompts)
        if size > self.MOST:
            return Prefill(prompts, None)
        num_queries = prompts.extend_lens.clamp(max=self._window)
        self._long[:, :size] = torch.stack((prompts.rows, prompts.seq_lens, prompts.lengths))
        self._int[:, :size] = torch.stack((num_queries.int(), prompts.counts.int()))
        end = (prompts.starts + prompts.extend_lens).unsqueeze(1)
        # Of a prompt shorter than a window the last query is kept again and again: nobody reads those places.
        kept = torch.minimum(end - num_queries.unsqueeze(1) + self._offsets, end - 1).clamp(min=0)
        return Prefill(prompts, kept.flatten())

    def note(self, plan: Prefill, layer: RadixAttention, queries: torch.Tensor) -> None:
        """A layer's queries ([tokens, Hq, D]) and keys are there."""
        if plan.prompts is None:
            return
        if plan.kept is None:
            self._select(plan.prompts, [layer], [queries])
            return
        index = self._index[layer.layer_id]
        kept = self._queries[index, : len(plan.kept)]
        torch.index_select(queries.to(kept.dtype), 0, plan.kept, out=kept)
        if index == len(self._layers) - 1 and not self._replay(len(plan.prompts)):
            self.run(len(plan.prompts))

    def clear(self) -> None:
        """No prompt is in mid-prefill: :meth:`run` selects nothing."""
        self._long.zero_()
        self._int.zero_()

    def run(self, batch_size: int) -> None:
        """Select for the prompts of the batch, or for more of them, in all layers. Recordable."""
        rows, seq_lens, lengths = self._long[:, :batch_size]
        num_queries, counts = self._int[:, :batch_size]
        prompts = PromptChunks(rows, seq_lens, self._starts[:batch_size], num_queries, lengths, counts)
        self._select(prompts, self._layers, list(self._queries[:, : batch_size * self._window]))

    def _select(
        self, prompts: PromptChunks, layers: Sequence[RadixAttention], queries: Sequence[torch.Tensor]
    ) -> None:
        scores = self._kernels.plan_prefill_scores(
            prompts.rows, prompts.seq_lens, prompts.starts, prompts.extend_lens, self._window
        )
        selection = self._kernels.plan_selection(prompts.rows, prompts.lengths, prompts.counts)
        for layer, layer_queries in zip(layers, queries, strict=True):
            kv = self._kv_of(layer)
            scores.run(layer_queries, kv, self._scores)
            selection.run(self._scores, kv.index)
