"""What Triton makes of the attention kernels on an H100, compiled for it on a machine without a GPU.

A kernel whose loads Triton does not pipeline is right and slow, which no test of its results would show. So its inner loop
is looked at: it waits for its tiles while those of the next iteration are still outstanding.
"""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from sm90 import RESERVED_BYTES, SHARED_BYTES, Compiled, compile_in_child, count_compiled, pretend_h100, report

from sglang_sparsespec.attention_backend.kernels import (
    flashinfer_kernels,
    triton_inputs,
    triton_prefill_scores,
    triton_select,
)
from sglang_sparsespec.attention_backend.kernels.flashinfer_kernels import FlashInferKernels
from sglang_sparsespec.attention_backend.kernels.interface import KernelShape, LayerKV, score_row
from sglang_sparsespec.attention_backend.kernels.triton_kernels import TritonKernels
from sglang_sparsespec.attention_backend.kernels.triton_prefill_scores import Windows, window_scores
from sglang_sparsespec.attention_backend.page_table import SelectionTable
from sglang_sparsespec.draft_weights import triton_fused, triton_product
from sglang_sparsespec.draft_weights.fp8 import Quantised

#: Query heads and KV heads.
SHAPES = {"qwen3-8b": (32, 8), "qwen2.5-coder-1.5b": (12, 2)}
BATCH, CONTEXT, HEAD_DIM, WINDOW, CAPACITY = 8, 8192 + 64, 128, 9, 410


def compile_for_h100(shape_name: str, cache: str) -> Compiled:
    """Compile the attention and selection kernels for heads as in ``SHAPES``."""
    # SGLang looks for GPUs as it is imported: before there seems to be one.
    from sglang_sparsespec.attention_backend.backend import SparseSpecAttnBackend

    found = pretend_h100(cache)
    num_q_heads, num_kv_heads = SHAPES[shape_name]
    bf16 = torch.bfloat16
    shape = KernelShape(
        BATCH, num_q_heads, num_kv_heads, HEAD_DIM, WINDOW, CAPACITY + 2 * WINDOW, dtype=bf16, kv_dtype=bf16
    )
    table = SelectionTable(1, 65, num_kv_heads, CAPACITY, "cpu")
    req_to_token = torch.empty(65, CONTEXT, dtype=torch.int32)
    kernels = TritonKernels(shape, table, req_to_token)
    kernels.num_sms, kernels.pdl = 132, True
    kernels._reserve(BATCH)
    assert kernels.draft_splits(BATCH) > 1

    cache_rows = torch.empty(16, num_kv_heads, HEAD_DIM, dtype=bf16)
    kv = LayerKV(cache_rows, cache_rows, HEAD_DIM**-0.5, 0)
    rows = torch.arange(BATCH)
    q1, lse = torch.empty(BATCH, num_q_heads, HEAD_DIM, dtype=bf16), torch.empty(BATCH, num_q_heads)
    kernels.plan_draft(rows, rows).run(q1, kv, q1.clone(), lse)
    compile_flashinfer(shape, table, req_to_token, kv, q1, lse)

    qw = torch.empty(BATCH * WINDOW, num_q_heads, HEAD_DIM, dtype=bf16)
    scores = torch.empty(BATCH, num_kv_heads, score_row(CONTEXT), dtype=torch.float16)
    hint = torch.empty(BATCH, WINDOW, num_q_heads)
    verify = kernels.plan_verify(rows, rows, WINDOW)
    for given in (None, hint):
        verify.run(qw, kv, qw.clone(), scores, given)
    found["_verify_kernel window"] = found.pop("_verify_kernel")
    # A step of a plain round.
    log_sums = lse.unsqueeze(1)
    kernels.plan_verify(rows, rows, 1).run(q1, kv, q1.clone(), None, log_sums, log_sums)
    found["_verify_kernel plain step"] = found.pop("_verify_kernel")
    window_scores(
        q=qw,
        kv=kv,
        req_to_token=req_to_token,
        windows=Windows(rows, rows, WINDOW),
        lse2=hint.unsqueeze(0),
        scores=scores,
        splits=4,
        config=kernels.scores_config,
    )
    # Mixed integer types are errors that only the compiler sees, and keys are 16 or 32 bits wide.
    selection = kernels.plan_selection(rows, rows, rows.int())
    for dtype in (torch.float32, torch.float16):
        selection.run(scores.to(dtype), 0)
        found[f"_select_kernel {dtype}"] = found.pop("_select_kernel")
    prefill_any_number(SparseSpecAttnBackend.warm_up, kernels, qw, kv, found)
    compile_draft_step(kv, found)
    return found


def compile_draft_step(kv: LayerKV, found: Compiled) -> None:
    """Compile what a draft step does between attentions."""
    num_kv_heads, bf16 = kv.k.shape[1], torch.bfloat16
    x, weight = Quantised.empty(BATCH, 1024, torch.device("cpu")), Quantised.empty(512, 1024, torch.device("cpu"))
    for config in triton_product.CONFIGS:
        triton_product.product(x, weight, bf16, None, config, pdl=True)
        found[f"_product_kernel {config.block_n} x {config.block_k}"] = found.pop("_product_kernel")
    hidden, norm = torch.empty(BATCH, 1024, dtype=bf16), torch.empty(1024, dtype=bf16)
    triton_fused.add_norm(hidden, hidden.clone(), norm, 1e-6, pdl=True)
    triton_fused.silu_and_mul(hidden, pdl=True)
    triton_fused.quantise(hidden, pdl=True)
    numbers, heads = torch.zeros(2, dtype=torch.int64), 3 * num_kv_heads
    triton_inputs.attention_inputs(
        qkv=torch.empty(2, heads * HEAD_DIM, dtype=bf16),
        positions=numbers,
        cos_sin=torch.empty(CONTEXT, HEAD_DIM),
        norms=(norm[:HEAD_DIM], norm[:HEAD_DIM]),
        eps=1e-6,
        kv=kv,
        slots=numbers,
        pdl=True,
    )


def compile_flashinfer(
    shape: KernelShape,
    table: SelectionTable,
    req_to_token: torch.Tensor,
    kv: LayerKV,
    q: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Compile the kernels around FlashInfer's."""
    with (
        mock.patch.object(flashinfer_kernels, "_refuse_unsupported"),
        mock.patch.object(flashinfer_kernels, "_new_wrapper") as wrapper,
    ):
        wrapper.return_value.workspace_size.return_value = (0, 1024)
        kernels = FlashInferKernels(shape, table, req_to_token)
        rows = torch.arange(BATCH)
        kernels.plan_draft(rows, rows).run(q, kv, q.clone(), lse)


def prefill_any_number(
    warm_up: Any, kernels: TritonKernels, queries: torch.Tensor, kv: LayerKV, found: Compiled
) -> None:
    """Warm the prefill kernels up, then let prefill batches of many sizes come; keeps count of what is compiled."""
    kernels_of_prefill = (
        triton_prefill_scores._window_lse_kernel,
        triton_prefill_scores._window_scores_kernel,
        triton_select._select_kernel,
    )
    kernels._reserve(64)
    scores = torch.empty(64, kernels.shape.num_kv_heads, score_row(CONTEXT), dtype=torch.float16)
    layer = SimpleNamespace(tp_q_head_num=kernels.shape.num_q_heads, head_dim=HEAD_DIM)
    server = SimpleNamespace(
        kernels=kernels,
        prefill_selection=object(),
        scores=scores,
        window=WINDOW,
        dtype=queries.dtype,
        device=torch.device("cpu"),
        num_rows=64,
        _first_layer=layer,
        _kv_of=lambda layer: kv,
    )
    before_warm_up = count_compiled(kernels_of_prefill)
    warm_up(server)
    before = count_compiled(kernels_of_prefill)
    for batch in (1, 2, 3, 5, 6, 7, 8, 11, 16, 33, 48, 64):
        # The types that ForwardBatch has them in.
        rows, extend = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int32)
        kernels.plan_prefill_scores(rows, rows, extend, extend, WINDOW).run(queries, kv, scores)
        kernels.plan_selection(rows, rows, rows.int()).run(scores, 0)
    later = count_compiled(kernels_of_prefill) - before
    found["compiled in warm-up, and later"] = (str(before - before_warm_up), later)


def inner_loop(ttgir: str) -> str:
    """The loop body with the first matrix product, from its ``scf.for`` on."""
    text = re.sub(r"loc\(.*", "", ttgir)
    product = re.search(r"tt\.dot|warp_group_dot", text)
    assert product, "no matrix product"
    begin = text.rindex("\n", 0, text.rindex("scf.for", 0, product.start())) + 1
    indent = re.match(r" *", text[begin:])
    assert indent
    return text[begin : text.index(f"\n{indent.group()}}}", begin)]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.nightly if index else ()) for index, name in enumerate(SHAPES)],
)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compile_in_child(__file__, request.param, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize(
    "kernel,tiles",
    [
        ("_draft_kernel", 2),
        ("_verify_kernel window", 2),
        ("_verify_kernel plain step", 2),
        ("_window_lse_kernel", 1),
        ("_window_scores_kernel", 1),
        # The weights and the activations.
        ("_product_kernel 16 x 256", 2),
        ("_product_kernel 16 x 512", 2),
        ("_product_kernel 64 x 128", 2),
    ],
)
def test_the_next_tiles_are_in_flight(kernel: str, tiles: int, compiled: Compiled) -> None:
    """K and V (scores: K alone; products: weights and activations) of the next iteration load while this one computes."""
    body = inner_loop(compiled[kernel][0])
    copies = body.count("async_copy_global_to_local")
    assert copies == tiles, f"{copies} of {tiles} tiles go to shared memory asynchronously"
    waits = [int(n) for n in re.findall(r"async_wait[^{]*\{num = (\d+)", body)]
    assert waits and min(waits) >= tiles, f"the loop waits for its own loads: {waits} outstanding"


@pytest.mark.parametrize(
    "kernel,programs", [("_draft_kernel", 2), ("_verify_kernel window", 2), ("_verify_kernel plain step", 2)]
)
def test_programs_share_a_multiprocessor(kernel: str, programs: int, compiled: Compiled) -> None:
    assert programs * (compiled[kernel][1] + RESERVED_BYTES) <= SHARED_BYTES


def test_no_size_of_a_prefill_batch_compiles_kernels_while_requests_wait(compiled: Compiled) -> None:
    before, later = compiled["compiled in warm-up, and later"]
    assert int(before) >= 3 and later == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_selection_compiles_for_keys_of_either_width(dtype: str, compiled: Compiled) -> None:
    assert f"_select_kernel torch.{dtype}" in compiled


@pytest.mark.parametrize("kernel", ["_row_offsets_kernel", "_lists_kernel", "_hand_over_kernel"])
def test_the_kernels_around_flashinfer_compile(kernel: str, compiled: Compiled) -> None:
    assert kernel in compiled


if __name__ == "__main__":
    report(compile_for_h100(*sys.argv[1:]))
