"""Whole-engine throughput: plain SGLang, SPARSESPEC and SGLang's own speculation under the same loads, in one command.

    python benchmarks/throughput.py --model-path M --results throughput.jsonl --plot throughput.png \\
        --engines plain sparsespec ngram standalone,speculative_draft_model_path=D \\
        --loads code:{2048,8192},{32,128},512,0.6 aime,64,3072,0.6

A load is DATASET,BATCH,NEW_TOKENS,TEMPERATURE (bash's braces make the product; datasets: ``_common.Dataset``). Prompts are
prefilled first and sent again together, so that decoding is timed, by SGLang's ``throughput_test_once``; each sample starts
from a flushed cache. Outputs are made to go on to their full length unless ``--respect-eos`` is given.

Every engine runs in a process of its own. Each sample becomes a JSON line at once. The same command goes on after an
interruption: samples of the same commit and device are not taken again. ``--interleave`` starts every engine anew for every
repeat, so that a drift of the machine meets all of them. ``--report`` makes the table of a results file and runs nothing.

With dummy weights (``--load-format dummy``, dataset ``random:TOKENS``) set SGLANG_SIMULATE_ACC_LEN; such figures are marked
SIMULATED in every record and row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from _common import (
    Dataset,
    EngineSpec,
    add_engine_options,
    attention_backends,
    describe,
    device_name,
    flush,
    internal_state,
    markdown,
    marks,
    pyplot,
    read_records,
    repetition,
    same_origin,
    say,
    significant,
    stamp,
    start_engine,
    write_record,
)

#: What makes rows comparable with each other.
LOAD = ("model", "device", "commit", "dataset", "batch", "output_length", "temperature", "ignore_eos")


@dataclass(frozen=True)
class Load:
    """``batch`` prompts at once, each answered with ``new_tokens`` tokens."""

    dataset: Dataset
    batch: int
    new_tokens: int
    temperature: float

    @classmethod
    def parse(cls, text: str) -> Load:
        """From DATASET,BATCH,NEW_TOKENS,TEMPERATURE."""
        dataset, batch, new_tokens, temperature = text.split(",")
        return cls(Dataset.parse(dataset), int(batch), int(new_tokens), float(temperature))


def sample_key(spec: EngineSpec, load: Load, args: argparse.Namespace) -> str:
    """Name of a cell in a results file: what is readable, and a digest of all else that may change its figures."""
    rest = [args.model_path, args.engine_args, args.dtype, args.device, args.load_format, args.respect_eos, args.interleave]
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:8]
    shape = f"{load.dataset}|b{load.batch}|o{load.new_tokens}|t{load.temperature:g}"
    return f"{Path(args.model_path).name}|{spec.label}|{shape}|{digest}"


# ----------------------------------------------------------------------- measuring


class Recorder:
    """An engine for SGLang's benchmark that is sent token ids and keeps its outputs."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.outputs: list[dict[str, Any]] = []

    def generate(self, prompt: list[list[int]], sampling_params: list[dict[str, Any]], **_: Any) -> list[dict[str, Any]]:
        """As ``Engine.generate``."""
        self.outputs = self.engine.generate(input_ids=prompt, sampling_params=sampling_params)
        return self.outputs

    def get_server_info(self) -> dict[str, Any]:
        """The engine's own."""
        return self.engine.get_server_info()


def run_sample(engine: Any, load: Load, prompts: list[list[int]], ignore_eos: bool) -> dict[str, Any]:
    """One timed run, from a flushed cache."""
    from sglang.benchmark.datasets import DatasetRow
    from sglang.benchmark.offline_throughput import throughput_test_once

    flush(engine)
    fixed = {"ignore_eos": True, "temperature": load.temperature}
    for tokens in (1, 16):  # prefill, then a few rounds to warm up
        engine.generate(input_ids=prompts, sampling_params={**fixed, "max_new_tokens": tokens})
    rows = [DatasetRow(prompt=prompt, prompt_len=len(prompt), output_len=load.new_tokens) for prompt in prompts]
    recorder = Recorder(engine)
    result = throughput_test_once("engine", recorder, rows, ignore_eos, {"temperature": load.temperature}, profile=False)
    return {
        "timed": "decoding, prompts in the cache",
        "prompt_tokens": result["total_input_tokens"],
        "distinct_prompts": len(set(map(tuple, prompts))),
        "seconds": round(result["total_latency"], 3),
        "output_tokens": result["total_output_tokens"],
        "tokens_per_s": round(result["output_throughput"], 1),
        **figures_of(recorder.outputs),
        **planner_state(engine),
    }


def planner_state(engine: Any) -> dict[str, Any]:
    """What SPARSESPEC's planner believes, and the rounds by their drafts since the engine's start; {} of other engines."""
    state = internal_state(engine)
    names = ("draft_length_histogram", "acceptance_rates", "time_corrections")
    return {name: state[f"sparsespec_{name}"] for name in names if f"sparsespec_{name}" in state}


def figures_of(outputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the outputs say about themselves."""
    repeats = repetition(output["output_ids"] for output in outputs)
    accept = [output["meta_info"].get("spec_accept_length") for output in outputs]
    fresh = [value for value, repeated in zip(accept, repeats, strict=True) if not repeated]
    text = json.dumps([output["output_ids"] for output in outputs])
    return {
        "accept_length": round(mean(accept), 3) if all(accept) else None,
        "accept_length_not_repetitive": round(mean(fresh), 3) if fresh and all(fresh) else None,
        "repetitive_prompts": sum(repeats),
        "retractions": sum(output["meta_info"].get("num_retractions", 0) for output in outputs),
        # Equal for equal outputs: greedy ones of lossless engines, where arithmetic is deterministic.
        "outputs_digest": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def missing(spec: EngineSpec, repeats: Iterable[int], args: argparse.Namespace) -> list[tuple[Load, int]]:
    """The samples of an engine that the results file lacks, repeat by repeat."""
    environment = stamp()
    done = {
        (record["key"], record["repeat"])
        for record in read_records(args.results)
        if record["kind"] == "sample" and same_origin(record, environment)
    }
    wanted = [(load, repeat) for repeat in repeats for load in args.loads]
    return [(load, repeat) for load, repeat in wanted if (sample_key(spec, load, args), repeat) not in done]


def run_engine(spec: EngineSpec, repeats: Iterable[int], args: argparse.Namespace) -> None:
    """Start an engine in this process and append the samples that are missing."""
    left = missing(spec, repeats, args)
    prompts = {load: load.dataset.prompts(args.model_path, load.batch) for load, _ in left}
    engine = start_engine(spec.engine_args(args, max(load.batch for load in args.loads)))
    about = {**stamp(), **describe(spec, args), "kind": "sample", "ignore_eos": not args.respect_eos}
    about.update(attention_backends(engine), interleaved=args.interleave)
    for load, repeat in left:
        if time.time() > args.deadline:
            break
        sample = {
            "key": sample_key(spec, load, args),
            "repeat": repeat,
            "dataset": str(load.dataset),
            "batch": load.batch,
            "output_length": load.new_tokens,
            "temperature": load.temperature,
        }
        figures = run_sample(engine, load, prompts[load], not args.respect_eos)
        write_record(args.results, {**about, **sample, **figures})
        say(f"{spec.label}, {sample['key']}: {figures['tokens_per_s']:,} tokens/s, accept length {figures['accept_length']}")
    engine.shutdown()


def run_apart(spec: EngineSpec, repeats: Sequence[int], args: argparse.Namespace, argv: Sequence[str]) -> str:
    """:func:`run_engine` in a process of its own, whose output goes to a log; why it failed, "" if it did not."""
    child = ["--child", spec.label, "--child-repeats", *map(str, repeats), "--deadline", str(args.deadline)]
    log = Path(args.results).with_suffix(".log")
    begin = log.stat().st_size if log.exists() else 0
    with log.open("ab") as sink:
        try:
            grace = None if args.deadline == float("inf") else max(1.0, args.deadline - time.time()) + 120
            command = [sys.executable, __file__, *argv, *child]
            status = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, timeout=grace).returncode
        except subprocess.TimeoutExpired:
            return "it went on after the time limit"
    return last_error(log.read_bytes()[begin:].decode(errors="replace"), status) if status else ""


def last_error(text: str, status: int) -> str:
    """The line of an engine's output that says best why it ended."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "SystemExit" in line or "error:" in line]
    return f"status {status}: {(telling or lines or ['no output'])[-1][:300]}"


def run_all(args: argparse.Namespace, argv: Sequence[str]) -> bool:
    """Run what the results file lacks; whether all of it could be run."""
    complete = True
    rounds = [[repeat] for repeat in range(args.repeats)] if args.interleave else [list(range(args.repeats))]
    for repeats in rounds:
        for spec in args.engines:
            if not missing(spec, repeats, args):
                continue
            say(f"{spec.label}: starting")
            failure = run_apart(spec, repeats, args, argv) if time.time() < args.deadline else "the time limit was reached"
            for load, _ in missing(spec, repeats, args):
                reason = failure or "the time limit was reached"
                about = {**stamp(), **describe(spec, args), "kind": "not run", "key": sample_key(spec, load, args)}
                write_record(args.results, {**about, "reason": reason})
                complete = False
    return complete


# -------------------------------------------------------------------------- report


def aggregate(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per cell: medians over the repeats, with the lowest and highest.

    ``times_plain`` is the throughput over that of the fastest engine without speculation under the same load.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == "sample":
            record = {**record, "device": device_name(record)}
            groups.setdefault((record["key"], *(record[name] for name in LOAD)), []).append(record)
    rows = [_row(samples) for samples in groups.values()]
    for row in rows:
        plain = [r["tokens_per_s"] for r in rows if r["kind"] == "plain" and all(r[name] == row[name] for name in LOAD)]
        row["times_plain"] = row["tokens_per_s"] / max(plain) if plain else None
    return sorted(rows, key=lambda row: (*(str(row[name]) for name in LOAD), -row["tokens_per_s"]))


def _row(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first, rates = samples[0], [sample["tokens_per_s"] for sample in samples]

    def middle(name: str) -> float | None:
        values = [sample[name] for sample in samples if sample.get(name) is not None]
        return median(values) if values else None

    return {
        **{name: first[name] for name in LOAD},
        "engine": first["label"],
        "kind": first["engine"].partition(":")[0].partition(",")[0],
        "attention": first.get("decode_attention_backend") or first.get("attention_backend"),
        "marks": marks(first),
        "repeats": len(samples),
        "interleaved": first["interleaved"],
        "tokens_per_s": median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "accept_length": middle("accept_length"),
        "accept_length_not_repetitive": middle("accept_length_not_repetitive"),
        "repetitive": max(sample["repetitive_prompts"] for sample in samples),
        "repeated_prompts": first["batch"] - first["distinct_prompts"],
        "retractions": max(sample.get("retractions") or 0 for sample in samples),
    }


def remarks(row: dict[str, Any]) -> str:
    """What a reader must know before using the row's figures."""
    found = list(row["marks"])
    if row["repetitive"]:
        found.append(f"{row['repetitive']} of {row['batch']} outputs repeat themselves")
    if row["ignore_eos"]:
        found.append("outputs go on past their end")
    if row["repeated_prompts"]:
        found.append(f"{row['repeated_prompts']} prompts are asked more than once")
    if row["retractions"]:
        found.append(f"{row['retractions']} retractions")
    if row["repeats"] < 3:
        found.append("one run" if row["repeats"] == 1 else f"{row['repeats']} runs")
    if not row["interleaved"] and row["repeats"] > 1:
        found.append("runs of one engine start")
    return "; ".join(found)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of one load beside each other."""
    return markdown(
        [
            {
                "model": row["model"],
                "load": f"{row['batch']} x {row['dataset']}, {row['output_length']} new, T {row['temperature']:g}",
                "engine": row["engine"],
                "attention": row["attention"],
                "tokens/s": round(row["tokens_per_s"]),
                "lowest": round(row["lowest"]),
                "highest": round(row["highest"]),
                "x plain": significant(row["times_plain"]),
                "accept length": significant(row["accept_length"]),
                "not repeating": significant(row["accept_length_not_repetitive"]),
                "remarks": remarks(row),
            }
            for row in rows
        ]
    )


def report(records: Sequence[dict[str, Any]]) -> str:
    """The Markdown report of a results file."""
    samples = [record for record in records if record["kind"] == "sample"]
    origins = sorted({f"Commit {r['commit']}, {device_name(r)}, SGLang {r['packages'].get('sglang')}." for r in samples})
    parts = [*origins, table(aggregate(samples))] if samples else []
    taken = {record["key"] for record in samples}
    failed = {(r["label"], r["reason"]): r for r in records if r["kind"] == "not run" and r["key"] not in taken}
    parts += [f"Not run: {label}: {reason}" for label, reason in failed]
    return "\n\n".join(parts) + "\n"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of the throughput over plain decoding's, by load and engine; SIMULATED figures say so."""
    import pandas

    compared = [row for row in rows if row["times_plain"] is not None]
    if not compared:
        say("no plot: no engine without speculation was measured")
        return
    frame = pandas.DataFrame(
        {
            "load": f"{row['batch']} x {row['dataset']}\n{row['output_length']} new, T {row['temperature']:g}",
            "engine": " ".join([row["engine"], *(f"({mark})" for mark in row["marks"])]),
            "times": row["times_plain"],
        }
        for row in compared
    )
    plt = pyplot()
    axes = frame.pivot_table(index="load", columns="engine", values="times", sort=False).plot.bar(rot=0, figsize=(9, 4.5))
    axes.axhline(1, color="grey", linewidth=0.8)
    title = f"{compared[0]['model']}, {compared[0]['device']}"
    axes.set(ylabel="throughput / fastest plain decoding", xlabel="", title=title)
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(axes.figure)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser, ["plain", "sparsespec"])
    parser.add_argument("--loads", nargs="+", type=Load.parse, default=[Load(Dataset("code", 8192), 64, 512, 0.6)])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--interleave", action="store_true", help="start every engine anew for every repeat")
    parser.add_argument("--respect-eos", action="store_true", help="let outputs end")
    parser.add_argument("--time-limit", type=float, default=0, help="seconds after which no sample is begun; 0: none")
    parser.add_argument("--report", action="store_true", help="make the table (and plot) of --results only")
    parser.add_argument("--plot", type=Path, help="image to write")
    parser.add_argument("--child", type=EngineSpec.parse, help=argparse.SUPPRESS)
    parser.add_argument("--child-repeats", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.results:
        parser.error("--results is needed")
    if args.time_limit and not args.child:
        args.deadline = time.time() + args.time_limit
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given command line; 1 if something could not be run."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_arguments(argv)
    if args.child:
        run_engine(args.child, args.child_repeats, args)
        return 0
    complete = args.report or run_all(args, argv)
    records = read_records(args.results)
    print(report(records))
    if args.plot:
        plot(aggregate(records), args.plot)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
