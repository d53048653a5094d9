"""Mean accept length by draft policy and context length, on real weights and real text.

    python benchmarks/accept_length.py --model-path M --device cpu --dtype float32 \
        --contexts 2048 4096 8192 --policies pillar window --results accept-length.jsonl

``--policies`` are values of ``--sparsespec-draft-policy``; ``--k`` and ``--budget-ratio`` that are not
given are each policy's own.

Every policy drafts the same text: outputs are lossless, so greedy outputs are equal (checked), and
accept lengths are compared on the same tokens. ``window`` (the newest tokens, same budget) is the
control of ``pillar``. Prompts are cut to the wanted number of tokens from two corpora:

- ``math``: OlympiadBench problems one after the other, then the request to solve one of them;
- ``code``: installed Python standard library sources (code-reading prompts in the style of code
  benchmarks, not one of them), to be continued.

Repetition flatters every drafter, so it is reported: ``distinct`` is the share of distinct 8-grams in
an output (1.0: none repeats), and accept length is given over all prompts and over those with
``distinct`` of at least 0.5.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from _common import append_json_line
from _workloads import LEAST_DISTINCT, distinct_share, make_prompts


def run_context(engine: Any, prompts: list[list[int]], k: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Generate for all prompts at once; per prompt the tokens, accept length and first round's."""
    sampling = {
        "temperature": args.temperature,
        "max_new_tokens": args.new_tokens,
        "ignore_eos": True,
    }
    rows: list[dict[str, Any]] = [{"first_round": None, "tokens": []} for _ in prompts]
    for chunk in engine.generate(input_ids=prompts, sampling_params=sampling, stream=True):
        row, meta = rows[chunk["index"]], chunk["meta_info"]
        row["tokens"].append(meta["completion_tokens"])
        # Chunks may be merged on their way; the first round is known if the first two were not.
        if len(row["tokens"]) == 2 and row["tokens"][0] == 1 and row["tokens"][1] - 1 <= k + 1:
            row["first_round"] = row["tokens"][1] - 1
        row["output_ids"] = chunk["output_ids"]
        row["histogram"] = meta.get("spec_correct_drafts_histogram")
    for row in rows:
        # SGLang's spec_accept_length divides all tokens, the prefill's too, by the verifications.
        rounds = row["histogram"]
        row["accept_length"] = 1 + sum(n * count for n, count in enumerate(rounds)) / sum(rounds)
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the prompts of one policy and context."""
    for row in rows:
        row["distinct"] = distinct_share(row["output_ids"])
    fresh = [row for row in rows if row["distinct"] >= LEAST_DISTINCT]
    first = [row["first_round"] for row in rows if row["first_round"] is not None]
    return {
        "accept_length": round(mean(row["accept_length"] for row in rows), 3),
        "accept_length_not_repetitive": round(mean(r["accept_length"] for r in fresh), 3) if fresh else None,
        "repetitive_prompts": len(rows) - len(fresh),
        "first_round_accept_length": round(mean(first), 3) if first else None,
        "distinct": round(mean(row["distinct"] for row in rows), 3),
    }


def run_policy(args: argparse.Namespace, policy: str, tokenizer: Any) -> dict[int, list[dict[str, Any]]]:
    """All contexts under one policy, in one engine."""
    import sglang

    from sglang_sparsespec.attention_backend.policy import POLICIES

    k = args.k or POLICIES[policy].default_num_steps
    ratio = args.budget_ratio or POLICIES[policy].default_budget_ratio
    engine = sglang.Engine(
        model_path=args.model_path,
        device=args.device,
        dtype=args.dtype,
        speculative_algorithm="SPARSESPEC",
        sparsespec_speculate="always",
        speculative_num_steps=k,
        sparsespec_draft_policy=policy,
        sparsespec_budget_ratio=ratio,
        sparsespec_min_budget=args.min_budget,
        sparsespec_lookahead=args.lookahead,
        max_running_requests=args.prompts,
        disable_radix_cache=True,
        random_seed=0,
        log_level="warning",
        stream_interval=1,
        **json.loads(args.engine_args),
    )
    results = {}
    for context in args.contexts:
        started = time.perf_counter()
        rows = run_context(engine, make_prompts(tokenizer, args.corpora, context, args.prompts), k, args)
        state = engine.get_server_info()["internal_states"][0]
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "model": Path(args.model_path).name,
            "device": args.device,
            "dtype": args.dtype,
            "policy": policy,
            "context": context,
            "prompts": args.prompts,
            "corpora": args.corpora,
            "new_tokens": args.new_tokens,
            "temperature": args.temperature,
            "k": k,
            "budget": max(args.min_budget, -(-context * ratio // 1)),
            "lookahead": args.lookahead,
            **summarise(rows),
            "kv_read_share_so_far": round(state["sparsespec_kv_read_share"], 4),
            "draft_length_so_far": round(state["sparsespec_draft_length"], 3),
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(append_json_line(args.results, record), flush=True)
        results[context] = rows
    engine.shutdown()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096, 8192], help="prompt tokens")
    parser.add_argument("--policies", nargs="+", default=["pillar", "window"])
    parser.add_argument("--corpora", nargs="+", choices=("math", "code"), default=["math", "code"])
    parser.add_argument("--prompts", type=int, default=8, help="prompts per context, run together")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--k", type=int, help="tokens drafted per round (default: the policy's own)")
    parser.add_argument("--budget-ratio", type=float, help="default: the policy's own")
    parser.add_argument("--min-budget", type=int, default=128)
    parser.add_argument("--lookahead", type=int, default=0, help="of policies that select by scores")
    parser.add_argument("--engine-args", default="{}", help="JSON object of further sglang.Engine arguments")
    parser.add_argument("--results", help="JSON-lines file to append to")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    outputs = {policy: run_policy(args, policy, tokenizer) for policy in args.policies}
    if args.temperature == 0 and len(args.policies) > 1:
        first, *others = (outputs[policy] for policy in args.policies)
        same = sum(
            a["output_ids"] == b["output_ids"]
            for other in others
            for context in args.contexts
            for a, b in zip(first[context], other[context], strict=True)
        )
        total = len(others) * len(args.contexts) * args.prompts
        print(f"greedy outputs equal under all policies: {same}/{total}")
        # On CUDA, tiles and splits are the same for every policy, so equality is expected there too.
        return 0 if same == total or args.device == "cuda" else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
