"""Where a round's GPU time goes: attention, matrix products, other kernels, idle; from a torch.profiler trace of an engine.

    python benchmarks/profile_round.py --model-path M --engines sparsespec,sparsespec_speculate=always plain \\
        --cases code:8192,64 --results profile.jsonl --traces traces/

Prompts are prefilled, then sent again together; once all of them decode, ``--rounds`` scheduler steps are recorded by
SGLang's profiler, and one before them that is dropped: starting the profiler stops the GPU. A step is a round of drafts and
a verification for SPARSESPEC, one token for plain decoding. Kernels may overlap (programmatic dependent launch begins one
before the one before it has ended): each is counted for what it adds to the time that earlier ones cover, so that the shares
and the idle time add up to the whole. A draft step's kernels are listed by themselves too, and so are the scheduler's calls
of CUDA: one that takes longer than a launch does (some 10 us) waits for the GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import re
import sys
import tempfile
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import (
    Dataset,
    EngineSpec,
    add_engine_options,
    attention_backends,
    describe,
    flush,
    markdown,
    marks,
    say,
    stamp,
    start_engine,
    write_record,
)

GPU_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
HOST_CATEGORIES = {"cuda_runtime", "cuda_driver"}
#: Gaps up to this length (us) are the GPU's own, between dependent kernels of a CUDA graph; in longer ones it waits.
LAUNCH_GAP_US = 5.0
#: Parts of the names of this project's attention kernels.
DRAFT_ATTENTION, VERIFY_ATTENTION = "_draft_kernel", "_verify_kernel"
#: Groups of kernels, by names; what matches none is "other".
GROUPS = {
    "attention": r"attention|attn|flash_?fwd|fmha|_draft_|_verify_|_select|_scores|window_lse|BatchDecode|BatchPrefill"
    r"|_lists_kernel|_row_offsets|_hand_over",
    "matrix products": r"gemm|nvjet|cutlass|cublas|splitk|marlin|gemv",
}


@dataclass(frozen=True)
class Event:
    """A kernel, copy or fill on the GPU, or a call of CUDA: start and duration in microseconds."""

    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        """Microsecond at which it ends."""
        return self.start + self.duration


def group_of(kernel: str) -> str:
    """The group of a kernel's name."""
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


def load_events(path: Path, *kinds: Set[str]) -> list[list[Event]]:
    """For each of ``kinds``, a set of categories, its events of a Chrome trace (plain or gzip), by start.

    Raises:
        ValueError: the trace has none of a kind.
    """
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        trace = json.load(file)
    return [_events_of(trace, categories, path) for categories in kinds]


def _events_of(trace: dict[str, Any], categories: Set[str], path: Path) -> list[Event]:
    events = [
        Event(event["name"], float(event["ts"]), float(event["dur"]))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in categories
    ]
    if not events:
        names = ", ".join(sorted(categories))
        raise ValueError(f"{path} holds no events of {names}; was the profiler run with the GPU activity?")
    return sorted(events, key=lambda event: event.start)


def without_first_step(events: Sequence[Event], steps: int) -> list[Event]:
    """The events of all but the first of ``steps`` equally long steps."""
    window = max(event.end for event in events) - events[0].start
    return [event for event in events if event.start >= events[0].start + window / steps]


def breakdown(events: Sequence[Event], steps: int, top: int = 30) -> dict[str, Any]:
    """Time of a step by group and by kernel, and idle shares; ``events`` (by start) are those of ``steps`` steps."""
    reached = events[0].start
    idle = waiting = longest = 0.0
    kernels: dict[str, list[float]] = {}
    for event in events:
        gap = max(0.0, event.start - reached)
        idle += gap
        waiting += gap if gap > LAUNCH_GAP_US else 0.0
        longest = max(longest, gap)
        entry = kernels.setdefault(event.name, [0, 0.0])
        entry[0] += 1
        entry[1] += max(0.0, event.end - max(event.start, reached))
        reached = max(reached, event.end)
    window = reached - events[0].start
    shares = dict.fromkeys([*GROUPS, "other"], 0.0)
    for name, (_, microseconds) in kernels.items():
        shares[group_of(name)] += microseconds / window
    longest_first = sorted(kernels.items(), key=lambda item: -item[1][1])[:top]
    return {
        "ms_per_step": window / 1e3 / steps,
        "shares": {**shares, "idle": idle / window},
        "gpu_idle": idle / window,
        "gpu_idle_waiting": waiting / window,
        "longest_gap_us": longest,
        "kernels": [
            {"kernel": name[:120], "launches": count / steps, "ms": microseconds / 1e3 / steps}
            for name, (count, microseconds) in longest_first
        ],
    }


def host_calls(calls: Sequence[Event], steps: int, top: int = 10) -> list[dict[str, Any]]:
    """The host's calls of CUDA during ``steps`` steps, by name, those that took longest first."""
    by_name: dict[str, list[float]] = {}
    for call in calls:
        by_name.setdefault(call.name, []).append(call.duration)
    longest_first = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:top]
    return [
        {"call": name, "calls": len(times) / steps, "ms": sum(times) / 1e3 / steps, "longest_ms": max(times) / 1e3}
        for name, times in longest_first
    ]


def draft_step(events: Sequence[Event], layers: int, top: int = 30) -> dict[str, Any] | None:
    """The :func:`breakdown` of one draft step, of all the steps that end within ``events`` (by start); None if none does.

    A step of a model of ``layers`` layers is what lies between the draft attention of a layer and that of the same layer one
    step later, where no verification lies between them.
    """
    starts = [index for index, event in enumerate(events) if DRAFT_ATTENTION in event.name]
    verified = [index for index, event in enumerate(events) if VERIFY_ATTENTION in event.name]
    steps = []
    for first, last in zip(starts[::layers], starts[layers::layers], strict=False):
        if not any(first < index < last for index in verified):
            steps.append(events[first:last])
    if not steps:
        return None
    found = [breakdown(step, 1, top) for step in steps]
    middle = sorted(found, key=lambda step: step["ms_per_step"])[len(found) // 2]
    return {"ms": middle["ms_per_step"], "shares": middle["shares"], "launches": len(steps[0]), "kernels": middle["kernels"]}


def write_small_trace(events: Sequence[Event], path: Path) -> None:
    """``events`` as a gzipped Chrome trace that holds nothing else, for https://ui.perfetto.dev."""
    common = {"ph": "X", "cat": "kernel", "pid": 0, "tid": 0}
    rows = [
        {**common, "name": event.name[:80], "ts": round(event.start - events[0].start, 3), "dur": round(event.duration, 3)}
        for event in events
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": rows}, file, separators=(",", ":"))


def num_layers(model_path: str) -> int:
    """Layers of the model at ``model_path``."""
    return int(json.loads((Path(model_path) / "config.json").read_text())["num_hidden_layers"])


async def decode_while_recording(engine: Any, prompts: list[list[int]], folder: str, args: argparse.Namespace) -> None:
    """Decode all prompts together, and have the scheduler record some steps of it."""
    from sglang.srt.managers.io_struct import ProfileReq

    sampling = {"temperature": args.temperature, "ignore_eos": True, "max_new_tokens": args.new_tokens}
    task = asyncio.ensure_future(engine.async_generate(input_ids=prompts, sampling_params=sampling))
    await asyncio.sleep(args.delay)
    if task.done():
        raise SystemExit(f"Decoding ended within --delay {args.delay} s; give more --new-tokens or a shorter delay.")
    request = ProfileReq(output_dir=folder, num_steps=args.rounds + 1, activities=["GPU"], with_stack=False)
    await engine.tokenizer_manager.start_profile(request)
    await task


def profile(spec: EngineSpec, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Start an engine and record steps of each case; a record of each."""
    engine = start_engine(spec.engine_args(args, max(batch for _, batch in args.cases)))
    records = []
    try:
        backends = attention_backends(engine)
        for dataset, batch in args.cases:
            flush(engine)
            prompts = dataset.prompts(args.model_path, batch)
            for tokens in (1, 16):
                sampling = {"temperature": args.temperature, "ignore_eos": True, "max_new_tokens": tokens}
                engine.generate(input_ids=prompts, sampling_params=sampling)
            with tempfile.TemporaryDirectory() as folder:
                engine.loop.run_until_complete(decode_while_recording(engine, prompts, folder, args))
                (trace,) = Path(folder).glob("*.json*")
                recorded, calls = load_events(trace, GPU_CATEGORIES, HOST_CATEGORIES)
            events = without_first_step(recorded, args.rounds + 1)
            calls = [call for call in calls if call.start >= events[0].start]
            if args.traces:
                name = re.sub(r"[^a-z0-9.]+", "-", f"trace-{Path(args.model_path).name}-{spec.label}-{dataset}x{batch}")
                end = events[0].start + 2 / args.rounds * (events[-1].end - events[0].start)
                write_small_trace([event for event in events if event.start < end], args.traces / f"{name}.json.gz")
            case = {"dataset": str(dataset), "context": dataset.context, "batch": batch, "temperature": args.temperature}
            figures = {**breakdown(events, args.rounds), "host_calls": host_calls(calls, args.rounds)}
            if spec.kind == "sparsespec":
                figures["draft_step"] = draft_step(events, num_layers(args.model_path))
            records.append({**stamp(), **describe(spec, args), **backends, **case, "steps": args.rounds, **figures})
            write_record(args.results, records[-1])
    finally:
        engine.shutdown()
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """Shares of a step, a row for each engine and case."""
    return markdown(
        [
            {
                "engine": record["engine"],
                "case": f"{record['batch']} x {record['dataset']}",
                "ms a step": round(record["ms_per_step"], 2),
                **{name: f"{share:.1%}" for name, share in record["shares"].items()},
                "idle in gaps over 5 us": f"{record['gpu_idle_waiting']:.1%}",
                "remarks": "; ".join(marks(record)),
            }
            for record in records
        ]
    )


def parse_case(text: str) -> tuple[Dataset, int]:
    """DATASET,BATCH."""
    dataset, _, batch = text.partition(",")
    return Dataset.parse(dataset), int(batch)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser, ["sparsespec,sparsespec_speculate=always", "plain"])
    parser.add_argument("--cases", type=parse_case, nargs="+", default=[(Dataset("code", 8192), 64)], help="DATASET,BATCH")
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--delay", type=float, default=2.0, help="seconds of decoding before the recording begins")
    parser.add_argument("--rounds", type=int, default=8, help="scheduler steps to record")
    parser.add_argument("--traces", type=Path, help="folder for traces of two steps")
    return parser.parse_args(argv)


def main() -> int:
    args = parse_arguments()
    records = []
    for spec in args.engines:
        say(f"{spec.label}: starting")
        records += profile(spec, args)
    print(table(records))
    for record in records:
        print(f"\n{record['engine']}, {record['batch']} x {record['dataset']}:\n\n{markdown(record['kernels'][:12])}")
        print(f"\nThe scheduler's calls of CUDA, a step:\n\n{markdown(record['host_calls'])}")
        if step := record.get("draft_step"):
            print(
                f"\nOne draft step of it, {step['ms']:.3f} ms, {step['launches']} launches:\n\n{markdown(step['kernels'])}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
