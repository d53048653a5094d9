"""KV pool utilisation, recomputed tokens and throughput where outputs of varied lengths overflow the KV pool.

On one H100, two engines in about 150 s (the model is the user's):

    python benchmarks/kv_manager.py --model-path Qwen2.5-1.5B-Instruct \\
        --engines sparsespec:retract sparsespec:host --host-kv-gb 16 --requests 192 --prompt-tokens 512 \\
        --min-new-tokens 200 --max-new-tokens 4000 --max-total-tokens 80000 --max-running-requests 128 \\
        --time-limit 120 --results kv_manager.jsonl --plot kv_manager.png

On a CPU, for a look at the records only:

    python benchmarks/kv_manager.py --model-path smollm2-135m-float32 --device cpu --dtype float32 \\
        --prefill-backend torch_native --decode-backend torch_native --host-kv-gb 1 --requests 10 \\
        --prompt-tokens 64 --min-new-tokens 16 --max-new-tokens 128 --max-total-tokens 500 --publish-interval 1 \\
        --max-running-requests 8 --results kv_manager.jsonl --plot kv_manager.png

Engines (``--engines``), started one after the other with the same flags but for these:

  plain:default                 SGLang without speculation
  plain:aggressive              the same, --schedule-conservativeness 0: nothing is kept free for what running requests will
                                write (after a retraction SGLang keeps room for an estimate again). A waiting request still
                                needs room for its prompt and min(max_new_tokens, 4096) tokens to be admitted
  sparsespec:retract            SPARSESPEC; a full pool retracts requests, which are computed again
  sparsespec:retract-aggressive the same, --schedule-conservativeness 0
  sparsespec:host               SPARSESPEC with --sparsespec-host-kv-gb: requests move to host memory and back

``:unified`` behind a sparsespec engine turns on --sparsespec-schedule unified. All requests are sent at once, greedy;
output lengths are drawn log-uniformly (``--seed``) and forced (ignore_eos, in the record as ``forced_lengths``). Prompts
begin with 8 random tokens each, so that none is found in another's cached prefix.

The scheduler does not know the lengths: as in traffic that ends by an end-of-text token, every request declares the same
max_new_tokens (``--declared-new-tokens``, default: the longest length), and a plugin of this benchmark
(``_end_plugin.py``), loaded into all engines alike, ends it at its own length when SGLang looks whether it is done. With
``--declared-new-tokens 0`` each declares its own length, so that SGLang's admission knows the future.

How the figures come about. Every ``--sample-seconds`` SGLang's load snapshot is read (shared memory, which the scheduler
writes every ``--publish-interval`` decode rounds); with a host tier the KV manager's counters (/server_info) too.

  tokens_per_s        output tokens of the whole run / its time, prefills included
  tokens_per_s_steady the same over the steady state (see utilisation_steady), from SGLang's counter of tokens that decode
                      rounds gave; None where there is none
  utilisation         1 - (free + evictable) / pool, SGLang's num_used_tokens. With a host tier that is what requests
                      hold which are not offloaded, and slots reserved for the next rounds in all of SPARSESPEC's
  utilisation_steady  its mean, weighted by time, from the first to the last sample after the first decode round in
                      which requests wait or are offloaded; None if none ever does
  recomputed_tokens   tokens that retracted requests were prefilled again, less what the radix cache still had of them;
                      counted by the plugin in SGLang's ScheduleBatch.prepare_for_extend
  retractions         calls of SGLang's Req.reset_for_retract, counted by the plugin
  offloads, restores, bytes_to_host, bytes_from_host    the KV manager's counters
  step_ms_moving, step_ms_still    mean time from one decode round's launch to the next's over the intervals between
                      samples without a prefill in which, by the counters, requests were moved, or were not. A copy is
                      shorter than an interval, so that a slow-down is diluted
  step_ratio_moving   the same as a ratio at equal batch sizes, weighted by the rarer of the two; None without both
  equal_outputs       share of the requests with the same output as the first sparsespec engine's (of those that no time
                      limit cut); None for engines that ran before it

A run that --time-limit cuts counts the tokens of its decode rounds (SGLang's), whatever became of their requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from _common import append_json_line, say, stamp
from _end_plugin import END_AT, RECOMPUTED, RETRACTIONS, install
from _engine_job import flush
from _report import load_pyplot
from throughput import add_model_options, digest, engine_arguments, make_inputs

ADMISSION: dict[str, dict[str, Any]] = {
    "default": {},
    "aggressive": {"schedule_conservativeness": 0.0},
    "retract": {},
    "retract-aggressive": {"schedule_conservativeness": 0.0},
    "host": {},
}
VARIANTS = {"sparsespec": ("retract", "retract-aggressive", "host"), "plain": ("default", "aggressive")}
ENGINES = [f"{kind}:{variant}" for kind, variants in VARIANTS.items() for variant in variants]
#: Tokens that make a prompt's prefix its own.
UNIQUE_TOKENS = 8
#: Figures from the KV manager's counters; the first four are of moves.
COUNTERS = {
    "offloads": "sparsespec_kv_requests_offloaded",
    "restores": "sparsespec_kv_requests_restored",
    "bytes_to_host": "sparsespec_kv_bytes_to_host",
    "bytes_from_host": "sparsespec_kv_bytes_from_host",
    "transfer_waits": "sparsespec_kv_transfer_waits",
    "host_full": "sparsespec_kv_host_full",
    "manager_recomputed_tokens": "sparsespec_kv_tokens_recomputed",
}
MOVES = tuple(COUNTERS)[:4]
#: Options that a record repeats.
RECORDED = (
    "requests",
    "prompt_tokens",
    "min_new_tokens",
    "max_new_tokens",
    "declared_new_tokens",
    "max_total_tokens",
    "max_running_requests",
    "k",
    "seed",
    "sample_seconds",
    "publish_interval",
)


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
    moved: dict[str, int]


# --------------------------------------------------------------------------- engine


def settings_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """An engine's name as ``sglang.Engine`` arguments.

    Raises:
        SystemExit: no such name.
    """
    kind, variant, schedule = (name.split(":") + ["", ""])[:3]
    if variant not in VARIANTS.get(kind, ()) or schedule not in (("", "unified") if kind == "sparsespec" else ("",)):
        raise SystemExit(f"--engines {name}: expected one of {', '.join(ENGINES)} (sparsespec's also with :unified)")
    base = f"plain:{args.decode_backend}" if kind == "plain" else f"sparsespec:pillar:{schedule}"
    settings = {
        "max_total_tokens": args.max_total_tokens,
        "load_snapshot_publish_interval": args.publish_interval,
        **ADMISSION[variant],
        **engine_arguments(base, args.max_running_requests, args),
    }
    if variant == "host":
        settings["sparsespec_host_kv_gb"] = args.host_kv_gb
    return settings


def make_requests(args: argparse.Namespace) -> tuple[list[list[int]], list[int]]:
    """Prompts (token ids) and output lengths, the same for every engine."""
    rng = random.Random(args.seed)
    low, high = math.log(args.min_new_tokens), math.log(args.max_new_tokens)
    lengths = [round(math.exp(rng.uniform(low, high))) for _ in range(args.requests)]
    bodies = make_inputs(args, args.prompt_tokens - UNIQUE_TOKENS, args.requests)
    prompts = [[rng.randrange(1000, 20000) for _ in range(UNIQUE_TOKENS)] + body for body in bodies]
    return prompts, lengths


def sampling_of(length: int, declared: int) -> dict[str, Any]:
    """A request's sampling parameters; ``declared``: its max_new_tokens, 0 for its own length."""
    fixed = {"temperature": 0.0, "ignore_eos": True}
    if declared == 0:
        return {**fixed, "max_new_tokens": length}
    return {**fixed, "max_new_tokens": declared, "custom_params": {END_AT: length}}


class Sampler:
    """Reads one engine's state.

    Args:
        has_host_tier: ask for the KV manager's counters too.
    """

    def __init__(self, engine: Any, has_host_tier: bool) -> None:
        self._manager = engine.tokenizer_manager
        self._has_host_tier = has_host_tier
        self.samples: list[Sample] = []

    async def read(self, since: float) -> Sample:
        """The state now; ``since``: the clock's value when the requests were sent."""
        moved: dict[str, int] = {}
        if self._has_host_tier:
            (state,) = await self._manager.get_internal_state()
            moved = {name: state[key] for name, key in COUNTERS.items()}
        load = self._manager.load_snapshot_reader.read_all()[0]
        rounds, batch_sum, round_us, _, _, generated = load.decode_moments or [0.0] * 6
        return Sample(
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

    async def counts(self) -> dict[str, int]:
        """The plugin's counters.

        Raises:
            RuntimeError: the engine did not load the plugin.
        """
        (state,) = await self._manager.get_internal_state()
        if RECOMPUTED not in state:
            raise RuntimeError("the engine did not load benchmarks/_end_plugin.py; unset SGLANG_PLUGINS, or see its log")
        return {"recomputed_tokens": state[RECOMPUTED], "retractions": state[RETRACTIONS]}

    async def idle(self, timeout: float = 30) -> Sample:
        """The state once nothing runs; an idle scheduler publishes its load at once.

        Raises:
            RuntimeError: something still runs after ``timeout`` seconds.
        """
        since = time.perf_counter()
        while True:
            sample = await self.read(since)
            if sample.running == sample.waiting == 0:
                return sample
            if sample.t > timeout:
                raise RuntimeError(f"{sample.running} requests run and {sample.waiting} wait when nothing should")
            await asyncio.sleep(0.02)

    async def follow(self, since: float, interval: float, answers: asyncio.Task[Any]) -> None:
        """Sample until there are answers."""
        while not answers.done():
            self.samples.append(await self.read(since))
            await asyncio.sleep(interval)


async def run_requests(
    engine: Any, prompts: list[list[int]], lengths: list[int], args: argparse.Namespace, has_host_tier: bool
) -> dict[str, Any]:
    """Serve all requests at once; the run's figures, ``outputs`` and ``samples`` among them."""
    sampler = Sampler(engine, has_host_tier)
    before, counts_before = await sampler.idle(), await sampler.counts()
    sampling = [sampling_of(length, args.declared_new_tokens) for length in lengths]
    started = time.perf_counter()
    answers = asyncio.create_task(engine.async_generate(input_ids=prompts, sampling_params=sampling))
    following = asyncio.create_task(sampler.follow(started, args.sample_seconds, answers))
    done, _ = await asyncio.wait([answers], timeout=args.time_limit or None)
    seconds = time.perf_counter() - started
    cut = not done
    if cut:
        engine.tokenizer_manager.abort_request(abort_all=True)
    outputs = await answers
    await following
    after, counts = await sampler.idle(), await sampler.counts()
    check_lengths(outputs, lengths)
    meta = [output["meta_info"] for output in outputs]
    generated = after.generated - before.generated
    tokens = round(generated) if cut else sum(entry["completion_tokens"] for entry in meta)
    accept = [entry["spec_accept_length"] for entry in meta if entry.get("spec_accept_length")]
    return {
        "seconds": round(seconds, 2),
        "cut_by_time_limit": cut,
        "all_prompt_tokens": sum(map(len, prompts)),
        "output_tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
        "accept_length": round(fmean(accept), 3) if accept else None,
        **{name: count - counts_before[name] for name, count in counts.items()},
        "prefilled_tokens": after.prefilled - before.prefilled,
        **{name: value - before.moved[name] for name, value in after.moved.items()},
        **summary(sampler.samples),
        "outputs": [output["output_ids"] if is_whole(output) else None for output in outputs],
        "samples": sampler.samples,
    }


def is_whole(output: dict[str, Any]) -> bool:
    """Whether an output was not cut by the time limit."""
    return output["meta_info"]["finish_reason"]["type"] == "length"


def check_lengths(outputs: list[dict[str, Any]], lengths: list[int]) -> None:
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


# -------------------------------------------------------------------------- figures


def steady_state(samples: list[Sample]) -> list[Sample]:
    """From the first to the last sample, of those after the first decode round, in which requests wait."""
    first = samples[0].rounds if samples else 0
    contended = [i for i, s in enumerate(samples) if s.rounds > first and (s.waiting or s.offloaded)]
    return samples[contended[0] : contended[-1] + 1] if contended else []


def mean_over_time(samples: list[Sample]) -> float | None:
    """Mean utilisation; each sample counts for the time until the next."""
    spans = [(right.t - left.t, left.used) for left, right in zip(samples, samples[1:], strict=False)]
    total = sum(span for span, _ in spans)
    return round(sum(span * used for span, used in spans) / total, 4) if total else None


def rate_over_time(samples: list[Sample]) -> float | None:
    """Output tokens per second between the first sample and the last."""
    seconds = samples[-1].t - samples[0].t if samples else 0
    return round((samples[-1].generated - samples[0].generated) / seconds, 1) if seconds else None


def summary(samples: list[Sample]) -> dict[str, Any]:
    """Utilisation, steady throughput and round times of one run."""
    steady = steady_state(samples)
    rounds = round_times(samples)
    return {
        "tokens_per_s_steady": rate_over_time(steady),
        "utilisation_steady": mean_over_time(steady),
        "utilisation_mean": mean_over_time(samples),
        "utilisation_peak": round(max((sample.used for sample in samples), default=0.0), 4),
        "steady_from_s": round(steady[0].t, 2) if steady else None,
        "steady_to_s": round(steady[-1].t, 2) if steady else None,
        "mean_running_steady": round(fmean(sample.running for sample in steady), 1) if steady else None,
        **{f"step_ms_{name}": mean_round(rounds, moving) for name, moving in (("moving", True), ("still", False))},
        "step_ratio_moving": ratio_of_rounds(rounds),
    }


#: (batch size, whether requests were moved): (rounds, milliseconds per round) of intervals.
RoundTimes = dict[tuple[int, bool], list[tuple[float, float]]]


def round_times(samples: list[Sample]) -> RoundTimes:
    """Decode rounds between consecutive samples without a prefill."""
    found: RoundTimes = defaultdict(list)
    for left, right in zip(samples, samples[1:], strict=False):
        rounds = right.rounds - left.rounds
        if rounds > 0 and right.prefilled == left.prefilled:
            size = round((right.batch_sum - left.batch_sum) / rounds)
            moving = any(left.moved.get(name) != right.moved.get(name) for name in MOVES)
            found[size, moving].append((rounds, (right.round_us - left.round_us) / rounds / 1e3))
    return found


def mean_round(times: RoundTimes, moving: bool) -> float | None:
    """Milliseconds per round over all batch sizes."""
    chosen = [entry for (_, moved), entries in times.items() if moved == moving for entry in entries]
    rounds = sum(count for count, _ in chosen)
    return round(sum(count * ms for count, ms in chosen) / rounds, 3) if rounds else None


def ratio_of_rounds(times: RoundTimes) -> float | None:
    """Time of a round while requests are moved / without, at equal batch sizes."""
    pairs = []
    for size in {size for size, _ in times}:
        moving, still = ([ms for _, ms in times.get((size, flag), [])] for flag in (True, False))
        if moving and still:
            pairs.append((min(len(moving), len(still)), median(moving) / median(still)))
    weight = sum(count for count, _ in pairs)
    return round(sum(count * ratio for count, ratio in pairs) / weight, 3) if weight else None


def equal_share(outputs: list[Any], reference: list[Any]) -> float | None:
    """Share of equal outputs among those that neither run cut short; None if there are none."""
    pairs = [(a, b) for a, b in zip(outputs, reference, strict=True) if a is not None and b is not None]
    return round(fmean(a == b for a, b in pairs), 4) if pairs else None


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Draw utilisation, and running requests, over time: a line per engine."""
    plt = load_pyplot()
    figure, panels = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for record in records:
        times = [sample["t"] for sample in record["samples"]]
        steady = record["utilisation_steady"]
        label = record["engine"] + (f" (steady state {steady:.1%})" if steady is not None else "")
        panels[0].plot(times, [100 * sample["used"] for sample in record["samples"]], label=label)
        panels[1].plot(times, [sample["running"] for sample in record["samples"]], label=record["engine"])
    panels[0].set(ylabel="KV pool in use, %", ylim=(0, 101))
    panels[1].set(ylabel="running requests", xlabel="seconds", ylim=(0, None))
    panels[0].set_title(f"{records[0]['model']}, KV pool of {records[0]['max_total_tokens']} tokens", fontsize=9)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ----------------------------------------------------------------------------- main


def measure(name: str, prompts: list[list[int]], lengths: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Start an engine, warm it up, serve the requests."""
    import sglang

    settings = settings_of(name, args)
    engine = sglang.Engine(**settings)
    say(f"{name}: ready")
    try:
        rng = random.Random(args.seed + 1)
        others = [[rng.randrange(1000, 20000) for _ in range(32)] for _ in range(args.max_running_requests)]
        engine.generate(input_ids=others, sampling_params={"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 16})
        flush(engine)
        has_host_tier = "sparsespec_host_kv_gb" in settings
        return engine.loop.run_until_complete(run_requests(engine, prompts, lengths, args, has_host_tier))
    finally:
        engine.shutdown()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--engines", nargs="+", default=ENGINES, metavar="ENGINE", help="see above; default: all")
    parser.add_argument("--decode-backend", default="flashinfer", help="of the plain engines")
    parser.add_argument("--host-kv-gb", type=float, default=32.0, help="sparsespec:host's --sparsespec-host-kv-gb")
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
    parser.add_argument("--results", help="JSON-lines file to append to")
    parser.add_argument("--plot", type=Path, help="image of utilisation over time to write")
    args = parser.parse_args()
    if args.prompt_tokens <= UNIQUE_TOKENS:
        parser.error(f"--prompt-tokens must be above {UNIQUE_TOKENS}")
    if not 0 < args.min_new_tokens <= args.max_new_tokens:
        parser.error("--min-new-tokens must be positive, and --max-new-tokens no smaller")
    if args.declared_new_tokens is None:
        args.declared_new_tokens = args.max_new_tokens
    if args.declared_new_tokens != 0 and args.declared_new_tokens < args.max_new_tokens:
        parser.error("--declared-new-tokens must be 0, or no smaller than --max-new-tokens")
    for name in args.engines:
        settings_of(name, args)
    return args


def main() -> int:
    args = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="kv_manager_plugin_") as folder:
        install(Path(folder))
        run(args)
    return 0


def run(args: argparse.Namespace) -> None:
    """Measure the engines one after the other; a record each."""
    if args.plot:
        load_pyplot()  # fails now if it is missing
    if args.device == "cpu":
        from sglang_sparsespec.cpu_bridge import CPU_BRIDGE_ENV

        os.environ[CPU_BRIDGE_ENV] = "1"  # plain SGLang needs it too on a processor without AMX
    prompts, lengths = make_requests(args)
    environment = stamp()
    described = {
        "model": Path(args.model_path).name,
        "load_format": args.load_format,
        "forced_lengths": True,
        "temperature": 0.0,
        **{name: getattr(args, name) for name in RECORDED},
    }
    records: list[dict[str, Any]] = []
    reference: list[Any] | None = None
    for name in args.engines:
        figures = measure(name, prompts, lengths, args)
        outputs = figures.pop("outputs")
        if reference is None and name.startswith("sparsespec"):
            reference = outputs
        record = {
            **environment,
            **described,
            "engine": name,
            "host_kv_gb": args.host_kv_gb if ":host" in name else 0.0,
            "equal_outputs": equal_share(outputs, reference) if reference is not None else None,
            "outputs_digest": digest(outputs),
            **figures,
            "samples": [asdict(sample) for sample in figures["samples"]],
        }
        records.append(record)
        append_json_line(args.results, record)
        print(json.dumps({name: value for name, value in record.items() if name not in {*environment, "samples"}}))
        if args.plot:
            plot(records, args.plot)


if __name__ == "__main__":
    sys.exit(main())
