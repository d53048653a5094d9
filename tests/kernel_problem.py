"""Random problems for the PillarAttn kernels, and the checks of draft attention that its implementations share."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch

from sglang_sparsespec.attention_backend.kernels import triton_common
from sglang_sparsespec.attention_backend.kernels.flashinfer_kernels import FlashInferKernels
from sglang_sparsespec.attention_backend.kernels.interface import KernelShape, LayerKV
from sglang_sparsespec.attention_backend.kernels.reference import ReferenceKernels
from sglang_sparsespec.attention_backend.kernels.triton_draft import DraftConfig
from sglang_sparsespec.attention_backend.kernels.triton_kernels import TritonKernels
from sglang_sparsespec.attention_backend.kernels.triton_prefill_scores import ScoresConfig
from sglang_sparsespec.attention_backend.kernels.triton_select import SelectConfig
from sglang_sparsespec.attention_backend.kernels.triton_verify import VerifyConfig
from sglang_sparsespec.attention_backend.page_table import SelectionTable

HAS_CUDA = torch.cuda.is_available()
#: Whether this process runs Triton's kernels on the CPU, see ``interpreter_child``.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
gpu_only = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_CUDA, reason="no CUDA GPU: the interpreter's cases cover the same code on the CPU"),
]
interpreter_only = pytest.mark.skipif(not INTERPRETED, reason="a child process runs it, in Triton's interpreter")
#: The layer that problems are set in; the one before it holds poison.
LAYER = 1


@dataclass(frozen=True)
class Case:
    """One random problem.

    Attributes:
        lens: committed lengths L, 0 for a padding row.
        budget: entries selected at most.
        splits: programs wanted per multiprocessor for draft attention and scores.
        programs: per KV head, for verification.
        block_n: 0 for the default launch.
        wide: caches that need 64-bit offsets (on CPU: that are taken to).
        sinks: query heads have attention sinks.
        reach: of a sliding window.
        soft_cap: of logits, 0 for none.
    """

    kernel: str
    g: int
    d: int
    lens: tuple[int, ...]
    hkv: int = 2
    window: int = 3
    budget: int = 12
    splits: float = 1.0
    programs: int = 4
    score_dtype: str = "float32"
    block_n: int = 16
    values: str = "normal"
    wide: bool = False
    sinks: bool = False
    reach: int = 0
    soft_cap: float = 0.0

    @property
    def name(self) -> str:
        lens = "-".join(str(x) for x in self.lens) if len(self.lens) < 6 else f"b{len(self.lens)}"
        return (
            f"{self.kernel}-g{self.g}-d{self.d}-w{self.window}-{lens}-s{self.splits:g}-p{self.programs}"
            f"-{self.score_dtype}-{self.values}{'-wide' if self.wide else ''}{'-sinks' if self.sinks else ''}"
            f"{f'-r{self.reach}' if self.reach else ''}{f'-c{self.soft_cap:g}' if self.soft_cap else ''}"
        )


RAGGED = (37, 0, 5, 64)
LONG = (1000, 0, 17, 4096, 8191, 333, 2049)


def spread(cache: torch.Tensor) -> torch.Tensor:
    """``cache`` [slots, Hkv, D] with its slots so far apart that offsets need 64 bits."""
    # A multiple of 16, as the strides of a server's caches are.
    stride = 16 * -(-(2**31) // (16 * cache.shape[0]))
    big = torch.empty(stride * cache.shape[0], dtype=cache.dtype, device=cache.device)
    view = big.view(cache.shape[0], stride)[:, : cache[0].numel()].unflatten(1, cache.shape[1:])
    view.copy_(cache)
    return view


def as_in_fused_qkv(q: torch.Tensor) -> torch.Tensor:
    """``q`` [tokens, Hq, D] as models hand it over: a slice of a wider projection, its tokens lying apart."""
    tokens, hq, d = q.shape
    fused = torch.full((tokens, (hq + 3) * d), float("nan"), dtype=q.dtype, device=q.device)
    view = fused[:, : hq * d].view(tokens, hq, d)
    view.copy_(q)
    return view


class Problem:
    """Random inputs of a case: every KV slot that no request owns is NaN, unused list entries are poison.

    Attributes:
        kv: of layer LAYER.
        table: selections of ``counts`` [B] positions below ``lens`` [B].
        q1: [B, Hq, D], queries of a draft step at the lengths ``draft_lens``.
        qw: [B * W, Hq, D], queries of verify windows.
        reference: the oracle, over the same tables.
    """

    def __init__(self, case: Case, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.case, self.device, self.dtype = case, device, dtype
        batch, w, hkv, d = len(case.lens), case.window, case.hkv, case.d
        self.batch, self.hq = batch, hkv * case.g
        self.lens = torch.tensor(case.lens, dtype=torch.int64)
        context = max(case.lens) + 2 * w
        num_rows = batch + 3
        self.rows = torch.randperm(num_rows - 1, generator=gen)[:batch] + 1
        self.rows[self.lens == 0] = 0  # SGLang pads with row 0
        slots = num_rows * context + 1
        perm = torch.randperm(slots - 1, generator=gen) + 1
        req_to_token = perm[: num_rows * context].view(num_rows, context).to(torch.int32)
        req_to_token[0] = 0
        shape = (slots, hkv, d)
        k, v = torch.randn(shape, generator=gen), torch.randn(shape, generator=gen)
        owned = torch.zeros(slots, dtype=torch.bool)
        owned[0] = True
        for row, length in zip(self.rows.tolist(), case.lens, strict=True):
            owned[req_to_token[row, : length + w].long()] = True
        k[~owned] = float("nan")
        v[~owned] = float("nan")
        # A draft step may be anywhere in the round: 1 to W tokens after L (further only after a fully accepted round).
        extra = torch.randint(1, w + 1, (batch,), generator=gen)
        self.draft_lens = torch.where(self.lens > 0, self.lens + extra, 0)
        self.table = SelectionTable(LAYER + 1, num_rows, hkv, max(case.budget, 1), device)
        self.table.positions.fill_(1 << 30)
        positions = self.table.positions[LAYER].cpu()
        self.counts = torch.clamp(self.lens, max=case.budget)
        for b, row in enumerate(self.rows.tolist()):
            n, length = int(self.counts[b]), int(self.lens[b])
            for h in range(hkv):
                chosen = torch.randperm(length, generator=gen)[:n].sort().values
                positions[row, h, :n] = chosen.to(torch.int32)
            self.table.num_selected[row], self.table.tail_start[row] = n, length
        self.table.positions[LAYER] = positions.to(device)
        k, v = k.to(device, dtype), v.to(device, dtype)
        if case.wide and device == "cuda":
            k, v = spread(k), spread(v)
        # About as large as the log-sum-exp of the tokens, some far larger, some far smaller.
        sinks = (2 * torch.randn(self.hq, generator=gen) + 3).to(device, dtype) if case.sinks else None
        self.kv = LayerKV(k, v, d**-0.5, LAYER, sinks, case.soft_cap)
        self.req_to_token = req_to_token.to(device)
        # SGLang passes int64 lengths and row indices; int32 must work too (seed picks).
        index = torch.int32 if seed % 2 else torch.int64
        self.rows, self.lens = self.rows.to(device, index), self.lens.to(device, index)
        self.draft_lens, self.counts = self.draft_lens.to(device, index), self.counts.to(device, torch.int32)
        self.q1 = as_in_fused_qkv(torch.randn(batch, self.hq, d, generator=gen).to(device, dtype))
        # Larger queries make peaked rows, so that scores differ.
        self.qw = as_in_fused_qkv((2 * torch.randn(batch * w, self.hq, d, generator=gen)).to(device, dtype))
        self.gen = gen
        self.reference = ReferenceKernels(self.table, self.req_to_token)

    def exact_kv(self) -> LayerKV:
        """The caches in float32."""
        return replace(self.kv, k=self.kv.k.float(), v=self.kv.v.float())

    def poison(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=self.device)

    def shape(self, max_batch: int | None = None, longest_list: int | None = None) -> KernelShape:
        """What kernels for this problem are built for."""
        case = self.case
        return KernelShape(
            max_batch=max_batch or self.batch,
            num_q_heads=self.hq,
            num_kv_heads=case.hkv,
            head_dim=case.d,
            window=case.window,
            longest_list=longest_list or max(case.budget, 1) + 2 * case.window,
            dtype=self.dtype,
            kv_dtype=self.kv.k.dtype,
        )


def make_kernels(p: Problem, kernels: type[TritonKernels] = TritonKernels, max_batch: int | None = None) -> TritonKernels:
    """Kernels for the problem, with the launch parameters of its case."""
    case = p.case
    small = case.block_n > 0  # interpreter sizes
    draft = DraftConfig(block_n=16, min_chunk=16) if small else DraftConfig()
    verify = VerifyConfig(block_n=case.block_n, min_blocks=1) if small else VerifyConfig()
    scores = ScoresConfig(block_n=case.block_n, min_chunk=16) if small else ScoresConfig()
    draft.target = scores.target = case.splits
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count if p.device == "cuda" else 4
    # A little more than the quotient, so that rounding does not take one away.
    verify.programs_per_sm = (case.programs * case.hkv + 0.01) / num_sms
    made = kernels(
        p.shape(max_batch, longest_list=p.req_to_token.shape[1] if case.kernel == "full" else None),
        p.table,
        p.req_to_token,
        draft_config=draft,
        verify_config=verify,
        select_config=SelectConfig(block=256, num_warps=4) if small else SelectConfig(),
        scores_config=scores,
    )
    assert made.verify_programs == case.programs
    return made


def poison_scratch(kernels: TritonKernels) -> None:
    """What a kernel reads of its scratch without having written it must show."""
    kernels.scratch.part_o.fill_(float("nan"))
    kernels.scratch.part_lse.fill_(float("nan"))
    if isinstance(kernels, FlashInferKernels):
        for bucket in kernels.buckets.values():
            bucket.q.fill_(float("nan"))
            bucket.result.fill_(float("nan"))
            bucket.lse2.fill_(float("nan"))
            bucket.indices.fill_(1 << 30)


def rel_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref||; NaN stays NaN and fails every comparison."""
    out, ref = out.double().cpu(), ref.double().cpu()
    return float((out - ref).norm() / ref.norm().clamp(min=1e-30))


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-2


def run_case(case: Case, check: Any, device: str, dtype: torch.dtype, seed: int, **options: Any) -> None:
    """Make the problem and its kernels (``options`` of :func:`make_kernels`), and check them."""
    p = Problem(case, device, dtype, seed)
    narrow = 1 if case.wide and device == "cpu" else triton_common.NARROW_ELEMENTS
    with mock.patch.object(triton_common, "NARROW_ELEMENTS", narrow):
        assert triton_common.is_wide(p.kv.k, p.kv.v) == case.wide
        check(p, make_kernels(p, **options))


# ---------------------------------------------------------------- draft attention


def check_draft(p: Problem, kernels: TritonKernels) -> None:
    ref = torch.zeros(p.q1.shape, device=p.device)
    ref_lse = torch.zeros(p.batch, p.hq, device=p.device)
    p.reference.plan_draft(p.rows, p.draft_lens).run(p.q1.float(), p.exact_kv(), ref, ref_lse)
    real = p.draft_lens > 0
    for with_lse in (True, False):
        out = p.poison(*p.q1.shape, dtype=p.dtype)
        lse = p.poison(p.batch, p.hq, dtype=torch.float32) if with_lse else None
        poison_scratch(kernels)
        kernels.plan_draft(p.rows, p.draft_lens).run(p.q1, p.kv, out, lse)
        assert not kernels.scratch.arrived.any(), "a launch left its counters set for the next one"
        assert rel_error(out, ref) < tolerance(p.dtype)
        assert (out[~real] == 0).all(), "a padding row is not zero"
        per_row = (out.float() - ref).flatten(1).norm(dim=1)[real] / ref.flatten(1).norm(dim=1)[real]
        assert per_row.max() < 2 * tolerance(p.dtype)
        if lse is not None:
            assert (lse[real] - ref_lse[real]).abs().max() < (1e-4 if p.dtype == torch.float32 else 2e-2)
            assert not torch.isnan(lse).any()


def check_full(p: Problem, kernels: TritonKernels) -> None:
    """The policy ``full``: a table of one entry, and a tail that begins at position 0."""
    p.table.num_selected.zero_()
    p.table.tail_start.zero_()
    assert p.table.positions.shape[3] == 1
    assert p.case.splits < 1 or kernels.draft_splits(p.batch) > 1, "the lists are as long as the request"
    check_draft(p, kernels)


def check_growth(p: Problem, kernels: TritonKernels) -> None:
    """An eager batch larger than what the kernels were made for."""
    kernels = make_kernels(p, type(kernels), max_batch=1)
    check_draft(p, kernels)
    assert kernels.scratch.arrived.numel() == p.batch * p.case.hkv


# ------------------------------------------------------- draft attention in CUDA graphs


def check_draft_follows_lengths(kernels_class: type[TritonKernels]) -> None:
    """A captured step follows lengths and tables that change between replays."""
    case = Case("draft", g=4, d=128, lens=(1000, 2000, 700), hkv=8, window=9, budget=200, splits=6, programs=33, block_n=0)
    p = Problem(case, "cuda", torch.bfloat16)
    kernels = make_kernels(p, kernels_class)
    lens = p.lens + 1
    out = p.poison(*p.q1.shape, dtype=p.dtype)
    lse = p.poison(p.batch, p.hq, dtype=torch.float32)

    def step() -> None:
        kernels.plan_draft(p.rows, lens).run(p.q1, p.kv, out, lse)

    def check_replay() -> None:
        out.fill_(float("nan"))
        graph.replay()
        ref, ref_lse = torch.zeros(p.q1.shape, device="cuda"), torch.zeros_like(lse)
        p.reference.plan_draft(p.rows, lens).run(p.q1.float(), p.exact_kv(), ref, ref_lse)
        real = lens > 0
        assert rel_error(out, ref) < 1e-2
        assert (out[~real] == 0).all()
        assert (lse[real] - ref_lse[real]).abs().max() < 2e-2

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(case.window):
        check_replay()
        lens += 1
    lens.copy_(torch.maximum(p.draft_lens - torch.tensor([0, 1, 2], device="cuda"), p.lens + 1))
    check_replay()
    lens[1] = 0
    check_replay()
    # Another selection, of other sizes: a table is read when a graph runs, not when it is captured.
    p.table.num_selected.fill_(1)
    p.table.tail_start[p.rows.long()] = (p.lens - 3).to(torch.int32)
    lens.copy_(p.draft_lens)
    check_replay()


def draft_call(p: Problem, kernels: TritonKernels, out: torch.Tensor, batch: int) -> Any:
    """Draft attention of the first ``batch`` requests."""
    return lambda: kernels.plan_draft(p.rows[:batch], p.draft_lens[:batch]).run(p.q1[:batch], p.kv, out[:batch])


def replay_problem() -> Problem:
    """Lists that programs share, so that parts are merged."""
    case = Case("draft", g=4, d=128, lens=(1000, 2000, 700, 8000), hkv=8, window=9, budget=400, splits=12, block_n=0)
    return Problem(case, "cuda", torch.bfloat16)


def check_same_bits_on_every_replay(kernels_class: type[TritonKernels], replays: int = 200) -> None:
    """Parts are merged in a fixed order, whichever program comes last; a race would show as a moving result."""
    p = replay_problem()
    kernels = make_kernels(p, kernels_class)
    assert kernels.draft_splits(p.batch) > 1
    out = p.poison(*p.q1.shape, dtype=torch.bfloat16)
    call = draft_call(p, kernels, out, p.batch)
    call()
    first = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(replays):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, first)


def check_graphs_outlive_growth(kernels_class: type[TritonKernels], max_batch: int = 2) -> None:
    """A larger eager batch takes new memory; graphs go on using what they were captured with."""
    p = replay_problem()
    kernels = make_kernels(p, kernels_class, max_batch=max_batch)
    out = p.poison(*p.q1.shape, dtype=torch.bfloat16)
    call = draft_call(p, kernels, out, max_batch)
    call()
    scratch = kernels.scratch
    sizes = [(buffer.shape, buffer.dtype) for buffer in (scratch.part_o, scratch.part_lse, scratch.arrived)]
    del scratch
    first = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    with pytest.raises(ValueError, match="exceeds max_batch 2"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        draft_call(p, kernels, out, p.batch)()
    draft_call(p, kernels, out, p.batch)()
    assert kernels.max_batch == p.batch
    # Whoever gets the old scratch's memory, had it been freed, finds it in use.
    others = [torch.full(size, 3, dtype=dtype, device="cuda") for size, dtype in sizes for _ in range(4)]
    for _ in range(2):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out[:max_batch], first[:max_batch])
    assert all((other == 3).all() for other in others)
