"""Inputs of the kernel table, and the kernels that it times: this project's, FlashInfer's and FlashAttention 3.

Each call is one layer's work for one batch. Successive calls walk through disjoint batches and different selections, as the
layers of a model do, so that none finds its data in the L2 cache. Kernels of one job are alternatives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_sparsespec.attention_backend.kernels import make_kernels
from sglang_sparsespec.attention_backend.kernels.interface import KernelShape, LayerKV, score_row
from sglang_sparsespec.attention_backend.page_table import SelectionTable, num_selected

DRAFT_TOKENS = 8
WINDOW = DRAFT_TOKENS + 1
RATIO, MIN_BUDGET = 0.05, 128
#: What a round emits: accepted drafts and the bonus token (the paper's figure of Qwen3-8B).
TOKENS_PER_ROUND = 7.16
#: Tokens between the start of the verified window and an average draft query: the round's tokens and half its steps.
TAIL = round(TOKENS_PER_ROUND + (DRAFT_TOKENS + 1) / 2)
#: Slots per request beyond its context: the verify window and the draft steps.
PAD = 64
#: A walk should cover this much of the KV cache, so that the L2 cache holds little of it.
LEAST_TRAFFIC = 800 << 20
MOST_SETS, MOST_SELECTIONS = 4, 36
LAYOUTS = ("runs", "random", "ragged")


@dataclass(frozen=True)
class Shape:
    """Attention of one layer: query heads, KV heads, head dim."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def token_bytes(self) -> int:
        """K and V bytes of one token in one layer, in 16 bits."""
        return 2 * self.num_kv_heads * self.head_dim * 2


SHAPES = {
    "qwen3-8b": Shape("qwen3-8b", 32, 8, 128),
    "qwen2.5-coder-1.5b": Shape("qwen2.5-coder-1.5b", 12, 2, 128),
    # The same KV, and rows of a verification that fill a tile of 64, or need one of 128.
    "qwen2.5-7b": Shape("qwen2.5-7b", 28, 4, 128),
    "qwen3-30b-a3b": Shape("qwen3-30b-a3b", 32, 4, 128),
    "gemma3-1b": Shape("gemma3-1b", 4, 1, 256),
    "tiny-g4": Shape("tiny-g4", 8, 2, 64),  # for the interpreter
    "tiny-g6": Shape("tiny-g6", 6, 1, 64),
}


@dataclass(frozen=True)
class Case:
    """One batch: ``batch`` requests of ``context`` committed tokens each.

    ``layout``: ``runs``, every request's slots are consecutive, as SGLang's allocator gives a prompt's; ``random``, every
    slot is anywhere in the pool, the worst that page size 1 allows; ``ragged``, as ``runs`` with lengths spread evenly from
    a quarter of ``context`` to all of it.
    """

    shape: Shape
    batch: int
    context: int
    layout: str

    @property
    def key(self) -> str:
        """Unique name, used in records."""
        return f"{self.shape.name}/b{self.batch}/c{self.context}/{self.layout}"

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Committed tokens of each request; neighbours differ if ragged."""
        if self.layout != "ragged" or self.batch == 1:
            return [self.context] * self.batch
        lengths = [self.context - 3 * self.context * i // (4 * (self.batch - 1)) for i in range(self.batch)]
        return lengths[0::2] + lengths[1::2]

    @functools.cached_property
    def selected(self) -> list[int]:
        """Positions selected per KV head for each request."""
        capacity = SelectionTable.capacity_for(max(self.lengths) + PAD, RATIO, MIN_BUDGET)
        return num_selected(torch.tensor(self.lengths), RATIO, MIN_BUDGET, WINDOW, capacity).tolist()

    @property
    def decode_bytes(self) -> int:
        """KV bytes that one plain decoding step reads in one layer."""
        return sum(self.lengths) * self.shape.token_bytes

    @property
    def verify_bytes(self) -> int:
        """KV bytes that one verification reads in one layer."""
        return (sum(self.lengths) + WINDOW * self.batch) * self.shape.token_bytes

    @property
    def draft_bytes(self) -> int:
        """KV bytes that one draft step reads in one layer (index lists are not counted)."""
        return (sum(self.selected) + TAIL * self.batch) * self.shape.token_bytes

    @property
    def num_sets(self) -> int:
        """Disjoint batches in the pool, so that a walk does not measure the cache."""
        return max(1, min(MOST_SETS, math.ceil(LEAST_TRAFFIC / self.decode_bytes)))

    @property
    def num_slots(self) -> int:
        """Token slots of the pool; slot 0 is SGLang's padding slot."""
        return self.num_sets * self.batch * (self.context + PAD) + 1


class Problem:
    """Inputs of one case on the device.

    Attributes:
        k, v: caches, [slots, Hkv, D].
        rows: one int64 [batch] of ``req_to_token`` rows per set.
        lens: int64 [batch], committed tokens. draft_lens: with the tail.
        table: random ascending selections, one per layer that a timed walk goes through.
        hint: float32 [batch, W, Hq], close to the log-sum-exps of the queries; those of the checked requests are exact.
    """

    def __init__(self, case: Case, pool: torch.Tensor, device: torch.device) -> None:
        self.case, self.device, self.dtype = case, device, pool.dtype
        shape, batch = case.shape, case.batch
        self.scaling = shape.head_dim**-0.5
        gen = torch.Generator(device=device)
        gen.manual_seed(0)
        size = case.num_slots * shape.num_kv_heads * shape.head_dim
        self.k, self.v = (half[:size].view(case.num_slots, shape.num_kv_heads, shape.head_dim) for half in pool)
        width, owners = case.context + PAD, case.num_sets * batch
        if case.layout == "random":
            slots = (torch.randperm(owners * width, generator=gen, device=device) + 1).view(owners, width)
        else:
            slots = (torch.arange(owners * width, device=device) + 1).view(owners, width)
            slots = slots[torch.randperm(owners, generator=gen, device=device)]
        self.req_to_token = torch.zeros((owners + 1, width), dtype=torch.int32, device=device)
        self.req_to_token[1:] = slots.to(torch.int32)
        del slots
        self.rows = list((torch.randperm(owners, generator=gen, device=device) + 1).view(case.num_sets, batch).unbind(0))
        self.lens = torch.tensor(case.lengths, dtype=torch.int64, device=device)
        self.draft_lens = self.lens + TAIL
        self.counts = torch.tensor(case.selected, dtype=torch.int32, device=device)
        self.capacity = SelectionTable.capacity_for(width, RATIO, MIN_BUDGET)
        layers = max(1, min(MOST_SELECTIONS, math.ceil(LEAST_TRAFFIC / case.draft_bytes / case.num_sets)))
        self.table = self.empty_table(layers)
        for layer in range(layers):
            self._draw_selection(self.table.positions[layer], gen)
        self.q1, self.qw = (
            torch.randn(tokens, shape.num_q_heads, shape.head_dim, generator=gen, device=device).to(self.dtype)
            for tokens in (batch, batch * WINDOW)
        )
        # Logits of random queries are standard normal, so their log-sum-exp is close to log(length) + 1/2.
        noise = torch.randn(batch, WINDOW, shape.num_q_heads, generator=gen, device=device)
        self.hint = (self.lens + WINDOW).float().log().view(-1, 1, 1) + 0.3 + 0.3 * noise
        self.checked = torch.tensor(sorted({0, batch - 1}), device=device)
        self.hint[self.checked] = self.reference["verify lse"]

    def empty_table(self, layers: int) -> SelectionTable:
        """A table of the case's counts without positions."""
        table = SelectionTable(layers, len(self.req_to_token), self.case.shape.num_kv_heads, self.capacity, self.device)
        for rows in self.rows:
            table.num_selected[rows], table.tail_start[rows] = self.counts, self.lens.to(torch.int32)
        return table

    def _draw_selection(self, positions: torch.Tensor, gen: torch.Generator) -> None:
        """Fill int32 [rows, Hkv, capacity] with random ascending subsets of each row's [0, length)."""
        rows, heads, _ = positions.shape
        most, context = max(self.case.selected), self.case.context
        place = torch.arange(context, device=self.device)
        step = max(1, (1 << 26) // (heads * context))
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            lengths = self.table.tail_start[part].repeat_interleave(heads)
            counts = self.table.num_selected[part].repeat_interleave(heads)
            keys = torch.rand((len(lengths), context), generator=gen, device=self.device)
            keys.masked_fill_(place >= lengths[:, None], -1.0)
            chosen = keys.topk(most, dim=-1).indices.to(torch.int32)
            chosen.masked_fill_(place[:most] >= counts[:, None], 1 << 30)
            positions[part, :, :most] = chosen.sort(dim=-1).values.view(-1, heads, most)

    def kernels(self, name: str, table: SelectionTable | None = None) -> Any:
        """The project's kernels, sized as a server with this batch and context would size them."""
        shape = self.case.shape
        longest = self.capacity + 2 * WINDOW
        sizes = (self.case.batch, shape.num_q_heads, shape.num_kv_heads, shape.head_dim, WINDOW, longest)
        built_for = KernelShape(*sizes, dtype=self.dtype, kv_dtype=self.dtype)
        return make_kernels(name, built_for, self.table if table is None else table, self.req_to_token)

    def layer(self, index: int = 0) -> LayerKV:
        """The KV cache as that of layer ``index`` of the table."""
        return LayerKV(self.k, self.v, self.scaling, index)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Poisoned output: what a kernel leaves unwritten fails its check."""
        return torch.full(shape, float("nan"), dtype=dtype or self.dtype, device=self.device)

    def empty_out(self, queries: int) -> torch.Tensor:
        """Output of ``queries`` queries per request, [batch * queries, Hq, D]."""
        return self.empty(self.case.batch * queries, self.case.shape.num_q_heads, self.case.shape.head_dim)

    def empty_scores(self, dtype: torch.dtype) -> torch.Tensor:
        """Scores of every request's positions."""
        return self.empty(self.case.batch, self.case.shape.num_kv_heads, score_row(self.req_to_token.shape[1]), dtype=dtype)

    def indices(self, of_set: int, beyond: int = 0) -> torch.Tensor:
        """int32: the slots of every request's committed tokens and ``beyond`` more, request after request."""
        table = self.req_to_token[self.rows[of_set]]
        return table[torch.arange(table.shape[1], device=self.device) < (self.lens + beyond)[:, None]].contiguous()

    def indptr(self, beyond: int = 0) -> torch.Tensor:
        """int32 [batch + 1] on the host: where each request begins in ``indices``."""
        return torch.tensor([0, *(length + beyond for length in self.case.lengths)]).cumsum(0).to(torch.int32)

    # ------------------------------------------------------------------------ checks

    @functools.cached_property
    def reference(self) -> dict[str, torch.Tensor]:
        """float32 results of the checked requests (the first and the last) of set 0, by the torch kernels."""
        kernels, layer, shape, at = self.kernels("torch"), self.layer(), self.case.shape, self.checked
        rows, lens = self.rows[0][at], self.lens[at]
        q1, qw = self.q1[at].float(), self.qw.view(-1, WINDOW, shape.num_q_heads, shape.head_dim)[at].flatten(0, 1).float()
        found = {"decode": torch.zeros_like(q1), "draft": torch.zeros_like(q1), "verify": torch.zeros_like(qw)}
        found["draft lse"] = torch.zeros(q1.shape[:2], device=self.device)
        found["verify lse"] = torch.zeros(len(at), WINDOW, shape.num_q_heads, device=self.device)
        found["scores"] = torch.zeros(len(at), shape.num_kv_heads, int(lens.max()), device=self.device)
        kernels.plan_verify(rows, lens - 1, 1).run(q1, layer, found["decode"])
        kernels.plan_draft(rows, self.draft_lens[at]).run(q1, layer, found["draft"], found["draft lse"])
        verify = kernels.plan_verify(rows, lens, WINDOW)
        verify.run(qw, layer, found["verify"], found["scores"], lse=found["verify lse"])
        return found

    def error(self, name: str, result: torch.Tensor) -> float:
        """||result - reference|| / ||reference|| of the checked requests, the larger; NaN if a result holds one.

        Args:
            result: first axis batch, or batch times W.
        """
        reference = self.reference[name]
        found = result.view(self.case.batch, -1)[self.checked].double()
        expected = reference.reshape(len(self.checked), -1).double()
        return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())

    def score_error(self, scores: torch.Tensor) -> float:
        """As :meth:`error`, of scores below the lengths."""
        errors = []
        for place, b in enumerate(self.checked.tolist()):
            found, expected = (s[..., : self.case.lengths[b]].double() for s in (scores[b], self.reference["scores"][place]))
            errors.append(float((found - expected).norm() / expected.norm()))
        return max(errors, key=lambda error: (math.isnan(error), error))

    def selection_error(self, scores: torch.Tensor, positions: torch.Tensor) -> float:
        """How far the selected scores' sum is from torch's top-k; 1 if a list is not ascending."""
        wrong = 0.0
        for b in self.checked.tolist():
            count, length = self.case.selected[b], self.case.lengths[b]
            chosen = positions[self.rows[0][b], :, :count].long()
            if not bool((chosen[:, 1:] > chosen[:, :-1]).all()) or int(chosen.min()) < 0 or int(chosen.max()) >= length:
                return 1.0
            own = scores[b, :, :length].float()
            best, got = own.topk(count, dim=-1).values.sum(-1), own.gather(1, chosen).sum(-1)
            wrong = max(wrong, float(((best - got).abs() / best.abs()).max()))
        return wrong


# --------------------------------------------------------------------------- kernels


@dataclass
class Prepared:
    """Calls to time in turn; ``errors`` of what the first call wrote, by name; KV bytes that one call must read."""

    calls: Sequence[Callable[[], Any]]
    errors: Callable[[], dict[str, float]]
    bytes: int


def copy_same_bytes(p: Problem) -> Prepared:
    """Copies that move as many bytes (half read, half written) as a draft step reads."""
    half = p.case.draft_bytes // 2 // p.k.element_size()
    source = p.k.view(-1)[: max(half, 1 << 30)]
    target = p.v.view(-1)[: source.numel()].clone()
    places = range(max(1, min(source.numel() // half, 32)))
    pieces = [(target[i * half : (i + 1) * half], source[i * half : (i + 1) * half]) for i in places]

    def errors() -> dict[str, float]:
        return {"out": float((pieces[0][0].float() - pieces[0][1].float()).abs().max())}

    return Prepared([functools.partial(a.copy_, b) for a, b in pieces], errors, p.case.draft_bytes)


def draft(name: str, p: Problem) -> Prepared:
    """This project's draft attention, with log-sum-exps where Triton's; planned once, run layer by layer."""
    out, lse = p.empty_out(1), p.empty(p.case.batch, p.case.shape.num_q_heads, dtype=torch.float32)
    # A plan is valid until the next one, so each set has kernels of its own.
    plans = [p.kernels(name).plan_draft(rows, p.draft_lens) for rows in p.rows]
    layers = range(len(p.table.positions))
    calls = [functools.partial(plan.run, p.q1, p.layer(index), out, lse) for index in layers for plan in plans]
    return Prepared(calls, lambda: {"out": p.error("draft", out), "lse": p.error("draft lse", lse)}, p.case.draft_bytes)


def verify(p: Problem, scored: bool = True, exact: bool = False) -> Prepared:
    """The project's verification; ``exact`` gives no hint, so that a pass over K finds the log-sum-exps first."""
    kernels = p.kernels("triton")
    out, scores = p.empty_out(WINDOW), p.empty_scores(kernels.score_dtype) if scored else None
    hint = None if exact else p.hint
    plans = [kernels.plan_verify(rows, p.lens, WINDOW) for rows in p.rows]
    calls = [functools.partial(plan.run, p.qw, p.layer(), out, scores, hint) for plan in plans]

    def errors() -> dict[str, float]:
        return {"out": p.error("verify", out), **({"scores": p.score_error(scores)} if scores is not None else {})}

    return Prepared(calls, errors, p.case.verify_bytes)


def plain_step(p: Problem) -> Prepared:
    """Attention of a plain round's step: the project's verification of one query, without scores."""
    out, lens = p.empty_out(1), p.lens - 1
    plans = [p.kernels("triton").plan_verify(rows, lens, 1) for rows in p.rows]
    calls = [functools.partial(plan.run, p.q1, p.layer(), out) for plan in plans]
    return Prepared(calls, lambda: {"out": p.error("decode", out)}, p.case.decode_bytes)


def prefill_scores(p: Problem) -> Prepared:
    """Scores of a prompt's last W queries: the first selection's. K is read twice, and counted once."""
    kernels = p.kernels("triton")
    scores, starts = p.empty_scores(kernels.score_dtype), torch.arange(p.case.batch, device=p.device) * WINDOW
    extends = torch.full_like(starts, WINDOW)
    plans = [kernels.plan_prefill_scores(rows, p.lens + WINDOW, starts, extends, WINDOW) for rows in p.rows]
    calls = [functools.partial(plan.run, p.qw, p.layer(), scores) for plan in plans]
    return Prepared(calls, lambda: {"scores": p.score_error(scores)}, p.case.verify_bytes // 2)


def given_scores(p: Problem) -> tuple[Any, torch.Tensor]:
    """Kernels with a table of their own, and the scores of a verification of set 0."""
    kernels = p.kernels("triton", p.empty_table(1))
    scores = p.empty_scores(kernels.score_dtype)
    kernels.plan_verify(p.rows[0], p.lens, WINDOW).run(p.qw, p.layer(), p.empty_out(WINDOW), scores, p.hint)
    return kernels, scores


def score_bytes(p: Problem, scores: torch.Tensor) -> int:
    """Bytes of the scores of all committed tokens."""
    return sum(p.case.lengths) * p.case.shape.num_kv_heads * scores.element_size()


def select(p: Problem) -> Prepared:
    """The project's selection; the scores are in the L2 cache if they fit, as after a verification."""
    kernels, scores = given_scores(p)
    plan = kernels.plan_selection(p.rows[0], p.lens, p.counts)
    call = functools.partial(plan.run, scores, 0)
    return Prepared([call], lambda: {"out": p.selection_error(scores, kernels.table.positions[0])}, score_bytes(p, scores))


def torch_select(p: Problem) -> Prepared:
    """torch's top-k and sort of as many scores; it takes no ragged lengths, so all are full."""
    _, scores = given_scores(p)
    view = scores[:, :, : p.case.context].nan_to_num(0.0)

    def run() -> None:
        view.topk(max(p.case.selected), dim=-1, sorted=False).indices.sort(dim=-1)

    return Prepared([run], lambda: {"out": 0.0}, view.nbytes)


def verify_and_select(p: Problem) -> Prepared:
    """Verification with scores and the selection after it, as a layer runs them."""
    kernels = p.kernels("triton", p.empty_table(1))
    out, scores = p.empty_out(WINDOW), p.empty_scores(kernels.score_dtype)

    def call(rows: torch.Tensor) -> Callable[[], None]:
        attend, choose = kernels.plan_verify(rows, p.lens, WINDOW), kernels.plan_selection(rows, p.lens, p.counts)

        def run() -> None:
            attend.run(p.qw, p.layer(), out, scores, p.hint)
            choose.run(scores, 0)

        return run

    def errors() -> dict[str, float]:
        selection = p.selection_error(scores, kernels.table.positions[0])
        return {"out": p.error("verify", out), "scores": p.score_error(scores), "selection": selection}

    return Prepared([call(rows) for rows in p.rows], errors, p.case.verify_bytes)


def flashinfer(verifies: bool, p: Problem) -> Prepared:
    """FlashInfer's paged attention of everything on tensor cores: decoding, or the window's queries without scores."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

    shape, pages = p.case.shape, (p.k.unsqueeze(1), p.v.unsqueeze(1))
    queries, beyond, q = (WINDOW, WINDOW, p.qw) if verifies else (1, 0, p.q1)
    out, calls = p.empty_out(queries), []
    heads = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim, 1)
    types = {"q_data_type": p.dtype, "kv_data_type": p.dtype, "sm_scale": p.scaling}
    for s in range(p.case.num_sets):
        lists = (p.indptr(beyond), p.indices(s, beyond), torch.ones(p.case.batch, dtype=torch.int32))
        if verifies:
            wrapper: Any = BatchPrefillWithPagedKVCacheWrapper(workspace(p.device), "NHD", backend="fa2")
            wrapper.plan(torch.arange(p.case.batch + 1, dtype=torch.int32) * WINDOW, *lists, *heads, causal=True, **types)
        else:
            wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(p.device), "NHD", use_tensor_cores=True)
            wrapper.plan(*lists, *heads, **types)
        calls.append(functools.partial(wrapper.run, q, pages, out=out))
    name, read = ("verify", p.case.verify_bytes) if verifies else ("decode", p.case.decode_bytes)
    return Prepared(calls, lambda: {"out": p.error(name, out)}, read)


@functools.cache
def workspace(device: torch.device) -> torch.Tensor:
    """FlashInfer's float workspace, shared: its wrappers run one after another here."""
    return torch.zeros(512 << 20, dtype=torch.uint8, device=device)


def fa3(window: int, p: Problem) -> Prepared:
    """FlashAttention 3 as SGLang's ``fa3`` backend calls it, for ``window`` queries per request."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    verifies = window > 1
    beyond = window if verifies else 0
    results: list[torch.Tensor] = []
    fixed = {
        "q": p.qw if verifies else p.q1,
        "k_cache": p.k.unsqueeze(1),
        "v_cache": p.v.unsqueeze(1),
        "cache_seqlens": (p.lens + beyond).to(torch.int32),
        "cu_seqlens_q": (torch.arange(p.case.batch + 1, device=p.device) * window).to(torch.int32),
        "cu_seqlens_k_new": p.indptr(beyond).to(p.device),
        "max_seqlen_q": window,
        "softmax_scale": p.scaling,
        "causal": True,
    }

    def call(table: torch.Tensor) -> None:
        results[:] = [flash_attn_with_kvcache(page_table=table, **fixed)]

    tables = [p.req_to_token[rows, : p.case.context + beyond].contiguous() for rows in p.rows]
    name, read = ("verify", p.case.verify_bytes) if verifies else ("decode", p.case.decode_bytes)
    return Prepared([functools.partial(call, table) for table in tables], lambda: {"out": p.error(name, results[0])}, read)


@dataclass(frozen=True)
class Kernel:
    """One way to do one job.

    Attributes:
        what: ``copy``, ``decode``, ``draft``, ``verify``, ``prefill-scores``, ``select`` or ``verify+select``.
        gpu: whether it needs a GPU.
        rival: a kernel of SGLang's backends, which the table compares with.
    """

    what: str
    name: str
    prepare: Callable[[Problem], Prepared]
    gpu: bool = False
    rival: bool = False


KERNELS = [
    Kernel("copy", "torch", copy_same_bytes),
    Kernel("draft", "triton", functools.partial(draft, "triton")),
    Kernel("decode", "triton", plain_step),
    Kernel("verify", "triton", verify),
    Kernel("verify", "triton, no scores", functools.partial(verify, scored=False)),
    Kernel("verify", "triton, exact scores", functools.partial(verify, exact=True)),
    Kernel("prefill-scores", "triton", prefill_scores),
    Kernel("select", "triton", select),
    Kernel("select", "torch", torch_select),
    Kernel("verify+select", "triton", verify_and_select),
    Kernel("draft", "flashinfer", functools.partial(draft, "flashinfer"), gpu=True),
    Kernel("decode", "flashinfer, tensor cores", functools.partial(flashinfer, False), gpu=True, rival=True),
    Kernel("verify", "flashinfer fa2", functools.partial(flashinfer, True), gpu=True, rival=True),
    Kernel("decode", "fa3", functools.partial(fa3, 1), gpu=True, rival=True),
    Kernel("verify", "fa3", functools.partial(fa3, WINDOW), gpu=True, rival=True),
]
