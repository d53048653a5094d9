"""Mean accept length by draft policy, budget and context length, on real weights and real text.

    python benchmarks/accept_length.py --model-path M --device cpu --dtype float32 --contexts 2048 4096 \\
        --policies pillar window streaming vegas triforce full --results accept-length.jsonl

Accept length is accepted drafts plus one bonus token, the mean over verifications. Every policy drafts the same text:
outputs are lossless, so that greedy outputs are equal (checked on a CPU) and accept lengths are compared on the same tokens.
``window`` (the newest tokens, same budget) is the control of ``pillar``. Repetition flatters every drafter, so accept length
is given over all prompts and over those whose outputs do not repeat themselves. Draft lengths and budget ratios that are not
given are each policy's own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import mean
from typing import Any

from _common import (
    Dataset,
    EngineSpec,
    add_engine_options,
    describe,
    internal_state,
    markdown,
    marks,
    repetition,
    say,
    significant,
    stamp,
    start_engine,
    write_record,
)


def accept_length(histogram: Sequence[int]) -> float:
    """Of an output whose verifications accepted n drafts ``histogram[n]`` times.

    SGLang's ``spec_accept_length`` is a little larger: it counts the prefill's token too.
    """
    return 1 + sum(n * count for n, count in enumerate(histogram)) / sum(histogram)


def summarise(outputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the prompts of one policy and context."""
    lengths = [accept_length(output["meta_info"]["spec_correct_drafts_histogram"]) for output in outputs]
    repeats = repetition(output["output_ids"] for output in outputs)
    fresh = [length for length, repeated in zip(lengths, repeats, strict=True) if not repeated]
    return {
        "accept_length": round(mean(lengths), 3),
        "accept_length_not_repetitive": round(mean(fresh), 3) if fresh else None,
        "repetitive_prompts": sum(repeats),
    }


def run_policy(policy: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """All contexts and budget ratios under one policy: records, and all outputs' tokens."""
    records, tokens = [], []
    for ratio in args.budget_ratios or [None]:
        settings = {"sparsespec_speculate": "always", "sparsespec_min_budget": args.min_budget, "disable_radix_cache": True}
        settings |= {"speculative_num_steps": args.k} if args.k else {}
        settings |= {"sparsespec_budget_ratio": ratio} if ratio else {}
        spec = EngineSpec(f"sparsespec:{policy}", "sparsespec", (policy,), settings)
        engine = start_engine(spec.engine_args(args, args.prompts))
        for context in args.contexts:
            started = time.perf_counter()
            dataset = Dataset(args.corpora, context)
            sampling = {"temperature": args.temperature, "max_new_tokens": args.new_tokens, "ignore_eos": True}
            outputs = engine.generate(input_ids=dataset.prompts(args.model_path, args.prompts), sampling_params=sampling)
            state = internal_state(engine)
            record = {
                **stamp(),
                **describe(spec, args),
                "device": args.device,
                "policy": policy,
                "dataset": str(dataset),
                "context": context,
                "prompts": args.prompts,
                "new_tokens": args.new_tokens,
                "temperature": args.temperature,
                "k": state["speculative_num_steps"],
                "budget_ratio": state.get("sparsespec_budget_ratio", ratio),
                "min_budget": args.min_budget,
                **summarise(outputs),
                "kv_read_share_so_far": round(state["sparsespec_kv_read_share"], 4),
                "draft_length_so_far": round(state["sparsespec_draft_length"], 3),
                "seconds": round(time.perf_counter() - started, 1),
            }
            write_record(args.results, record)
            say(f"{policy}, {context} tokens: accept length {record['accept_length']}")
            records.append(record)
            tokens += [output["output_ids"] for output in outputs]
        engine.shutdown()
    return records, tokens


def table(records: Sequence[dict[str, Any]]) -> str:
    """A row for each policy and context."""
    return markdown(
        [
            {
                "policy": record["policy"],
                "k": record["k"],
                "ratio": record["budget_ratio"],
                "context": record["context"],
                "accept length": significant(record["accept_length"]),
                "not repeating": significant(record["accept_length_not_repetitive"]),
                "repeating": f"{record['repetitive_prompts']} of {record['prompts']}",
                "KV read while drafting, so far": f"{record['kv_read_share_so_far']:.1%}",
                "remarks": "; ".join(marks(record)),
            }
            for record in records
        ]
    )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser, [])
    parser.add_argument("--policies", nargs="+", default=["pillar", "window"], help="values of --sparsespec-draft-policy")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096, 8192], help="prompt tokens")
    parser.add_argument("--corpora", default="math+code", help="math, code, or both joined by +")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per context, run together")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--k", type=int, help="tokens drafted per round")
    parser.add_argument("--budget-ratios", type=float, nargs="+")
    parser.add_argument("--min-budget", type=int, default=128)
    return parser.parse_args(argv)


def main() -> int:
    """Run; 1 if greedy outputs differ between policies on a CPU, where arithmetic is deterministic."""
    args = parse_arguments()
    records: list[dict[str, Any]] = []
    outputs: list[list[list[int]]] = []
    for policy in args.policies:
        found, tokens = run_policy(policy, args)
        records += found
        outputs.append(tokens)
    print(table(records))
    if args.temperature > 0 or len(outputs) < 2:
        return 0
    same = sum(a == b for other in outputs[1:] for a, b in zip(outputs[0], other, strict=True))
    total = sum(map(len, outputs[1:]))
    print(f"\nGreedy outputs equal under all policies: {same} of {total}")
    return int(same < total and args.device == "cpu")


if __name__ == "__main__":
    sys.exit(main())
