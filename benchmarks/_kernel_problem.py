"""Shapes, byte counts and inputs of the kernel benchmark."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.attention_backend.page_table import SelectionTable, num_selected

if TYPE_CHECKING:
    import torch

DRAFT_TOKENS = 8
WINDOW = DRAFT_TOKENS + 1
RATIO = 0.05
MIN_BUDGET = 128
# Accepted draft tokens of a round, and what a round emits with the bonus token (the paper's Qwen3-8B figure).
ACCEPTED = 6.16
TOKENS_PER_ROUND = ACCEPTED + 1
# Tokens between the start of the verified window and the query of an average draft step: the round's emitted tokens and
# half of its draft steps.
TAIL = round(TOKENS_PER_ROUND + (DRAFT_TOKENS + 1) / 2)
# Slots per request beyond its context: the verify window and the draft steps.
PAD = 64
# A repetition should walk through this much of the KV cache, so that the L2 cache holds little of it.
LEAST_TRAFFIC = 800 << 20
MOST_SETS = 4
MOST_SELECTIONS = 36


@dataclass(frozen=True)
class Shape:
    """Attention of one layer: query heads, KV heads, head dim; ``layers`` of them in the model."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    layers: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    def token_bytes(self, itemsize: int = 2) -> int:
        """K and V bytes of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * itemsize


SHAPES = {
    "qwen3-8b": Shape("qwen3-8b", 32, 8, 128, 36),
    "qwen2.5-coder-1.5b": Shape("qwen2.5-coder-1.5b", 12, 2, 128, 28),
}
TINY = {
    "tiny-g4": Shape("tiny-g4", 8, 2, 64, 2),
    "tiny-g6": Shape("tiny-g6", 6, 1, 64, 2),
}
LAYOUTS = ("runs", "random")


@dataclass(frozen=True)
class Unit:
    """One batch: ``batch`` requests of ``context`` committed tokens each.

    ``layout``: ``runs``, every request's slots are consecutive, as SGLang's allocator gives a prompt's; ``random``,
    every slot is anywhere in the pool, the worst that page size 1 allows.
    """

    shape: Shape
    batch: int
    context: int
    layout: str

    @property
    def key(self) -> str:
        """Unique name, used in records."""
        return f"{self.shape.name}/b{self.batch}/c{self.context}/{self.layout}"


def budget_counts(context: int, ratio: float = RATIO, min_budget: int = MIN_BUDGET, window: int = WINDOW) -> int:
    """Positions selected per KV head for a request of ``context`` tokens."""
    import torch

    capacity = SelectionTable.capacity_for(context + PAD, ratio, min_budget)
    return int(num_selected(torch.tensor([context]), ratio, min_budget, window, capacity)[0])


def decode_bytes(unit: Unit) -> int:
    """KV bytes that one plain decoding step reads in one layer."""
    return unit.batch * unit.context * unit.shape.token_bytes()


def verify_bytes(unit: Unit, window: int = WINDOW) -> int:
    """KV bytes that one verification reads in one layer."""
    return unit.batch * (unit.context + window) * unit.shape.token_bytes()


def draft_bytes(unit: Unit, tail: int = TAIL) -> tuple[int, int]:
    """(KV bytes, index bytes) of one draft step in one layer.

    The index bytes are an int32 position per selected entry and an int32 slot per attended entry, per KV head.
    """
    count = budget_counts(unit.context)
    entries = unit.batch * (count + tail)
    lists = unit.batch * unit.shape.num_kv_heads
    return entries * unit.shape.token_bytes(), lists * 4 * (count + count + tail)


def ideal_round(unit: Unit) -> float:
    """Bytes of plain decoding over bytes of a round, for the same number of tokens."""
    steps = DRAFT_TOKENS * draft_bytes(unit)[0] + verify_bytes(unit)
    return TOKENS_PER_ROUND * decode_bytes(unit) / steps


def pool_elements(unit: Unit) -> int:
    """Elements of the K (and of the V) buffer that ``Problem`` needs for this unit."""
    return num_slots(unit) * unit.shape.num_kv_heads * unit.shape.head_dim


def num_sets(unit: Unit) -> int:
    """Disjoint batches in the pool, so that repetitions do not measure the cache."""
    return max(1, min(MOST_SETS, math.ceil(LEAST_TRAFFIC / decode_bytes(unit))))


def num_slots(unit: Unit) -> int:
    """Token slots of the pool; slot 0 is SGLang's padding slot."""
    return num_sets(unit) * unit.batch * (unit.context + PAD) + 1


class Pool:
    """K and V buffers for the largest unit, filled once with random numbers and viewed by every unit.

    Args:
        elements: of each buffer.
    """

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        import torch

        self.k = torch.empty(elements, dtype=dtype, device=device)
        self.v = torch.empty(elements, dtype=dtype, device=device)
        for buffer in (self.k, self.v):
            # In pieces: the generator's scratch for one huge call would not fit beside the buffers.
            for piece in buffer.split(1 << 28):
                piece.normal_()

    def view(self, unit: Unit) -> tuple[torch.Tensor, torch.Tensor]:
        """The unit's caches, [slots, KV heads, head dim]."""
        shape = (num_slots(unit), unit.shape.num_kv_heads, unit.shape.head_dim)
        size = pool_elements(unit)
        return self.k[:size].view(shape), self.v[:size].view(shape)


class Problem:
    """Inputs of one unit on the device.

    Attributes:
        k, v: caches, [slots, Hkv, D].
        req_to_token: int32 [rows, context + PAD].
        requests: one int64 [batch] of ``req_to_token`` rows per set.
        positions: int32 [selections, rows, Hkv, capacity], random ascending subsets, one selection per layer that a
            timed graph walks through.
        hint: float32 [batch, window, Hq], close to the log-sum-exp of the rows, on average a little below.
    """

    def __init__(self, unit: Unit, pool: Pool, device: torch.device, seed: int = 0) -> None:
        import torch

        self.unit, self.device = unit, device
        shape, batch, context = unit.shape, unit.batch, unit.context
        self.dtype = pool.k.dtype
        self.scaling = shape.head_dim**-0.5
        self.window = WINDOW
        gen = torch.Generator(device=device)
        gen.manual_seed(seed)
        self.gen = gen
        self.sets = num_sets(unit)
        self.k, self.v = pool.view(unit)
        width = context + PAD
        owners = self.sets * batch
        slots = owners * width
        if unit.layout == "random":
            owned = torch.randperm(slots, generator=gen, device=device) + 1
            table = owned.view(owners, width)
        else:
            table = (torch.arange(slots, device=device) + 1).view(owners, width)
            table = table[torch.randperm(owners, generator=gen, device=device)]
        self.req_to_token = torch.zeros((owners + 1, width), dtype=torch.int32, device=device)
        self.req_to_token[1:] = table.to(torch.int32)
        rows = torch.randperm(owners, generator=gen, device=device) + 1
        self.requests = list(rows.to(torch.int64).view(self.sets, batch).unbind(0))

        self.count = budget_counts(context)
        self.capacity = SelectionTable.capacity_for(width, RATIO, MIN_BUDGET)
        bytes_each, self.index_bytes = draft_bytes(unit)
        self.draft_bytes = bytes_each
        wanted = math.ceil(LEAST_TRAFFIC / bytes_each / self.sets)
        selections = max(1, min(MOST_SELECTIONS, wanted))
        self.positions = torch.zeros(
            (selections, owners + 1, shape.num_kv_heads, self.capacity), dtype=torch.int32, device=device
        )
        for selection in range(selections):
            self._draw_selection(self.positions[selection])
        self.num_selected = torch.full((owners + 1,), self.count, dtype=torch.int32, device=device)
        self.tail_start = torch.full((owners + 1,), context, dtype=torch.int32, device=device)
        self.draft_lens = torch.full((batch,), context + TAIL, dtype=torch.int64, device=device)
        self.lens = torch.full((batch,), context, dtype=torch.int64, device=device)
        self.counts = torch.full((batch,), self.count, dtype=torch.int32, device=device)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=gen, device=device, dtype=torch.float32).to(self.dtype)

        self.q1 = randn(batch, shape.num_q_heads, shape.head_dim)
        self.qw = randn(batch * WINDOW, shape.num_q_heads, shape.head_dim)
        # Logits of random rows are standard normal, so their log-sum-exp is close to log(length) + 1/2.
        noise = torch.randn(batch, WINDOW, shape.num_q_heads, generator=gen, device=device)
        self.hint = math.log(context + WINDOW) + 0.5 + 0.3 * noise - 0.2
        self._cache: dict[str, Any] = {}

    def _draw_selection(self, positions: torch.Tensor) -> None:
        """Fill int32 [rows, Hkv, capacity] with random ascending subsets of [0, context)."""
        import torch

        rows, heads, _ = positions.shape
        context = self.unit.context
        step = max(1, (1 << 26) // (heads * context))
        for begin in range(0, rows, step):
            part = positions[begin : begin + step]
            keys = torch.rand((part.shape[0] * heads, context), generator=self.gen, device=self.device)
            chosen = keys.topk(self.count, dim=-1, sorted=False).indices.sort(dim=-1).values
            part[..., : self.count] = chosen.view(part.shape[0], heads, self.count).to(torch.int32)

    def make_kernels(self, **configs: Any) -> Any:
        """The plugin's CUDA kernels, sized as a server with this batch and context would size them."""
        from sglang_sparsespec.attention_backend.cuda_kernels import CudaPillarKernels

        shape = self.unit.shape
        return CudaPillarKernels(
            max_batch=self.unit.batch,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            window=WINDOW,
            capacity=self.capacity,
            max_context=self.unit.context + PAD,
            device=self.device,
            **configs,
        )

    def indices(self, request_set: int, length: int) -> torch.Tensor:
        """int32 [batch * length]: the slots of the first ``length`` positions of a set's requests."""
        return self.req_to_token[self.requests[request_set], :length].reshape(-1).contiguous()

    # -------------------------------------------------------------- references

    def _sample(self) -> list[int]:
        return sorted({0, self.unit.batch - 1})

    def cached(self, key: str, compute: Any) -> Any:
        """``compute()``, once per problem."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def reference(self, kind: str) -> Any:
        """float32 results for the first and last request of set 0, by the torch oracle.

        ``decode``: outputs [n, Hq, D].  ``draft``: (outputs [n, Hq, D], lse [n, Hq]).  ``verify``: (outputs
        [n, window, Hq, D], exact scores [n, Hkv, context], scores relative to the hint).
        """
        return self.cached(f"reference/{kind}", {"decode": self._decode, "draft": self._draft, "verify": self._verify}[kind])

    def _decode(self) -> torch.Tensor:
        import torch

        from sglang_sparsespec.attention_backend.torch_kernels import TorchPillarKernels

        index = torch.tensor(self._sample(), device=self.device)
        q = self.q1[index].float()
        out = torch.zeros_like(q)
        TorchPillarKernels().verify_attention(
            q, self.k, self.v, self.req_to_token, self.requests[0][index], self.lens[index] - 1, 1, self.scaling, out
        )
        return out

    def _draft(self) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        from sglang_sparsespec.attention_backend.torch_kernels import TorchPillarKernels

        index = torch.tensor(self._sample(), device=self.device)
        q = self.q1[index].float()
        out = torch.zeros_like(q)
        lse = torch.zeros(q.shape[:2], device=self.device)
        TorchPillarKernels().draft_attention(
            q,
            self.k,
            self.v,
            self.positions[0],
            self.num_selected,
            self.tail_start,
            self.req_to_token,
            self.requests[0][index],
            self.draft_lens[index],
            self.scaling,
            out,
            lse,
        )
        return out, lse

    def _verify(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        from sglang_sparsespec.attention_backend.torch_kernels import _probabilities, _weighted_values

        shape, context = self.unit.shape, self.unit.context
        total = context + WINDOW
        position = torch.arange(total, device=self.device)
        mask = position[None, :] <= position[context:, None]
        outs, exact, hinted = [], [], []
        for b in self._sample():
            slots = self.req_to_token[self.requests[0][b], :total].long()
            q = self.qw.view(-1, WINDOW, shape.num_q_heads, shape.head_dim)[b]
            prob, lse = _probabilities(q.float(), self.k[slots], self.scaling, mask)
            outs.append(_weighted_values(prob, self.v[slots]))
            exact.append(prob[..., :context].mean(dim=(1, 2)))
            hint = self.hint[b].view(WINDOW, shape.num_kv_heads, shape.group).permute(1, 2, 0)
            hinted.append((prob[..., :context] * torch.exp(lse - hint).unsqueeze(-1)).mean(dim=(1, 2)))
        return torch.stack(outs), torch.stack(exact), torch.stack(hinted)

    def error(self, out: torch.Tensor, ref: torch.Tensor) -> float:
        """||out - ref|| / ||ref||, where ``out`` still holds all requests along its first axis."""
        sample = out[self._sample()].double()
        ref = ref.double()
        return float((sample - ref).norm() / ref.norm())
