"""What Triton makes of the kernels on an H100, compiled for it on a machine without a GPU.

A kernel whose loads Triton does not pipeline is right and slow, which no test of its results would show. So its inner
loop is looked at: it waits for its tiles while those of the next iteration are still outstanding.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

# Shared memory of an H100's multiprocessor, and what each program reserves beside its own.
SHARED_BYTES, RESERVED_BYTES = 228 << 10, 1 << 10
SHAPES = {"qwen3-8b": (32, 8), "qwen2.5-coder-1.5b": (12, 2)}
SAMPLING = "sampling"


def compile_for_h100(shape: str, cache: str) -> dict[str, tuple[str, int]]:
    """Name of each kernel that launches, for heads as in ``SHAPES`` or for SAMPLING: (TTGIR, bytes of shared memory)."""
    os.environ["TRITON_CACHE_DIR"] = cache
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.jit import JITFunction

    # SGLang looks for GPUs as it is imported: before there seems to be one.
    import sglang_sparsespec.attention_backend.backend  # noqa: F401

    class Driver(DriverBase):
        """Stands in for the CUDA driver: says that there is an H100, launches nothing."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_benchmarker(self):
            raise NotImplementedError

    triton.runtime.driver.set_active(Driver())
    found: dict[str, tuple[str, int]] = {}

    def compile_only(kernel, grid):
        def run(*args, **kwargs) -> None:
            compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            found[kernel.__name__] = (compiled.asm["ttgir"], compiled.metadata.shared)

        return run

    JITFunction.__getitem__ = compile_only
    if shape == SAMPLING:
        compile_sampling(found)
    else:
        compile_attention(*SHAPES[shape], found)
    return found


def compile_attention(hq: int, hkv: int, found: dict[str, tuple[str, int]]) -> None:
    """Compile the attention and selection kernels for ``hq`` query heads and ``hkv`` KV heads."""
    from sglang_sparsespec.attention_backend.cuda_kernels import CudaPillarKernels
    from sglang_sparsespec.attention_backend.triton_prefill_scores import window_scores
    from sglang_sparsespec.attention_backend.triton_verify import verify_num_programs

    batch, context, dim, window, bf16 = 8, 8192, 128, 9, torch.bfloat16
    capacity = 410
    kernels = CudaPillarKernels(batch, hq, hkv, dim, window, capacity, context + 64, "cpu")
    kernels.num_sms, kernels.pdl = 132, True
    kernels.verify_programs = verify_num_programs(hkv, kernels.num_sms, kernels.verify_config)
    kernels._reserve(batch)
    assert kernels.draft_splits(batch) > 1
    cache_rows = torch.empty(16, hkv, dim, dtype=bf16)
    table = torch.empty(batch + 1, context + 64, dtype=torch.int32)
    rows = torch.arange(batch)
    counts = torch.zeros(batch + 1, dtype=torch.int32)
    q1 = torch.empty(batch, hq, dim, dtype=bf16)
    positions = torch.empty(batch + 1, hkv, capacity, dtype=torch.int32)
    lse = torch.empty(batch, hq)
    kernels.draft_attention(
        q1, cache_rows, cache_rows, positions, counts, counts, table, rows, rows, dim**-0.5, q1.clone(), lse
    )
    qw = torch.empty(batch * window, hq, dim, dtype=bf16)
    scores = torch.empty(batch, hkv, context + 64, dtype=torch.float16)
    hint = torch.empty(batch, window, hq)
    for given in (None, hint):
        kernels.verify_attention(qw, cache_rows, cache_rows, table, rows, rows, window, dim**-0.5, qw.clone(), scores, given)
    found["_verify_kernel window"] = found.pop("_verify_kernel")
    # A step of a plain round.
    log_sums = lse.unsqueeze(1)
    kernels.verify_attention(
        q1, cache_rows, cache_rows, table, rows, rows, 1, dim**-0.5, q1.clone(), None, log_sums, log_sums
    )
    found["_verify_kernel plain step"] = found.pop("_verify_kernel")
    window_scores(
        qw, cache_rows, table, rows, rows, None, window, dim**-0.5, hint.unsqueeze(0), scores, 4, kernels.scores_config
    )
    prefill_any_number(kernels, qw, cache_rows, table, found)
    # Mixed integer types are errors that only the compiler sees, and keys are 16 or 32 bits wide.
    for dtype in (torch.float32, torch.float16):
        kernels.select(scores.to(dtype), rows, rows, counts[1:], positions)
        text, shared = found.pop("_select_kernel")
        found[f"_select_kernel {dtype}"] = (text, shared)
    kernels.select(scores, rows, rows, counts[1:], positions, lookahead=8)
    found["_select_kernel lookahead"] = found.pop("_select_kernel")


def count_compiled(kernels) -> int:
    """How many kernels the JIT functions ``kernels`` have been compiled to so far."""
    return sum(len(kernel.device_caches[0][0]) for kernel in kernels)


def prefill_any_number(kernels, queries, cache_rows, table, found: dict[str, tuple[str, int]]) -> None:
    """Warm the prefill kernels up, then let prefill batches of many sizes come; keeps count of what is compiled."""
    from sglang_sparsespec.attention_backend import triton_prefill_scores, triton_select
    from sglang_sparsespec.attention_backend.backend import SparseSpecAttnBackend

    kernels_of_prefill = (
        triton_prefill_scores._window_lse_kernel,
        triton_prefill_scores._window_scores_kernel,
        triton_select._select_kernel,
    )

    kernels._reserve(64)
    dim, heads, context = queries.shape[2], cache_rows.shape[1], table.shape[1]
    scores = torch.empty(64, heads, context, dtype=torch.float16)
    server = SimpleNamespace(
        kernels=kernels,
        policy=SimpleNamespace(uses_scores=True),
        token_to_kv_pool=SimpleNamespace(get_key_buffer=lambda layer: cache_rows),
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        table=SimpleNamespace(positions=torch.empty(1, 64, heads, kernels.capacity, dtype=torch.int32)),
        config=SimpleNamespace(lookahead=0),
        scores=scores,
        first_layer=0,
        num_q_heads=kernels.num_q_heads,
        window=kernels.window,
        dtype=queries.dtype,
        device=torch.device("cpu"),
        max_bs=64,
    )
    SparseSpecAttnBackend.warm_up(server)
    before = count_compiled(kernels_of_prefill)
    for batch in (1, 2, 3, 5, 6, 7, 8, 11, 16, 33, 48, 64):
        # The types that ForwardBatch has them in.
        rows, extend = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int32)
        kernels.prefill_scores(queries, cache_rows, table, rows, rows, extend, extend, kernels.window, dim**-0.5, scores)
        positions = torch.empty(65, heads, kernels.capacity, dtype=torch.int32)
        kernels.select(scores, rows, rows, rows.int(), positions)
    found["compiled in warm-up, and later"] = (str(before), count_compiled(kernels_of_prefill) - before)


def sample_any_number(found: dict[str, tuple[str, int]]) -> None:
    """Warm the sampling kernels up, then let batches of many sizes sample; keeps count of what is compiled."""
    from sglang_sparsespec import triton_filters, triton_rows, triton_sampling
    from sglang_sparsespec.warm_up import compile_sampling

    kernels_of_sampling = [
        getattr(module, name)
        for module in (triton_filters, triton_rows, triton_sampling)
        for name in vars(module)
        if name.endswith("_kernel")
    ]

    k, vocab = 8, 151_936
    compile_sampling(vocab, k + 1, torch.bfloat16, "cpu")
    before = count_compiled(kernels_of_sampling)
    for batch in (1, 2, 3, 7, 16, 40):
        temperatures, top_ks = torch.ones(batch, 1), torch.full((batch,), 20, dtype=torch.int32)
        seeds, candidates = triton_sampling.round_seeds(k + 1, "cpu"), torch.zeros(batch, k + 1, dtype=torch.int64)
        kept, lse = torch.empty(batch, k, vocab, dtype=torch.bfloat16), torch.empty(batch, k)
        target = torch.empty(batch * (k + 1), vocab)
        for top_ps in (None, torch.ones(batch)):
            for step in range(k):
                triton_sampling.draft(target[:batch], temperatures, top_ks, seeds, step, kept, lse, top_ps=top_ps)
            triton_sampling.accept(candidates, target, temperatures, top_ks, kept, lse, seeds[k:], top_ps=top_ps)
    found["compiled in warm-up, and later"] = (str(before), count_compiled(kernels_of_sampling) - before)


def compile_sampling(found: dict[str, tuple[str, int]]) -> None:
    """Compile the sampling kernels for vocabularies of many blocks and of one, and for logits of each type."""
    from sglang_sparsespec import triton_sampling

    sample_any_number(found)
    batch, k = 4, 8
    temperatures, top_ks = torch.ones(batch, 1), torch.ones(batch, dtype=torch.int32)
    seeds, candidates = triton_sampling.round_seeds(k + 1, "cpu"), torch.zeros(batch, k + 1, dtype=torch.int64)
    for vocab, dtype, kept_dtype in [
        (151_936, torch.float32, torch.bfloat16),
        (151_936, torch.bfloat16, torch.bfloat16),
        (4000, torch.float16, torch.float32),
    ]:
        kept, lse = torch.empty(batch, k, vocab, dtype=kept_dtype), torch.empty(batch, k)
        triton_sampling.draft(torch.empty(batch, vocab, dtype=dtype), temperatures, top_ks, seeds, 3, kept, lse)
        found[f"_sums_kernel draft {vocab} {dtype}"] = found.pop("_sums_kernel")
        target = torch.empty(batch * (k + 1), vocab, dtype=dtype)
        triton_sampling.accept(candidates, target, temperatures, top_ks, kept, lse, seeds[-1:])
        for name in ("_sums", "_draw", "_accept", "_residual", "_final"):
            found[f"{name}_kernel sampling {vocab} {dtype}"] = found.pop(f"{name}_kernel")
        # Of staggered windows: a plan's columns are views of any alignment.
        rows, num_drafted = torch.zeros(2 * batch + 1, dtype=torch.int64)[1:].split([batch, batch])
        triton_sampling.draft(
            torch.empty(batch, vocab, dtype=dtype), temperatures, top_ks, seeds, 3, kept, lse, slots=rows.clone()
        )
        found[f"_sums_kernel slots {vocab} {dtype}"] = found.pop("_sums_kernel")
        triton_sampling.accept(
            candidates, target, temperatures, top_ks, kept, lse, seeds[-1:], rows=rows, num_drafted=num_drafted
        )
        for name in ("_draw", "_accept", "_residual", "_final"):
            found[f"{name}_kernel windows {vocab} {dtype}"] = found.pop(f"{name}_kernel")
        top_ps = torch.ones(batch)
        triton_sampling.draft(
            torch.empty(batch, vocab, dtype=dtype), temperatures, top_ks, seeds, 3, kept, lse, top_ps=top_ps
        )
        found[f"_sums_kernel filters {vocab} {dtype}"] = found.pop("_sums_kernel")
        triton_sampling.accept(candidates, target, temperatures, top_ks, kept, lse, seeds[-1:], top_ps=top_ps)
        for name in ("_draw", "_accept", "_residual", "_final", "_floors"):
            found[f"{name}_kernel filters {vocab} {dtype}"] = found.pop(f"{name}_kernel")


def inner_loop(ttgir: str) -> str:
    """The loop body with the first matrix product, from its ``scf.for`` on."""
    text = re.sub(r"loc\(.*", "", ttgir)
    product = re.search(r"tt\.dot|warp_group_dot", text)
    assert product, "no matrix product"
    begin = text.rindex("\n", 0, text.rindex("scf.for", 0, product.start())) + 1
    indent = re.match(r" *", text[begin:])
    assert indent
    return text[begin : text.index(f"\n{indent.group()}}}", begin)]


@pytest.fixture(scope="module", params=list(SHAPES))
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    return compile_in_child(request.param, str(tmp_path_factory.mktemp("triton")))


@pytest.fixture(scope="module")
def sampling(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    return compile_in_child(SAMPLING, str(tmp_path_factory.mktemp("triton")))


def compile_in_child(what: str, cache: str) -> dict[str, tuple[str, int]]:
    # In a process of its own: it replaces Triton's driver.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, os.path.abspath(__file__), what, cache]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "kernel,tiles",
    [
        ("_draft_kernel", 2),
        ("_verify_kernel window", 2),
        ("_verify_kernel plain step", 2),
        ("_window_lse_kernel", 1),
        ("_window_scores_kernel", 1),
    ],
)
def test_the_next_tiles_of_kv_are_in_flight(kernel: str, tiles: int, compiled: dict[str, tuple[str, int]]) -> None:
    """K and V (scores: K alone) of the next iteration load while this one computes."""
    body = inner_loop(compiled[kernel][0])
    copies = body.count("async_copy_global_to_local")
    assert copies == tiles, f"{copies} of {tiles} tiles go to shared memory asynchronously"
    waits = [int(n) for n in re.findall(r"async_wait[^{]*\{num = (\d+)", body)]
    assert waits and min(waits) >= tiles, f"the loop waits for its own loads: {waits} outstanding"


@pytest.mark.parametrize(
    "kernel,programs", [("_draft_kernel", 2), ("_verify_kernel window", 2), ("_verify_kernel plain step", 2)]
)
def test_programs_share_a_multiprocessor(kernel: str, programs: int, compiled: dict[str, tuple[str, int]]) -> None:
    assert programs * (compiled[kernel][1] + RESERVED_BYTES) <= SHARED_BYTES


def test_no_size_of_a_prefill_batch_compiles_kernels_while_requests_wait(compiled: dict[str, tuple[str, int]]) -> None:
    before, later = compiled["compiled in warm-up, and later"]
    assert int(before) >= 3 and later == 0


def test_no_size_of_a_sampled_batch_compiles_kernels_while_requests_wait(sampling: dict[str, tuple[str, int]]) -> None:
    before, later = sampling["compiled in warm-up, and later"]
    assert int(before) >= 5 and later == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_selection_compiles_for_keys_of_either_width(dtype: str, compiled: dict[str, tuple[str, int]]) -> None:
    assert f"_select_kernel torch.{dtype}" in compiled


def test_selection_with_look_ahead_moves_16_bytes_at_a_time(compiled: dict[str, tuple[str, int]]) -> None:
    text = compiled["_select_kernel lookahead"][0]
    groups = re.findall(r"tt\.(load|store) .*tensor<1024x8x!tt\.ptr<i16>, (#\w+)>", text)
    # Two of a row that fits the registers, two and the store of a longer one, those of the passes over it, and the gather.
    assert sum(kind == "load" for kind, _ in groups) >= 6 and [kind for kind, _ in groups].count("store") == 1
    layouts = [layout for _, layout in groups]
    wide = [layout for layout in layouts if re.search(rf"^{layout} = #ttg.blocked<\{{sizePerThread = \[1, 8\]", text, re.M)]
    # Candidates lie anywhere.
    assert len(wide) >= len(layouts) - 1


@pytest.mark.parametrize(
    "kernel",
    [
        "_sums_kernel draft",
        "_sums_kernel slots",
        "_sums_kernel sampling",
        "_residual_kernel sampling",
        "_residual_kernel windows",
        "_sums_kernel filters",
        "_residual_kernel filters",
    ],
)
@pytest.mark.parametrize("dtype,each", [("float32", 4), ("bfloat16", 8)])
def test_passes_over_logits_load_16_bytes_at_a_time(
    kernel: str, dtype: str, each: int, sampling: dict[str, tuple[str, int]]
) -> None:
    text = sampling[f"{kernel} 151936 torch.{dtype}"][0]
    loads = re.findall(r"tt\.load .* : tensor<4096x.*(#\w+)>", text)
    assert loads, "no load of a block of logits"
    for layout in set(loads):
        per_thread = re.search(rf"^{layout} = #ttg.blocked<\{{sizePerThread = \[(\d+)\]", text, re.MULTILINE)
        assert per_thread and int(per_thread.group(1)) >= each


@pytest.mark.parametrize("kernel", ["_draw", "_accept", "_final"])
@pytest.mark.parametrize("kept", ["sampling", "windows", "filters"])
def test_sampling_compiles_for_a_vocabulary_of_one_block(
    kernel: str, kept: str, sampling: dict[str, tuple[str, int]]
) -> None:
    assert f"{kernel}_kernel {kept} 4000 torch.float16" in sampling


if __name__ == "__main__":
    print(json.dumps(compile_for_h100(*sys.argv[1:])))
