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
LAYOUTS = ("runs", "random", "ragged")


@dataclass(frozen=True)
class Unit:
    """One batch: ``batch`` requests of ``context`` committed tokens each.

    ``layout``: ``runs``, every request's slots are consecutive, as SGLang's allocator gives a prompt's; ``random``,
    every slot is anywhere in the pool, the worst that page size 1 allows; ``ragged``, as ``runs`` with lengths spread
    evenly from a quarter of ``context`` to all of it.
    """

    shape: Shape
    batch: int
    context: int
    layout: str

    @property
    def key(self) -> str:
        """Unique name, used in records."""
        return f"{self.shape.name}/b{self.batch}/c{self.context}/{self.layout}"

    def lengths(self) -> list[int]:
        """Committed tokens of each request; the first and the last one are the longest and a short one if ragged."""
        if self.layout != "ragged" or self.batch == 1:
            return [self.context] * self.batch
        lengths = [self.context - 3 * self.context * i // (4 * (self.batch - 1)) for i in range(self.batch)]
        # Interleaved, so that neighbours differ; the order is the same in every run.
        return lengths[0::2] + lengths[1::2]


def budget_counts(lengths: list[int], ratio: float = RATIO, min_budget: int = MIN_BUDGET) -> list[int]:
    """Positions selected per KV head for requests of ``lengths`` tokens."""
    import torch

    capacity = SelectionTable.capacity_for(max(lengths) + PAD, ratio, min_budget)
    return num_selected(torch.tensor(lengths), ratio, min_budget, WINDOW, capacity).tolist()


def decode_bytes(unit: Unit) -> int:
    """KV bytes that one plain decoding step reads in one layer."""
    return sum(unit.lengths()) * unit.shape.token_bytes()


def verify_bytes(unit: Unit, window: int = WINDOW) -> int:
    """KV bytes that one verification reads in one layer."""
    return sum(length + window for length in unit.lengths()) * unit.shape.token_bytes()


def draft_bytes(unit: Unit, tail: int = TAIL) -> tuple[int, int]:
    """(KV bytes, index bytes) of one draft step in one layer.

    The index bytes are an int32 position per selected entry and an int32 slot per attended entry, per KV head.
    """
    selected = sum(budget_counts(unit.lengths()))
    attended = selected + unit.batch * tail
    return attended * unit.shape.token_bytes(), 4 * unit.shape.num_kv_heads * (selected + attended)


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
        lengths, selected: committed tokens and selected positions of each request, on the host.
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
        gen = torch.Generator(device=device)
        gen.manual_seed(seed)
        self.gen = gen
        self.sets = num_sets(unit)
        self.k, self.v = pool.view(unit)
        width = context + PAD
        owners = self.sets * batch
        slots = owners * width
        if unit.layout == "random":
            table = (torch.randperm(slots, generator=gen, device=device) + 1).view(owners, width)
        else:
            table = (torch.arange(slots, device=device) + 1).view(owners, width)
            table = table[torch.randperm(owners, generator=gen, device=device)]
        self.req_to_token = torch.zeros((owners + 1, width), dtype=torch.int32, device=device)
        self.req_to_token[1:] = table.to(torch.int32)
        del table
        rows = torch.randperm(owners, generator=gen, device=device) + 1
        self.requests = list(rows.to(torch.int64).view(self.sets, batch).unbind(0))

        self.lengths = unit.lengths()
        self.selected = budget_counts(self.lengths)
        self.lens = torch.tensor(self.lengths, dtype=torch.int64, device=device)
        self.draft_lens = self.lens + TAIL
        self.counts = torch.tensor(self.selected, dtype=torch.int32, device=device)
        self.num_selected = torch.zeros(owners + 1, dtype=torch.int32, device=device)
        self.tail_start = torch.zeros(owners + 1, dtype=torch.int32, device=device)
        for request_set in self.requests:
            self.num_selected[request_set] = self.counts
            self.tail_start[request_set] = self.lens.to(torch.int32)
        self.capacity = SelectionTable.capacity_for(width, RATIO, MIN_BUDGET)
        self.draft_bytes, self.index_bytes = draft_bytes(unit)
        wanted = math.ceil(LEAST_TRAFFIC / self.draft_bytes / self.sets)
        selections = max(1, min(MOST_SELECTIONS, wanted))
        self.positions = torch.zeros(
            (selections, owners + 1, shape.num_kv_heads, self.capacity), dtype=torch.int32, device=device
        )
        for selection in range(selections):
            self._draw_selection(self.positions[selection])

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=gen, device=device, dtype=torch.float32).to(self.dtype)

        self.q1 = randn(batch, shape.num_q_heads, shape.head_dim)
        self.qw = randn(batch * WINDOW, shape.num_q_heads, shape.head_dim)
        # Logits of random rows are standard normal, so their log-sum-exp is close to log(length) + 1/2.
        noise = torch.randn(batch, WINDOW, shape.num_q_heads, generator=gen, device=device)
        self.hint = (self.lens + WINDOW).float().log().view(-1, 1, 1) + 0.3 + 0.3 * noise
        self._cache: dict[str, Any] = {}

    def _draw_selection(self, positions: torch.Tensor) -> None:
        """Fill int32 [rows, Hkv, capacity] with random ascending subsets of each row's [0, length)."""
        import torch

        rows, heads, _ = positions.shape
        most, context = max(self.selected), self.unit.context
        place = torch.arange(context, device=self.device)
        step = max(1, (1 << 26) // (heads * context))
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            lengths = self.tail_start[part].repeat_interleave(heads)
            counts = self.num_selected[part].repeat_interleave(heads)
            keys = torch.rand((len(lengths), context), generator=self.gen, device=self.device)
            keys.masked_fill_(place >= lengths[:, None], -1.0)
            chosen = keys.topk(most, dim=-1).indices.to(torch.int32)
            chosen.masked_fill_(place[:most] >= counts[:, None], 1 << 30)
            positions[part, :, :most] = chosen.sort(dim=-1).values.view(-1, heads, most)

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

    def indices(self, request_set: int, beyond: int = 0) -> torch.Tensor:
        """int32: the slots of every request's committed tokens and ``beyond`` more, request after request."""
        import torch

        table = self.req_to_token[self.requests[request_set]]
        place = torch.arange(table.shape[1], device=self.device)
        return table[place < (self.lens + beyond)[:, None]].contiguous()

    def indptr(self, beyond: int = 0) -> torch.Tensor:
        """int32 [batch + 1] on the host: where each request begins in ``indices``."""
        import torch

        ends = torch.tensor([0, *(length + beyond for length in self.lengths)], dtype=torch.int64).cumsum(0)
        return ends.to(torch.int32)

    # -------------------------------------------------------------- references

    def sample(self) -> list[int]:
        """The requests that are checked: the first and the last."""
        return sorted({0, self.unit.batch - 1})

    def cached(self, key: str, compute: Any) -> Any:
        """``compute()``, once per problem."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def forget(self) -> None:
        """Drop what ``cached`` holds."""
        self._cache.clear()

    def reference(self, kind: str) -> list[Any]:
        """float32 results of the sampled requests of set 0, by the torch oracle.

        ``decode``: outputs [Hq, D].  ``draft``: (output [Hq, D], lse [Hq]).  ``verify``: (outputs [window, Hq, D],
        exact scores [Hkv, length], scores relative to the hint).
        """
        compute = {"decode": self._decode, "draft": self._draft, "verify": self._verify}[kind]
        return self.cached(f"reference/{kind}", compute)

    def _decode(self) -> list[torch.Tensor]:
        import torch

        from sglang_sparsespec.attention_backend.torch_kernels import TorchPillarKernels

        index = torch.tensor(self.sample(), device=self.device)
        q = self.q1[index].float()
        out = torch.zeros_like(q)
        TorchPillarKernels().verify_attention(
            q, self.k, self.v, self.req_to_token, self.requests[0][index], self.lens[index] - 1, 1, self.scaling, out
        )
        return list(out)

    def _draft(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        import torch

        from sglang_sparsespec.attention_backend.torch_kernels import TorchPillarKernels

        index = torch.tensor(self.sample(), device=self.device)
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
        return list(zip(out, lse, strict=True))

    def _verify(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        import torch

        from sglang_sparsespec.attention_backend.torch_kernels import _probabilities, _weighted_values

        shape = self.unit.shape
        found = []
        for b in self.sample():
            length = self.lengths[b]
            total = length + WINDOW
            position = torch.arange(total, device=self.device)
            mask = position[None, :] <= position[length:, None]
            slots = self.req_to_token[self.requests[0][b], :total].long()
            q = self.qw.view(-1, WINDOW, shape.num_q_heads, shape.head_dim)[b]
            prob, lse = _probabilities(q.float(), self.k[slots], self.scaling, mask)
            hint = self.hint[b].view(WINDOW, shape.num_kv_heads, shape.group).permute(1, 2, 0)
            exact = prob[..., :length].mean(dim=(1, 2))
            hinted = (prob[..., :length] * torch.exp(lse - hint).unsqueeze(-1)).mean(dim=(1, 2))
            found.append((_weighted_values(prob, self.v[slots]), exact, hinted))
        return found


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref||; NaN if ``out`` holds one."""
    out, ref = out.double(), ref.double()
    return float((out - ref).norm() / ref.norm())
