"""One engine start of ``run.py``, in a process of its own: a crash or a leak of an engine ends with the process.

Reads a job (JSON, see :func:`job_contents`) from the file in the first argument and writes a JSON line per sample to the
file descriptor in the second. A resident engine says first that it has started, and waits for a line on its standard input
before each sample.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from _matrix import Job, Matrix
from _workloads import Dataset


def job_contents(job: Job, matrix: Matrix, log_level: str) -> dict[str, Any]:
    """What the process needs to know."""
    return {
        "engine": job.engine.engine,
        "settings": {
            "model_path": job.model,
            "load_format": matrix.load_format,
            "device": matrix.device,
            "dtype": matrix.dtype,
            "log_level": log_level,
            "random_prompts": all(cell.dataset.name == "random" for cell, _ in job.samples),
            "prefill_backend": matrix.prefill_backend,
            "k": matrix.k,
            "engine_args": json.dumps({**matrix.engine_args, **job.engine.args}),
        },
        "ignore_eos": matrix.ignore_eos,
        "resident": matrix.resident,
        "samples": [cell.sample(matrix, repeat) for cell, repeat in job.samples],
    }


def prompts_of(samples: list[dict[str, Any]], model_path: str) -> dict[tuple[str, int], list[list[int]]]:
    """Prompts by dataset and number of requests."""
    from transformers import AutoTokenizer

    wanted = {(sample["dataset"], sample["requests"]) for sample in samples}
    needs_tokenizer = any(Dataset.parse(name).name != "random" for name, _ in wanted)
    tokenizer = AutoTokenizer.from_pretrained(model_path) if needs_tokenizer else None
    return {(name, count): Dataset.parse(name).prompts(tokenizer, count) for name, count in wanted}


def flush(engine: Any, timeout: float = 60) -> None:
    """Drop what earlier runs left in the radix cache and in n-gram tables.

    Raises:
        RuntimeError: the engine refused, as it does while requests run, for ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not engine.flush_cache().success:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the engine's cache could not be flushed for {timeout:g} s")
        time.sleep(0.1)


def run_sample(engine: Any, sample: dict[str, Any], prompts: list[list[int]], ignore_eos: bool) -> dict[str, Any]:
    """One timed run, from a flushed cache."""
    from throughput import prefill, run_case

    flush(engine)
    # With more requests than fit at once the cache would not keep all prompts: they are prefilled as they come.
    refilled = len(prompts) > sample["batch"]
    prefill_s = prefill(engine, prompts[: sample["batch"]], [sample["temperature"]])
    if refilled:
        flush(engine)
    sampling = {
        "temperature": sample["temperature"],
        "max_new_tokens": sample["output_length"],
        "ignore_eos": ignore_eos,
    }
    return {
        **sample,
        "timed": "whole requests, prefill included" if refilled else "decoding, prompts in the cache",
        "prompt_tokens": sum(map(len, prompts)),
        "distinct_prompts": len(set(map(tuple, prompts))),
        "prefill_s": round(prefill_s, 2),
        **run_case(engine, prompts, sampling, repeats=1, at_once=sample["batch"] if refilled else None),
    }


def main() -> int:
    job, output = json.loads(Path(sys.argv[1]).read_text()), os.fdopen(int(sys.argv[2]), "w", buffering=1)
    settings = argparse.Namespace(**job["settings"])
    if settings.device == "cpu":
        from sglang_sparsespec.cpu_bridge import CPU_BRIDGE_ENV

        os.environ[CPU_BRIDGE_ENV] = "1"  # plain SGLang needs it too on a processor without AMX
    import sglang
    from throughput import engine_arguments

    prompts = prompts_of(job["samples"], settings.model_path)
    settings_of_engine = engine_arguments(job["engine"], max(s["batch"] for s in job["samples"]), settings)
    if job["resident"] and settings.device == "cpu":
        settings_of_engine["sleep_on_idle"] = True  # the cores are shared, too
    started = time.perf_counter()
    engine = sglang.Engine(**settings_of_engine)
    start_s = round(time.perf_counter() - started, 1)
    if job["resident"]:
        output.write(json.dumps({"started": start_s}) + "\n")
    for sample in job["samples"]:
        if job["resident"] and not sys.stdin.readline():
            break
        record = run_sample(engine, sample, prompts[sample["dataset"], sample["requests"]], job["ignore_eos"])
        output.write(json.dumps({**record, "engine_start_s": start_s}) + "\n")
    engine.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
