"""Greedy parity: SPARSESPEC's output tokens against plain SGLang's, prompt by prompt.

    python benchmarks/parity.py baseline --model-path M --device cpu --output plain.json
    python benchmarks/parity.py compare  --model-path M --device cpu --baseline plain.json \
        --k 8 --concurrency 16 --radix on --overlap on --chunked-prefill-size 256 --results parity.jsonl

Several GPUs: ``--engine-args '{"tp_size": 2}'``, to both commands (arithmetic differs with their number).

``compare`` runs one configuration and appends one JSON line to ``--results``. Where arithmetic is
deterministic (float32 on CPU) every output must be equal, and the exit status is 1 otherwise. Where
16-bit kernels of different shapes break ties, each divergence is listed with the margin between
the two tokens in the baseline's own log-probabilities at the first differing position: a tie has a
margin within the rounding of the logits.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from _common import append_json_line

REPO = Path(__file__).resolve().parent.parent
DATA = REPO / "benchmarks" / "data"
ALTERNATIVES = 5  # log-probabilities kept per position
ROUNDING = 1e-4  # of a difference of two log-probabilities

SHORT = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time",
    "1, 2, 3, 5, 8, 13,",
    "Water boils at",
    "The opposite of hot is",
    "import numpy as np\n",
    "Roses are red,",
    "A",
    "To be or not to be,",
    "The derivative of x^2 is",
    "Dear Sir or Madam,",
    "SELECT name FROM users WHERE",
    "The quick brown fox",
    "In 1969, the first",
    "Ingredients: flour, sugar,",
    "# Installation\n\n",
    "Q: What is photosynthesis?\nA:",
    "Translate to French: good morning ->",
    "The three primary colors are",
)


def load_prompts(short: int, problems: int, long: int, long_chars: int) -> list[str]:
    """``short`` one-liners, ``problems`` AIME and OlympiadBench problems, ``long`` concatenations.

    Args:
        long_chars: least characters of a long prompt (about 3 per token).
    """
    aime = [json.loads(line)["problem"] for line in (DATA / "aime24.jsonl").read_text().splitlines()]
    olympiad = [
        json.loads(line)["question"] for line in (DATA / "olympiadbench.jsonl").read_text().splitlines()
    ]
    prompts = list(SHORT[:short]) + (aime + olympiad)[:problems]
    rest = iter(olympiad[problems:])
    for index in range(long):
        parts: list[str] = []
        while sum(map(len, parts)) < long_chars:
            parts.append(f"Problem {len(parts) + 1}. {next(rest)}\n\n")
        parts.append(f"Solve problem {index % len(parts) + 1} step by step.\n\nSolution:")
        prompts.append("".join(parts))
    return prompts


def start_engine(args: argparse.Namespace, speculative: bool) -> Any:
    """A SGLang engine with the flags of ``args``."""
    import sglang

    settings: dict[str, Any] = {
        "model_path": args.model_path,
        "device": args.device,
        "dtype": args.dtype,
        "random_seed": 0,
        "log_level": "warning",
        "max_running_requests": max(args.concurrency, 1),
        **json.loads(args.engine_args),
    }
    if args.max_total_tokens:
        settings["max_total_tokens"] = args.max_total_tokens
    if args.chunked_prefill_size:
        settings["chunked_prefill_size"] = args.chunked_prefill_size
    settings["disable_radix_cache"] = args.radix == "off"
    settings["disable_overlap_schedule"] = args.overlap == "off"
    if speculative:
        settings.update(speculative_algorithm="SPARSESPEC", speculative_num_steps=args.k)
        settings["sparsespec_schedule"] = args.schedule
        settings.setdefault("sparsespec_speculate", "always")  # what is compared is speculation
    elif args.device == "cpu":
        os.environ["SPARSESPEC_CPU_BRIDGE"] = "1"
        settings.update(disable_cuda_graph=True, attention_backend="torch_native")
    return sglang.Engine(**settings)


def generate(
    engine: Any, prompts: list[str], args: argparse.Namespace, logprobs: bool
) -> list[dict[str, Any]]:
    """SGLang's outputs in the order of ``prompts``; one at a time if ``--concurrency`` is 1."""
    sampling = {"temperature": 0.0, "max_new_tokens": args.max_new_tokens, "ignore_eos": True}
    extra: dict[str, Any] = {"return_logprob": True, "top_logprobs_num": ALTERNATIVES} if logprobs else {}
    if args.concurrency == 1:
        outputs = []
        for index, prompt in enumerate(prompts):
            outputs.append(engine.generate(prompt, sampling, **extra))
            if sys.stderr.isatty() or index % 10 == 9:
                print(f"  {index + 1}/{len(prompts)}", file=sys.stderr, flush=True)
        return outputs
    return engine.generate(prompts, sampling, **extra)


def first_difference(left: list[int], right: list[int]) -> int | None:
    """Index of the first differing token, or None for equal lists."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def margin_at(baseline: dict[str, Any], index: int, token: int) -> float | None:
    """Log-probability of the baseline's token less that of ``token``, or None if not among its best."""
    best = {int(entry[1]): float(entry[0]) for entry in baseline["top_logprobs"][index]}
    if token not in best:
        return None
    return best[baseline["output_ids"][index]] - best[token]


def shard_of_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of ``--shard I/N``: every N-th, from the I-th on."""
    index, _, count = args.shard.partition("/")
    return load_prompts(args.short, args.problems, args.long, args.long_chars)[int(index) :: int(count)]


def read_baseline(paths: list[str], prompts: list[str], wait_s: float) -> list[dict[str, Any]]:
    """The baseline's outputs for ``prompts``, from files that may still be in the making.

    Raises:
        KeyError: a prompt is in none of the files.
    """
    deadline = time.monotonic() + wait_s
    while not all(Path(path).exists() for path in paths) and time.monotonic() < deadline:
        time.sleep(1)
    outputs: dict[str, dict[str, Any]] = {}
    for path in paths:
        record = json.loads(Path(path).read_text())
        outputs.update(zip(record["prompts"], record["outputs"], strict=True))
    return [outputs[prompt] for prompt in prompts]


def run_baseline(args: argparse.Namespace) -> int:
    prompts = shard_of_prompts(args)
    engine = start_engine(args, speculative=False)
    started = time.perf_counter()
    # Alternatives are only needed where divergences are judged.
    logprobs = args.device != "cpu"
    outputs = generate(engine, prompts, args, logprobs)
    seconds = time.perf_counter() - started
    engine.shutdown()
    rows = [
        {
            "output_ids": output["output_ids"],
            "prompt_tokens": output["meta_info"]["prompt_tokens"],
            "top_logprobs": output["meta_info"].get("output_top_logprobs", []),
        }
        for output in outputs
    ]
    record = {"concurrency": args.concurrency, "seconds": seconds, "prompts": prompts, "outputs": rows}
    # Written whole or not at all: comparisons may wait for it.
    partial = Path(f"{args.output}.partial")
    partial.write_text(json.dumps(record))
    partial.rename(args.output)
    lengths = sorted(row["prompt_tokens"] for row in rows)
    tokens = sum(len(row["output_ids"]) for row in rows)
    print(
        f"baseline: {len(rows)} prompts of {lengths[0]} to {lengths[-1]} tokens, "
        f"{tokens} tokens in {seconds:.0f} s"
    )
    return 0


def run_compare(args: argparse.Namespace) -> int:
    prompts = shard_of_prompts(args)
    engine = start_engine(args, speculative=True)
    started = time.perf_counter()
    outputs = generate(engine, prompts, args, logprobs=False)
    seconds = time.perf_counter() - started
    state = engine.get_server_info()["internal_states"][0]
    engine.shutdown()
    baseline = read_baseline(args.baseline, prompts, args.wait_baseline)
    divergences = []
    for index, (plain, output) in enumerate(zip(baseline, outputs, strict=True)):
        at = first_difference(plain["output_ids"], output["output_ids"])
        if at is None:
            continue
        ids = output["output_ids"]
        margin = margin_at(plain, at, ids[at]) if plain["top_logprobs"] and at < len(ids) else None
        divergences.append({"prompt": index, "at": at, "margin": margin})
    tokens = sum(len(output["output_ids"]) for output in outputs)
    lengths = sorted(output["meta_info"]["prompt_tokens"] for output in outputs)
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "model": Path(args.model_path).name,
        "device": args.device,
        "dtype": args.dtype,
        "k": args.k,
        "schedule": args.schedule,
        "concurrency": args.concurrency,
        "radix": args.radix,
        "overlap": args.overlap,
        "chunked_prefill_size": args.chunked_prefill_size,
        "engine_args": args.engine_args,
        "shard": args.shard,
        "prompts": len(prompts),
        "longest_prompt": lengths[-1],
        "prompts_of_2000_tokens": sum(length >= 2000 for length in lengths),
        "tokens": tokens,
        "equal_prompts": len(prompts) - len(divergences),
        "divergences": divergences,
        "accept_length": round(state["sparsespec_accept_length"], 3),
        "kv_read_share": round(state["sparsespec_kv_read_share"], 4),
        "forward_tokens": round(state["sparsespec_forward_tokens"], 1),
        "forward_tokens_variation": round(state["sparsespec_forward_tokens_variation"], 4),
        "seconds": round(seconds, 1),
    }
    print(append_json_line(args.results, record))
    if args.device == "cpu":
        return 1 if divergences else 0
    shown = [d for d in divergences if d["margin"] is not None and d["margin"] <= args.tie_margin + ROUNDING]
    return 0 if len(shown) == len(divergences) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("baseline", "compare"))
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--max-total-tokens", type=int, default=0, help="KV pool in tokens (0: SGLang decides)"
    )
    parser.add_argument("--engine-args", default="{}", help="JSON object of further sglang.Engine arguments")
    parser.add_argument("--short", type=int, default=20, help="one-line prompts")
    parser.add_argument("--problems", type=int, default=36, help="AIME and OlympiadBench prompts")
    parser.add_argument("--long", type=int, default=4, help="prompts of --long-chars characters")
    parser.add_argument("--long-chars", type=int, default=6800)
    parser.add_argument("--radix", choices=("on", "off"), default="on")
    parser.add_argument("--overlap", choices=("on", "off"), default="on")
    parser.add_argument("--chunked-prefill-size", type=int, default=0)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--schedule", choices=("lockstep", "unified"), default="lockstep")
    parser.add_argument("--output", help="baseline: where its outputs go")
    parser.add_argument("--shard", default="0/1", help="I/N: only every N-th prompt, from the I-th on")
    parser.add_argument("--baseline", nargs="+", help="compare: the files that `baseline` wrote")
    parser.add_argument("--wait-baseline", type=float, default=0, help="compare: seconds to wait for those files")
    parser.add_argument("--results", help="compare: JSON-lines file to append to")
    parser.add_argument(
        "--tie-margin", type=float, default=0.25, help="largest log-probability margin of a tie (CUDA)"
    )
    args = parser.parse_args()
    if args.command == "baseline":
        if not args.output:
            parser.error("baseline needs --output")
        return run_baseline(args)
    if not args.baseline:
        parser.error("compare needs --baseline")
    return run_compare(args)


if __name__ == "__main__":
    sys.exit(main())
