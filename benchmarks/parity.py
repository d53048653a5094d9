"""Greedy parity: SPARSESPEC's output tokens against plain SGLang's, prompt by prompt.

    python benchmarks/parity.py --model-path M --device cpu --dtype float32 --results parity.jsonl \\
        --engines sparsespec sparsespec:pillar:unified sparsespec,speculative_num_steps=3,disable_radix_cache=true

The baseline runs first, then every engine, each with the same prompts and a JSON line of its own. Engines speculate in every
round unless their names set ``sparsespec_speculate``. Where arithmetic is deterministic (float32 on a CPU) every output must
be equal. Where 16-bit kernels of different shapes break ties, each divergence is listed with the margin between the two
tokens in the baseline's own log-probabilities at the first differing position: a tie has a margin within the rounding of the
logits. How large that is, plain engines among ``--engines`` show (``plain:triton``): where they and the baseline have
written the same tokens so far, small margins between the best tokens still differ. The largest such difference is the bound,
if it is more than ``--tie-margin``. Controls may be asked fewer prompts (``--control-prompts``): the bound can only become
lower. The exit status is 1 if an output differs on a CPU, or differs at more than a tie on a GPU.

Ten thousand short generations, which fit into some minutes of a GPU:

    python benchmarks/parity.py --model-path M --results parity.jsonl --short 0 --problems 0 --long 0 --cuts 10000 \\
        --max-new-tokens 48 --alternatives 10 --concurrency 256 --control-prompts 1000 --engines plain:triton sparsespec
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import (
    QUESTIONS,
    SIMULATE,
    EngineSpec,
    add_engine_options,
    attention_backends,
    corpus_text,
    describe,
    internal_state,
    markdown,
    read_data,
    say,
    simulated_accept_length,
    stamp,
    start_engine,
    write_record,
)

ROUNDING = 1e-4  # of a difference of two log-probabilities
CLOSE = 1.0  # a larger margin is no candidate for a tie, and shows nothing about ties

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
    aime, olympiad = ([row[QUESTIONS[name][1]] for row in read_data(name)] for name in ("aime", "olympiadbench"))
    prompts = list(SHORT[:short]) + (aime + olympiad)[:problems]
    rest = iter(olympiad[problems:])
    for index in range(long):
        parts: list[str] = []
        while sum(map(len, parts)) < long_chars:
            parts.append(f"Problem {len(parts) + 1}. {next(rest)}\n\n")
        parts.append(f"Solve problem {index % len(parts) + 1} step by step.\n\nSolution:")
        prompts.append("".join(parts))
    return prompts


def cut_prompts(count: int, least_chars: int = 60, most_chars: int = 1500) -> list[str]:
    """``count`` pieces of code and of mathematics in turn, cut at random places: the same in every run, all different."""
    generator, texts = random.Random(0), [corpus_text(name) for name in ("code", "math")]
    found: dict[str, None] = {}
    while len(found) < count:
        text, length = texts[len(found) % 2], generator.randint(least_chars, most_chars)
        begin = generator.randrange(len(text) - length)
        found[text[begin : begin + length]] = None
    return list(found)


def random_prompts(lengths: Sequence[int], count: int, vocab_size: int) -> list[list[int]]:
    """``count`` prompts of random token ids of each of ``lengths``: the same in every run."""
    generator = random.Random(0)
    return [[generator.randrange(vocab_size) for _ in range(length)] for length in lengths for _ in range(count)]


def run_engine(
    spec: EngineSpec, prompts: Sequence[str] | Sequence[list[int]], args: argparse.Namespace, logprobs: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Outputs in the order of ``prompts``, sent one at a time if ``--concurrency`` is 1; and figures of the run."""
    settings = spec.engine_args(args, args.concurrency)
    if spec.kind == "sparsespec":
        settings.setdefault("sparsespec_speculate", "always")  # what is compared is speculation
    sampling = {"temperature": 0.0, "max_new_tokens": args.max_new_tokens, "ignore_eos": True}
    extra: dict[str, Any] = {"return_logprob": True, "top_logprobs_num": args.alternatives} if logprobs else {}
    kind = "input_ids" if args.random_tokens else "prompt"
    engine = start_engine(settings)
    started = time.perf_counter()
    if args.concurrency == 1:
        outputs = [engine.generate(**{kind: prompt}, sampling_params=sampling, **extra) for prompt in prompts]
    else:
        outputs = engine.generate(**{kind: list(prompts)}, sampling_params=sampling, **extra)
    figures = {"seconds": round(time.perf_counter() - started, 1), **attention_backends(engine)}
    state = internal_state(engine)
    names = ("accept_length", "kv_read_share", "forward_tokens", "forward_tokens_variation")
    figures |= {name: round(state[f"sparsespec_{name}"], 4) for name in names if f"sparsespec_{name}" in state}
    engine.shutdown()
    return outputs, figures


# ---------------------------------------------------------------------- comparison


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first differing token, or None for equal lists."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def margin_at(baseline: dict[str, Any], index: int, token: int) -> float | None:
    """Log-probability of the baseline's token less that of ``token``, or None if not among its best."""
    best = {int(entry[1]): float(entry[0]) for entry in baseline["meta_info"]["output_top_logprobs"][index]}
    if token not in best:
        return None
    return best[baseline["output_ids"][index]] - best[token]


def divergences(baseline: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prompt, position and margin of every output that differs; the margin is None where it is not known."""
    found = []
    for index, (plain, output) in enumerate(zip(baseline, outputs, strict=True)):
        ids = output["output_ids"]
        at = first_difference(plain["output_ids"], ids)
        if at is not None:
            known = plain["meta_info"].get("output_top_logprobs") and at < min(len(ids), len(plain["output_ids"]))
            found.append({"prompt": index, "at": at, "margin": margin_at(plain, at, ids[at]) if known else None})
    return found


def margin_noise(baseline: Sequence[dict[str, Any]], control: Sequence[dict[str, Any]]) -> float:
    """The largest difference between two plain engines' small margins, where both have written the same tokens so far.

    A margin is the best token's log-probability less another's, as the baseline has them. Both engines need
    log-probabilities.
    """
    largest = 0.0
    for plain, other in zip(baseline, control, strict=True):
        at = first_difference(plain["output_ids"], other["output_ids"])
        same = len(plain["output_ids"]) if at is None else at + 1  # the first different token has the same past
        ours, theirs = (item["meta_info"]["output_top_logprobs"][:same] for item in (plain, other))
        for left, right in zip(ours, theirs, strict=False):
            known = {int(token): float(value) for value, token, *_ in right}
            best, best_token = float(left[0][0]), int(left[0][1])
            for value, token, *_ in left[1:]:
                margin = best - float(value)
                if margin <= CLOSE and int(token) in known and best_token in known:
                    change = margin - (known[best_token] - known[int(token)])
                    largest = max(largest, abs(change))
    return largest


def are_ties(found: Sequence[dict[str, Any]], tie_margin: float) -> bool:
    """Whether every divergence is shown to be a tie; one of unknown margin is not."""
    return all(item["margin"] is not None and item["margin"] <= tie_margin + ROUNDING for item in found)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser, ["sparsespec"])
    parser.add_argument("--baseline", type=EngineSpec.parse, default=EngineSpec.parse("plain"), help="an engine's name")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--short", type=int, default=20, help="one-line prompts")
    parser.add_argument("--problems", type=int, default=36, help="AIME and OlympiadBench prompts")
    parser.add_argument("--long", type=int, default=4, help="prompts of --long-chars characters")
    parser.add_argument("--long-chars", type=int, default=6800)
    parser.add_argument("--cuts", type=int, default=0, help="prompts of 60 to 1,500 characters out of code and mathematics")
    parser.add_argument("--alternatives", type=int, default=5, help="log-probabilities of the baseline at each position")
    parser.add_argument("--control-prompts", type=int, help="controls are asked the first so many prompts (default: all)")
    parser.add_argument(
        "--random-tokens",
        type=lambda text: [int(length) for length in text.split(",")],
        metavar="LENGTH,...",
        help="--problems prompts of so many random token ids instead, for checkpoints without a tokenizer or weights",
    )
    parser.add_argument("--tie-margin", type=float, default=0.25, help="least bound of a tie's log-probability margin")
    args = parser.parse_args(argv)
    if simulated_accept_length("sparsespec"):
        parser.error(f"{SIMULATE} is set: simulated acceptance has no outputs to compare")
    return args


def main() -> int:
    args = parse_arguments()
    prompts: Sequence[str] | Sequence[list[int]] = [
        *load_prompts(args.short, args.problems, args.long, args.long_chars),
        *cut_prompts(args.cuts),
    ]
    if args.random_tokens:
        config = json.loads((Path(args.model_path) / "config.json").read_text())
        prompts = random_prompts(args.random_tokens, args.problems, config["vocab_size"])
    on_cpu = args.device == "cpu"
    # Alternatives are only needed where divergences are judged.
    say(f"{args.baseline.label}: {len(prompts)} prompts")
    baseline, about_baseline = run_engine(args.baseline, prompts, args, logprobs=not on_cpu)
    failed, rows = False, []
    tie_margin = args.tie_margin
    # Controls come first: what they show is what the others are judged by.
    for spec in sorted(args.engines, key=lambda spec: spec.kind != "plain"):
        say(f"{spec.label}: starting")
        is_control = spec.kind == "plain" and not on_cpu
        asked = prompts[: args.control_prompts] if spec.kind == "plain" else prompts
        outputs, figures = run_engine(spec, asked, args, logprobs=is_control)
        if is_control:
            figures["margin_noise"] = round(margin_noise(baseline[: len(asked)], outputs), 4)
            tie_margin = max(tie_margin, figures["margin_noise"])
        found = divergences(baseline[: len(asked)], outputs)
        passed = not found if on_cpu else are_ties(found, tie_margin)
        failed = failed or not passed
        lengths = [output["meta_info"]["prompt_tokens"] for output in outputs]
        record = {
            **stamp(),
            **describe(spec, args),
            "device": args.device,
            "concurrency": args.concurrency,
            "baseline": args.baseline.label,
            "baseline_attention": about_baseline["attention_backend"],
            "prompts": len(asked),
            "max_new_tokens": args.max_new_tokens,
            "baseline_seconds": about_baseline["seconds"],
            "longest_prompt": max(lengths),
            "prompts_of_2000_tokens": sum(length >= 2000 for length in lengths),
            "tokens": sum(len(output["output_ids"]) for output in outputs),
            "equal_prompts": len(asked) - len(found),
            "divergences": found,
            "tie_margin": None if on_cpu else tie_margin,
            "passed": passed,
            **figures,
        }
        write_record(args.results, record)
        margins = [item["margin"] for item in found]
        row = {"engine": spec.label, "equal": f"{record['equal_prompts']} of {len(asked)}", "passed": str(passed)}
        row["largest margin"] = max((margin for margin in margins if margin is not None), default=None)
        rows.append({**row, "unknown margins": margins.count(None), "accept length": figures.get("accept_length")})
    print(markdown(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
