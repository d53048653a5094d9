"""The balanced verify kernel and the scores from a log-sum-exp against the float32 reference.

As in ``test_cuda_kernels``, the CPU cases run in Triton's interpreter in one child process; the same checks run on CUDA
under the ``gpu`` mark.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from dataclasses import replace

import pytest
import torch
from test_cuda_kernels import (
    LONG,
    RAGGED,
    Case,
    Problem,
    compare_scores,
    gpu_only,
    reference_scores,
    rel_error,
    tolerance,
)

# ``splits`` is the number of programs per KV head here.
CPU_CASES = [
    Case("balanced", g=1, d=64, lens=RAGGED, splits=1),
    Case("balanced", g=4, d=128, lens=(37, 0, 5), splits=4),
    Case("balanced", g=4, d=64, lens=RAGGED, splits=7),
    Case("balanced", g=6, d=64, lens=(150, 1), window=9, splits=5, hkv=1),
    Case("balanced", g=16, d=64, lens=(33, 2), window=9, splits=3, hkv=1),
    Case("balanced", g=4, d=64, lens=(50, 3), splits=50, score_dtype="float16", hkv=1),
    # Twenty requests: more than one power of two, several of them whole in one program.
    Case("balanced", g=2, d=64, lens=tuple(range(0, 60, 3)), splits=6, hkv=1),
    Case("rescored", g=4, d=64, lens=(37, 0, 5), splits=3),
    Case("rescored", g=6, d=128, lens=(20, 70), window=9, splits=1, hkv=1),
]

GPU_CASES = [
    *[
        Case("balanced", g=g, d=d, lens=LONG, window=w, splits=s, hkv=h, block_n=0, score_dtype=t)
        for g, d, h, w, s, t in [
            (1, 128, 4, 9, 66, "float32"),
            (2, 64, 4, 9, 66, "float16"),
            (4, 128, 8, 9, 33, "float16"),
            (4, 128, 8, 9, 1, "float32"),
            (6, 128, 2, 9, 132, "float16"),
            (7, 64, 2, 9, 132, "bfloat16"),
            (16, 128, 1, 9, 264, "float32"),
            (4, 128, 8, 17, 33, "float32"),
        ]
    ],
    Case("balanced", g=4, d=128, lens=(8192,) * 40, window=9, splits=33, hkv=8, score_dtype="float16", block_n=0),
    Case("rescored", g=4, d=128, lens=LONG, window=9, splits=4, hkv=8, block_n=0),
    Case("rescored", g=6, d=128, lens=LONG, window=9, splits=8, hkv=2, block_n=0),
]


def make_balanced(case: Case, p: Problem):
    from sglang_sparsespec.attention_backend.triton_verify_alt import BalancedConfig, BalancedVerify

    config = BalancedConfig(block_n=16, min_blocks=1) if case.block_n else BalancedConfig()
    config.programs_per_sm = 1
    return BalancedVerify(p.hq, case.hkv, case.d, case.window, int(case.splits) * case.hkv, p.device, config)


def check_balanced(case: Case, p: Problem) -> None:
    w, max_len = case.window, p.req_to_token.shape[1] + 5
    score_dtype = getattr(torch, case.score_dtype)
    args = (p.req_to_token, p.rows, p.lens, w, p.scaling)
    verify = make_balanced(case, p)
    ref, exact, lse = reference_scores(p, None)
    hint = lse + 0.3 * torch.randn(lse.shape, generator=p.gen).to(p.device) - 0.2
    _, hinted, _ = reference_scores(p, hint)

    def run(given: torch.Tensor, with_scores: bool = True) -> torch.Tensor:
        scores = p.poison(p.batch, case.hkv, max_len, dtype=score_dtype)
        out = p.poison(*p.qw.shape, dtype=p.dtype)
        verify._part_o.fill_(float("nan"))
        verify._part_lse.fill_(float("nan"))
        verify.verify_attention(p.qw, p.k, p.v, *args, out, scores if with_scores else None, given)
        assert rel_error(out, ref) < tolerance(p.dtype)
        per_row = (out.float() - ref).flatten(1).norm(dim=1) / ref.flatten(1).norm(dim=1)
        assert per_row.max() < 2 * tolerance(p.dtype)
        return scores

    scores = run(hint)
    compare_scores(p, scores, hinted)
    for b, length in enumerate(p.lens.tolist()):
        assert torch.isnan(scores[b, :, length:]).all(), "scores beyond the window start were written"
    compare_scores(p, run(lse), exact)
    run(hint, with_scores=False)
    # Hints far off, none at all, or wrong for a single row must not disturb the attention itself, and only the rows'
    # own share of the scores.
    for useless in (torch.full_like(hint, -1e4), torch.full_like(hint, 1e4), torch.full_like(hint, float("nan"))):
        scores = run(useless)
        if not torch.isnan(useless).any():
            finite = [torch.isfinite(scores[b, :, :n]).all() for b, n in enumerate(p.lens.tolist())]
            assert all(finite)
    single = hint.clone()
    single[0, 0, 0] = 1e4
    run(single)


def check_rescored(case: Case, p: Problem) -> None:
    from sglang_sparsespec.attention_backend.triton_verify_alt import scores_from_lse

    _, exact, lse = reference_scores(p, None)
    flat = lse.view(-1, p.hq)
    block_n = case.block_n or 64
    for base2 in (False, True):
        scores = p.poison(p.batch, case.hkv, p.req_to_token.shape[1], dtype=getattr(torch, case.score_dtype))
        given = (flat * 1.4426950408889634 if base2 else flat).contiguous()
        scores_from_lse(
            p.qw, p.k, p.req_to_token, p.rows, p.lens, case.window, p.scaling, given, scores, int(case.splits),
            base2=base2, block_n=block_n,
        )
        compare_scores(p, scores, exact)
        for b, length in enumerate(p.lens.tolist()):
            assert torch.isnan(scores[b, :, length:]).all(), "scores beyond the window start were written"


def run_case(case: Case, device: str, dtype: torch.dtype, seed: int) -> None:
    p = Problem(replace(case, kernel="verify"), device, dtype, seed)
    {"balanced": check_balanced, "rescored": check_rescored}[case.kernel](case, p)


@pytest.fixture(scope="module")
def interpreter_results() -> dict[str, str]:
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=env, timeout=600, check=False
    )
    results = {}
    for line in child.stdout.splitlines():
        if line.startswith("{"):
            entry = json.loads(line)
            results[entry["name"]] = entry["error"]
    if child.returncode != 0:
        pytest.fail(f"interpreter process failed:\n{child.stderr[-4000:]}")
    return results


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda c: c.name)
def test_interpreted_alternative_matches_reference(case: Case, interpreter_results: dict[str, str]) -> None:
    assert case.name in interpreter_results, "the interpreter process did not run this case"
    assert interpreter_results[case.name] == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [pytest.param(c, marks=gpu_only, id=c.name) for c in GPU_CASES])
def test_gpu_alternative_matches_reference(case: Case, dtype: torch.dtype) -> None:
    run_case(case, "cuda", dtype, seed=3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for index, cpu_case in enumerate(CPU_CASES):
        message = ""
        try:
            run_case(cpu_case, "cpu", torch.float32, seed=index)
        except Exception:  # noqa: BLE001 - reported to the parent, case by case
            message = traceback.format_exc(limit=-6)[-3000:]
        print(json.dumps({"name": cpu_case.name, "error": message}), flush=True)
