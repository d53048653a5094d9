"""What Triton makes of the sampling kernels on an H100, compiled for it on a machine without a GPU.

A pass over logits that loads few bytes at a time is right and slow, which no test of its results would show.
"""

from __future__ import annotations

import re
import sys

import pytest
import torch
from sm90 import Compiled, compile_in_child, count_compiled, pretend_h100, report

from sglang_sparsespec.sampling import triton_filters, triton_penalties, triton_rows, triton_sampling
from sglang_sparsespec.sampling.parameters import RowParameters
from sglang_sparsespec.sampling.penalties import Penalties
from sglang_sparsespec.sampling.sampler import Sampler, compile_kernels

KERNELS = [
    getattr(module, name)
    for module in (triton_filters, triton_penalties, triton_rows, triton_sampling)
    for name in vars(module)
    if name.endswith("_kernel")
]
K = 8
#: Vocabularies of many blocks and of one, types of the logits and of what is kept.
CASES = [
    (151_936, torch.float32, torch.bfloat16),
    (151_936, torch.bfloat16, torch.bfloat16),
    (4000, torch.float16, torch.float32),
]


def parameters(batch: int, filters: bool) -> RowParameters:
    rows = RowParameters(torch.ones(batch, 1), torch.full((batch,), 20, dtype=torch.int32))
    if not filters:
        return rows
    return RowParameters(rows.temperatures, rows.top_ks, torch.ones(batch), torch.zeros(batch))


def compile_for_h100(_what: str, cache: str) -> Compiled:
    """Compile the kernels as rounds launch them."""
    # SGLang looks for GPUs as it is imported: before there seems to be one.
    import sglang.srt.layers.sampler  # noqa: F401

    found = pretend_h100(cache)
    sample_any_number(found)
    batch = 4
    seeds, slots = triton_sampling.round_seeds(2, "cpu"), torch.arange(batch)
    candidates = torch.zeros(batch, K + 1, dtype=torch.int64)
    for vocab, dtype, kept_dtype in CASES:
        kept, lse = torch.empty(batch * K, vocab, dtype=kept_dtype), torch.empty(batch * K)
        target = torch.empty(batch * (K + 1), vocab, dtype=dtype)
        for filters in (False, True):
            rows, name = parameters(batch, filters), f"{'filters' if filters else 'plain'} {vocab} {dtype}"
            triton_sampling.draft(target[:batch], rows, seeds, 0, kept, lse, slots)
            found[f"_sums_kernel draft {name}"] = found.pop("_sums_kernel")
            triton_sampling.accept(candidates, target, rows, seeds, 1, kept, lse, K, slots, slots)
            for kernel in list(found):
                if kernel.endswith("_kernel"):
                    found[f"{kernel} {name}"] = found.pop(kernel)
    return found


def sample_any_number(found: Compiled) -> None:
    """Warm the sampling kernels up, then let rounds of many sizes sample; keeps count of what is compiled."""
    from sampling_checks import as_requests, batch_info
    from tiny_model import Sampling

    vocab = 151_936
    compile_kernels(vocab, K + 1, torch.bfloat16, "cpu")
    Penalties(1, vocab, "cpu", use_triton=True).compile_kernels(K + 1)
    counts, strengths = torch.empty(42, vocab, dtype=torch.int32), torch.empty(42, 3)
    before = count_compiled(KERNELS)
    sampler = Sampler(K, torch.bfloat16, "cpu", use_triton=True)
    for batch in (1, 2, 3, 7, 16, 40):
        target = torch.empty(batch * (K + 1), vocab)
        positions = torch.zeros(batch * (K + 1), dtype=torch.int64)
        candidates = torch.zeros(batch, K + 1, dtype=torch.int64)
        for rows in (torch.arange(batch), torch.arange(batch + 1)[1:]):
            shaped, step = target.view(batch, K + 1, vocab), torch.arange(K + 1)[batch % 2 :][0].expand(batch)
            given = (counts, strengths)
            triton_penalties.penalise(shaped, rows, candidates, rows, *given)
            triton_penalties.penalise(shaped[:, :1], rows, candidates, step, *given)
            triton_penalties.penalise(target[:batch].unsqueeze(1), rows, candidates, rows, *given)
            triton_penalties.penalise(target[:batch].unsqueeze(1), rows, candidates[:, :1], rows, *given)
        for request in (Sampling(), Sampling(top_k=20, top_p=0.9), Sampling(min_p=0.1)):
            requests = [request] * batch
            for num_slots, window_slots in ((batch, None), (41, torch.arange(batch + 1)[1:])):
                # Each round calls the sampler as the lock-step rounds, or as the unified ones, whose tensors are views of
                # any alignment.
                sampler.begin_round(batch_info(requests, vocab=vocab), as_requests(requests), num_slots, K + 1)
                whole = torch.full((batch + 1,), K)[1:] if window_slots is not None else None
                order = None if window_slots is None else torch.arange(batch)
                for step in range(K):
                    entries = torch.arange(step, step + batch + step % 2)[step % 2 :]
                    sampler.draw(target[:batch], entries, positions[:batch], order)
                sampler.accept(candidates, target, positions, window_slots, order, whole)
    found["compiled in warm-up, and later"] = (str(before), count_compiled(KERNELS) - before)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compile_in_child(__file__, "sampling", tmp_path_factory.mktemp("triton"))


def test_no_size_of_a_sampled_batch_compiles_kernels_while_requests_wait(compiled: Compiled) -> None:
    """Nor does the first request with a filter, nor any alignment of the tensors of a round's plan."""
    before, later = compiled["compiled in warm-up, and later"]
    assert int(before) >= 9 and later == 0


@pytest.mark.parametrize("filters", ["plain", "filters"])
@pytest.mark.parametrize("kernel", ["_sums_kernel draft", "_sums_kernel", "_residual_kernel"])
@pytest.mark.parametrize("dtype,each", [("float32", 4), ("bfloat16", 8)])
def test_passes_over_logits_load_16_bytes_at_a_time(
    kernel: str, filters: str, dtype: str, each: int, compiled: Compiled
) -> None:
    text = compiled[f"{kernel} {filters} 151936 torch.{dtype}"][0]
    loads = re.findall(r"tt\.load .* : tensor<4096x.*(#\w+)>", text)
    assert loads, "no load of a block of logits"
    for layout in set(loads):
        per_thread = re.search(rf"^{layout} = #ttg.blocked<\{{sizePerThread = \[(\d+)\]", text, re.MULTILINE)
        assert per_thread and int(per_thread.group(1)) >= each


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kernel_compiles_for_vocabularies_of_many_blocks_and_of_one(
    case: tuple[int, torch.dtype, torch.dtype], compiled: Compiled
) -> None:
    for filters, names in (("plain", ()), ("filters", ("_floors",))):
        for kernel in ("_sums", "_draw", "_accept", "_residual", "_final", *names):
            assert f"{kernel}_kernel {filters} {case[0]} {case[1]}" in compiled


if __name__ == "__main__":
    report(compile_for_h100(*sys.argv[1:]))
