"""A prompt's first selection, made for all layers after the last one.

Scoring and selecting take three launches a layer, each next to nothing on the GPU. Launched from prefill's eager
forward, they were a quarter to half of its time on the host, which keeps a prompt of two thousand tokens longer than the
GPU (``docs/unified-batches.md``, "Time to first token"). So a layer only keeps the queries that score, those of the prompt's
last tokens; what they score is still in the KV cache after the last layer, and then all launches follow at once, as one
CUDA graph where there is one (``sglang_sparsespec.prefill_graph``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention


@dataclass(frozen=True)
class QueryRows:
    """Requests whose last queries score, and where these are; of a prefill batch mostly.

    Attributes:
        rows, seq_lens: int64 [B], rows of ``req_to_token`` and lengths with this chunk.
        starts, extend_lens: int32 [B], first query of each request and their number.
        lengths: int64 [B], positions that are selected from.
        counts: int32 [B], how many.
    """

    rows: torch.Tensor
    seq_lens: torch.Tensor
    starts: torch.Tensor
    extend_lens: torch.Tensor
    lengths: torch.Tensor
    counts: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)


#: Scores the last queries ([tokens, Hq, D]) of the prompts of a batch in one layer, and selects.
SelectLayer = Callable[["RadixAttention", torch.Tensor, QueryRows], None]


class PrefillSelection:
    """Selects for prefill batches: after the last layer, or layer by layer for batches of more than :attr:`MOST` requests.

    Args:
        layers: the model's, in order.
        window: W; the last min(W, extend length) queries of a prompt score.
        dtype: of queries.
        select_layer: does it for one layer.

    Attributes:
        replay: replays :meth:`run` of a number of requests, if that has been captured: returns whether it has.
    """

    #: Of larger batches the GPU's work outlasts the host's, and the queries of all layers would take much memory.
    MOST = 16

    def __init__(
        self,
        layers: Sequence[RadixAttention],
        window: int,
        dtype: torch.dtype,
        device: torch.device,
        select_layer: SelectLayer,
    ) -> None:
        self._layers = list(layers)
        self._index = {layer.layer_id: index for index, layer in enumerate(self._layers)}
        self._window = window
        self._select_layer = select_layer
        self.replay: Callable[[int], bool] = lambda batch_size: False
        heads, head_dim = self._layers[0].tp_q_head_num, self._layers[0].head_dim
        self._queries = torch.zeros(
            (len(self._layers), self.MOST * window, heads, head_dim), dtype=dtype, device=device
        )
        # What the graphs read; requests past those of a batch have no length.
        self._long = torch.zeros((3, self.MOST), dtype=torch.int64, device=device)
        self._int = torch.zeros((2, self.MOST), dtype=torch.int32, device=device)
        self._starts = torch.arange(0, self.MOST * window, window, dtype=torch.int32, device=device)
        self._offsets = torch.arange(window, device=device)
        self._batch: QueryRows | None = None
        self._kept: torch.Tensor | None = None

    def begin(self, batch: QueryRows) -> None:
        """A forward of ``batch`` begins."""
        self.clear()
        self._batch = batch
        size = len(batch)
        if size > self.MOST:
            return
        num_queries = batch.extend_lens.clamp(max=self._window)
        end = (batch.starts + batch.extend_lens).unsqueeze(1)
        # Of a prompt shorter than a window, the last query again and again: rows that nobody reads.
        self._kept = torch.minimum(end - num_queries.unsqueeze(1) + self._offsets, end - 1).clamp(min=0).flatten()
        self._long[:, :size] = torch.stack((batch.rows, batch.seq_lens, batch.lengths))
        self._int[:, :size] = torch.stack((num_queries.int(), batch.counts.int()))

    def note(self, layer: RadixAttention, queries: torch.Tensor) -> None:
        """A layer's queries [tokens, Hq, D] and keys are there."""
        if self._batch is None:
            return
        if self._kept is None:
            self._select_layer(layer, queries, self._batch)
            return
        index = self._index[layer.layer_id]
        kept = self._queries[index, : len(self._kept)]
        torch.index_select(queries.to(kept.dtype), 0, self._kept, out=kept)
        if index == len(self._layers) - 1 and not self.replay(len(self._batch)):
            self.run(len(self._batch))

    def clear(self) -> None:
        """No request is in mid-prefill: :meth:`run` selects nothing."""
        self._batch = self._kept = None
        self._long.zero_()
        self._int.zero_()

    def run(self, batch_size: int) -> None:
        """Select for the requests of the batch, or more of them, in all layers. Recordable."""
        rows, seq_lens, lengths = self._long[:, :batch_size]
        num_queries, counts = self._int[:, :batch_size]
        batch = QueryRows(rows, seq_lens, self._starts[:batch_size], num_queries, lengths, counts)
        for layer, queries in zip(self._layers, self._queries, strict=True):
            self._select_layer(layer, queries[: batch_size * self._window], batch)
