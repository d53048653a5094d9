"""Where a decoding step's GPU time goes: idle share and kernels, from a torch profiler trace of an engine.

    python benchmarks/profile_steps.py --model-path M --engines sparsespec plain:flashinfer --case 8192x128 \
        --results profile/

Prompts are prefilled, then sent again together; once all of them decode, ``--steps`` scheduler steps are recorded, and one
before them that is dropped: starting the profiler stops the GPU. A step is a round of k drafts and a verification for
SPARSESPEC, one token for plain decoding. Written per engine: a small
trace (GPU events of ``--kept-steps`` steps; open it in https://ui.perfetto.dev), and a line in profile.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _common import append_json_line, markdown_table, stamp
from _engine_job import flush
from _trace import GpuEvent, by_kernel, load_gpu_events, occupancy, write_small_trace
from throughput import add_engine_options, describe, engine_arguments, make_inputs, parse_case, prefill


async def decode_while_recording(engine: Any, prompts: list[list[int]], folder: str, args: argparse.Namespace) -> None:
    """Decode all prompts together, and have the scheduler record some steps of it."""
    from sglang.srt.managers.io_struct import ProfileReq

    sampling = {"temperature": args.temperature, "ignore_eos": True, "max_new_tokens": args.new_tokens}
    task = asyncio.ensure_future(engine.async_generate(input_ids=prompts, sampling_params=sampling))
    await asyncio.sleep(args.delay)
    if task.done():
        raise SystemExit(f"Decoding ended within --delay {args.delay} s; give more --new-tokens or a shorter delay.")
    request = ProfileReq(output_dir=folder, num_steps=args.steps + 1, activities=["GPU"], with_stack=False)
    await engine.tokenizer_manager.start_profile(request)
    await task


def without_first_step(events: Sequence[GpuEvent], steps: int) -> list[GpuEvent]:
    """The events of all but the first of ``steps`` equally long steps."""
    begin = events[0].start + occupancy(events).window_us / steps
    return [event for event in events if event.start >= begin]


def profile(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Start engine ``name``, record steps of each case, write traces and figures; yields the figures of each."""
    import sglang

    engine = sglang.Engine(**engine_arguments(name, max(batch for _, batch in args.case), args, speculate="always"))
    try:
        for context, batch in args.case:
            flush(engine)
            prompts = make_inputs(args, context, batch)
            prefill(engine, prompts, [args.temperature])
            with tempfile.TemporaryDirectory() as folder:
                engine.loop.run_until_complete(decode_while_recording(engine, prompts, folder, args))
                (trace,) = Path(folder).glob("*.json*")
                events = without_first_step(load_gpu_events(trace), args.steps + 1)
            yield write_figures(name, context, batch, events, args)
    finally:
        engine.shutdown()


def write_figures(
    name: str, context: int, batch: int, events: Sequence[GpuEvent], args: argparse.Namespace
) -> dict[str, Any]:
    """Write a small trace and a record of ``events``, those of ``--steps`` steps; returns the record."""
    taken = occupancy(events)
    folder_out = Path(args.results)
    folder_out.mkdir(parents=True, exist_ok=True)
    label = f"{Path(args.model_path).name}-{name.replace(':', '-')}-{context}x{batch}"
    kept = [e for e in events if e.start < events[0].start + taken.window_us * args.kept_steps / args.steps]
    write_small_trace(kept, folder_out / f"trace-{label}.json.gz")
    record = {
        **stamp(),
        **describe(name, context, batch, args),
        "temperature": args.temperature,
        "steps": args.steps,
        "ms_per_step": taken.window_us / 1e3 / args.steps,
        "gpu_idle": taken.idle,
        "gpu_idle_waiting": taken.waiting,
        "longest_gap_us": taken.longest_gap_us,
        "kernels": [
            {"kernel": row["kernel"][:120], "launches": row["launches"] / args.steps, "ms": row["ms"] / args.steps}
            for row in by_kernel(events)[: args.top]
        ],
    }
    append_json_line(folder_out / "profile.jsonl", record)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser)
    parser.add_argument("--case", type=parse_case, nargs="+", default=[(8192, 64)], metavar="CONTEXTxBATCH")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--delay", type=float, default=2.0, help="seconds of decoding before the recording begins")
    parser.add_argument("--steps", type=int, default=8, help="scheduler steps to record")
    parser.add_argument("--kept-steps", type=int, default=2, help="steps in the trace that is written")
    parser.add_argument("--top", type=int, default=40, help="kernels to list")
    parser.add_argument("--results", required=True, help="folder to write to")
    args = parser.parse_args()
    for name in args.engines:
        began = time.perf_counter()
        for record in profile(name, args):
            print(
                f"{name}, {record['context']}x{record['batch']}: {record['ms_per_step']:.2f} ms a step, GPU idle "
                f"{record['gpu_idle']:.1%} (waiting {record['gpu_idle_waiting']:.1%}); {time.perf_counter() - began:.0f} s",
                flush=True,
            )
            rows = [[row["kernel"][:90], row["launches"], row["ms"]] for row in record["kernels"]]
            print(markdown_table(["kernel", "launches a step", "ms a step"], rows, right=(1, 2)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
