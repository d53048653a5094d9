"""The benchmark: a matrix of engines, models, workloads and loads in one command, with tables and plots.

    python benchmarks/run.py smoke-cpu --model-path M --results smoke.jsonl
    python benchmarks/run.py h100-main --model-path M --draft-model-path D --results main.jsonl --plots plots/
    python benchmarks/run.py my-matrix.json --model-path M --engines plain:flashinfer sparsespec --batches 64

The matrix is a preset of ``matrices/`` or a JSON file (``_matrix.py`` says what is in it); options override parts of it.
Every sample (one timed run of one cell) becomes a JSON line of ``--results`` at once, with device, versions, commit and
flags. Run the same command again after an interruption: samples that the file has from the same commit and device are
skipped, and what could not be run is tried again. Tables and plots are made from the file, ``--report-only`` makes them
alone.

With ``--resident`` all engines of a model are started together and share the GPU's memory, and samples are taken in turn,
one engine at a time: repeats are interleaved, and no time goes into starting engines again. SGLang sizes its KV pool by
what is free, so give each its share:

    python benchmarks/run.py h100-main --model-path M --resident --no-interleave --engines plain:flashinfer sparsespec ngram
        --engine-args '{"max_total_tokens": 400000, "cuda_graph_backend_prefill": "disabled"}' ...

Engines: ``plain:flashinfer``, ``plain:triton``, ``plain:torch_native`` (CPU), ``sparsespec[:POLICY]``; SGLang's
``ngram``, ``standalone`` (``--draft-model-path``) and ``eagle3`` (``--eagle3-path``); and servers that run already, through
SGLang's bench_serving: ``server`` (``--server-url``), ``vllm`` (``--vllm-url``), ``vllm-ngram`` (``--vllm-ngram-url``; vLLM
started with VLLM_SERVER_DEV_MODE=1, for flushing its cache). What is not given, or fails, is recorded as not run, with the
reason.

Offline engines are timed while decoding: prompts are prefilled first, and every sample starts from a flushed cache.
Servers are timed over whole requests. The two are never compared with each other.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _common import append_json_line, say, stamp, utc_now
from _engine_job import job_contents
from _matrix import SERVED, EngineSpec, Job, Matrix, jobs, load_matrix, turns
from _report import draw_plots, latest_not_run, load_pyplot, report
from _server_job import run_samples

HERE = Path(__file__).resolve().parent
URL_OPTIONS = {"server": "server_url", "vllm": "vllm_url", "vllm-ngram": "vllm_ngram_url"}
DRAFT_OPTIONS = {"standalone": "draft_model_path", "eagle3": "eagle3_path"}
#: Parts of the matrix that an option of the same name overrides.
OVERRIDES = (
    "batches",
    "output_lengths",
    "temperatures",
    "repeats",
    "interleave",
    "resident",
    "ignore_eos",
    "device",
    "dtype",
    "load_format",
)


class NotRun(Exception):
    """An engine cannot be run; the message says why."""


# ------------------------------------------------------------------------- results


def read_results(path: Path) -> list[dict[str, Any]]:
    """The records of a results file; an empty list if there is none.

    A last line that an interruption cut short is dropped from the file, so that the next record begins a line.
    """
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        say(f"{path}: the last line is not whole; dropped")
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def device_name(record: dict[str, Any]) -> str:
    """The GPU's name, or ``CPU``."""
    return record["gpu"]["name"] if record.get("gpu") else "CPU"


def finished(records: list[dict[str, Any]], environment: dict[str, Any]) -> set[tuple[str, int]]:
    """(key, repeat) of the samples that were measured with this commit on this device."""
    return {
        (record["key"], record["repeat"])
        for record in records
        if record["kind"] == "sample"
        and record["commit"] == environment["commit"]
        and device_name(record) == device_name(environment)
    }


def write_report(results: Path, plots: Path | None) -> None:
    """Table beside the results file, and plots."""
    records = read_results(results)
    samples = [record for record in records if record["kind"] == "sample"]
    text = report(samples, latest_not_run(records))
    results.with_suffix(".md").write_text(text)
    print(text)
    if plots and samples:
        say(f"plots: {', '.join(str(path) for path in draw_plots(samples, plots))}")


# ----------------------------------------------------------------------------- jobs


def check(job: Job, args: argparse.Namespace) -> None:
    """Look for what the job's engine needs.

    Raises:
        NotRun: it is missing.
    """
    from sglang_sparsespec.config import DRAFT_POLICIES

    kind = job.engine.kind
    if kind == "sparsespec" and job.engine.policy not in DRAFT_POLICIES:
        raise NotRun(f"--sparsespec-draft-policy {job.engine.policy} is not one of {', '.join(DRAFT_POLICIES)}")
    if kind in URL_OPTIONS and not getattr(args, URL_OPTIONS[kind]):
        raise NotRun(f"no --{URL_OPTIONS[kind].replace('_', '-')} was given")
    if kind in DRAFT_OPTIONS and "speculative_draft_model_path" not in job.engine.args:
        raise NotRun(f"no --{DRAFT_OPTIONS[kind].replace('_', '-')} was given")
    if kind in SERVED and any(cell.dataset.name == "random" for cell, _ in job.samples):
        raise NotRun("random token ids are not text, which servers are asked with; use another dataset")


def run_job(job: Job, matrix: Matrix, args: argparse.Namespace, log: Path) -> Iterator[dict[str, Any]]:
    """The samples of one job, as they are finished.

    Raises:
        NotRun: it failed; samples before that have been given.
    """
    check(job, args)
    if job.engine.kind not in SERVED:
        yield from run_engine(job_contents(job, matrix, args.log_level), args.timeout, log)
        return
    try:
        yield from run_samples(job, matrix, getattr(args, URL_OPTIONS[job.engine.kind]), log)
    except RuntimeError as error:
        raise NotRun(str(error)) from None


class EngineProcess:
    """An engine in a process of its own; what it prints is appended to ``log``.

    Args:
        contents: ``_engine_job.job_contents``.
        timeout: seconds without a line from it after which it counts as hanging.
    """

    def __init__(self, contents: dict[str, Any], timeout: float, log: Path) -> None:
        self._timeout = timeout
        self._log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        self._reading, writing = os.pipe()
        self._job = tempfile.NamedTemporaryFile("w", suffix=".json")  # noqa: SIM115 (closed with the process)
        self._job.write(json.dumps(contents))
        self._job.flush()
        with log.open("a") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "_engine_job.py"), self._job.name, str(writing)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(writing,),
                start_new_session=True,
            )
        os.close(writing)
        self._lines = lines_within(self._reading, timeout)

    def go(self) -> None:
        """Let a resident engine run its next sample."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: the next line says why
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()

    def line(self) -> dict[str, Any]:
        """The next object that it writes.

        Raises:
            NotRun: it ended, or hangs.
        """
        try:
            found = next(self._lines, None)
            if found is None:
                self._process.wait(timeout=60)
        except (TimeoutError, subprocess.TimeoutExpired):
            raise NotRun(f"the engine gave nothing for {self._timeout:g} s (--timeout)") from None
        if found is None:
            text = self._log.read_bytes()[self._log_start :].decode(errors="replace")
            raise NotRun(f"the engine ended with status {self._process.returncode}: {last_error(text)}")
        return json.loads(found)

    def finish(self) -> None:
        """Wait until it has ended by itself, as it does after its last sample; at most a minute."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=60)

    def close(self) -> None:
        """End it, whatever it does."""
        os.close(self._reading)
        end_group(self._process)
        self._job.close()


def run_engine(contents: dict[str, Any], timeout: float, log: Path) -> Iterator[dict[str, Any]]:
    """Start an engine and pass its samples on.

    Raises:
        NotRun: it ended without all samples, or gave none for ``timeout`` seconds.
    """
    with contextlib.closing(EngineProcess(contents, timeout, log)) as process:
        for _ in contents["samples"]:
            yield process.line()
        process.finish()


Outcome = tuple[Job, "dict[str, Any] | NotRun"]


def one_by_one(planned: list[Job], matrix: Matrix, args: argparse.Namespace, log: Path) -> Iterator[Outcome]:
    """Samples of the jobs, each engine by itself; of a job that cannot go on, why not."""
    for job in planned:
        with log.open("a") as file:
            file.write(f"\n=== {utc_now()} {job.model} {job.engine.label}\n")
        try:
            for sample in run_job(job, matrix, args, log):
                yield job, sample
        except NotRun as error:
            yield job, error


def together(planned: list[Job], matrix: Matrix, args: argparse.Namespace, log: Path) -> Iterator[Outcome]:
    """As :func:`one_by_one`, of one model's engines, which are all started before the first sample is taken."""
    labels = [job.engine.label for job in planned]
    running: dict[int, EngineProcess] = {}
    try:
        for index, job in enumerate(planned):
            try:
                check(job, args)
                own_log = log.with_name(f"{log.stem}.{index}.log")
                running[index] = EngineProcess(job_contents(job, matrix, args.log_level), args.timeout, own_log)
            except NotRun as error:
                yield job, error
        for index, process in list(running.items()):
            say(f"{labels[index]}: starting")
            try:
                say(f"{labels[index]}: started in {process.line()['started']:g} s")
            except NotRun as error:
                running.pop(index).close()
                yield planned[index], error
        for index, _ in turns(planned, matrix):
            if index not in running:
                continue
            try:
                running[index].go()
                yield planned[index], {**running[index].line(), "resident_engines": labels}
            except NotRun as error:
                running.pop(index).close()
                yield planned[index], error
    finally:
        for process in running.values():
            process.close()


def outcomes(planned: list[Job], matrix: Matrix, args: argparse.Namespace, log: Path) -> Iterator[Outcome]:
    """What the jobs give, in the order in which it happens."""
    if not matrix.resident:
        yield from one_by_one(planned, matrix, args, log)
        return
    for model in matrix.models:
        yield from together([job for job in planned if job.model == model], matrix, args, log)


def lines_within(descriptor: int, timeout: float) -> Iterator[bytes]:
    """Lines of a pipe until its end.

    Raises:
        TimeoutError: no line came for ``timeout`` seconds.
    """
    rest = b""
    while True:
        if not select.select([descriptor], [], [], timeout)[0]:
            raise TimeoutError
        read = os.read(descriptor, 1 << 16)
        if not read:
            return
        *lines, rest = (rest + read).split(b"\n")
        yield from lines


def end_group(process: subprocess.Popen[Any]) -> None:
    """End the engine's processes, if any are left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def last_error(text: str) -> str:
    """The line of an engine's output that says best why it ended."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "SystemExit" in line or "error:" in line]
    return (telling or lines or ["no output"])[-1][:300]


# ------------------------------------------------------------------------- command line


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", help="a preset (smoke-cpu, h100-main, ablation) or a JSON file")
    parser.add_argument("--results", type=Path, required=True, help="JSON-lines file to append to; .md and .log beside it")
    parser.add_argument("--plots", type=Path, help="folder for plots (needs matplotlib)")
    parser.add_argument("--report-only", action="store_true", help="run nothing, make table and plots of --results")
    parser.add_argument("--model-path", nargs="+", help="models; overrides the matrix")
    parser.add_argument("--engines", nargs="+")
    parser.add_argument("--datasets", nargs="+", help="aime, olympiadbench, code:TOKENS, math:TOKENS, random:TOKENS")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--output-lengths", nargs="+", type=int)
    parser.add_argument("--temperatures", nargs="+", type=float)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--interleave", action=argparse.BooleanOptionalAction, help="start engines anew for every repeat")
    parser.add_argument("--resident", action=argparse.BooleanOptionalAction, help="all engines at once, samples in turn")
    parser.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, help="outputs go on to their full length")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--dtype")
    parser.add_argument("--load-format", help="dummy: random weights (use random:TOKENS and SGLANG_SIMULATE_ACC_LEN)")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="JSON object, added to the matrix's")
    parser.add_argument("--draft-model-path", help="of the engine standalone")
    parser.add_argument("--eagle3-path", help="draft head of the engine eagle3")
    parser.add_argument("--server-url", help="of the engine server")
    parser.add_argument("--vllm-url")
    parser.add_argument("--vllm-ngram-url")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds an engine may take for a start or a sample")
    parser.add_argument("--time-limit", type=float, default=0, help="seconds after which no sample is begun; 0: none")
    parser.add_argument("--log-level", default="warning")
    return parser.parse_args(argv)


def make_matrix(args: argparse.Namespace) -> Matrix:
    """The matrix with the command line's overrides.

    Raises:
        ValueError: it is not valid.
    """
    value = load_matrix(args.matrix)
    if args.model_path:
        value["models"] = args.model_path
    if args.engines:
        # Names of the matrix's own engines keep their arguments.
        known = {spec.label: spec for spec in map(EngineSpec.parse, value.get("engines", ()))}
        value["engines"] = [dataclasses.asdict(known.get(name) or EngineSpec(name)) for name in args.engines]
    if args.datasets:
        value["datasets"] = args.datasets
    for name in OVERRIDES:
        if getattr(args, name) is not None:
            value[name] = getattr(args, name)
    value["engine_args"] = {**value.get("engine_args", {}), **args.engine_args}
    matrix = Matrix.parse(value)
    matrix = dataclasses.replace(matrix, engines=tuple(with_draft_model(spec, args) for spec in matrix.engines))
    if not matrix.models:
        raise ValueError("no model: give --model-path, or models in the matrix")
    return matrix


def with_draft_model(spec: EngineSpec, args: argparse.Namespace) -> EngineSpec:
    """The engine with the draft model that the command line gives it, if it takes one."""
    path = getattr(args, DRAFT_OPTIONS[spec.kind]) if spec.kind in DRAFT_OPTIONS else None
    if not path or "speculative_draft_model_path" in spec.args:
        return spec
    return dataclasses.replace(spec, args={**spec.args, "speculative_draft_model_path": path})


def describe(matrix: Matrix, model: str, engine: EngineSpec) -> dict[str, Any]:
    """What every record says about the engine and its flags; a server's flags come from itself, with the samples."""
    about = {
        "model": Path(model).name,
        "engine": engine.engine,
        "label": engine.label,
        "ignore_eos": matrix.ignore_eos,
        "interleaved": matrix.interleave or matrix.resident,
    }
    if engine.kind in SERVED:
        return about
    simulated = os.environ.get("SGLANG_SIMULATE_ACC_LEN") if engine.kind == "sparsespec" else None
    return {
        **about,
        "policy": engine.policy,
        "engine_args": {**matrix.engine_args, **engine.args},
        "load_format": matrix.load_format,
        "dtype": matrix.dtype,
        "prefill_backend": matrix.prefill_backend,
        "k": engine.args.get("speculative_num_steps", matrix.k) if engine.kind == "sparsespec" else None,
        "simulated_accept_length": float(simulated) if simulated else None,
    }


def run_all(matrix: Matrix, args: argparse.Namespace, environment: dict[str, Any]) -> int:
    """Run what is left to run; returns the number of engine starts that failed or could not be made."""
    from tqdm import tqdm

    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = finished(read_results(args.results), environment)
    planned = list(jobs(matrix, done))
    left = sum(len(job.samples) for job in planned)
    say(f"{left} samples to run in {len(planned)} engine starts; {len(done)} in {args.results} already")
    failures = 0
    log = args.results.with_suffix(".log")
    log.touch()
    deadline = time.monotonic() + args.time_limit if args.time_limit else math.inf
    given: dict[Job, set[tuple[str, int]]] = {job: set() for job in planned}
    ended: dict[Job, str] = {}
    # Closed at once, and so its engines, if this ends early.
    with tqdm(total=left, unit="sample") as progress, contextlib.closing(outcomes(planned, matrix, args, log)) as found:
        for job, outcome in found:
            progress.set_postfix_str(f"{Path(job.model).name} {job.engine.label}")
            about = {**environment, **describe(matrix, job.model, job.engine)}
            if isinstance(outcome, NotRun):
                ended[job] = str(outcome)
                say(f"{job.engine.label}: not run: {outcome}")
            else:
                append_json_line(args.results, {**about, "date": utc_now(), "kind": "sample", **outcome})
                given[job].add((outcome["key"], outcome["repeat"]))
                progress.update()
            if time.monotonic() > deadline:
                say("--time-limit: what is left is not run")
                break
    for job in planned:
        missing = {cell.key(matrix) for cell, repeat in job.samples if (cell.key(matrix), repeat) not in given[job]}
        failures += bool(missing)
        about = {**environment, **describe(matrix, job.model, job.engine)}
        for key in sorted(missing):
            reason = ended.get(job, f"the time limit of {args.time_limit:g} s was reached")
            append_json_line(args.results, {**about, "kind": "not run", "key": key, "reason": reason})
    return failures


def main(argv: list[str] | None = None) -> int:
    """Run with the given command line; 1 if something could not be run."""
    args = parse_arguments(argv)
    if args.plots:
        load_pyplot()  # better now than after hours
    failures = 0
    if not args.report_only:
        try:
            matrix = make_matrix(args)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        failures = run_all(matrix, args, stamp())
    write_report(args.results, args.plots)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
