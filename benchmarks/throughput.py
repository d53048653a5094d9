"""Whole-engine throughput: plain SGLang, SPARSESPEC, SGLang's own speculation and vLLM under the same loads, in one command.

    python benchmarks/throughput.py --model-path M --results throughput.jsonl --plot throughput.png \\
        --engines plain sparsespec ngram standalone,speculative_draft_model_path=D vllm vllm:ngram \\
        --vllm-python "env PYTHONPATH=/tmp/vllm-site python3" \\
        --loads code:{2048,8192},{32,128},512,0.6 aime+olympiadbench,64,4096,0.6,128

A load is DATASET,BATCH,NEW_TOKENS,TEMPERATURE (bash's braces make the product; datasets: ``_common.Dataset``). Prompts are
prefilled first and sent again together, so that decoding is timed; each sample starts from an empty cache. "Whole run" adds
the time of prefilling them.

With a fifth part, REQUESTS, the batch is kept full: so many requests are asked from an empty cache, BATCH of them under way
at once, each sent when another ends. Tokens per second are then those of the time in which the batch was full (from when all
run to the first end of a request that no other follows), and of the whole run. Tokens are counted by the engines themselves.

Outputs are made to go on to their full length unless ``--respect-eos`` is given. Prompts are made once, as token ids in a
file that all engines read (``--prompts``); ``--make-prompts`` makes it beforehand and runs nothing. vLLM is started by
``--vllm-python``, so that it may lie in an environment of its own. ``plain,quantization=fp8,kv_cache_dtype=fp8_e4m3`` is
SGLang with FP8 weights and KV, marked "not lossless".

Every engine runs in a process of its own. Those that differ in ``sparsespec_speculate`` alone share one, which is switched
between them for each load, in the order given. Each sample becomes a JSON line at once. The same command goes on after an
interruption: samples of the same commit and device are not taken again, and one that ``--time-limit`` cuts is given up.
``--interleave`` starts every engine anew for every repeat, so that a drift of the machine meets all of them. ``--turns``
lets engines of several commands start side by side and measures them in turn.

Servers that run already are measured as LABEL=sglang@URL, after the engines: each sample of all of them in turn, beginning
with another one for each load (``--engines --attach main=sglang@http://127.0.0.1:30000 new=sglang@http://127.0.0.1:30001``).
So two builds of the plugin are compared without a drift of the machine between them. The label ``plain`` is the baseline.
Records have the commit of this checkout; a label may name the server's.

``--report`` makes the table of a results file and runs nothing.

With dummy weights (``--load-format dummy``, dataset ``random:TOKENS``) set SGLANG_SIMULATE_ACC_LEN; such figures are marked
SIMULATED in every record and row.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from _attached import Attached, AttachedServer
from _common import (
    NOT_LOSSLESS,
    Dataset,
    EngineSpec,
    OutOfTime,
    Progress,
    Served,
    add_engine_options,
    add_prompt_options,
    add_turn_option,
    attention_backends,
    describe,
    device_name,
    flush,
    internal_state,
    make_prompts,
    markdown,
    marks,
    measuring,
    prompts_of,
    pyplot,
    read_records,
    repetition,
    same_origin,
    say,
    significant,
    simulated_accept_length,
    stamp,
    start_engine,
    starting,
    write_record,
)
from _vllm import SAMPLE_SECONDS, VllmEngine

#: What makes rows comparable with each other.
LOAD = ("model", "device", "commit", "dataset", "batch", "requests", "output_length", "temperature", "ignore_eos")
#: The setting that a running engine of SPARSESPEC can be given.
SPECULATE = "sparsespec_speculate"
#: Decode rounds between two load snapshots of SGLang's scheduler, while its progress is looked at.
PUBLISH_INTERVAL = 4


@dataclass(frozen=True)
class Load:
    """``batch`` prompts at once, each answered with ``new_tokens`` tokens.

    Attributes:
        requests: of them all, ``batch`` at a time; None: there is one batch, whose prompts are in the cache.
    """

    dataset: Dataset
    batch: int
    new_tokens: int
    temperature: float
    requests: int | None = None

    @classmethod
    def parse(cls, text: str) -> Load:
        """From DATASET,BATCH,NEW_TOKENS,TEMPERATURE[,REQUESTS].

        Raises:
            ValueError: there are too many or too few parts.
            ArgumentTypeError: no such dataset, or fewer requests than run at once.
        """
        dataset, batch, new_tokens, temperature, *requests = text.split(",")
        found = cls(Dataset.parse(dataset), int(batch), int(new_tokens), float(temperature), *map(int, requests))
        if found.prompts < found.batch:
            raise argparse.ArgumentTypeError(f"{text!r}: a batch of {found.batch} is never full")
        return found

    @property
    def prompts(self) -> int:
        """How many there are."""
        return self.batch if self.requests is None else self.requests

    def describe(self) -> dict[str, Any]:
        """What a record says about it."""
        return {
            "dataset": str(self.dataset),
            "batch": self.batch,
            "requests": self.prompts,
            "kept_full": self.requests is not None,
            "output_length": self.new_tokens,
            "temperature": self.temperature,
        }


def sample_key(spec: EngineSpec | Attached, load: Load, args: argparse.Namespace) -> str:
    """Name of a cell in a results file: what is readable, and a digest of all else that may change its figures."""
    rest = [args.model_path, args.engine_args, args.dtype, args.device, args.load_format, args.respect_eos, args.interleave]
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:8]
    shape = f"{load.dataset}|b{load.batch}|o{load.new_tokens}|t{load.temperature:g}"
    if load.requests is not None:
        shape += f"|n{load.requests}"
    return f"{Path(args.model_path).name}|{spec.label}|{shape}|{digest}"


# ----------------------------------------------------------------------- measuring


def run_sample(engine: Any, load: Load, prompts: list[list[int]], ignore_eos: bool, deadline: float) -> dict[str, Any]:
    """One timed run, from a flushed cache.

    Raises:
        OutOfTime: the deadline (``time.time()``) came before the end of a run with a full batch.
    """
    flush(engine)
    take = time_batch if load.requests is None else time_full_batch
    figures, outputs = take(engine, load, prompts, ignore_eos, deadline)
    return {
        "prompt_tokens": sum(map(len, prompts)),
        "distinct_prompts": len(set(map(tuple, prompts))),
        "prompts_digest": digest(prompts),
        **figures,
        **figures_of(outputs),
        **(engine.figures if isinstance(engine, VllmEngine) else planner_state(engine)),
    }


def time_batch(
    engine: Any, load: Load, prompts: list[list[int]], ignore_eos: bool, deadline: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and outputs of one batch whose prompts are in the cache."""
    fixed = {"ignore_eos": True, "temperature": load.temperature}
    started = time.perf_counter()
    engine.generate(input_ids=prompts, sampling_params={**fixed, "max_new_tokens": 1})
    prefill = time.perf_counter() - started
    engine.generate(input_ids=prompts, sampling_params={**fixed, "max_new_tokens": 16})  # a few rounds to warm up
    sampling = {**fixed, "ignore_eos": ignore_eos, "max_new_tokens": load.new_tokens}
    started = time.perf_counter()
    outputs = engine.generate(input_ids=prompts, sampling_params=sampling)
    seconds = time.perf_counter() - started
    tokens = completion_tokens(outputs)
    figures = {
        "timed": "decoding, prompts in the cache",
        "seconds": round(seconds, 3),
        "prefill_seconds": round(prefill, 3),
        "output_tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
        "tokens_per_s_whole": round(tokens / (prefill + seconds), 1),
    }
    return figures, outputs


def time_full_batch(
    engine: Any, load: Load, prompts: list[list[int]], ignore_eos: bool, deadline: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and outputs of a run in which requests are sent as others end.

    Raises:
        OutOfTime: the deadline came first.
    """
    sampling = {"ignore_eos": ignore_eos, "temperature": load.temperature, "max_new_tokens": load.new_tokens}
    few = {**sampling, "ignore_eos": True, "max_new_tokens": 16}
    engine.generate(input_ids=prompts[: load.batch], sampling_params=few)  # a few rounds to warm up
    flush(engine)
    serve = engine.serve if isinstance(engine, VllmEngine) else lambda *given: serve_sglang(engine, *given)
    served = serve(prompts, sampling, load.batch, deadline)
    return full_batch_figures(served, load.batch), served.outputs


def serve_sglang(
    engine: Any, prompts: list[list[int]], sampling: dict[str, Any], at_once: int, deadline: float = float("inf")
) -> Served:
    """As :meth:`VllmEngine.serve`, of ``sglang.Engine``."""
    return engine.loop.run_until_complete(_serve_sglang(engine, prompts, sampling, at_once, deadline))


async def _serve_sglang(
    engine: Any, prompts: list[list[int]], sampling: dict[str, Any], at_once: int, deadline: float
) -> Served:
    started = time.time()
    progress = [Progress(started, sglang_progress(engine).generated, 0)]
    outputs: list[Any] = [None] * len(prompts)
    places = asyncio.Semaphore(at_once)
    sent = 0
    turns: list[float] = []
    drains: list[float] = []

    async def ask(index: int) -> None:
        nonlocal sent
        async with places:
            if time.time() > deadline:
                return
            sent += 1
            outputs[index] = await engine.async_generate(input_ids=prompts[index], sampling_params=dict(sampling))
            turns.append(time.time())
            if sent == len(prompts):
                drains.append(turns[-1])

    answers = asyncio.gather(*map(ask, range(len(prompts))))
    while not answers.done():
        await asyncio.wait([answers], timeout=SAMPLE_SECONDS)
        progress.append(sglang_progress(engine))
        if time.time() > deadline and not answers.done():
            engine.tokenizer_manager.abort_request(abort_all=True)
            await answers
            raise OutOfTime
    await answers
    if sent < len(prompts):  # the deadline came before their places were free
        raise OutOfTime
    ended = time.time()
    await asyncio.sleep(2 * SAMPLE_SECONDS)  # an idle scheduler publishes its load at once
    progress.append(sglang_progress(engine)._replace(t=ended, running=0))
    newest = {sample.t: sample for sample in progress if started <= sample.t <= ended}
    return Served(outputs, [newest[t] for t in sorted(newest)], started, turns[0], drains[0], ended)


def sglang_progress(engine: Any) -> Progress:
    """The scheduler's newest load snapshot."""
    load = engine.tokenizer_manager.load_snapshot_reader.read_all()[0]
    return Progress(load.timestamp, load.decode_moments[5] if load.decode_moments else 0.0, load.num_running_reqs)


def full_batch_figures(served: Served, batch: int) -> dict[str, Any]:
    """Figures of the whole run, and of the time in which the batch was full.

    That is from the first sample with ``batch`` running requests to ``served.drains``. If so many did not run before the
    first one ended, as where the KV pool is too small for them, it is from the first sample with a token on. An engine's
    own count leaves out first tokens, or has some too many at a request's end; so it is taken for shares of the tokens.

    Raises:
        RuntimeError: the engine's count does not change, or the batch was full for no time at all.
    """
    progress, tokens = served.progress, completion_tokens(served.outputs)
    counted = progress[-1].generated - progress[0].generated
    if counted <= 0:
        raise RuntimeError("the engine's count of generated tokens does not change")
    began = [sample.t for sample in progress if sample.running >= batch and sample.t <= served.turns]
    began = began or [sample.t for sample in progress if sample.generated > progress[0].generated]
    begin, end = began[0], served.drains
    if end <= begin:
        raise RuntimeError("the batch was never full between two samples: ask for more, or for longer outputs")
    share = (tokens_until(progress, end) - tokens_until(progress, begin)) / counted
    full = [sample.running for sample in progress if begin <= sample.t < end]
    seconds = served.ended - served.started
    return {
        "timed": "while the batch was full",
        "seconds": round(seconds, 3),
        "output_tokens": tokens,
        "tokens_per_s": round(share * tokens / (end - begin), 1),
        "tokens_per_s_whole": round(tokens / seconds, 1),
        "full_from_s": round(begin - served.started, 3),
        "full_to_s": round(end - served.started, 3),
        "full_share_of_tokens": round(share, 4),
        "mean_running_full": round(mean(full), 2),
        "counted_tokens": round(counted),
        "progress": [[round(s.t - served.started, 2), round(s.generated), s.running] for s in progress],
    }


def tokens_until(progress: Sequence[Progress], t: float) -> float:
    """An engine's count at a time between samples, by a straight line."""
    for left, right in zip(progress, progress[1:], strict=False):
        if left.t <= t <= right.t and right.t > left.t:
            return left.generated + (right.generated - left.generated) * (t - left.t) / (right.t - left.t)
    return progress[-1].generated if t > progress[-1].t else progress[0].generated


def completion_tokens(outputs: Iterable[dict[str, Any]]) -> int:
    """Tokens of all outputs."""
    return sum(output["meta_info"]["completion_tokens"] for output in outputs)


def digest(tokens: Any) -> str:
    """Equal for equal token ids."""
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


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
    return {
        "accept_length": round(mean(accept), 3) if all(accept) else None,
        "accept_length_not_repetitive": round(mean(fresh), 3) if fresh and all(fresh) else None,
        "repetitive_prompts": sum(repeats),
        "retractions": sum(output["meta_info"].get("num_retractions", 0) for output in outputs),
        # Equal for equal outputs: greedy ones of lossless engines, where arithmetic is deterministic.
        "outputs_digest": digest([output["output_ids"] for output in outputs]),
    }


def missing(spec: EngineSpec | Attached, repeats: Iterable[int], args: argparse.Namespace) -> list[tuple[Load, int]]:
    """The samples of an engine that the results file lacks, repeat by repeat."""
    environment = stamp()
    done = {
        (record["key"], record["repeat"])
        for record in read_records(args.results)
        if record["kind"] == "sample" and same_origin(record, environment)
    }
    wanted = [(load, repeat) for repeat in repeats for load in args.loads]
    return [(load, repeat) for load, repeat in wanted if (sample_key(spec, load, args), repeat) not in done]


def start_of(spec: EngineSpec) -> tuple[Any, ...]:
    """What an engine is started with; its rounds may be switched while it runs."""
    settings = {name: value for name, value in spec.settings.items() if name != SPECULATE}
    return spec.kind, spec.details, json.dumps(settings, sort_keys=True)


def sharing(specs: Iterable[EngineSpec]) -> list[list[EngineSpec]]:
    """Those that one engine can be, one after the other, in the order of the first."""
    groups: dict[tuple[Any, ...], list[EngineSpec]] = {}
    for spec in specs:
        groups.setdefault(start_of(spec), []).append(spec)
    return list(groups.values())


def run_engine(specs: Sequence[EngineSpec], repeats: Sequence[int], args: argparse.Namespace) -> None:
    """Start the engine that ``specs`` share in this process, and append the samples that are missing."""
    lacking = {spec.label: missing(spec, repeats, args) for spec in specs}
    left = [(load, repeat) for repeat in repeats for load in args.loads]
    samples = [(spec, *pair) for pair in left for spec in specs if pair in lacking[spec.label]]
    prompts = {load: prompts_of(args.prompts, load.dataset, load.prompts) for _, load, _ in samples}
    with starting(args.turns):
        engine = start(samples[0][0], args)
    same = {"kind": "sample", "ignore_eos": not args.respect_eos, "interleaved": args.interleave}
    same |= {**stamp(), **attention_backends(engine)}
    for spec, load, repeat in samples:
        sample = {**describe(spec, args), "key": sample_key(spec, load, args), "repeat": repeat, **load.describe()}
        try:
            with measuring(args.turns):
                if time.time() > args.deadline:
                    break
                if len(specs) > 1:
                    switch(engine, spec.settings.get(SPECULATE, "auto"))
                figures = run_sample(engine, load, prompts[load], not args.respect_eos, args.deadline)
        except OutOfTime:
            say(f"{spec.label}, {sample['key']}: given up at the time limit")
            break
        write_record(args.results, {**same, **sample, **figures})
        say(f"{spec.label}, {sample['key']}: {figures['tokens_per_s']} tokens/s, accept length {figures['accept_length']}")
    engine.shutdown()


def run_attached(args: argparse.Namespace) -> bool:
    """Measure the servers that run already, in turn, and append the samples that are missing; whether there is none left."""
    servers = [(attached, AttachedServer(attached.url)) for attached in args.attach]
    lacking = {attached: missing(attached, range(args.repeats), args) for attached, _ in servers}
    wanted = {load for pairs in lacking.values() for load, _ in pairs}
    prompts = {load: prompts_of(args.prompts, load.dataset, load.prompts) for load in wanted}
    same, complete = stamp(), True
    for number, (repeat, load) in enumerate(itertools.product(range(args.repeats), args.loads)):
        first = number % max(1, len(servers))
        for attached, engine in servers[first:] + servers[:first]:
            if (load, repeat) not in lacking[attached]:
                continue
            key = sample_key(attached, load, args)
            try:
                with measuring(args.turns):
                    found = sample_of_attached(engine, load, prompts[load], args)
            except OutOfTime:
                say(f"{attached.label}, {key}: given up at the time limit")
                return False
            except (OSError, RuntimeError) as error:  # OSError: all errors of requests, too
                found = {"kind": "not run", "reason": str(error)[:300]}
                complete = False
            about = {**same, **describe_attached(attached, args), **load.describe(), "key": key, "repeat": repeat}
            write_record(args.results, {**about, **found})
            say(f"{attached.label}, {key}: {found.get('tokens_per_s', found['kind'])}")
    return complete


def sample_of_attached(
    engine: AttachedServer, load: Load, prompts: list[list[int]], args: argparse.Namespace
) -> dict[str, Any]:
    """Figures of one sample.

    Raises:
        OutOfTime: the deadline came first.
        OSError, RuntimeError: the server did not answer, or as :func:`run_sample`.
    """
    if time.time() > args.deadline:
        raise OutOfTime
    figures = run_sample(engine, load, prompts, not args.respect_eos, args.deadline)
    about = {"kind": "sample", "ignore_eos": not args.respect_eos, "interleaved": True}
    return {**about, **attention_backends(engine), **figures}


def describe_attached(attached: Attached, args: argparse.Namespace) -> dict[str, Any]:
    """What a record says about a server that runs already."""
    return {
        "model": Path(args.model_path).name,
        "engine": attached.label,
        "label": attached.label,
        "server_url": attached.url,
        "simulated_accept_length": simulated_accept_length(attached.label.partition("-")[0]),
        "load_format": args.load_format,
    }


def switch(engine: Any, rounds: str) -> None:
    """Set ``sparsespec_speculate`` of a running ``sglang.Engine``.

    Raises:
        RuntimeError: the engine did not take it.
    """
    from sglang.srt.managers.io_struct import SetInternalStateReq

    from sglang_sparsespec import settings

    request = SetInternalStateReq(server_args={SPECULATE: settings.SPECULATE.index(rounds)})
    if not all(engine.loop.run_until_complete(engine.tokenizer_manager.set_internal_state(request))):
        raise RuntimeError(f"{SPECULATE} could not be set to {rounds}")


def start(spec: EngineSpec, args: argparse.Namespace) -> Any:
    """The engine, with room for the largest of the loads' batches."""
    largest = max(load.batch for load in args.loads)
    if spec.kind == "vllm":
        return VllmEngine(spec.vllm_args(args, largest))
    settings = spec.engine_args(args, largest)
    if any(load.requests is not None for load in args.loads):
        settings.setdefault("load_snapshot_publish_interval", PUBLISH_INTERVAL)
    return start_engine(settings)


def run_apart(specs: Sequence[EngineSpec], repeats: Sequence[int], args: argparse.Namespace, argv: Sequence[str]) -> str:
    """:func:`run_engine` in a process of its own, whose output goes to a log; why it failed, "" if it did not."""
    labels = [spec.label for spec in specs]
    child = ["--child", *labels, "--child-repeats", *map(str, repeats), "--deadline", str(args.deadline)]
    log = Path(args.results).with_suffix(".log")
    begin = log.stat().st_size if log.exists() else 0
    with log.open("ab") as sink:
        try:
            grace = None if args.deadline == float("inf") else max(1.0, args.deadline - time.time()) + 120
            python = shlex.split(args.vllm_python) if specs[0].kind == "vllm" else [sys.executable]
            command = [*python, __file__, *argv, *child]
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
    wanted = [pair for spec in [*args.engines, *args.attach] for pair in missing(spec, range(args.repeats), args)]
    make_prompts(args.prompts, args.model_path, [(load.dataset, load.prompts) for load, _ in wanted])
    rounds = [[repeat] for repeat in range(args.repeats)] if args.interleave else [list(range(args.repeats))]
    for repeats in rounds:
        for specs in sharing(spec for spec in args.engines if missing(spec, repeats, args)):
            say(f"{' and '.join(spec.label for spec in specs)}: starting")
            failure = run_apart(specs, repeats, args, argv) if time.time() < args.deadline else "the time limit was reached"
            not_run = [(spec, load) for spec in specs for load, _ in missing(spec, repeats, args)]
            for spec, load in not_run:
                reason = failure or "the time limit was reached"
                about = {**stamp(), **describe(spec, args), "kind": "not run", "key": sample_key(spec, load, args)}
                write_record(args.results, {**about, "reason": reason})
                complete = False
    return run_attached(args) and complete


# -------------------------------------------------------------------------- report


def aggregate(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per cell: medians over the repeats, with the lowest and highest.

    ``times_plain`` is the throughput over that of the fastest lossless SGLang without speculation under the same load.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == "sample":
            record = {"requests": record["batch"], **record, "device": device_name(record)}
            groups.setdefault((record["key"], *(record[name] for name in LOAD)), []).append(record)
    rows = [_row(samples) for samples in groups.values()]
    for row in rows:
        plain = [r["tokens_per_s"] for r in rows if is_baseline(r) and all(r[name] == row[name] for name in LOAD)]
        row["times_plain"] = row["tokens_per_s"] / max(plain) if plain else None
    return sorted(rows, key=lambda row: (*(str(row[name]) for name in LOAD), -row["tokens_per_s"]))


def is_baseline(row: dict[str, Any]) -> bool:
    """Whether others may be compared with it: SGLang without speculation, and lossless."""
    return row["kind"] == "plain" and NOT_LOSSLESS not in row["marks"]


def load_name(row: dict[str, Any], separator: str = ", ") -> str:
    """A row's load for people."""
    load = f"{row['batch']} x {row['dataset']}"
    if row["kept_full"]:
        load = f"{row['requests']} x {row['dataset']}, {row['batch']} at once"
    return f"{load}{separator}{row['output_length']} new, T {row['temperature']:g}"


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
        "kept_full": first.get("kept_full", False),
        "full_share": middle("full_share_of_tokens"),
        "mean_running": middle("mean_running_full"),
        "tokens_per_s_whole": middle("tokens_per_s_whole"),
        "tokens_per_s": median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "accept_length": middle("accept_length"),
        "accept_length_not_repetitive": middle("accept_length_not_repetitive"),
        "repetitive": max(sample["repetitive_prompts"] for sample in samples),
        "repeated_prompts": first["requests"] - first["distinct_prompts"],
        "retractions": max(sample.get("retractions") or 0 for sample in samples),
    }


def remarks(row: dict[str, Any]) -> str:
    """What a reader must know before using the row's figures."""
    found = list(row["marks"])
    if row["repetitive"]:
        found.append(f"{row['repetitive']} of {row['requests']} outputs repeat themselves")
    if row["kept_full"]:
        found.append(f"the batch was full for {row['full_share']:.0%} of the tokens")
        if row["mean_running"] < 0.95 * row["batch"]:
            found.append(f"{row['mean_running']:.1f} of {row['batch']} ran on average")
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
                "load": load_name(row),
                "engine": row["engine"],
                "attention": row["attention"],
                "tokens/s": round(row["tokens_per_s"]),
                "lowest": round(row["lowest"]),
                "highest": round(row["highest"]),
                "whole run": round(row["tokens_per_s_whole"]) if row["tokens_per_s_whole"] is not None else None,
                "x plain": significant(row["times_plain"]),
                "accept length": significant(row["accept_length"]),
                "not repeating": significant(row["accept_length_not_repetitive"]),
                "remarks": remarks(row),
            }
            for row in rows
        ]
    )


def server_of(record: dict[str, Any]) -> str:
    """SGLang or vLLM, and its version."""
    name = "vLLM" if record["label"].startswith("vllm") else "SGLang"
    return f"{name} {record['packages'].get(name.lower())}"


def report(records: Sequence[dict[str, Any]]) -> str:
    """The Markdown report of a results file."""
    samples = [record for record in records if record["kind"] == "sample"]
    origins = sorted({f"Commit {r['commit']}, {device_name(r)}, {server_of(r)}." for r in samples})
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
            "load": load_name(row, "\n"),
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
    add_engine_options(parser, ["plain", "sparsespec"], vllm=True)
    parser.add_argument("--attach", nargs="+", type=Attached.parse, default=[], help="servers that run already")
    parser.add_argument("--loads", nargs="+", type=Load.parse, default=[Load(Dataset("code", 8192), 64, 512, 0.6)])
    parser.add_argument("--repeats", type=int, default=3)
    add_prompt_options(parser)
    add_turn_option(parser)
    parser.add_argument("--vllm-python", default=sys.executable, help="command that starts a Python that has vLLM")
    parser.add_argument("--interleave", action="store_true", help="start every engine anew for every repeat")
    parser.add_argument("--respect-eos", action="store_true", help="let outputs end")
    parser.add_argument("--time-limit", type=float, default=0, help="seconds after which no sample is begun; 0: none")
    parser.add_argument("--report", action="store_true", help="make the table (and plot) of --results only")
    parser.add_argument("--plot", type=Path, help="image to write")
    parser.add_argument("--child", nargs="+", type=EngineSpec.parse, help=argparse.SUPPRESS)
    parser.add_argument("--child-repeats", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.results:
        parser.error("--results is needed")
    if others := [attached.label for attached in args.attach if attached.backend != "sglang"]:
        parser.error(f"--attach {others[0]}: only servers of SGLang (LABEL=sglang@URL)")
    args.prompts = args.prompts or Path(args.results).with_suffix(".prompts.json")
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
    if args.make_prompts:
        make_prompts(args.prompts, args.model_path, [(load.dataset, load.prompts) for load in args.loads])
        return 0
    complete = args.report or run_all(args, argv)
    records = read_records(args.results)
    print(report(records))
    if args.plot:
        plot(aggregate(records), args.plot)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
