"""The attention kernels against the memory's speed, and against those of SGLang's backends.

    python benchmarks/kernels.py            # all shapes, batches, contexts and slot layouts; under four minutes on an H100
    python benchmarks/kernels.py --quick    # batch 64 only
    python benchmarks/kernels.py --sweep    # launch configurations of the project's kernels
    python benchmarks/kernels.py --interpret    # no GPU: tiny shapes in Triton's interpreter, checks without times

Prints one table and writes kernels-<gpu>-<date>.json, .md and .jsonl under --output. Times are per layer, medians of
CUDA graph replays with cold L2. Before a kernel is timed its result is checked against float32 attention; a kernel that
fails the check is listed as wrong and compared with nothing. The measuring runs in a child process, so that a kernel
that crashes or hangs costs its own line and no other.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _common import REPO, JsonLines, clean, gpu_slug, say, write_reports
from _kernel_problem import (
    ACCEPTED,
    DRAFT_TOKENS,
    LAYOUTS,
    RATIO,
    SHAPES,
    TAIL,
    TINY,
    Unit,
    decode_bytes,
    draft_bytes,
    ideal_round,
    pool_elements,
)

PREFIX = "@@ "
BATCHES = (32, 64, 128, 256)
CONTEXTS = (8192, 32768)
KINDS = ("copy", "decode", "draft", "verify", "select", "verify+select")
FLASHINFER_MODULES = ("fa2", "decode", "fa3")
# Seconds to wait once for FlashInfer's cached module before going on with other kernels.
FIRST_WAIT = 20.0
# Of the free memory, for the K and V buffers; outputs, selections and scores need the rest.
POOL_SHARE = 0.7


def plan_units(
    shapes: Sequence[str],
    batches: Sequence[int],
    contexts: Sequence[int],
    layouts: Sequence[str],
    tiny: bool = False,
) -> list[Unit]:
    """Units to measure, the telling ones first in case time runs out: batch 64, then larger, then smaller.

    Ragged lengths are measured at the first batch size only.
    """
    known = TINY if tiny else SHAPES
    order = sorted(batches, key=lambda b: (b != 64, b < 64, b))
    return [
        Unit(known[shape], batch, context, layout)
        for batch in order
        for layout in layouts
        for context in contexts
        for shape in shapes
        if layout != "ragged" or batch == order[0]
    ]


# --------------------------------------------------------------------- worker


class Worker:
    """Measures units and prints records; runs in the child process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begin = time.monotonic()
        self.plan = json.loads(Path(options.worker).read_text())
        self.finished = set(self.plan["finished"])
        self.jit = Path(self.plan["jit"]) if self.plan["jit"] else None
        self.deferred: list[tuple[Unit, str]] = []
        self.patience = FIRST_WAIT
        self.absent: set[str] = set()

    def emit(self, kind: str, **fields: Any) -> None:
        """Send one record to the parent."""
        print(PREFIX + json.dumps(clean({"kind": kind, **fields})), flush=True)

    def section(self, key: str, limit: float) -> None:
        """Tell the parent what runs now and for how long it may."""
        self.emit("begin", section=key, limit=limit)

    def remaining(self) -> float:
        """Seconds left of the time limit."""
        return self.plan["seconds"] - (time.monotonic() - self.begin)

    def run(self) -> int:
        """Everything; returns the exit status."""
        self.section("start", 180)
        import torch
        from _common import Timer, stamp

        interpret = self.options.interpret
        if not interpret and not torch.cuda.is_available():
            self.emit("fatal", error="no CUDA GPU found; use --interpret to check the kernels without one")
            return 2
        self.torch = torch
        self.device = torch.device("cpu" if interpret else "cuda")
        if not interpret:
            torch.cuda.init()
        self.emit("stamp", stamp=stamp())
        self.timer = Timer(budget_s=0.03 if self.options.sweep else 0.06)
        if not interpret and "bandwidth" not in self.finished:
            self.guarded("bandwidth", 60, self.ceilings)
        if any(p.kind in ("decode", "verify") and "sglang" in p.name for p in self.providers()):
            self.guarded("imports", 120, self.imports)
        units = [unit for unit in self.units() if self.fits(unit)]
        if not units:
            self.emit("fatal", error="no unit fits in this device's memory")
            return 2
        self.section("pool", 60)
        from _kernel_problem import Pool

        dtype = torch.float32 if interpret else torch.bfloat16
        self.pool = Pool(max(map(pool_elements, units)), dtype, self.device)
        for unit in units:
            self.measure(unit, None)
        pending, self.deferred = self.deferred, []
        for unit in dict.fromkeys(unit for unit, _ in pending):
            self.measure(unit, {key for owner, key in pending if owner == unit}, last=True)
        self.emit("done")
        return 0

    def units(self) -> list[Unit]:
        """The plan's units."""
        known = TINY if self.options.interpret else SHAPES
        return [Unit(known[u["shape"]], u["batch"], u["context"], u["layout"]) for u in self.plan["units"]]

    def fits(self, unit: Unit) -> bool:
        """Whether the unit's KV cache fits; says so if not."""
        if self.device.type == "cpu":
            return True
        free, _ = self.torch.cuda.mem_get_info()
        needed = 2 * 2 * pool_elements(unit)
        if needed <= POOL_SHARE * free:
            return True
        self.emit(
            "skipped",
            section=unit.key,
            reason=f"its KV cache of {needed / 1e9:.0f} GB does not fit in {free / 1e9:.0f} GB of free memory",
        )
        return False

    def guarded(self, key: str, limit: float, work: Any) -> Any:
        """Run ``work`` as section ``key``; report its failure and go on."""
        self.section(key, limit)
        try:
            result = work()
            if self.device.type == "cuda":
                self.torch.cuda.synchronize()
            self.emit("finished", section=key)
            return result
        except Exception as error:  # noqa: BLE001 - the point of this function
            from _kernel_providers import NotCompiled, NotReady

            if isinstance(error, NotReady):
                raise
            self.emit("failed", section=key, error=f"{type(error).__name__}: {str(error)[-600:]}")
            if isinstance(error, (ImportError, NotCompiled)):
                self.absent.add(key)
            if self.device.type == "cuda":
                try:
                    self.torch.cuda.synchronize()
                    self.torch.cuda.empty_cache()
                except Exception:  # noqa: BLE001
                    # An illegal access leaves the context unusable: a fresh process has to go on.
                    sys.stdout.flush()
                    os._exit(3)
            return None

    def imports(self) -> None:
        """Import SGLang's kernels, which takes long, outside any kernel's time."""
        import sglang.kernels.ops.attention.decode_attention
        import sglang.kernels.ops.attention.extend_attention  # noqa: F401

    def ceilings(self) -> None:
        """The copy bandwidth and matrix rate of this device."""
        from _common import copy_bandwidth, matrix_rate

        # Twice, for the spread.
        rates = [copy_bandwidth(self.timer, 2 << 30)[0] for _ in range(2)]
        flops, _ = matrix_rate(self.timer)
        self.emit(
            "ceilings",
            copy_bytes_per_s=max(rates),
            copy_runs=rates,
            matrix_flops_per_s=flops,
        )
        self.torch.cuda.empty_cache()

    def providers(self) -> list[Any]:
        """The providers of this mode and kind."""
        if self.options.sweep:
            from _kernel_sweep import sweep_providers

            found = sweep_providers()
        else:
            from _kernel_providers import default_providers

            found = default_providers()
        if self.options.kinds:
            found = [p for p in found if p.kind in self.options.kinds]
        return [p for p in found if self.device.type == "cuda" or not p.gpu]

    def measure(self, unit: Unit, only: set[str] | None, last: bool = False) -> None:
        """Time all providers (or ``only`` some) on one unit."""
        from _kernel_problem import Problem

        providers = [
            p
            for p in self.providers()
            if f"{unit.key}/{p.key}" not in self.finished
            and (only is None or p.key in only)
            and (p.groups is None or unit.shape.group in p.groups)
            # What cannot be imported or compiled once is reported once.
            and not any(key.endswith(f"/{p.key}") for key in self.absent)
        ]
        if not providers:
            return
        if self.remaining() < 3:
            self.emit("skipped", section=unit.key, reason="the time limit was reached")
            return
        problem = self.guarded(f"{unit.key}/problem", 60, lambda: Problem(unit, self.pool, self.device))
        if problem is None:
            return
        if self.options.sweep and self.device.type == "cuda":
            from _kernel_sweep import precompile

            found = self.guarded(f"{unit.key}/precompile", 120, lambda: precompile(problem, providers))
            for key, error in (found or {}).items():
                self.emit("failed", section=f"{unit.key}/{key}", error=f"does not compile: {error}")
                self.finished.add(f"{unit.key}/{key}")
        for provider in providers:
            key = f"{unit.key}/{provider.key}"
            if key in self.finished:
                continue
            if self.remaining() < 1.5:
                self.emit("skipped", section=f"{unit.key}, from {provider.key} on", reason="the time limit was reached")
                break
            try:
                self.guarded(key, self.options.section_limit, lambda p=provider: self.time_one(problem, p, last))
            except Exception as error:  # noqa: BLE001 - NotReady
                if last:
                    self.emit("failed", section=key, error=str(error))
                else:
                    self.deferred.append((unit, provider.key))
        problem.forget()

    def time_one(self, problem: Any, provider: Any, last: bool) -> None:
        """Check and time one provider on one problem."""
        from _kernel_providers import TOLERANCE, require_flashinfer

        if provider.needs:
            wait = min(self.options.section_limit - 10, max(0.0, self.remaining() - 10)) if last else self.patience
            begin = time.monotonic()
            try:
                require_flashinfer(provider.needs, self.jit, wait)
            finally:
                self.patience = max(0.0, self.patience - (time.monotonic() - begin))
        prepared = provider.make(problem)
        prepared.calls[0]()
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
        errors = prepared.check()
        tolerance = 1e-3 if self.device.type == "cpu" else TOLERANCE
        if self.device.type == "cuda":
            timing = self.timer.graph(prepared.calls)
        else:
            timing = self.timer.wall(prepared.calls[:2])
        unit = problem.unit
        extra = {k: v for k, v in prepared.extra.items() if k != "outputs"}
        self.emit(
            "row",
            section=f"{unit.key}/{provider.key}",
            unit=unit.key,
            shape=unit.shape.name,
            batch=unit.batch,
            context=unit.context,
            layout=unit.layout,
            what=provider.kind,
            name=provider.name,
            **timing.row(),
            bytes=prepared.bytes,
            errors=errors,
            # NaN fails the comparison and so is wrong.
            wrong=not all(error <= tolerance for error in errors.values()),
            **extra,
        )
        del prepared


# --------------------------------------------------------------------- parent


@dataclass
class Run:
    """Records of a run and what became of its sections."""

    log: JsonLines
    records: list[dict[str, Any]] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)
    done: bool = False
    fatal: str = ""

    def add(self, record: dict[str, Any]) -> None:
        """Take in one record of the worker's."""
        kind = record["kind"]
        if kind not in ("begin", "finished"):
            self.records.append(record)
            self.log.write(record)
        if kind == "finished" and not record["section"].endswith(("/problem", "/precompile")):
            self.finished.add(record["section"])
        elif kind in ("failed", "skipped"):
            self.finished.add(record["section"])
            say(f"{record['section']}: {kind}: {record.get('error') or record.get('reason')}")
        elif kind == "row":
            mark = "  WRONG " + str(record["errors"]) if record["wrong"] else ""
            say(f"{record['section']}: {record['ms']:.4f} ms{mark}")
        elif kind == "ceilings":
            say(
                f"copy {record['copy_bytes_per_s'] / 1e12:.2f} TB/s, matrix product "
                f"{record['matrix_flops_per_s'] / 1e12:.0f} TFLOP/s"
            )
        elif kind == "done":
            self.done = True
        elif kind == "fatal":
            self.fatal = record["error"]

    def first(self, kind: str) -> dict[str, Any] | None:
        """The first record of a kind."""
        return next((r for r in self.records if r["kind"] == kind), None)


def read_lines(stream: Any, sink: queue.Queue[str | None]) -> None:
    """Pass a child's output on line by line, then None."""
    for line in stream:
        sink.put(line)
    sink.put(None)


def supervise(
    run: Run,
    command: list[str],
    plan: dict[str, Any],
    folder: Path,
    seconds: float,
    env: dict[str, str],
    restarts: int = 3,
) -> None:
    """Run workers until all is done, replacing one that dies or overruns a section; leaves the records in ``run``."""
    until = time.monotonic() + seconds
    for attempt in range(restarts + 1):
        left = until - time.monotonic()
        if left < 5 and attempt:
            run.add({"kind": "skipped", "section": "rest", "reason": "the time limit was reached"})
            return
        path = folder / f"plan-{attempt}.json"
        path.write_text(json.dumps({**plan, "finished": sorted(run.finished), "seconds": left}))
        worker = subprocess.Popen([*command, "--worker", str(path)], stdout=subprocess.PIPE, text=True, env=env)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=read_lines, args=(worker.stdout, lines), daemon=True).start()
        section, section_until = "start", time.monotonic() + 180
        overrun = False
        while True:
            try:
                line = lines.get(timeout=max(0.1, section_until - time.monotonic()))
            except queue.Empty:
                overrun = True
                worker.kill()
                break
            if line is None:
                break
            if not line.startswith(PREFIX):
                sys.stderr.write(line)
                continue
            record = json.loads(line[len(PREFIX) :])
            if record["kind"] == "begin":
                section = record["section"]
                # The time limit ends a section too, with a little grace for the last one.
                section_until = min(time.monotonic() + record["limit"], until + 15)
            run.add(record)
        status = worker.wait()
        if run.done or run.fatal:
            return
        if section not in run.finished:
            reason = "overran its time" if overrun else f"its process ended with status {status}"
            run.add({"kind": "failed", "section": section, "error": reason})
        if section in ("start", "pool"):
            return
    say("too many workers died; giving up on the rest")


def start_builders(folder: Path, command: list[str], env: dict[str, str]) -> list[subprocess.Popen[bytes]]:
    """Compile FlashInfer's modules in processes of their own, while other kernels are measured."""
    return [
        subprocess.Popen([*command, "--build", name, "--build-folder", str(folder)], stdout=sys.stderr, env=env)
        for name in FLASHINFER_MODULES
    ]


def report_text(run: Run, options: argparse.Namespace) -> str:
    """The Markdown report."""
    from _kernel_providers import BASELINES
    from _kernel_report import baseline_table, detail_table, goal_lines, main_table, summaries, sweep_tables

    ceilings = run.first("ceilings") or {}
    copy_rate = ceilings.get("copy_bytes_per_s")
    head = header_lines(run, options)
    failures = [
        f"- {r['section']}: {r.get('error') or r.get('reason')}"
        for r in run.records
        if r["kind"] in ("failed", "skipped")
    ]
    parts = ["\n".join(head)]
    if options.sweep:
        parts.append(sweep_tables(run.records, copy_rate) or "Nothing was measured.")
    else:
        found = summaries(run.records, copy_rate, BASELINES)
        parts.append("## Every kernel\n\n" + detail_table(run.records, copy_rate))
        parts.append("## Fastest kernels of SGLang's backends\n\n" + baseline_table(found))
    if failures:
        parts.append("## Not measured\n\n" + "\n".join(failures))
    if not options.sweep and not options.interpret:
        goals = "\n".join(f"- {line}" for line in goal_lines(found))
        parts.append(f"## Result\n\n{legend()}\n\n{main_table(found)}\n\nBatches that meet the goals:\n\n{goals}")
    return "\n\n".join(parts)


def header_lines(run: Run, options: argparse.Namespace) -> list[str]:
    """Where the numbers come from."""
    stamp = (run.first("stamp") or {}).get("stamp", {})
    gpu = stamp.get("gpu") or {}
    ceilings = run.first("ceilings")
    lines = [f"# Attention kernels{': launch configurations' if options.sweep else ''}", ""]
    if options.interpret:
        lines.append("Run in Triton's interpreter on a CPU, on tiny shapes: the checks count, the times mean nothing.")
    lines.append(
        f"{gpu.get('name', 'no GPU')}, driver {gpu.get('driver', '-')}, "
        + ", ".join(f"{k} {v}" for k, v in stamp.get("packages", {}).items())
        + f", commit {stamp.get('commit', '-')}, {stamp.get('date', '-')}."
    )
    if ceilings:
        lines.append(
            f"Measured in this run: copy {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s (bytes read plus written), bf16 "
            f"matrix product {ceilings['matrix_flops_per_s'] / 1e12:.0f} TFLOP/s."
        )
    return lines


def legend() -> str:
    """What the columns of the main table are."""
    return (
        f"One layer, bf16, page size 1, budget {RATIO:g} of the context, k = {DRAFT_TOKENS}, {TAIL} tail tokens per "
        "draft step. slots: a request's token slots are consecutive (runs), anywhere (random), or consecutive with "
        "lengths from a quarter of the context to all of it (ragged). of copy: K and V bytes of the selected tokens "
        "per second over the copy bandwidth (index lists not counted). vs decode: time of full decode attention by "
        "the fastest SGLang backend over draft attention. vs full: verification with scores over the fastest full "
        "attention of an SGLang backend for the same rows. select: selection over verification. "
        f"round: attention of {ACCEPTED + 1:.2f} plain decoding steps over that of {DRAFT_TOKENS} draft steps, "
        "verification and selection. same-size copy: of a contiguous block, as many bytes read and written as draft "
        "attention reads; round with it: the round if draft attention took no longer than that."
    )


def console_text(run: Run, options: argparse.Namespace, text: str, paths: Sequence[Path]) -> str:
    """What goes to stdout: the header, the result, and where the rest is."""
    tail = text
    if "## Result" in text:
        tail = "\n".join(header_lines(run, options)) + "\n\n" + text[text.index("## Result") :]
    return tail + "\n\n" + "\n".join(f"wrote {path}" for path in paths)


def predictions(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """What the bytes alone allow, per unit."""
    return [
        {
            "unit": unit.key,
            "decode_bytes": decode_bytes(unit),
            "draft_bytes": draft_bytes(unit)[0],
            "draft_index_bytes": draft_bytes(unit)[1],
            "round_by_bytes": ideal_round(unit),
        }
        for unit in units
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, *TINY], help="model shapes (default: all)")
    parser.add_argument("--batches", nargs="+", type=int, help="batch sizes (default: 32 64 128 256)")
    parser.add_argument("--contexts", nargs="+", type=int, help="context lengths (default: 8192 32768)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="slot layouts (default: both)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="only these jobs (default: all)")
    parser.add_argument("--quick", action="store_true", help="batch 64 only")
    parser.add_argument("--sweep", action="store_true", help="try launch configurations (default: batch 64, layout runs)")
    parser.add_argument("--interpret", action="store_true", help="no GPU: check tiny shapes in Triton's interpreter")
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks" / "results", help="folder for the reports")
    parser.add_argument("--time-limit", type=float, default=225.0, help="seconds for all measuring")
    parser.add_argument("--section-limit", type=float, default=45.0, help="seconds for one kernel on one batch")
    parser.add_argument("--no-flashinfer-build", action="store_true", help="let FlashInfer compile when it is first used")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--build", choices=FLASHINFER_MODULES, help=argparse.SUPPRESS)
    parser.add_argument("--build-folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    small = options.quick or options.sweep
    if options.interpret:
        options.shapes = options.shapes or list(TINY)
        if not set(options.shapes) <= set(TINY):
            parser.error(f"--interpret takes only the shapes {', '.join(TINY)}")
        options.batches = options.batches or [2]
        options.contexts = options.contexts or [300]
    options.shapes = options.shapes or list(SHAPES)
    if not options.interpret and not set(options.shapes) <= set(SHAPES):
        parser.error(f"the shapes {', '.join(TINY)} are for --interpret")
    options.batches = options.batches or ([64] if small else list(BATCHES))
    options.contexts = options.contexts or list(CONTEXTS)
    options.layouts = options.layouts or (["runs"] if options.sweep else list(LAYOUTS))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status (1: something could not be measured, 2: nothing could)."""
    options = parse(arguments)
    if options.build:
        from _kernel_providers import build_flashinfer

        build_flashinfer(options.build, options.build_folder)
        return 0
    if options.worker:
        return Worker(options).run()

    begin = time.monotonic()
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = [sys.executable, str(Path(__file__).resolve()), *given]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.interpret:
        env.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    units = plan_units(options.shapes, options.batches, options.contexts, options.layouts, tiny=options.interpret)
    plan: dict[str, Any] = {
        "units": [{"shape": u.shape.name, "batch": u.batch, "context": u.context, "layout": u.layout} for u in units],
        "jit": None,
    }
    kind = "sweep" if options.sweep else "kernels"
    date = time.strftime("%Y-%m-%d", time.gmtime())
    options.output.mkdir(parents=True, exist_ok=True)
    log_path = options.output / f"{kind}-{os.getpid()}.jsonl"
    run = Run(JsonLines(log_path))
    builders: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="kernels-") as scratch:
        folder = Path(scratch)
        try:
            if not (options.sweep or options.interpret or options.no_flashinfer_build):
                plan["jit"] = str(folder)
                builders = start_builders(folder, command, env)
            supervise(run, command, plan, folder, options.time_limit, env)
        finally:
            for builder in builders:
                if builder.poll() is None:
                    builder.terminate()
            for builder in builders:
                try:
                    builder.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    builder.kill()
    run.log.close()
    rows = [r for r in run.records if r["kind"] == "row"]
    if run.fatal or not rows:
        print(f"error: {run.fatal or 'nothing was measured; see the messages above'}", file=sys.stderr)
        return 2
    stamp = (run.first("stamp") or {}).get("stamp", {})
    gpu = (stamp.get("gpu") or {}).get("name")
    name = f"{kind}-{gpu_slug(gpu) if gpu else 'interpreted'}-{date}"
    final_log = log_path.rename(options.output / f"{name}.jsonl")
    report = {
        "stamp": {**stamp, "command": ["kernels.py", *given]},
        "seconds": round(time.monotonic() - begin, 1),
        "ceilings": run.first("ceilings"),
        "predictions": predictions(units),
        "records": [r for r in run.records if r["kind"] not in ("stamp", "ceilings", "done")],
    }
    text = report_text(run, options)
    paths = write_reports(options.output, name, report, text)
    print(console_text(run, options, text, [*paths, final_log]))
    say(f"done in {report['seconds']} s")
    bad = [r for r in rows if r["wrong"]] or [r for r in run.records if r["kind"] == "failed"]
    return 1 if bad and options.interpret else 0


if __name__ == "__main__":
    sys.exit(main())
