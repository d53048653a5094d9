"""The attention kernels against the memory's speed, and against those of FlashInfer and SGLang's backends.

    python benchmarks/kernel_table.py --results kernels.jsonl                       # about four minutes on an H100
    python benchmarks/kernel_table.py --results kernels.jsonl --batches 64 --what draft verify
    python benchmarks/kernel_table.py --results kernels.jsonl --report --compare results/OLD.jsonl
    TRITON_INTERPRET=1 python benchmarks/kernel_table.py --interpret --results k.jsonl   # no GPU: checks, no times

Times are per layer: medians of CUDA graph replays by ``flashinfer.testing.bench_gpu_time``. A graph walks through disjoint
batches and different selections, more than the L2 cache holds. Before a kernel is timed its result is checked against
float32 attention; one that fails is listed as wrong and compared with nothing. Each row is a JSON line at once: run the same
command again after an interruption or a crash, and it goes on behind the kernel that crashed.

``--compare`` joins the rows with those of an older file by case and kernel (rows of files of before 2026-11-29 call this
project's Triton kernels "pillar") and fails if one of the project's kernels is slower by more than ``--tolerance``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch
from _common import device_name, markdown, read_records, say, significant, stamp, write_record
from _kernel_cases import DRAFT_TOKENS, KERNELS, LAYOUTS, SHAPES, TOKENS_PER_ROUND, Case, Kernel, Problem

TOLERANCE = 1e-2
#: What is measured on a GPU by default.
USUAL_SHAPES = ("qwen3-8b", "qwen2.5-coder-1.5b")
#: Of the free memory, for the K and V buffers; outputs, selections and scores need the rest.
POOL_SHARE = 0.7
LEGEND = f"""\
One layer, 16 bits, page size 1, budget 5% of the context, k = {DRAFT_TOKENS}. slots: a request's token slots are consecutive
(runs), anywhere (random), or consecutive with lengths from a quarter of the context to all of it (ragged). of copy: K and V
bytes of the selected tokens per second over the copy bandwidth. vs decode: full decode attention by the fastest kernel of
SGLang's backends over draft attention. vs full: verification with scores over the fastest full attention of the same
queries. plain: a plain round's step over the fastest full decode attention. select: selection over verification. round:
attention of {TOKENS_PER_ROUND} plain steps over that of {DRAFT_TOKENS} draft steps, verification and selection."""
#: What a batch should reach: column, and whether a value does.
GOALS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "draft attention at 70% of the copy bandwidth": ("of copy", lambda value: value >= 0.70),
    "draft attention 8 times faster than full decoding (32K and more)": ("vs decode", lambda value: value >= 8),
    "verification with scores within 1.15 times the best full attention": ("vs full", lambda value: value <= 1.15),
    "a plain step's attention within 1.02 times the best full decoding": ("plain", lambda value: value <= 1.02),
    "selection within 10% of verification": ("select", lambda value: value <= 0.10),
    "attention of a round 4.5 times cheaper than of plain decoding": ("round", lambda value: value >= 4.5),
}


# ----------------------------------------------------------------------- measuring


def plan_cases(args: argparse.Namespace) -> list[Case]:
    """What is measured, batch 64 first, then larger, then smaller; ragged lengths at the first batch size only."""
    batches = sorted(args.batches, key=lambda batch: (batch != 64, batch < 64, batch))
    product = itertools.product(batches, args.layouts, args.contexts, args.shapes)
    return [
        Case(SHAPES[shape], batch, context, layout)
        for batch, layout, context, shape in product
        if layout != "ragged" or batch == batches[0]
    ]


def time_calls(calls: Sequence[Callable[[], Any]]) -> dict[str, Any]:
    """Milliseconds of a call: median, 10th and 90th percentile."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        calls[0]()
        times, count, method = [(time.perf_counter() - begin) * 1e3], 1, "wall"
    else:
        from flashinfer.testing import bench_gpu_time

        begin = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        walk_ms = (time.perf_counter() - begin) * 1e3
        # A graph of one millisecond or more, and of whole walks.
        count = len(calls) * max(1, min(math.ceil(1 / walk_ms), 64 // len(calls)))
        turns = itertools.cycle(calls)
        times, method = bench_gpu_time(
            lambda: next(turns)(),
            dry_run_time_ms=10,
            repeat_time_ms=60,
            use_cuda_graph=True,
            num_iters_within_graph=count,
            cold_l2_cache=False,  # the calls walk through more than the cache holds
        ), "graph"
    low, middle, high = numpy.percentile(times, [10, 50, 90])
    found = {"ms": float(middle), "low": float(low), "high": float(high)}
    return {**found, "repetitions": len(times), "calls": count, "method": method}


def copy_bandwidth() -> float:
    """Bytes read plus written per second by a large copy on the device."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (time_calls([lambda: target.copy_(source)])["ms"] * 1e-3)


def measure(kernel: Kernel, problem: Problem) -> dict[str, Any]:
    """Check and time one kernel on one problem."""
    prepared = kernel.prepare(problem)
    prepared.calls[0]()
    errors = prepared.errors()
    limit = TOLERANCE if problem.device.type == "cuda" else 1e-3
    # NaN fails the comparison, and so is wrong.
    wrong = not all(error <= limit for error in errors.values())
    return {**time_calls(prepared.calls), "bytes": prepared.bytes, "errors": errors, "wrong": wrong}


def run(args: argparse.Namespace) -> None:
    """Measure what the results file lacks."""
    on_gpu = torch.cuda.is_available() and not args.interpret
    device = torch.device("cuda" if on_gpu else "cpu")
    deadline, environment = time.monotonic() + args.time_limit, stamp()
    origin = {"commit": environment["commit"], "device": device_name(environment)}
    records = [r for r in read_records(args.results) if all(r.get(name) == value for name, value in origin.items())]
    # One that began and did not end has crashed.
    done = {record["section"] for record in records if record["kind"] != "ceilings"}
    write_record(args.results, {"kind": "stamp", "section": "", **origin, "stamp": environment})
    if on_gpu and not any(record["kind"] == "ceilings" for record in records):
        write_record(args.results, {"kind": "ceilings", **origin, "copy_bytes_per_s": copy_bandwidth()})
    kernels = [k for k in KERNELS if (on_gpu or not k.gpu) and (not args.what or k.what in args.what)]
    free = torch.cuda.mem_get_info()[0] if on_gpu else 8 << 30
    cases = [case for case in plan_cases(args) if case.num_slots * case.shape.token_bytes <= POOL_SHARE * free]
    elements = max(case.num_slots * case.shape.token_bytes // 4 for case in cases)
    pool = torch.empty((2, elements), dtype=torch.bfloat16 if on_gpu else torch.float32, device=device)
    for piece in pool.view(-1).split(1 << 28):  # the generator's scratch for all at once would not fit beside it
        piece.normal_()
    for case in cases:
        left = [k for k in kernels if f"{case.key}/{k.what}/{k.name}" not in done]
        problem = Problem(case, pool, device) if left and time.monotonic() < deadline else None
        for kernel in left:
            if problem is None or time.monotonic() > deadline:
                say(f"{case.key}: the time limit was reached")
                return
            section = f"{case.key}/{kernel.what}/{kernel.name}"
            about = {"section": section, "unit": case.key, "what": kernel.what, "name": kernel.name, **origin}
            about |= {"shape": case.shape.name, "batch": case.batch, "context": case.context, "layout": case.layout}
            write_record(args.results, {"kind": "begin", "section": section, **origin})
            try:
                record = {"kind": "row", **about, **measure(kernel, problem)}
                say(f"{section}: {record['ms']:.4f} ms" + (f"  WRONG {record['errors']}" if record["wrong"] else ""))
            except torch.AcceleratorError:
                raise  # nothing more can be measured in this process
            except Exception as error:  # noqa: BLE001 - a kernel that cannot run costs its own row
                record = {"kind": "failed", **about, "error": f"{type(error).__name__}: {str(error)[-300:]}"}
                say(f"{section}: {record['error']}")
            write_record(args.results, record)


# -------------------------------------------------------------------------- report


def latest_rows(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest row of each case and kernel; the names are today's."""
    rows = {}
    for record in records:
        if record["kind"] == "row":
            name = record["name"].replace("pillar", "triton")
            rows[record["unit"], record["what"], name] = {**record, "name": name}
    return list(rows.values())


def round_speedup(decode_ms: float, draft_ms: float, verify_and_select_ms: float) -> float:
    """Attention time of plainly decoding a round's tokens over that of the round, one layer."""
    return TOKENS_PER_ROUND * decode_ms / (DRAFT_TOKENS * draft_ms + verify_and_select_ms)


def summary(rows: Iterable[dict[str, Any]], copy_bytes_per_s: float | None) -> list[dict[str, Any]]:
    """The figures of each case; None where a part was not measured or was wrong."""
    rivals = {(kernel.what, kernel.name) for kernel in KERNELS if kernel.rival}
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["unit"], []).append(row)
    found = []
    for group in cases.values():
        good = {(row["what"], row["name"]): row for row in group if not row["wrong"]}
        ms = {key: row["ms"] for key, row in good.items()}

        def fastest(what: str, ms: dict[tuple[str, str], float] = ms) -> tuple[float, str] | None:
            return min(((value, key[1]) for key, value in ms.items() if key in rivals and key[0] == what), default=None)

        decode, full = fastest("decode"), fastest("verify")
        triton, select, both = (ms.get((what, "triton")) for what in ("draft", "select", "verify+select"))
        verify, flashinfer, copy = ms.get(("verify", "triton")), ms.get(("draft", "flashinfer")), good.get(("copy", "torch"))
        plain = ms.get(("decode", "triton"))
        rate = good["draft", "triton"]["bytes"] / (triton * 1e-3) if triton else None
        first = group[0]
        found.append(
            {
                "shape": first["shape"],
                "context": first["context"],
                "slots": first["layout"],
                "batch": first["batch"],
                "draft us": triton and triton * 1e3,
                "by flashinfer us": flashinfer and flashinfer * 1e3,
                "of copy": rate / copy_bytes_per_s if rate and copy_bytes_per_s else None,
                "vs decode": decode[0] / triton if decode and triton else None,
                "verify ms": verify,
                "vs full": verify / full[0] if verify and full else None,
                "plain": plain / decode[0] if plain and decode else None,
                "select": select / verify if select and verify else None,
                "round": round_speedup(decode[0], triton, both) if decode and triton and both else None,
                "full decode ms": decode and decode[0],
                "decode by": decode and decode[1],
                "verify by": full and full[1],
                "same-size copy us": copy and copy["ms"] * 1e3,
            }
        )
    return sorted(found, key=lambda case: (case["shape"], case["context"], case["slots"], case["batch"]))


def largest(errors: Iterable[float | None]) -> float:
    """The largest error; None, which stands for NaN in a record, is infinite."""
    return max(math.inf if error is None else error for error in errors)


def goal_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """How many of the measured cases meet each goal."""
    lines = []
    for text, (column, is_met) in GOALS.items():
        values = [c[column] for c in found if c[column] is not None and (column != "vs decode" or c["context"] >= 32768)]
        lines.append(f"- {text}: {sum(map(is_met, values))} of {len(values)}")
    return lines


def comparison(new: Iterable[dict[str, Any]], old: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios of times, new over old, of the cases that both have: one row per kernel."""
    before = {(row["unit"], row["what"], row["name"]): row["ms"] for row in old if not row["wrong"]}
    ratios: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for row in new:
        key = (row["unit"], row["what"], row["name"])
        if key in before and not row["wrong"]:
            ratios.setdefault(key[1:], []).append((row["ms"] / before[key], row["unit"]))
    return [
        {
            "job": what,
            "kernel": name,
            "cases": len(values),
            "median": median(ratio for ratio, _ in values),
            "lowest": min(values)[0],
            "highest": max(values)[0],
            "of case": max(values)[1],
        }
        for (what, name), values in sorted(ratios.items())
    ]


def report(records: Sequence[dict[str, Any]]) -> str:
    """The Markdown report of a results file."""
    ceiling = next((r["copy_bytes_per_s"] for r in reversed(records) if r["kind"] == "ceilings"), None)
    origin: dict[str, Any] = next((r["stamp"] for r in reversed(records) if r["kind"] == "stamp"), {})
    rows = latest_rows(records)
    found = summary(rows, ceiling)
    head = f"{device_name(origin)}, commit {origin.get('commit')}, {origin.get('date')}"
    head += f"; copy {ceiling / 1e12:.2f} TB/s" if ceiling else "; no GPU: the checks count, the times mean nothing"
    shown = [{key: significant(v) if isinstance(v, float) else v for key, v in case.items()} for case in found]
    detail = [
        {
            "case": row["unit"],
            "job": row["what"],
            "kernel": row["name"],
            "ms": significant(row["ms"]),
            "GB/s": round(row["bytes"] / row["ms"] / 1e6),
            "of copy": f"{row['bytes'] / row['ms'] * 1e3 / ceiling:.0%}" if ceiling else None,
            "error": ("WRONG " if row["wrong"] else "") + f"{largest(row['errors'].values()):.0e}",
        }
        for row in sorted(rows, key=lambda row: (row["unit"], row["what"], row["ms"]))
    ]
    failed = {record["section"]: record["error"] for record in records if record["kind"] == "failed"}
    goals = ["\n".join(goal_lines(found))] if ceiling else []
    parts = [head, LEGEND, markdown(shown), *goals, "Every kernel:", markdown(detail)]
    parts += [f"Not measured: {section}: {error}" for section, error in failed.items()]
    return "\n\n".join(parts)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help=f"on a GPU {' and '.join(USUAL_SHAPES)} if not given")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--contexts", nargs="+", type=int)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--what", nargs="+", choices=sorted({kernel.what for kernel in KERNELS}), help="only these jobs")
    parser.add_argument("--interpret", action="store_true", help="no GPU: tiny shapes in Triton's interpreter")
    parser.add_argument("--time-limit", type=float, default=480, help="seconds after which no kernel is begun")
    parser.add_argument("--report", action="store_true", help="make the tables of --results only")
    parser.add_argument("--compare", type=Path, help="older results to divide the times by")
    parser.add_argument("--tolerance", type=float, default=0.02, help="of a median ratio above 1, with --compare")
    args = parser.parse_args(argv)
    small = args.interpret
    args.shapes = args.shapes or ([name for name in SHAPES if name.startswith("tiny")] if small else list(USUAL_SHAPES))
    args.batches = args.batches or ([2] if small else [32, 64, 128, 256])
    args.contexts = args.contexts or ([300] if small else [8192, 32768])
    if not (args.report or small or torch.cuda.is_available()):
        parser.error("there is no GPU; --interpret checks the kernels without one")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given command line; 1 if a kernel is wrong, failed in the interpreter, or is slower than before."""
    args = parse_arguments(argv)
    if not args.report:
        run(args)
    records = read_records(args.results)
    print(report(records))
    bad = any(row["wrong"] for row in latest_rows(records))
    if args.interpret:
        bad = bad or any(record["kind"] == "failed" for record in records)
    if args.compare:
        ratios = comparison(latest_rows(records), latest_rows(read_records(args.compare)))
        rounded = [{key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()} for row in ratios]
        print(f"\nTimes over those of {args.compare.name}:\n\n{markdown(rounded)}")
        bad = bad or any(row["median"] > 1 + args.tolerance for row in ratios if row["kernel"].startswith("triton"))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
