"""Offline decode throughput: SPARSESPEC beside plain SGLang, same requests, same flags but for the algorithm.

    python benchmarks/throughput.py --model-path M --engines plain:flashinfer plain:triton sparsespec \
        --cases 8192x128 16384x64 --new-tokens 512 --results throughput.jsonl

Each engine is started once and runs every case (context x batch): all prompts are prefilled first,
which fills the radix cache, then sent again together, so that the timed run is decoding but for one
token per prompt. Reported are output tokens per second of that run.

Several GPUs: ``--engine-args '{"tp_size": 2}'``, for all engines.

``--random-prompts`` sends random token ids, for dummy weights (``--load-format dummy``), together with
SGLANG_SIMULATE_ACC_LEN: such results are marked simulated.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from _common import append_json_line, stamp
from _workloads import LEAST_DISTINCT, distinct_share, make_prompts, random_prompts

#: SGLang's own speculative algorithms, by the names that ``--engines`` takes.
SGLANG_SPECULATION = {"ngram": "NGRAM", "standalone": "STANDALONE", "eagle3": "EAGLE3"}


def engine_arguments(
    name: str, max_batch: int, args: argparse.Namespace, speculate: str | None = None
) -> dict[str, Any]:
    """An engine's name as ``sglang.Engine`` arguments.

    ``plain:BACKEND``, ``sparsespec[:POLICY[:SCHEDULE]]``, or ``ngram``, ``standalone``, ``eagle3`` with ``[:BACKEND]``:
    SGLang's own speculation, with SGLang's default draft lengths (the draft model's path comes with ``--engine-args``).

    Args:
        speculate: SPARSESPEC's ``--sparsespec-speculate``, where measurements of rounds that speculate need it.

    Raises:
        SystemExit: no such name.
    """
    kind, _, detail = name.partition(":")
    policy, _, schedule = detail.partition(":")
    settings: dict[str, Any] = {
        "model_path": args.model_path,
        "load_format": args.load_format,
        "device": args.device,
        "dtype": args.dtype,
        "random_seed": 0,
        "log_level": args.log_level,
        "skip_tokenizer_init": args.random_prompts,
        "max_running_requests": max_batch,
    }
    if args.device != "cpu":
        settings["cuda_graph_max_bs_decode"] = max_batch
    elif kind != "sparsespec":
        settings["disable_cuda_graph"] = True
    if kind == "plain":
        settings["prefill_attention_backend"] = args.prefill_backend
        settings["decode_attention_backend"] = detail or "flashinfer"
    elif kind == "sparsespec":
        settings.update(
            speculative_algorithm="SPARSESPEC",
            speculative_num_steps=args.k,
            sparsespec_base_attention_backend=args.prefill_backend,
            sparsespec_draft_policy=policy or "pillar",
            sparsespec_schedule=schedule or "lockstep",
        )
        if speculate is not None:
            settings["sparsespec_speculate"] = speculate
    elif kind in SGLANG_SPECULATION:
        settings.update(speculative_algorithm=SGLANG_SPECULATION[kind], attention_backend=detail or "flashinfer")
    else:
        names = ", ".join(SGLANG_SPECULATION)
        raise SystemExit(f"--engines {name}: expected plain:BACKEND, sparsespec[:POLICY[:SCHEDULE]], or one of {names}")
    return {**settings, **json.loads(args.engine_args)}


def describe(name: str, context: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """What a record says about engine and requests."""
    simulated = os.environ.get("SGLANG_SIMULATE_ACC_LEN")
    return {
        "model": Path(args.model_path).name,
        "load_format": args.load_format,
        "engine": name,
        "tp_size": json.loads(args.engine_args).get("tp_size", 1),
        "prefill_backend": args.prefill_backend,
        "context": context,
        "batch": batch,
        "new_tokens": args.new_tokens,
        "k": args.k,
        "simulated_accept_length": float(simulated) if simulated and name.startswith("sparsespec") else None,
    }


def prefill(engine: Any, prompts: list[list[int]], temperatures: Sequence[float]) -> float:
    """Fill the radix cache with ``prompts``; seconds. A few tokens are decoded afterwards, to warm up."""
    started = time.perf_counter()
    engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": 1, "ignore_eos": True})
    seconds = time.perf_counter() - started
    for temperature in temperatures:
        sampling = {"max_new_tokens": 16, "ignore_eos": True, "temperature": temperature}
        engine.generate(input_ids=prompts, sampling_params=sampling)
    return seconds


def digest(outputs: list[list[int]]) -> str:
    """Equal for equal outputs: greedy ones of a lossless engine, where arithmetic is deterministic."""
    return hashlib.sha256(json.dumps(outputs).encode()).hexdigest()[:16]


async def keep_full(engine: Any, prompts: list[list[int]], sampling: dict[str, Any], at_once: int) -> list[dict[str, Any]]:
    """Answers to all prompts, ``at_once`` of which are with the engine until none is left to be sent."""
    free = asyncio.Semaphore(at_once)

    async def ask(prompt: list[int]) -> dict[str, Any]:
        async with free:
            return await engine.async_generate(input_ids=prompt, sampling_params=sampling)

    return list(await asyncio.gather(*map(ask, prompts)))


def run_case(
    engine: Any, prompts: list[list[int]], sampling: dict[str, Any], repeats: int, at_once: int | None = None
) -> dict[str, Any]:
    """Time ``repeats`` runs of all prompts together, or of ``at_once`` of them at a time (:func:`keep_full`)."""
    seconds, outputs = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        if at_once is None:
            outputs = engine.generate(input_ids=prompts, sampling_params=sampling)
        else:
            outputs = engine.loop.run_until_complete(keep_full(engine, prompts, sampling, at_once))
        seconds.append(time.perf_counter() - started)
    accept = [output["meta_info"].get("spec_accept_length") for output in outputs]
    tokens = sum(output["meta_info"]["completion_tokens"] for output in outputs)
    distinct = [distinct_share(output["output_ids"]) for output in outputs]
    fresh = [value for value, share in zip(accept, distinct, strict=True) if share >= LEAST_DISTINCT]
    return {
        "decode_s": [round(value, 3) for value in seconds],
        "output_tokens": tokens,
        "tokens_per_s": round(tokens / median(seconds), 1),
        "cached_tokens": sum(output["meta_info"]["cached_tokens"] for output in outputs),
        "stopped_at_limit": sum(output["meta_info"]["finish_reason"]["type"] == "length" for output in outputs),
        "outputs_digest": digest([output["output_ids"] for output in outputs]),
        "retractions": sum(output["meta_info"].get("num_retractions", 0) for output in outputs),
        "accept_length": round(mean(accept), 3) if all(accept) else None,
        "accept_length_not_repetitive": round(mean(fresh), 3) if fresh and all(fresh) else None,
        "distinct": round(mean(distinct), 3),
        "repetitive_prompts": sum(share < LEAST_DISTINCT for share in distinct),
    }


def parse_case(text: str) -> tuple[int, int]:
    """``CONTEXTxBATCH`` as two numbers."""
    context, _, batch = text.partition("x")
    return int(context), int(batch)


def make_inputs(args: argparse.Namespace, context: int, batch: int) -> list[list[int]]:
    """Prompts of the corpora, or of random token ids (``--random-prompts``)."""
    if args.random_prompts:
        return random_prompts(context, batch)
    from transformers import AutoTokenizer

    return make_prompts(AutoTokenizer.from_pretrained(args.model_path), args.corpora, context, batch)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which engines run which requests."""
    add_model_options(parser)
    parser.add_argument("--engines", nargs="+", default=["plain:flashinfer", "plain:triton", "sparsespec"])
    parser.add_argument("--new-tokens", type=int, default=512)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What all engines have in common, and where prompts come from."""
    add_start_options(parser)
    parser.add_argument("--corpora", nargs="+", choices=("math", "code"), default=["code", "math"])
    parser.add_argument("--random-prompts", action="store_true")


def add_start_options(parser: argparse.ArgumentParser) -> None:
    """What all engines have in common."""
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--prefill-backend", default="triton", help="the same for all engines")
    parser.add_argument("--engine-args", default="{}", help="JSON object of further sglang.Engine arguments")
    parser.add_argument("--log-level", default="warning")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser)
    parser.add_argument("--cases", nargs="+", type=parse_case, default=[(8192, 64)], help="CONTEXTxBATCH")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", help="JSON-lines file to append to")
    args = parser.parse_args()

    import sglang

    environment = stamp()
    cases = [(context, batch, make_inputs(args, context, batch)) for context, batch in args.cases]
    max_batch = max(batch for _, batch in args.cases)
    for name in args.engines:
        started = time.perf_counter()
        engine = sglang.Engine(**engine_arguments(name, max_batch, args))
        print(f"{name}: ready after {time.perf_counter() - started:.0f} s", flush=True)
        for context, batch, prompts in cases:
            prefill_s = prefill(engine, prompts, args.temperatures)
            for temperature in args.temperatures:
                sampling = {"temperature": temperature, "ignore_eos": True, "max_new_tokens": args.new_tokens}
                record = {
                    **environment,
                    **describe(name, context, batch, args),
                    "temperature": temperature,
                    "prefill_s": round(prefill_s, 2),
                    **run_case(engine, prompts, sampling, args.repeats),
                }
                print(append_json_line(args.results, record), flush=True)
            engine.flush_cache()
        engine.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
