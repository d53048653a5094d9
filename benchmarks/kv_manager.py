"""The KV manager on outputs of varied lengths: plain SGLang, SPARSESPEC with its retraction, SPARSESPEC with a host tier.

    python benchmarks/kv_manager.py --model-path M --requests 96 --max-total-tokens 200000 \\
        --min-tokens 200 --max-tokens 16000 --results kv_manager.jsonl --plot kv_manager.png

Each engine serves the same requests, all sent at once, in a process of its own; output lengths are
log-uniform. From its log, at every ``--log-interval`` rounds: share of the KV pool in use, running
requests, seconds per round. Recomputed tokens are the prefilled tokens of the timed run beyond the
prompts. The steady state is what lies before the last waiting request was admitted.

Step times with and without copies under way are compared at equal numbers of running requests (only
where the log shows both), weighted by the rarer of the two.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import Any

from _common import append_json_line, stamp

ENGINES: dict[str, dict[str, Any]] = {
    "plain-default": {},
    "plain-aggressive": {"schedule_conservativeness": 0.0},
    "sparsespec-retraction": {"speculative_algorithm": "SPARSESPEC", "schedule_conservativeness": 0.0},
    "sparsespec-host-tier": {"speculative_algorithm": "SPARSESPEC", "sparsespec_host_kv_gb": "auto"},
}
START, END = "BENCHMARK-START", "BENCHMARK-END"
DECODE = re.compile(r"Decode batch.*#running-req: (\d+), #token: (\d+), token usage: ([\d.]+).*#queue-req: (\d+)")
PREFILL = re.compile(r"Prefill batch.*#new-token: (\d+)")
RETRACT = re.compile(r"Retract requests.*#retracted_reqs: (\d+)")
MOVED = re.compile(r"SPARSESPEC KV manager:.*offloaded (\d+) and restored (\d+) requests, ([\d.]+) GB.* ([\d.]+) GB back")


def make_requests(args: argparse.Namespace) -> tuple[list[list[int]], list[int]]:
    """Prompts (token ids) and output lengths; the same for every engine."""
    rng = random.Random(args.seed)
    low, high = math.log(args.min_tokens), math.log(args.max_tokens)
    lengths = [round(math.exp(rng.uniform(low, high))) for _ in range(args.requests)]
    if args.random_prompts:
        return [[rng.randrange(args.vocab) for _ in range(args.prompt_tokens)] for _ in lengths], lengths
    from accept_length import make_prompts
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    bodies = make_prompts(tokenizer, ["code", "math"], args.prompt_tokens - 8, args.requests)
    # A first line of their own, so that no prompt is another's prefix.
    return [[rng.randrange(1000, 20000) for _ in range(8)] + body for body in bodies], lengths


def serve(args: argparse.Namespace) -> None:
    """Child process: one engine, a warm-up, then all requests; prints one line of JSON."""
    import sglang

    prompts, lengths = make_requests(args)
    settings: dict[str, Any] = {
        "model_path": args.model_path,
        "dtype": args.dtype,
        "random_seed": 0,
        "log_level": "info",
        "skip_tokenizer_init": args.random_prompts,
        "max_total_tokens": args.max_total_tokens,
        "max_running_requests": args.max_running_requests,
        "decode_log_interval": args.log_interval,
        **ENGINES[args.child],
        **json.loads(args.engine_args),
    }
    engine = sglang.Engine(**settings)
    sampling = [{"temperature": args.temperature, "ignore_eos": True, "max_new_tokens": n} for n in lengths]
    warm_up = {"temperature": args.temperature, "ignore_eos": True, "max_new_tokens": 64}
    rng = random.Random(args.seed + 1)
    others = [[rng.randrange(100, args.vocab) if args.vocab > 100 else 0 for _ in range(64)] for _ in prompts]
    engine.generate(input_ids=others, sampling_params=warm_up)
    time.sleep(1)
    engine.flush_cache()
    print(START, file=sys.stderr, flush=True)
    started = time.perf_counter()
    outputs = engine.generate(input_ids=prompts, sampling_params=sampling)
    seconds = time.perf_counter() - started
    print(END, file=sys.stderr, flush=True)
    state = engine.get_server_info()["internal_states"][0]
    result = {
        "seconds": seconds,
        "prompt_tokens": sum(len(prompt) for prompt in prompts),
        "output_tokens": sum(output["meta_info"]["completion_tokens"] for output in outputs),
        "accept_length": mean(output["meta_info"].get("spec_accept_length") or 1 for output in outputs),
        "state": {key: value for key, value in state.items() if key.startswith("sparsespec_")},
    }
    print("RESULT " + json.dumps(result), flush=True)
    engine.shutdown()


def watch(command: list[str], log: Path) -> tuple[dict[str, Any], list[tuple[float, str]]]:
    """Run a child; its result, and its log lines of the timed run with the time each was read."""
    lines: list[tuple[float, str]] = []
    timed = False
    result: dict[str, Any] | None = None
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as sink, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            now = time.monotonic()
            sink.write(line)
            timed = (timed or START in line) and END not in line
            if timed:
                lines.append((now, line))
            if line.startswith("RESULT "):
                result = json.loads(line.removeprefix("RESULT "))
    if result is None:
        raise SystemExit(f"The engine failed; see {log}.")
    return result, lines


def analyse(lines: list[tuple[float, str]], prompt_tokens: int, interval: int) -> dict[str, Any]:
    """Utilisation, recomputed tokens and step times, from a log."""
    begin = lines[0][0]
    samples: list[dict[str, float]] = []
    prefilled = retracted = 0
    steps: dict[tuple[int, bool], list[float]] = defaultdict(list)
    last: float | None = None
    moved: tuple[str, ...] = ()
    moving = False
    pending: tuple[int, float] | None = None
    for now, line in lines:
        if found := DECODE.search(line):
            running, tokens, usage, queued = found.groups()
            samples.append({"t": now - begin, "usage": float(usage), "running": int(running), "queued": int(queued)})
            pending = (int(running), (now - last) / interval) if last is not None else None
            last = now
            if not moved and pending is not None:
                steps[pending[0], False].append(pending[1])
        elif found := MOVED.search(line):
            moving = bool(moved) and found.groups() != moved
            if moved and pending is not None:
                steps[pending[0], moving].append(pending[1])
            moved = found.groups()
        elif found := PREFILL.search(line):
            prefilled += int(found.group(1))
            last = None  # the time until the next line is not decoding alone
        elif found := RETRACT.search(line):
            retracted += int(found.group(1))
    contended = [sample for sample in samples if sample["queued"] > 0]
    # The pool fills up first.
    steady = contended[len(contended) // 5 :] or samples
    return {
        "utilisation_steady": mean(sample["usage"] for sample in steady) if steady else None,
        "recomputed_tokens": prefilled - prompt_tokens,
        "retracted_requests": retracted,
        "step_ms_ratio_moving": ratio_of_steps(steps),
        "samples": samples,
    }


def ratio_of_steps(steps: dict[tuple[int, bool], list[float]]) -> float | None:
    """Time of a round with copies under way / without, at equal batch sizes; None without both."""
    pairs = []
    for running in {running for running, _ in steps}:
        still, moving = steps.get((running, False), []), steps.get((running, True), [])
        if still and moving:
            pairs.append((min(len(still), len(moving)), median(moving) / median(still)))
    weight = sum(count for count, _ in pairs)
    return sum(count * ratio for count, ratio in pairs) / weight if weight else None


def plot(series: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw utilisation over time, one line per engine."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib, or leave --plot out.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4))
    for name, samples in series.items():
        axes.plot([sample["t"] for sample in samples], [100 * sample["usage"] for sample in samples], label=name)
    axes.set(xlabel="seconds", ylabel="KV pool in use by running requests, %", ylim=(0, 101))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--min-tokens", type=int, default=200, help="shortest output")
    parser.add_argument("--max-tokens", type=int, default=16000, help="longest output")
    parser.add_argument("--max-total-tokens", type=int, default=200_000, help="KV pool of every engine")
    parser.add_argument("--max-running-requests", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-interval", type=int, default=4, help="rounds between samples")
    parser.add_argument("--random-prompts", action="store_true")
    parser.add_argument("--vocab", type=int, default=20000, help="token ids of random prompts are below this")
    parser.add_argument("--engine-args", default="{}", help="JSON object of further sglang.Engine arguments")
    parser.add_argument("--logs", type=Path, default=Path("kv_manager_logs"), help="folder for the engines' logs")
    parser.add_argument("--results", help="JSON-lines file to append to")
    parser.add_argument("--plot", type=Path, help="image of utilisation over time")
    parser.add_argument("--child", choices=list(ENGINES), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    if args.child:
        serve(args)
        return 0
    environment = stamp()
    args.logs.mkdir(parents=True, exist_ok=True)
    series = {}
    for name in args.engines:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
        result, lines = watch(command, args.logs / f"{name}.log")
        found = analyse(lines, result["prompt_tokens"], args.log_interval)
        series[name] = found["samples"]
        record = {
            **environment,
            "model": Path(args.model_path).name,
            "engine": name,
            "requests": args.requests,
            "output_lengths": [args.min_tokens, args.max_tokens],
            "max_total_tokens": args.max_total_tokens,
            **result,
            "tokens_per_s": result["output_tokens"] / result["seconds"],
            **found,
        }
        append_json_line(args.results, record)
        print(json.dumps({key: value for key, value in record.items() if key != "samples"}), flush=True)
    if args.plot:
        plot(series, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
