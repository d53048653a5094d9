"""The attention backend ``sparsespec`` on a small random KV pool, without a model or a server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_sparsespec.attention_backend.backend import SparseSpecAttnBackend
from sglang_sparsespec.settings import Settings, attach_settings

NUM_LAYERS = 2
NUM_Q_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = 8
WINDOW = 3
ROWS = 5
CONTEXT = 80


class SmallPool:
    """Stands in for SGLang's KV pool: float32 [slots, Hkv, D] per layer."""

    def __init__(self, generator: torch.Generator) -> None:
        shape = (NUM_LAYERS, ROWS * CONTEXT, NUM_KV_HEADS, HEAD_DIM)
        self.k = torch.randn(shape, generator=generator)
        self.v = torch.randn(shape, generator=generator)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.k[layer_id]

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k[layer_id], self.v[layer_id]

    def set_kv_buffer(
        self, layer: RadixAttention, where: Any, k: torch.Tensor, v: torch.Tensor, k_scale: Any, v_scale: Any
    ) -> None:
        self.k[layer.layer_id][where.loc] = k if k_scale is None else k / k_scale
        self.v[layer.layer_id][where.loc] = v if v_scale is None else v / v_scale


class TwoPools(SmallPool):
    """As SGLang's pool for models with sliding windows: the slots of the last layer are others, by a table.

    Attributes:
        full_to_swa_index_mapping: int64 [slots], 0 for a slot that the last layer has none for.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__(generator)
        slots = self.k.shape[1]
        self.full_to_swa_index_mapping = torch.randperm(slots - 1, generator=generator) + 1
        self.full_to_swa_index_mapping = torch.cat((self.full_to_swa_index_mapping, torch.zeros(1, dtype=torch.int64)))

    def translate_loc_from_full_to_swa(self, slots: torch.Tensor) -> torch.Tensor:
        return self.full_to_swa_index_mapping[slots]

    def set_kv_buffer(
        self, layer: RadixAttention, where: Any, k: torch.Tensor, v: torch.Tensor, k_scale: Any, v_scale: Any
    ) -> None:
        loc = where.swa_loc if layer.layer_id == NUM_LAYERS - 1 else where.loc
        super().set_kv_buffer(layer, SimpleNamespace(loc=loc), k, v, k_scale, v_scale)


class BaseBackend:
    """Stands in for the SGLang backend that runs prefill; its output is not looked at."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        pass

    def forward_extend(self, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(q)


class SmallServer:
    """The backend with its pool, and all kinds of forward.

    Args:
        reach: of a sliding window that the last layer has; None: all layers have full attention.
        pool: class of the pool.

    Attributes:
        req_to_token: int32 [ROWS, CONTEXT], every position of every row has a slot.
    """

    def __init__(self, reach: int | None = None, pool: type[SmallPool] = SmallPool, **config: Any) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.pool = pool(self.generator)
        slots = torch.randperm(ROWS * CONTEXT, generator=self.generator)
        self.req_to_token = slots.int().view(ROWS, CONTEXT)
        self.layers = [
            RadixAttention(
                num_heads=NUM_Q_HEADS,
                head_dim=HEAD_DIM,
                scaling=HEAD_DIM**-0.5,
                num_kv_heads=NUM_KV_HEADS,
                layer_id=i,
                sliding_window_size=reach if reach is not None and i == NUM_LAYERS - 1 else -1,
            )
            for i in range(NUM_LAYERS)
        ]
        settings = {"budget_ratio": 0.01, "min_budget": 8, **config}
        server_args = SimpleNamespace(speculative_num_draft_tokens=WINDOW)
        attach_settings(server_args, Settings(**settings))
        runner: Any = SimpleNamespace(
            dtype=torch.float32,
            server_args=server_args,
            req_to_token_pool=SimpleNamespace(req_to_token=self.req_to_token),
            token_to_kv_pool=self.pool,
            device="cpu",
            model=torch.nn.ModuleList(self.layers),
        )
        base: Any = BaseBackend()
        self.backend = SparseSpecAttnBackend(runner, base)

    def random(self, tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads * HEAD_DIM, generator=self.generator)

    def _run(self, batch: Any, tokens: int, q: torch.Tensor | None = None) -> torch.Tensor:
        """Output of the last layer, [tokens, Hq * D]; ``q`` is used in every layer."""
        for layer in self.layers:
            queries = q if q is not None else self.random(tokens, NUM_Q_HEADS)
            k, v = self.random(tokens, NUM_KV_HEADS), self.random(tokens, NUM_KV_HEADS)
            forward = (
                self.backend.forward_decode if batch.forward_mode.is_decode() else self.backend.forward_extend
            )
            output = forward(queries, k, v, layer, batch)
        return output

    def prefill(self, rows: list[int], totals: list[int], extends: list[int]) -> None:
        """Chunks of ``extends`` tokens that end at lengths ``totals``."""
        lens = torch.tensor(extends)
        batch = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND,
            batch_size=len(rows),
            req_pool_indices=torch.tensor(rows),
            seq_lens=torch.tensor(totals),
            extend_seq_lens=lens,
            extend_start_loc=lens.cumsum(0) - lens,
        )
        self.backend.init_forward_metadata(batch)
        self._run(batch, sum(extends))

    def draft(self, rows: list[int], lengths: list[int], q: torch.Tensor | None = None) -> torch.Tensor:
        """One draft step; ``lengths`` include the current token."""
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            batch_size=len(rows),
            req_pool_indices=torch.tensor(rows),
            seq_lens=torch.tensor(lengths),
            out_cache_loc=self.req_to_token[rows, [n - 1 for n in lengths]].long(),
        )
        self.backend.begin(self.backend.plan_draft(batch.req_pool_indices, batch.seq_lens))
        return self._run(batch, len(rows), q)

    def verify(self, rows: list[int], lengths: list[int], q: torch.Tensor | None = None) -> torch.Tensor:
        """One verification; ``lengths`` are the committed tokens."""
        slots = [self.req_to_token[row, n : n + WINDOW] for row, n in zip(rows, lengths, strict=True)]
        batch = SimpleNamespace(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=len(rows),
            req_pool_indices=torch.tensor(rows),
            seq_lens=torch.tensor(lengths),
            out_cache_loc=torch.cat(slots).long(),
        )
        self.backend.init_forward_metadata(batch)
        return self._run(batch, len(rows) * WINDOW, q)

    def plain(self, rows: list[int], lengths: list[int], q: torch.Tensor | None = None) -> torch.Tensor:
        """One plain step; ``lengths`` include the current token."""
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            batch_size=len(rows),
            out_cache_loc=self.req_to_token[rows, [n - 1 for n in lengths]].long(),
        )
        self.backend.begin(self.backend.plan_plain(torch.tensor(rows), torch.tensor(lengths) - 1))
        return self._run(batch, len(rows), q)

    def mixed(
        self, drafts: list[tuple[int, int]], windows: list[tuple[int, int]], q: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Draft steps of (row, length with the current token), and windows of (row, committed length).

        A draft of length 0 and a window of row 0 are padding.
        """
        draft_rows, draft_lens = torch.tensor(drafts, dtype=torch.int64).view(-1, 2).T.contiguous()
        verify_rows, verify_lens = torch.tensor(windows, dtype=torch.int64).view(-1, 2).T.contiguous()
        self.backend.count_draft_queries(draft_rows, draft_lens)
        num_drafted = torch.full_like(verify_rows, WINDOW - 1)
        plan = self.backend.plan_mixed(draft_rows, draft_lens, verify_rows, verify_lens, num_drafted)
        self.backend.begin(plan)
        positions = verify_lens.unsqueeze(1) + torch.arange(WINDOW)
        slots = [
            self.req_to_token[draft_rows, (draft_lens - 1).clamp(min=0)],
            self.req_to_token[verify_rows.unsqueeze(1), positions].flatten(),
        ]
        tokens = len(drafts) + WINDOW * len(windows)
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE, batch_size=tokens, out_cache_loc=torch.cat(slots).long()
        )
        output = self._run(batch, tokens, q)
        self.backend.end()
        return output

    def selected(self, row: int, layer: int = 0, kv_head: int = 0) -> list[int]:
        """Positions that drafts of ``row`` attend to, besides the tail."""
        table = self.backend.table
        return table.positions[layer, row, kv_head, : int(table.num_selected[row])].tolist()


def attended(server: SmallServer, row: int, length: int, layer: int = 0, head: int = 0) -> set[int]:
    """Positions that a draft step of ``row`` attends to; ``length`` includes the current token."""
    return {*server.selected(row, layer, head), *range(int(server.backend.table.tail_start[row]), length)}
