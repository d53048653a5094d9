"""The kernel benchmark's arithmetic, tables and supervision, and one run of it in Triton's interpreter."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _common  # noqa: E402
import _kernel_problem as problem  # noqa: E402
import _kernel_report as report  # noqa: E402
import kernels  # noqa: E402

QWEN = problem.SHAPES["qwen3-8b"]
BASELINES = {"decode": ("a", "b"), "verify": ("c",)}


def unit(batch: int = 64, context: int = 8192, layout: str = "runs") -> problem.Unit:
    return problem.Unit(QWEN, batch, context, layout)


def test_decode_bytes_are_k_and_v_of_every_token() -> None:
    # 64 requests x 8192 tokens x 8 heads x 128 dims x 2 (K, V) x 2 bytes.
    assert problem.decode_bytes(unit()) == 2_147_483_648
    assert problem.verify_bytes(unit()) == 2_147_483_648 + 64 * 9 * 4096
    assert problem.SHAPES["qwen2.5-coder-1.5b"].token_bytes() == 1024


def test_draft_bytes_count_the_budget_and_the_tail() -> None:
    # ceil(0.05 * 8192) = 410, of which one verify window of 9 is left to the tail; 12 tail tokens are read.
    assert problem.budget_counts([8192]) == [401]
    assert problem.TAIL == 12
    kv, index = problem.draft_bytes(unit())
    assert kv == 64 * (401 + 12) * 4096
    assert index == 64 * 8 * 4 * (401 + 401 + 12)
    # Below the least budget the whole context is selected.
    assert problem.budget_counts([100, 8192]) == [100, 401]


def test_ragged_lengths_reach_from_a_quarter_to_all_of_the_context() -> None:
    ragged = unit(layout="ragged")
    lengths = ragged.lengths()
    assert (len(lengths), lengths[0], max(lengths), min(lengths)) == (64, 8192, 8192, 2048)
    assert problem.decode_bytes(ragged) == sum(lengths) * 4096
    assert problem.decode_bytes(ragged) < problem.decode_bytes(unit()) * 0.63


def test_the_round_that_bytes_allow_matches_the_paper() -> None:
    # Attention per token (k s + 1) / (k alpha + 1): 1.4 / 7.16, that is 5.1 times less.
    assert problem.ideal_round(unit(context=32768)) == pytest.approx(7.16 / 1.4, rel=0.01)


def test_small_batches_walk_through_disjoint_sets() -> None:
    small = problem.Unit(problem.SHAPES["qwen2.5-coder-1.5b"], 32, 8192, "runs")
    assert problem.num_sets(small) == 4
    assert problem.num_sets(unit(batch=256, context=32768)) == 1
    assert problem.num_slots(small) == 4 * 32 * (8192 + problem.PAD) + 1


def test_round_speedup() -> None:
    # Free drafts and a verification as long as a decode step: all of the round's tokens for one step.
    assert report.round_speedup(2.0, 0.0, 2.0) == pytest.approx(7.16)
    assert report.round_speedup(1.0, 0.05, 1.0) == pytest.approx(7.16 / 1.4)


def row(what: str, name: str, ms: float, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "row", "unit": "u", "shape": "qwen3-8b", "batch": 64, "context": 32768, "layout": "runs",
        "what": what, "name": name, "ms": ms, "low": ms, "high": ms, "method": "graph", "bytes": 1_000_000,
        "errors": {"out": 1e-3}, "wrong": False, **fields,
    }  # fmt: skip


ROWS = [
    row("decode", "a", 1.0),
    row("decode", "b", 2.0),
    row("draft", "pillar", 0.1),
    row("verify", "pillar", 1.2),
    row("verify", "c", 1.0),
    row("select", "pillar", 0.06),
    row("verify+select", "pillar", 1.26),
]


def test_summary_compares_with_the_fastest_baseline() -> None:
    found = report.summarize_unit(ROWS, 2e10, BASELINES)
    assert found.decode_best == "a"
    assert found.draft_speedup == pytest.approx(10)
    # 1 MB in 0.1 ms is 10 GB/s.
    assert found.draft_share == pytest.approx(0.5)
    assert found.verify_ratio == pytest.approx(1.2)
    assert found.select_share == pytest.approx(0.05)
    assert found.round == pytest.approx(7.16 / 2.06)
    assert found.missed() == ["bandwidth", "verify", "round"]


def test_wrong_or_missing_kernels_compare_with_nothing() -> None:
    rows = [dict(r, wrong=True) if r["name"] == "a" else r for r in ROWS]
    assert report.summarize_unit(rows, 2e10, BASELINES).decode_best == "b"
    rows = [r for r in ROWS if r["what"] != "decode"]
    found = report.summarize_unit(rows, None, BASELINES)
    assert found.draft_speedup is None and found.round is None and found.draft_share is None
    assert set(found.missed()) == {"bandwidth?", "speedup?", "verify", "round?"}


def test_tables_show_every_row_and_mark_wrong_ones() -> None:
    rows = [*ROWS, row("verify", "broken", 0.5, wrong=True, errors={"out": None})]
    text = report.detail_table(rows, 2e10)
    assert len(text.splitlines()) == 2 + len(rows)
    assert "WRONG" in next(line for line in text.splitlines() if "broken" in line)
    found = report.summaries(rows, 2e10, BASELINES)
    assert "10.00x" in report.main_table(found)
    assert any("0 of 1" in line for line in report.goal_lines(found))


def test_sweep_marks_need_every_unit() -> None:
    rows = [
        row("draft", "x", 1.0, unit="u1"), row("draft", "y", 2.0, unit="u1"),
        row("draft", "x", 4.0, unit="u2"), row("draft", "y", 1.0, unit="u2"),
        row("draft", "z", 0.5, unit="u2"),
    ]  # fmt: skip
    marks = report.overall_marks(rows, ["u1", "u2"])
    assert [name for name, *_ in marks] == ["y", "x"]
    assert dict((n, m) for n, m, _ in marks)["x"] == pytest.approx(math.sqrt(8))
    assert "u2" in report.sweep_tables(rows, None)


def test_markdown_cells() -> None:
    table = _common.markdown_table(("name", "value"), [("a|b", 0.012345), ("c", None), ("d", 123.4)], right=(1,))
    lines = table.splitlines()
    assert lines[1] == "| ---- | -----: |"
    assert "a\\|b" in lines[2] and "0.0123" in lines[2]
    assert lines[3].endswith("- |") and "123 |" in lines[4]
    with pytest.raises(ValueError, match="3 cells"):
        _common.markdown_table(("a", "b"), [(1, 2, 3)])


def test_timing_summary_is_per_call() -> None:
    timing = _common.summarize([4.0, 2.0, 6.0], 2, "graph")
    assert (timing.ms, timing.low, timing.high) == (2.0, 1.0, 3.0)
    with pytest.raises(ValueError):
        _common.summarize([], 1, "graph")


def test_names_and_json() -> None:
    assert _common.gpu_slug("NVIDIA H100 80GB HBM3") == "h100"
    assert _common.gpu_slug("NVIDIA L40S") == "l40s"
    assert _common.clean({"a": [math.nan, 1.0], "b": math.inf}) == {"a": [None, 1.0], "b": None}


def test_every_job_can_be_asked_for_alone() -> None:
    import _kernel_providers as providers

    assert {p.kind for p in providers.default_providers()} == set(kernels.KINDS)


def test_plan_begins_with_batch_64_and_covers_everything() -> None:
    units = kernels.plan_units(list(problem.SHAPES), (32, 64, 128), (8192,), problem.LAYOUTS)
    assert len(units) == len({u.key for u in units}) == 14
    assert [u.batch for u in units] == [64] * 6 + [128] * 4 + [32] * 4
    assert {u.batch for u in units if u.layout == "ragged"} == {64}


def test_options_are_checked() -> None:
    assert kernels.parse(["--quick"]).batches == [64]
    assert kernels.parse([]).batches == [32, 64, 128, 256]
    assert kernels.parse(["--sweep"]).layouts == ["runs"]
    with pytest.raises(SystemExit):
        kernels.parse(["--interpret", "--shapes", "qwen3-8b"])
    with pytest.raises(SystemExit):
        kernels.parse(["--shapes", "tiny-g4"])
    with pytest.raises(SystemExit):
        kernels.parse(["--kinds", "drafts"])


FAKE_WORKER = """
import json, os, sys, time
plan = json.load(open(sys.argv[sys.argv.index("--worker") + 1]))
def emit(**record): print("@@ " + json.dumps(record), flush=True)
print("some library's chatter", flush=True)
for name in ("good", "crash", "hang", "last"):
    if name in plan["finished"]:
        continue
    emit(kind="begin", section=name, limit=1.5 if name == "hang" else 30)
    if name == "crash": os._exit(11)
    if name == "hang": time.sleep(60)
    emit(kind="finished", section=name)
emit(kind="done")
"""


def test_a_kernel_that_crashes_or_hangs_costs_only_its_own_line(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(FAKE_WORKER)
    run = kernels.Run(_common.JsonLines(tmp_path / "log.jsonl"))
    begin = time.monotonic()
    kernels.supervise(run, [sys.executable, str(script)], {"units": [], "jit": None}, tmp_path, 60, dict(os.environ))
    assert run.done
    assert run.finished == {"good", "crash", "hang", "last"}
    failures = {r["section"]: r["error"] for r in run.records if r["kind"] == "failed"}
    assert failures == {"crash": "its process ended with status 11", "hang": "overran its time"}
    assert time.monotonic() - begin < 40
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["section"] for r in logged if r["kind"] == "failed"] == ["crash", "hang"]


def test_flashinfer_modules_are_waited_for(tmp_path: Path) -> None:
    import _kernel_providers as providers

    with pytest.raises(providers.NotReady, match="fa2"):
        providers.require_flashinfer(("fa2",), tmp_path, 0.0)
    (tmp_path / "fa2.mark").write_text("ok 3 s")
    providers.require_flashinfer(("fa2",), tmp_path, 0.0)
    (tmp_path / "fa3.mark").write_text("failed OSError: no nvcc")
    with pytest.raises(providers.NotCompiled, match="no nvcc"):
        providers.require_flashinfer(("fa2", "fa3"), tmp_path, 0.0)


def test_without_a_gpu_the_benchmark_says_what_to_do(tmp_path: Path) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "kernels.py"), "--sweep", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    assert done.returncode == 2
    assert "--interpret" in done.stderr


def test_interpreted_run_checks_the_kernels_and_writes_reports(tmp_path: Path) -> None:
    command = [
        sys.executable, str(BENCHMARKS / "kernels.py"), "--interpret", "--shapes", "tiny-g6", "--layouts", "ragged",
        "--kinds", "draft", "select", "--output", str(tmp_path), "--time-limit", "400", "--section-limit", "200",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.glob("*.json")
    records = json.loads(path.read_text())["records"]
    rows = {(r["what"], r["name"]): r for r in records if r["kind"] == "row"}
    assert {("draft", "pillar"), ("select", "pillar"), ("select", "pillar, look-ahead 8")} <= set(rows)
    assert not any(r["wrong"] for r in rows.values())
    assert "the times mean nothing" in done.stdout
