"""KV pool utilisation, recomputed tokens and throughput where outputs of varied lengths overflow the KV pool.

    python benchmarks/kv_manager.py --model-path M --results kv_manager.jsonl \\
        --engines sparsespec sparsespec,sparsespec_host_kv_gb=16 plain plain,schedule_conservativeness=0 \\
        --requests 192 --prompt-tokens 512 --min-new-tokens 200 --max-new-tokens 4000 --max-total-tokens 80000 \\
        --max-running-requests 128 --time-limit 120

Engines run one after the other. All requests are sent at once, greedy; output lengths are drawn log-uniformly and forced.
The scheduler does not know them: as in traffic that ends by an end-of-text token, every request declares the same
max_new_tokens, and a plugin of this benchmark (``register`` below), loaded into all engines alike, ends it at its own length
when SGLang looks whether it is done. With ``--declared-new-tokens 0`` each declares its own length instead.

Every ``--sample-seconds`` SGLang's load snapshot is read, and with a host tier the KV manager's counters. Figures:

  tokens_per_s, tokens_per_s_steady   of the whole run, and while requests wait or are offloaded (the steady state)
  utilisation, utilisation_steady     SGLang's used tokens / pool, mean over time; of all samples and of the steady state
  recomputed_tokens, retractions      counted by the plugin: tokens prefilled again, and Req.reset_for_retract
  offloads, restores, bytes_...       the KV manager's counters
  step_ratio_moving, ..._error        time of a round in which requests were moved / of one without, at equal batch sizes,
                                      tokens a request and KV in use; its standard error
  equal_outputs                       share of outputs equal to the first sparsespec engine's, of those that were not cut

Requests that --time-limit cuts count with the tokens that SGLang has counted for them.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from _common import (
    Dataset,
    EngineSpec,
    add_engine_options,
    describe,
    flush,
    markdown,
    marks,
    say,
    significant,
    stamp,
    start_engine,
    write_record,
)

#: Tokens that make a prompt's prefix its own.
UNIQUE_TOKENS = 8
#: Figures of moves, from the KV manager's counters.
MOVES = {
    "offloads": "sparsespec_kv_requests_offloaded",
    "restores": "sparsespec_kv_requests_restored",
    "bytes_to_host": "sparsespec_kv_bytes_to_host",
    "bytes_from_host": "sparsespec_kv_bytes_from_host",
}

# -------------------------------------------------------------------------- plugin

END_AT = "end_at"
#: Keys of the plugin's counts in /server_info.
RECOMPUTED, RETRACTIONS = "benchmark_recomputed_tokens", "benchmark_retractions"
#: Of this scheduler process.
_counts: Counter[str] = Counter()


def install_plugin(folder: Path) -> None:
    """Let the engines that this process starts load ``register``; ``folder`` is empty and outlives them.

    SGLang finds plugins by the entry points of distributions on ``sys.path``, which its processes inherit.
    """
    info = folder / "sparsespec_benchmark_end-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sparsespec-benchmark-end\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nzz_benchmark_end = kv_manager:register\n")
    sys.path.append(str(folder))


def end_at_length(original: Callable[..., None], req: Any, *args: Any, **kwargs: Any) -> None:
    """``Req.update_finish_state``: in this call alone a request's longest length is its ``end_at``; SGLang ends it there."""
    sampling = req.sampling_params
    declared = sampling.max_new_tokens
    sampling.max_new_tokens = min(declared, (sampling.custom_params or {}).get(END_AT, declared))
    try:
        return original(req, *args, **kwargs)
    finally:
        sampling.max_new_tokens = declared


def count_recomputed(result: Any, batch: Any) -> None:
    """After ``ScheduleBatch.prepare_for_extend``, which prefills requests, retracted ones again."""
    lengths = zip(batch.reqs, batch.extend_lens, strict=True)
    _counts[RECOMPUTED] += sum(length for req, length in lengths if req.retracted_stain)


def count_retraction(result: Any, req: Any) -> None:
    """After ``Req.reset_for_retract``: SGLang (or the KV manager) gives up a request's KV."""
    _counts[RETRACTIONS] += 1


def add_counts(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """After ``Scheduler.get_internal_state``, SGLang's answer to /server_info."""
    result.internal_state.update({name: _counts[name] for name in (RECOMPUTED, RETRACTIONS)})


def register() -> None:
    """Register the hooks; SGLang calls it in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    managers = "sglang.srt.managers."
    HookRegistry.register(managers + "schedule_batch.Req.update_finish_state", end_at_length, HookType.AROUND)
    HookRegistry.register(managers + "schedule_batch.Req.reset_for_retract", count_retraction, HookType.AFTER)
    HookRegistry.register(managers + "schedule_batch.ScheduleBatch.prepare_for_extend", count_recomputed, HookType.AFTER)
    HookRegistry.register(managers + "scheduler.Scheduler.get_internal_state", add_counts, HookType.AFTER)


# ------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Sample:
    """The scheduler's state at one time.

    Attributes:
        t: seconds since the requests were sent.
        used: share of the KV pool.
        running, waiting, offloaded: requests.
        prefilled: tokens prefilled so far.
        rounds, batch_sum, round_us, generated: decode rounds so far, and the sums of their batch sizes, times and tokens.
        moved: the KV manager's counters.
    """

    t: float
    used: float
    running: int
    waiting: int
    offloaded: int
    prefilled: int
    rounds: float
    batch_sum: float
    round_us: float
    generated: float
    moved: dict[str, int] = field(default_factory=dict)


def make_requests(args: argparse.Namespace) -> tuple[list[list[int]], list[int]]:
    """Prompts (token ids) and output lengths, the same for every engine."""
    rng = random.Random(args.seed)
    low, high = math.log(args.min_new_tokens), math.log(args.max_new_tokens)
    lengths = [round(math.exp(rng.uniform(low, high))) for _ in range(args.requests)]
    dataset = Dataset("random" if args.load_format == "dummy" else "code+math", args.prompt_tokens - UNIQUE_TOKENS)
    bodies = dataset.prompts(args.model_path, args.requests)
    return [[rng.randrange(1000, 20000) for _ in range(UNIQUE_TOKENS)] + body for body in bodies], lengths


def sampling_of(length: int, declared: int) -> dict[str, Any]:
    """A request's sampling parameters; ``declared``: its max_new_tokens, 0 for its own length."""
    fixed = {"temperature": 0.0, "ignore_eos": True}
    if declared == 0:
        return {**fixed, "max_new_tokens": length}
    return {**fixed, "max_new_tokens": declared, "custom_params": {END_AT: length}}


async def read_sample(manager: Any, since: float) -> tuple[Sample, dict[str, int]]:
    """The state now, and the plugin's counts; ``since``: the clock's value when the requests were sent.

    Raises:
        RuntimeError: the engine did not load the plugin.
    """
    (state,) = await manager.get_internal_state()
    if RECOMPUTED not in state:
        raise RuntimeError("the engine did not load this benchmark's plugin; unset SGLANG_PLUGINS, or see its log")
    moved = {name: state[key] for name, key in MOVES.items() if key in state}
    load = manager.load_snapshot_reader.read_all()[0]
    rounds, batch_sum, round_us, _, _, generated = load.decode_moments or [0.0] * 6
    sample = Sample(
        t=time.perf_counter() - since,
        used=load.num_used_tokens / load.max_total_num_tokens,
        running=load.num_running_reqs,
        waiting=load.num_waiting_reqs,
        offloaded=moved.get("offloads", 0) - moved.get("restores", 0),
        prefilled=load.total_prefill_uncached_tokens,
        rounds=rounds,
        batch_sum=batch_sum,
        round_us=round_us,
        generated=generated,
        moved=moved,
    )
    return sample, {name: state[name] for name in (RECOMPUTED, RETRACTIONS)}


async def when_idle(manager: Any, timeout: float = 30) -> tuple[Sample, dict[str, int]]:
    """:func:`read_sample` once nothing runs; an idle scheduler publishes its load at once.

    Raises:
        RuntimeError: something still runs after ``timeout`` seconds.
    """
    since = time.perf_counter()
    while True:
        sample, counts = await read_sample(manager, since)
        if sample.running == sample.waiting == 0:
            return sample, counts
        if sample.t > timeout:
            raise RuntimeError(f"{sample.running} requests run and {sample.waiting} wait when nothing should")
        await asyncio.sleep(0.02)


async def run_requests(engine: Any, prompts: list[list[int]], lengths: list[int], args: Any) -> dict[str, Any]:
    """Serve all requests at once; the run's figures, ``outputs`` and ``samples`` among them."""
    manager = engine.tokenizer_manager
    before, counts_before = await when_idle(manager)
    sampling = [sampling_of(length, args.declared_new_tokens) for length in lengths]
    samples: list[Sample] = []
    started = time.perf_counter()
    answers = asyncio.create_task(engine.async_generate(input_ids=prompts, sampling_params=sampling))
    cut = False
    while not answers.done():
        samples.append((await read_sample(manager, started))[0])
        await asyncio.wait([answers], timeout=args.sample_seconds)
        if args.time_limit and not cut and time.perf_counter() - started > args.time_limit and not answers.done():
            cut, seconds = True, time.perf_counter() - started
            manager.abort_request(abort_all=True)
    if not cut:
        seconds = time.perf_counter() - started
    outputs = await answers
    after, counts = await when_idle(manager)
    check_lengths(outputs, lengths)
    meta = [output["meta_info"] for output in outputs]
    tokens = round(after.generated - before.generated) if cut else sum(entry["completion_tokens"] for entry in meta)
    accept = [entry["spec_accept_length"] for entry in meta if entry.get("spec_accept_length")]
    return {
        "seconds": round(seconds, 2),
        "cut_by_time_limit": cut,
        "all_prompt_tokens": sum(map(len, prompts)),
        "output_tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
        "accept_length": round(fmean(accept), 3) if accept else None,
        "recomputed_tokens": counts[RECOMPUTED] - counts_before[RECOMPUTED],
        "retractions": counts[RETRACTIONS] - counts_before[RETRACTIONS],
        "prefilled_tokens": after.prefilled - before.prefilled,
        **{name: value - before.moved[name] for name, value in after.moved.items()},
        **summary(samples),
        "outputs": [output["output_ids"] if is_whole(output) else None for output in outputs],
        "samples": samples,
    }


def is_whole(output: dict[str, Any]) -> bool:
    """Whether an output was not cut by the time limit."""
    return output["meta_info"]["finish_reason"]["type"] == "length"


def check_lengths(outputs: Sequence[dict[str, Any]], lengths: Sequence[int]) -> None:
    """See that every output that was not cut has the length drawn for it.

    Raises:
        RuntimeError: one has not.
    """
    for output, length in zip(outputs, lengths, strict=True):
        if is_whole(output) and len(output["output_ids"]) != length:
            raise RuntimeError(
                f"an output has {len(output['output_ids'])} tokens instead of {length}: the KV pool (--max-total-tokens) or "
                "the model's context is too short for it"
            )


# ------------------------------------------------------------------------- figures


def steady_state(samples: Sequence[Sample]) -> Sequence[Sample]:
    """From the first to the last sample, of those after the first decode round, in which requests wait or are offloaded."""
    first = samples[0].rounds if samples else 0
    contended = [i for i, s in enumerate(samples) if s.rounds > first and (s.waiting or s.offloaded)]
    return samples[contended[0] : contended[-1] + 1] if contended else []


def mean_over_time(samples: Sequence[Sample]) -> float | None:
    """Mean utilisation; each sample counts for the time until the next."""
    spans = [(right.t - left.t, left.used) for left, right in zip(samples, samples[1:], strict=False)]
    total = sum(span for span, _ in spans)
    return round(sum(span * used for span, used in spans) / total, 4) if total else None


def step_ratio_moving(samples: Sequence[Sample]) -> tuple[float | None, float | None]:
    """Time of a round while requests are moved / without, and its standard error; None without both kinds.

    A round's time is fitted by least squares to the batch size, the tokens that a request gets (which follow the number of
    drafts), their product, the KV in use and whether something was moved; the ratio is that of the fitted times at the
    means. Intervals between samples in which something was prefilled do not count. A copy is shorter than an interval, so
    that a slow-down is diluted.
    """
    rows, times = [], []
    for left, right in zip(samples, samples[1:], strict=False):
        rounds, batches = right.rounds - left.rounds, right.batch_sum - left.batch_sum
        if rounds > 0 and right.prefilled == left.prefilled:
            tokens = (right.generated - left.generated) / batches
            moving = any(left.moved.get(name) != right.moved.get(name) for name in MOVES)
            rows.append([1.0, batches / rounds, tokens, batches / rounds * tokens, left.used, float(moving)])
            times.append((right.round_us - left.round_us) / rounds)
    moved = sum(row[-1] for row in rows)
    if not 0 < moved < len(rows):
        return None, None
    known, measured = np.array(rows), np.array(times)
    inverse = np.linalg.pinv(known)
    fitted = inverse @ measured
    still = float(known[:, :-1].mean(0) @ fitted[:-1])
    freedom = max(1, len(rows) - np.linalg.matrix_rank(known))
    spread = np.sqrt(((measured - known @ fitted) ** 2).sum() / freedom * (inverse[-1] ** 2).sum())
    return round(1 + float(fitted[-1]) / still, 3), round(float(spread) / still, 3)


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Utilisation, steady throughput and round times of one run."""
    steady = steady_state(samples)
    seconds = steady[-1].t - steady[0].t if steady else 0
    ratio, error = step_ratio_moving(samples)
    return {
        "tokens_per_s_steady": round((steady[-1].generated - steady[0].generated) / seconds, 1) if seconds else None,
        "utilisation_steady": mean_over_time(steady),
        "utilisation_mean": mean_over_time(samples),
        "steady_from_s": round(steady[0].t, 2) if steady else None,
        "steady_to_s": round(steady[-1].t, 2) if steady else None,
        "mean_running_steady": round(fmean(sample.running for sample in steady), 1) if steady else None,
        "step_ratio_moving": ratio,
        "step_ratio_moving_error": error,
    }


def equal_share(outputs: Sequence[Any], reference: Sequence[Any]) -> float | None:
    """Share of equal outputs among those that neither run cut short; None if there are none."""
    pairs = [(a, b) for a, b in zip(outputs, reference, strict=True) if a is not None and b is not None]
    return round(fmean(a == b for a, b in pairs), 4) if pairs else None


def table(records: Sequence[dict[str, Any]]) -> str:
    """A row for each engine."""
    columns = ("utilisation_steady", "mean_running_steady", "tokens_per_s_steady", "tokens_per_s", "recomputed_tokens")
    return markdown(
        [
            {
                "engine": record["engine"],
                "seconds": record["seconds"],
                **{name.replace("_", " "): significant(record[name], 5) for name in columns},
                "retractions": record["retractions"],
                "moved and back": f"{record['offloads']}, {record['restores']}" if "offloads" in record else None,
                "round with moves / without": record["step_ratio_moving"],
                "equal outputs": record["equal_outputs"],
                "remarks": "; ".join([*marks(record), *(["cut by the time limit"] if record["cut_by_time_limit"] else [])]),
            }
            for record in records
        ]
    )


# ----------------------------------------------------------------------------- main


def measure(spec: EngineSpec, prompts: list[list[int]], lengths: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Start an engine, warm it up, serve the requests."""
    pool = {"max_total_tokens": args.max_total_tokens, "load_snapshot_publish_interval": args.publish_interval}
    engine = start_engine({**pool, **spec.engine_args(args, args.max_running_requests)})
    say(f"{spec.label}: ready")
    try:
        rng = random.Random(args.seed + 1)
        others = [[rng.randrange(1000, 20000) for _ in range(32)] for _ in range(args.max_running_requests)]
        engine.generate(input_ids=others, sampling_params={"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 16})
        flush(engine)
        return engine.loop.run_until_complete(run_requests(engine, prompts, lengths, args))
    finally:
        engine.shutdown()


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser, ["plain", "sparsespec", "sparsespec,sparsespec_host_kv_gb=32"])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--min-new-tokens", type=int, default=200, help="shortest output")
    parser.add_argument("--max-new-tokens", type=int, default=16_000, help="longest output")
    parser.add_argument("--declared-new-tokens", type=int, help="every request's max_new_tokens; 0: its own length")
    parser.add_argument("--max-total-tokens", type=int, default=200_000, help="size of the KV pool")
    parser.add_argument("--max-running-requests", type=int, default=128)
    parser.add_argument("--time-limit", type=float, default=0, help="seconds after which a run is cut; 0: none")
    parser.add_argument("--sample-seconds", type=float, default=0.25, help="time between samples")
    parser.add_argument("--publish-interval", type=int, default=4, help="decode rounds between load snapshots")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.prompt_tokens <= UNIQUE_TOKENS:
        parser.error(f"--prompt-tokens must be above {UNIQUE_TOKENS}")
    if not 0 < args.min_new_tokens <= args.max_new_tokens:
        parser.error("--min-new-tokens must be positive, and --max-new-tokens no smaller")
    if args.declared_new_tokens is None:
        args.declared_new_tokens = args.max_new_tokens
    if args.declared_new_tokens != 0 and args.declared_new_tokens < args.max_new_tokens:
        parser.error("--declared-new-tokens must be 0, or no smaller than --max-new-tokens")
    return args


def main() -> int:
    args = parse_arguments()
    prompts, lengths = make_requests(args)
    options = ["requests", "prompt_tokens", "min_new_tokens", "max_new_tokens", "declared_new_tokens", "max_total_tokens"]
    options += ["max_running_requests", "seed", "sample_seconds", "publish_interval", "time_limit"]
    load = {"forced_lengths": True, "temperature": 0.0, **{name: getattr(args, name) for name in options}}
    records: list[dict[str, Any]] = []
    reference: list[Any] | None = None
    with tempfile.TemporaryDirectory(prefix="kv_manager_plugin_") as folder:
        install_plugin(Path(folder))
        for spec in args.engines:
            figures = measure(spec, prompts, lengths, args)
            outputs = figures.pop("outputs")
            if reference is None and spec.kind == "sparsespec":
                reference = outputs
            record = {
                **stamp(),
                **describe(spec, args),
                **load,
                "equal_outputs": equal_share(outputs, reference) if reference is not None else None,
                "outputs_digest": hashlib.sha256(json.dumps(outputs).encode()).hexdigest()[:16],
                **figures,
                "samples": [asdict(sample) for sample in figures["samples"]],
            }
            records.append(record)
            write_record(args.results, record)
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
