"""What to expect of SPARSESPEC before serving with it: a prediction for a model, a GPU and a load.

    python -m sglang_sparsespec.advise --model Qwen/Qwen3-8B --gpu h100 --context 8192 --batch 32

Everything printed is a prediction of ``perf_model``, not a measurement. No GPU is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from sglang_sparsespec import perf_model
from sglang_sparsespec.config import SparseSpecConfig

LABEL = "model prediction, not measured"
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 4, 16, 64, 256)
KV_BYTES = {"auto": 2.0, "bfloat16": 2.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m sglang_sparsespec.advise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(shape.name for shape in perf_model.MODELS.values())
    made.add_argument("--model", required=True, help=f"checkpoint folder, config.json, or one of: {names}")
    made.add_argument("--gpu", required=True, choices=sorted(perf_model.GPUS), help="the model was fitted to h100")
    made.add_argument("--context", type=int, default=8192, help="mean tokens of a running request (default %(default)s)")
    made.add_argument("--batch", type=int, help="requests at once (default: as many as the KV pool holds, at most 256)")
    made.add_argument(
        "--accept-length",
        type=float,
        default=perf_model.PAPER_ACCEPT_LENGTH,
        help="tokens a verification yields, as spec_accept_length of an answer (default %(default)s, which the paper "
        "reports: measure yours)",
    )
    made.add_argument("--tp", type=int, default=1, help="GPUs (--tp-size)")
    made.add_argument("--k", type=int, default=perf_model.DEFAULT_K, help="--speculative-num-steps (default %(default)s)")
    made.add_argument("--budget-ratio", type=float, default=SparseSpecConfig.budget_ratio, help="--sparsespec-budget-ratio")
    made.add_argument("--min-budget", type=int, default=SparseSpecConfig.min_budget, help="--sparsespec-min-budget")
    made.add_argument("--kv-cache-dtype", choices=sorted(KV_BYTES), default="auto", help="SGLang's flag of that name")
    made.add_argument("--json", action="store_true", help="print JSON instead of text")
    return made


def make_setup(args: argparse.Namespace) -> perf_model.Setup:
    """What the arguments ask about.

    Raises:
        ValueError: a value out of range, an unknown model, or one that does not fit the GPU.
    """
    shape = dataclasses.replace(perf_model.find_model(args.model), kv_bytes=KV_BYTES[args.kv_cache_dtype])
    setup = perf_model.Setup(
        shape,
        perf_model.GPUS[args.gpu],
        args.context,
        1 if args.batch is None else args.batch,
        args.accept_length,
        args.k,
        args.tp,
        SparseSpecConfig(budget_ratio=args.budget_ratio, min_budget=args.min_budget),
    )
    most = setup.kv_capacity // setup.context
    if most == 0:
        raise ValueError(
            f"{shape.name} with one request of {args.context} tokens does not fit {args.tp} x {args.gpu}; "
            "use more GPUs (--tp) or a shorter --context."
        )
    if args.batch is None:
        return dataclasses.replace(setup, batch=perf_model.largest_batch(setup))
    if args.batch > most:
        raise ValueError(f"--batch {args.batch}: the KV pool holds {most} requests of {args.context} tokens; use fewer.")
    return setup


def recommendation(setup: perf_model.Setup) -> str:
    """One sentence: serve with SPARSESPEC, measure, or expect no gain."""
    expected = perf_model.gain(setup)
    limit = perf_model.STATED_ERROR
    if expected >= 1 + limit:
        return f"Serve with SPARSESPEC: {expected:.2f} times the throughput of plain decoding is expected."
    if expected > 1 - limit:
        return f"Measure: {expected:.2f} times plain decoding is expected, which is within the model's error of {limit:.0%}."
    return (
        f"No gain by speculation: {expected:.2f} times the throughput of plain decoding is expected. A server with "
        "--sparsespec-speculate auto (the default) finds that out and decodes plainly."
    )


def crossover_sentence(setup: perf_model.Setup) -> str:
    """From which context on speculation pays at this batch."""
    context = perf_model.crossover_context(setup)
    at = f"At batch {setup.batch} and accept length {setup.accept_length:g}"
    if context is None:
        return f"{at}, speculation pays at no context up to {1 << 20:,} tokens."
    if context <= 1:
        return f"{at}, speculation pays at every context."
    return f"{at}, speculation pays from a context of {context:,} tokens on."


def method_rows(setup: perf_model.Setup) -> list[dict[str, Any]]:
    """One row per method, JSON-ready."""
    base = perf_model.plain(setup).tokens_per_s
    rows = []
    for name, predict in perf_model.METHODS.items():
        found = predict(setup)
        rows.append(
            {
                "method": name,
                "ms_per_step": round(found.cost.total * 1e3, 2),
                "tokens_per_s": round(found.tokens_per_s, 1),
                "gain": round(found.tokens_per_s / base, 3),
                "ms_by_work": {key: round(value * 1e3, 2) for key, value in vars(found.cost).items()},
            }
        )
    return rows


def report(setup: perf_model.Setup) -> dict[str, Any]:
    """Everything that is predicted, JSON-ready."""
    return {
        "label": LABEL,
        "stated_error": perf_model.STATED_ERROR,
        "calibrated_on_this_gpu": setup.gpu.measured and setup.tp == 1,
        "model": setup.shape.name,
        "gpu": setup.gpu.name,
        "tp": setup.tp,
        "context": setup.context,
        "batch": setup.batch,
        "accept_length": setup.accept_length,
        "k": setup.k,
        "budget": setup.sparse.budget(setup.context),
        "kv_pool_tokens": setup.kv_capacity,
        "methods": method_rows(setup),
        "break_even_accept_length": round(perf_model.break_even_accept_length(setup), 2),
        "crossover_context": perf_model.crossover_context(setup),
        "gain_by_context_and_batch": {
            "contexts": CONTEXTS,
            "batches": BATCHES,
            "gains": perf_model.gain_table(setup, CONTEXTS, BATCHES, "lock-step"),
        },
        "recommendation": recommendation(setup),
    }


def render(found: dict[str, Any], setup: perf_model.Setup) -> str:
    """The report as text."""
    trust = f"within {found['stated_error']:.0%} of the measured points"
    if not found["calibrated_on_this_gpu"]:
        trust = "scaled from one H100 by data sheets, with assumed link rates, and hardly measured"
    lines = [
        f"{found['model']} on {found['tp']} x {found['gpu']} ({LABEL}; {trust})",
        f"{found['batch']} requests of {found['context']:,} tokens, accept length {found['accept_length']:g} at k = "
        f"{found['k']}, draft budget {found['budget']:,} tokens, KV pool {found['kv_pool_tokens']:,} tokens",
        "",
        f"{'method':<12}{'ms a step':>10}{'tokens/s':>10}{'gain':>7}   where the milliseconds go",
    ]
    for row in found["methods"]:
        work = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in row["ms_by_work"].items() if value)
        figures = f"{row['ms_per_step']:>10g}{row['tokens_per_s']:>10,.0f}{row['gain']:>7.2f}"
        lines.append(f"{row['method']:<12}{figures}   {work}")
    lines += [
        "(a step: plain, a token of each request; else a round of each request. lock-step is what the plugin runs;",
        "unified staggers the rounds, as the paper's unified batch scheduler does.)",
        "",
        f"Gain of lock-step by context and batch, accept length {found['accept_length']:g} (-: does not fit the KV pool):",
        f"{'context':>8}" + "".join(f"{f'batch {batch}':>11}" for batch in BATCHES),
    ]
    for context, gains in zip(CONTEXTS, found["gain_by_context_and_batch"]["gains"], strict=True):
        lines.append(f"{context:>8}" + "".join(f"{'-' if value is None else f'{value:.2f}':>11}" for value in gains))
    lines += [
        "",
        f"Break-even accept length: {found['break_even_accept_length']:g}.",
        crossover_sentence(setup),
        found["recommendation"],
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given command line; return the exit status."""
    args = parser().parse_args(argv)
    try:
        setup = make_setup(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = report(setup)
    print(json.dumps(found) if args.json else render(found, setup))
    return 0


if __name__ == "__main__":
    sys.exit(main())
