"""The kernel table: byte counts, figures from rows, the comparison with kept results, and checks in the interpreter."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from preloaded import run_to_end

REPO = Path(__file__).resolve().parents[2]
sys.path.append(str(REPO / "benchmarks"))

import _kernel_cases as cases  # noqa: E402
import kernel_table  # noqa: E402
from _common import commit, read_records, write_record  # noqa: E402

KEPT = REPO / "benchmarks/results/2026-11-27-h100/kernels-h100-d090498.jsonl"


def case(shape: str = "qwen3-8b", batch: int = 64, context: int = 8192, layout: str = "runs") -> cases.Case:
    return cases.Case(cases.SHAPES[shape], batch, context, layout)


def test_bytes_are_those_of_the_tokens_attended_to() -> None:
    # 64 requests of ceil(0.05 * 8192) - 9 selected positions and a tail of 12; 4,096 bytes a token.
    assert case().draft_bytes == 64 * (401 + 12) * 4096
    assert case().decode_bytes == 64 * 8192 * 4096
    assert case().verify_bytes == 64 * 8201 * 4096


def test_ragged_lengths_reach_from_a_quarter_to_all_of_the_context() -> None:
    ragged = case(layout="ragged")
    assert (len(ragged.lengths), max(ragged.lengths), min(ragged.lengths)) == (64, 8192, 2048)
    assert ragged.decode_bytes == sum(ragged.lengths) * 4096 < case().decode_bytes * 0.63


def options(*extra: str) -> Any:
    return kernel_table.parse_arguments(["--results", "r", "--report", *extra])


def test_the_plan_has_the_kept_cases_and_begins_with_batch_64() -> None:
    found = kernel_table.plan_cases(options())
    assert [c.batch for c in found] == [64] * 12 + [128] * 8 + [256] * 8 + [32] * 8
    kept = {row["unit"]: row for row in kernel_table.latest_rows(read_records(KEPT))}
    assert {c.key for c in found} == set(kept)
    # The newest kept table, of whose draft attention each row has the bytes.
    rows = {row["unit"]: row for row in kernel_table.latest_rows(read_records(KEPT)) if row["what"] == "draft"}
    assert {c.key: c.draft_bytes for c in found} == {unit: row["bytes"] for unit, row in rows.items()}


def row(what: str, name: str, ms: float, **fields: Any) -> dict[str, Any]:
    about = {"unit": "u", "shape": "qwen3-8b", "batch": 64, "context": 32768, "layout": "runs"}
    return {"kind": "row", **about, "what": what, "name": name, "ms": ms, "bytes": 1_000_000, "wrong": False, **fields}


ROWS = [
    row("decode", "fa3", 1.0),
    row("decode", "flashinfer, tensor cores", 2.0),
    row("decode", "triton", 1.1),
    row("draft", "triton", 0.1),
    row("draft", "flashinfer", 0.2),
    row("verify", "triton", 1.2),
    row("verify", "flashinfer fa2", 1.0),
    row("select", "triton", 0.06),
    row("verify+select", "triton", 1.26),
]


def test_figures_compare_with_the_fastest_kernel_of_the_backends() -> None:
    (found,) = kernel_table.summary(ROWS, 2e10)
    assert found["decode by"] == "fa3"
    assert found["vs decode"] == pytest.approx(10)
    assert found["of copy"] == pytest.approx(0.5)  # 1 MB in 0.1 ms is 10 GB/s
    assert (found["vs full"], found["plain"], found["select"]) == pytest.approx((1.2, 1.1, 0.05))
    assert found["round"] == pytest.approx(7.16 / 2.06)
    assert found["by flashinfer us"] == pytest.approx(200)
    assert [line.rpartition(": ")[2] for line in kernel_table.goal_lines([found])] == [
        "0 of 1",
        "1 of 1",
        "0 of 1",
        "0 of 1",
        "1 of 1",
        "0 of 1",
    ]


def test_wrong_or_missing_kernels_compare_with_nothing() -> None:
    wrong = [dict(r, wrong=True) if r["name"] == "fa3" else r for r in ROWS]
    assert kernel_table.summary(wrong, 2e10)[0]["decode by"] == "flashinfer, tensor cores"
    (found,) = kernel_table.summary([r for r in ROWS if r["what"] != "decode"], None)
    assert found["vs decode"] is found["round"] is found["of copy"] is None


def test_the_round_that_bytes_allow_matches_the_paper() -> None:
    # Free drafts and a verification as long as a decode step: all of the round's tokens for one step.
    assert kernel_table.round_speedup(2.0, 0.0, 2.0) == pytest.approx(7.16)
    assert kernel_table.round_speedup(1.0, 0.05, 1.0) == pytest.approx(7.16 / 1.4)


def test_kept_figures_come_out_again() -> None:
    records = read_records(KEPT)
    found = kernel_table.summary(kernel_table.latest_rows(records), 3.0029e12)
    assert [line.rpartition(": ")[2] for line in kernel_table.goal_lines(found)] == [
        "26 of 36",
        "18 of 18",
        "36 of 36",
        "0 of 0",
        "36 of 36",
        "19 of 36",
    ]


def test_times_are_compared_case_by_case_with_older_names() -> None:
    old = [row("draft", "pillar", 0.1), row("draft", "pillar", 0.2, unit="v"), row("verify", "pillar, no scores", 1.0)]
    new = [row("draft", "triton", 0.102), row("draft", "triton", 0.21, unit="v"), row("draft", "triton", 1.0, unit="other")]
    found = kernel_table.comparison(kernel_table.latest_rows(new), kernel_table.latest_rows(old))
    assert [(r["job"], r["kernel"], r["cases"], r["of case"]) for r in found] == [("draft", "triton", 2, "v")]
    assert (found[0]["lowest"], found[0]["highest"]) == (pytest.approx(1.02), pytest.approx(1.05))
    assert found[0]["median"] == pytest.approx(1.035)
    same = kernel_table.comparison(*[kernel_table.latest_rows(read_records(KEPT))] * 2)
    assert {r["median"] for r in same} == {1.0} and {r["cases"] for r in same if r["kernel"] == "triton"} == {36}


def test_the_interpreter_checks_kernels_and_goes_on_behind_one_that_crashed(tmp_path: Path) -> None:
    results = tmp_path / "k.jsonl"
    for name, origin in (("torch", commit()), ("triton", "an older one")):
        begun = {"kind": "begin", "section": f"tiny-g6/b2/c300/ragged/select/{name}"}
        write_record(results, {**begun, "commit": origin, "device": "CPU"})
    command = [sys.executable, str(REPO / "benchmarks" / "kernel_table.py"), "--interpret", "--shapes", "tiny-g6"]
    command += ["--layouts", "ragged", "--what", "draft", "decode", "select", "--results", str(results)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = run_to_end(command, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [record for record in read_records(results) if record["kind"] == "row"]
    assert [(r["what"], r["name"], r["wrong"]) for r in rows] == [
        (what, "triton", False) for what in ("draft", "decode", "select")
    ]
    assert "the times mean nothing" in done.stdout
