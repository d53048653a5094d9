"""Draft attention by FlashInfer over per-head page tables, against the torch oracle.

The cases under the ``gpu`` mark run FlashInfer. Without a GPU, :class:`StandIn` takes the place of its wrapper: it does what
FlashInfer documents in plain torch, so the project's own kernels around it run in Triton's interpreter (in the child process
of ``test_triton_kernels.py``).
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_problem import (
    LONG,
    RAGGED,
    Case,
    Problem,
    check_draft,
    check_draft_follows_lengths,
    check_full,
    check_graphs_outlive_growth,
    check_growth,
    check_same_bits_on_every_replay,
    gpu_only,
    interpreter_only,
    make_kernels,
    run_case,
)

from sglang_sparsespec.attention_backend.kernels import flashinfer_kernels
from sglang_sparsespec.attention_backend.kernels.flashinfer_kernels import FlashInferKernels
from sglang_sparsespec.attention_backend.kernels.interface import KernelShape, LayerKV

CPU_CASES = [
    Case("draft", g=1, d=64, lens=RAGGED),
    Case("draft", g=4, d=128, lens=RAGGED),
    Case("draft", g=6, d=64, lens=(40, 0, 9), hkv=1),
    Case("draft", g=16, d=64, lens=(33, 2), hkv=1),
    Case("draft", g=2, d=64, lens=(20, 0, 7), budget=0, hkv=1),
    # Lists of several blocks, which FlashInfer splits.
    Case("full", g=2, d=64, lens=(700, 0, 20), budget=0, splits=0.01, hkv=1),
    Case("growth", g=2, d=64, lens=(37, 0, 5), hkv=1),
]
CHECKS = {"draft": check_draft, "full": check_full, "growth": check_growth}


class StandIn:
    """A wrapper like FlashInfer's ``BatchDecodeWithPagedKVCacheWrapper`` outside of its CUDA graph mode."""

    made: list[StandIn] = []

    def __init__(self, float_workspace: torch.Tensor) -> None:
        self.plan_arguments: dict[str, Any] = {}
        self.runs: list[dict[str, Any]] = []
        StandIn.made.append(self)

    def workspace_size(self, **arguments: Any) -> tuple[int, int]:
        rows = len(arguments["last_page_len"])
        return 64 * rows if arguments["fixed_split_size"] else 0, 20 * rows

    def reset_workspace_buffer(self, float_workspace: torch.Tensor, int_workspace: torch.Tensor) -> None:
        self.workspaces = (float_workspace, int_workspace)

    def plan(self, **arguments: Any) -> None:
        self.plan_arguments = arguments
        self.planned_indptr = arguments["indptr"].clone()

    def run(
        self,
        q: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        *,
        k_scale: float,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        return_lse: bool,
    ) -> None:
        self.runs.append({"q": q, "caches": caches, "k_scale": k_scale, "out": out, "lse": lse, "return_lse": return_lse})
        k, v = (cache[:, 0, 0].float() for cache in caches)
        indptr, indices = self.plan_arguments["indptr"].tolist(), self.plan_arguments["indices"].long()
        scale = self.plan_arguments["sm_scale"] * k_scale
        for row in range(len(q)):
            pages = indices[indptr[row] : indptr[row + 1]]
            logits = q[row].float() @ k[pages].T * scale
            # FlashInfer's infinity is 5e4: an empty row has zeros and a finite log-sum-exp.
            out[row] = torch.softmax(logits, dim=-1) @ v[pages]
            if lse is not None:
                lse[row] = torch.logsumexp(logits, dim=-1).clamp(min=-5e4) / math.log(2)


@pytest.fixture
def stand_in() -> Iterator[type[StandIn]]:
    StandIn.made = []
    with (
        mock.patch.object(flashinfer_kernels, "_new_wrapper", StandIn),
        mock.patch.object(flashinfer_kernels, "_refuse_unsupported"),
    ):
        yield StandIn


def make_flashinfer(p: Problem, max_batch: int | None = None) -> FlashInferKernels:
    kernels = make_kernels(p, FlashInferKernels, max_batch)
    assert isinstance(kernels, FlashInferKernels)
    return kernels


# ----------------------------------------------------------------- in the interpreter


@interpreter_only
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda c: c.name)
def test_interpreted(case: Case, stand_in: type[StandIn]) -> None:
    seed = CPU_CASES.index(case)
    run_case(case, CHECKS[case.kernel], "cpu", torch.float32, seed=seed, kernels=FlashInferKernels)


@interpreter_only
def test_lists_are_packed_and_hold_the_pages_of_each_head(stand_in: type[StandIn]) -> None:
    p = Problem(Case("draft", g=4, d=64, lens=(37, 0, 5, 64, 9), budget=20), "cpu", torch.float32)
    kernels = make_flashinfer(p)
    plan = kernels.plan_draft(p.rows, p.draft_lens)
    bucket = kernels.buckets[8]
    bucket.indices.fill_(-7)
    plan.run(p.q1, p.kv, torch.empty(p.q1.shape))
    counts, pages = [], []
    for b, row in enumerate(p.rows.tolist()):
        for h in range(p.case.hkv):
            tail = torch.arange(int(p.lens[b]), int(p.draft_lens[b]))
            chosen = p.table.positions[p.kv.index, row, h, : int(p.counts[b])].long()
            positions = torch.cat([chosen, tail]) if int(p.draft_lens[b]) else tail
            counts.append(len(positions))
            pages.append(p.req_to_token[row][positions] * p.case.hkv + h)
    # Rows past the batch's end are empty.
    counts += [0] * (8 * p.case.hkv - len(counts))
    assert bucket.indptr.tolist() == [0, *torch.tensor(counts).cumsum(0).tolist()]
    expected = torch.cat(pages)
    assert torch.equal(bucket.indices[: len(expected)], expected.int())
    assert (bucket.indices[len(expected) :] == -7).all()
    rows = p.batch * p.case.hkv
    assert torch.equal(bucket.q[:rows], p.q1.reshape(rows, p.case.g, p.case.d))


@interpreter_only
def test_stale_tables_never_overrun_the_lists(stand_in: type[StandIn]) -> None:
    p = Problem(Case("draft", g=2, d=64, lens=(37, 60), budget=20), "cpu", torch.float32)
    kernels = make_flashinfer(p)
    p.table.num_selected.fill_(1000)
    p.table.tail_start.fill_(-50)
    p.table.positions.fill_(1 << 30)
    plan = kernels.plan_draft(p.rows, p.draft_lens)
    longest, bucket = kernels.shape.longest_list, kernels.buckets[2]
    assert bucket.indptr.tolist() == [longest * row for row in range(2 * p.case.hkv + 1)]
    plan.run(p.q1, p.kv, torch.empty(p.q1.shape))
    assert int(bucket.indices.min()) >= 0 and int(bucket.indices.max()) < p.kv.k.shape[0] * p.case.hkv


@interpreter_only
def test_flashinfer_is_called_with_one_batch_row_per_request_and_kv_head(stand_in: type[StandIn]) -> None:
    p = Problem(Case("draft", g=4, d=64, lens=(37, 0, 5), budget=200), "cpu", torch.float32)
    kernels = make_flashinfer(p, max_batch=5)
    # Batches of 1, 2, 4 and 8.
    assert [len(made.plan_arguments["last_page_len"]) for made in stand_in.made] == [2, 4, 8, 16]
    longest = kernels.shape.longest_list
    for made in stand_in.made:
        plan, rows = made.plan_arguments, len(made.plan_arguments["last_page_len"])
        assert made.planned_indptr.tolist() == [longest * row for row in range(rows + 1)], "planned for the longest lists"
        assert plan["indptr"].dtype == plan["indices"].dtype == plan["last_page_len"].dtype == torch.int32
        assert (plan["last_page_len"] == 1).all() and plan["page_size"] == 1
        assert (plan["num_qo_heads"], plan["num_kv_heads"], plan["head_dim"]) == (4, 1, 64)
        assert len(plan["indices"]) >= rows * longest
        # Four multiprocessors have room for eight programs.
        assert plan["fixed_split_size"] == {2: 128, 4: 128, 8: None, 16: None}[rows]
        assert plan["disable_split_kv"] == (rows >= 8)
        workspace, int_workspace = made.workspaces
        assert workspace.data_ptr() == stand_in.made[0].workspaces[0].data_ptr(), "partial results are shared"
        assert workspace.numel() == 64 * 4 and int_workspace.numel() == 20 * rows
        made.runs.clear()
    # The lists, offsets and page lengths, queries and results, log-sum-exps, and plans.
    rows, values = 16, 16 * 4 * 64
    buffers = 4 * (rows * longest + rows + 1 + rows) + 4 * 2 * values + 4 * rows * 4 + 20 * (2 + 4 + 8 + 16)
    assert kernels.scratch_bytes() == kernels.scratch.nbytes + buffers
    out, lse = torch.empty(p.q1.shape), torch.empty(p.batch, p.hq)
    kernels.plan_draft(p.rows, p.draft_lens).run(p.q1, LayerKV(p.kv.k, p.kv.v, 0.3, p.kv.index), out, lse)
    assert [len(made.runs) for made in stand_in.made] == [0, 0, 1, 0]
    (run,) = stand_in.made[2].runs
    assert run["q"].shape == run["out"].shape == (8, 4, 64) and run["lse"].shape == (8, 4)
    assert run["k_scale"] == 0.3 and run["return_lse"]
    for cache, given in zip(run["caches"], (p.kv.k, p.kv.v), strict=True):
        assert cache.shape == (given.shape[0] * 2, 1, 1, 64)
        assert cache.data_ptr() == given.data_ptr(), "a cache was copied"


@interpreter_only
def test_flashinfer_takes_the_arguments() -> None:
    """The installed version's signatures: plan and workspace_size take the same ones."""
    wrapper = pytest.importorskip("flashinfer").BatchDecodeWithPagedKVCacheWrapper
    planned = (
        "indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size q_data_type kv_data_type sm_scale "
        "fixed_split_size disable_split_kv"
    )
    for method in (wrapper.workspace_size, wrapper.plan):
        inspect.signature(method).bind(None, **dict.fromkeys(planned.split()))
    inspect.signature(wrapper.run).bind(None, None, None, k_scale=1.0, out=None, lse=None, return_lse=True)
    inspect.signature(wrapper.reset_workspace_buffer).bind(None, None, None)
    inspect.signature(wrapper).bind(None, "NHD", use_tensor_cores=True, backend="fa2")


# ------------------------------------------------------------------------- anywhere


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({}, "cpu", "needs a CUDA GPU, not cpu; use --sparsespec-kernels auto"),
        ({"dtype": torch.float32}, "cuda", "needs bfloat16 or float16 queries, not torch.float32; use --sparsespec-kernels"),
        ({"kv_dtype": torch.float16}, "cuda", "cannot read KV caches of torch.float16; use --sparsespec-kernels triton"),
        ({"kv_dtype": torch.uint8}, "cuda", "cannot read KV caches of torch.uint8; use --sparsespec-kernels triton"),
    ],
)
def test_what_flashinfer_lacks_is_refused(changes: dict[str, torch.dtype], device: str, message: str) -> None:
    types = {"dtype": torch.bfloat16, "kv_dtype": torch.bfloat16, **changes}
    shape = KernelShape(1, 4, 2, 64, 3, 14, **types)
    with pytest.raises(ValueError, match=message):
        flashinfer_kernels._refuse_unsupported(shape, torch.device(device))


def test_types_that_flashinfer_has_are_taken() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for kv_dtype in (dtype, torch.float8_e4m3fn, torch.float8_e5m2):
            shape = KernelShape(1, 4, 2, 64, 3, 14, dtype, kv_dtype)
            flashinfer_kernels._refuse_unsupported(shape, torch.device("cuda"))


def test_caches_that_cannot_be_viewed_as_pages_are_refused(stand_in: type[StandIn]) -> None:
    p = Problem(Case("draft", g=2, d=64, lens=(20, 9)), "cpu", torch.float32)
    kernels = make_flashinfer(p)
    strided = torch.zeros(4, 2, 128)[:, :, :64]
    with pytest.raises(ValueError, match="needs contiguous KV caches; use --sparsespec-kernels triton"):
        kernels.attend(kernels.buckets[2], LayerKV(strided, strided, 1.0, 0), with_lse=False)


def test_lists_beyond_32_bits_are_refused(stand_in: type[StandIn]) -> None:
    p = Problem(Case("draft", g=2, d=64, lens=(20, 9)), "cpu", torch.float32)
    shape = p.shape(max_batch=300, longest_list=2**22)
    with pytest.raises(ValueError, match="512 requests and 2 KV heads exceed FlashInfer's 32-bit offsets"):
        FlashInferKernels(shape, p.table, p.req_to_token)


# ---------------------------------------------------------------------- with FlashInfer

GPU_CASES = [
    *[
        Case("draft", g=g, d=128, lens=LONG, budget=300, window=9, splits=6, hkv=h, block_n=0)
        for g, h in [(1, 8), (4, 8), (6, 2), (16, 1)]
    ],
    Case("draft", g=4, d=128, lens=(8192,) * 64, budget=410, window=9, splits=6, hkv=8, block_n=0),
    Case("draft", g=4, d=128, lens=(32768,), budget=1639, window=9, splits=6, hkv=8, block_n=0),
    Case("draft", g=4, d=128, lens=(131072, 5), budget=6554, window=9, splits=6, hkv=2, block_n=0),
    Case("full", g=4, d=128, lens=LONG, budget=0, window=9, splits=4, hkv=8, block_n=0),
    Case("full", g=6, d=128, lens=(131072, 5), budget=0, window=9, splits=4, hkv=2, block_n=0),
    Case("growth", g=4, d=128, lens=LONG, budget=300, window=9, splits=4, hkv=8, block_n=0),
]
#: FlashInfer compiles these types and head dims on first use, which takes a minute or two each.
OTHER_MODULES = [
    (torch.float16, Case("draft", g=4, d=128, lens=LONG, budget=300, window=9, splits=6, hkv=8, block_n=0)),
    (torch.bfloat16, Case("draft", g=7, d=64, lens=LONG, budget=300, window=9, splits=6, hkv=2, block_n=0)),
    (torch.bfloat16, Case("draft", g=2, d=256, lens=LONG, budget=300, window=9, splits=6, hkv=2, block_n=0)),
]


def run_gpu_case(case: Case, dtype: torch.dtype) -> None:
    seed = zlib.crc32(case.name.encode()) % 1000
    run_case(case, CHECKS[case.kernel], "cuda", dtype, seed=seed, kernels=FlashInferKernels)


@pytest.mark.parametrize("case", [pytest.param(c, marks=gpu_only, id=c.name) for c in GPU_CASES])
def test_gpu(case: Case) -> None:
    run_gpu_case(case, torch.bfloat16)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("dtype", "case"), [pytest.param(t, c, marks=gpu_only, id=f"{c.name}-{t}") for t, c in OTHER_MODULES]
)
def test_gpu_other_types_and_head_dims(dtype: torch.dtype, case: Case) -> None:
    run_gpu_case(case, dtype)


@pytest.mark.parametrize(
    "cache_dtype",
    [
        pytest.param(torch.float8_e4m3fn, marks=gpu_only, id="e4m3"),
        pytest.param(torch.float8_e5m2, marks=[*gpu_only, pytest.mark.nightly], id="e5m2"),
    ],
)
def test_gpu_fp8_caches_are_read_as_what_they_hold(cache_dtype: torch.dtype) -> None:
    case = Case("draft", g=4, d=128, lens=(700, 3, 129, 2048), window=9, budget=100, programs=132, block_n=0)
    p = Problem(case, "cuda", torch.bfloat16)
    p.kv = LayerKV(p.kv.k.to(cache_dtype), p.kv.v.to(cache_dtype), p.kv.scaling, p.kv.index)
    check_draft(p, make_flashinfer(p))


@pytest.mark.parametrize("kernels", [pytest.param(FlashInferKernels, marks=gpu_only)])
def test_gpu_captured_draft_follows_lengths(kernels: type[FlashInferKernels]) -> None:
    check_draft_follows_lengths(kernels)


@pytest.mark.parametrize("kernels", [pytest.param(FlashInferKernels, marks=gpu_only)])
def test_gpu_draft_gives_the_same_bits_on_every_replay(kernels: type[FlashInferKernels]) -> None:
    check_same_bits_on_every_replay(kernels)


@pytest.mark.parametrize("kernels", [pytest.param(FlashInferKernels, marks=gpu_only)])
def test_gpu_graphs_outlive_the_buffers_they_were_captured_with(kernels: type[FlashInferKernels]) -> None:
    check_graphs_outlive_growth(kernels)
