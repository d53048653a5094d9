"""The pipelined draft kernel against the float32 reference, in Triton's interpreter on the CPU and on CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback

import pytest
import torch
from test_cuda_kernels import LONG, RAGGED, Case, Problem, check_draft, gpu_only, rel_error

CPU_CASES = [
    Case("draft", g=1, d=64, lens=RAGGED, splits=0.01),
    Case("draft", g=4, d=128, lens=RAGGED, splits=100),
    Case("draft", g=4, d=128, lens=RAGGED, splits=100, tag="-two-launches"),
    Case("draft", g=6, d=64, lens=(40, 0, 9), splits=100, hkv=1),
    Case("draft", g=16, d=64, lens=(33, 2), splits=0.01, hkv=1),
    Case("draft", g=4, d=64, lens=(300,), budget=120, splits=100, block_n=32),
    # No selected positions at all: every entry is of the tail.
    Case("draft", g=2, d=64, lens=(20, 0, 7), budget=0, splits=100, hkv=1),
]
GPU_CASES = [
    *[
        Case("draft", g=g, d=d, lens=LONG, budget=300, window=9, splits=s, hkv=h, block_n=0, tag=tag)
        for g, d, h, s in [(1, 128, 8, 6), (4, 128, 8, 6), (6, 128, 2, 6), (7, 64, 2, 6), (16, 128, 1, 6), (4, 128, 8, 0.01)]
        for tag in ("", "-two-launches")
    ],
    Case("draft", g=4, d=128, lens=(8192,) * 64, budget=410, window=9, splits=6, hkv=8, block_n=0),
    Case("draft", g=4, d=128, lens=(32768,), budget=1639, window=9, splits=6, hkv=8, block_n=0),
]


def make_pipelined(case: Case, p: Problem):
    from sglang_sparsespec.attention_backend.triton_draft_alt import PipelinedDraft, PipelinedDraftConfig

    config = PipelinedDraftConfig(block_n=16, min_chunk=16) if case.block_n else PipelinedDraftConfig()
    config.target = case.splits
    config.merge = "two-launches" not in case.tag
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count if p.device == "cuda" else 4
    entries = p.positions.shape[2] + 2 * case.window
    return PipelinedDraft(p.batch, p.hq, case.hkv, case.d, entries, num_sms, p.device, config)


def run_case(case: Case, device: str, dtype: torch.dtype, seed: int) -> None:
    p = Problem(case, device, dtype, seed)
    draft = make_pipelined(case, p)
    draft._part_o.fill_(float("nan"))
    draft._part_lse.fill_(float("nan"))
    check_draft(case, p, draft)
    assert not draft._arrived.any(), "a launch left its counters set for the next one"


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """Results of all CPU cases from the interpreter child: name -> '' or the traceback."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__)], env=env, capture_output=True, text=True, timeout=600
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and lines, done.stderr[-4000:]
    return {item["name"]: item["error"] for item in map(json.loads, lines)}


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda c: c.name)
def test_interpreted_draft_matches_reference(case: Case, interpreted: dict[str, str]) -> None:
    error = interpreted[case.name]
    assert not error, error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [pytest.param(c, marks=gpu_only, id=c.name) for c in GPU_CASES])
def test_gpu_draft_matches_reference(case: Case, dtype: torch.dtype) -> None:
    run_case(case, "cuda", dtype, seed=5)


@pytest.mark.parametrize("replays", [pytest.param(200, marks=gpu_only)])
def test_gpu_merging_in_place_gives_the_same_bits_on_every_replay(replays: int) -> None:
    """Parts are merged in a fixed order, whichever program comes last; a race would show as a moving result."""
    case = Case("draft", g=4, d=128, lens=(1000, 2000, 700, 8000), hkv=8, window=9, budget=400, splits=12, block_n=0)
    p = Problem(case, "cuda", torch.bfloat16)
    draft = make_pipelined(case, p)
    assert draft.splits(p.batch) > 1
    out = p.poison(*p.q1.shape, dtype=torch.bfloat16)
    args = (p.positions, p.num_selected, p.tail_start, p.req_to_token, p.rows, p.draft_lens, p.scaling)
    draft.draft_attention(p.q1, p.k, p.v, *args, out)
    first = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draft.draft_attention(p.q1, p.k, p.v, *args, out)
    for _ in range(replays):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, first)
    assert rel_error(out, first) == 0.0


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case_index, cpu_case in enumerate(CPU_CASES):
        message = ""
        try:
            run_case(cpu_case, "cpu", torch.float32, seed=case_index)
        except Exception:  # noqa: BLE001 - reported to the parent, case by case
            message = traceback.format_exc(limit=-6)[-3000:]
        print(json.dumps({"name": cpu_case.name, "error": message}), flush=True)
