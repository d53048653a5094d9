"""Runs of SGLang's ``bench_serving`` (which speaks to vLLM too), and samples of ``run.py`` by it from a running server."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _common import say
from _matrix import Cell, Job, Matrix
from _workloads import LEAST_DISTINCT, distinct_share

#: What is kept of a server's answer to /server_info (SGLang's; vLLM has no such page).
SERVER_FLAGS = (
    "version",
    "model_path",
    "device",
    "dtype",
    "kv_cache_dtype",
    "tp_size",
    "attention_backend",
    "max_running_requests",
    "speculative_algorithm",
    "speculative_num_steps",
    "speculative_num_draft_tokens",
    "speculative_draft_model_path",
)
BACKENDS = {"server": "sglang", "vllm": "vllm", "vllm-ngram": "vllm"}
#: Seconds between signs of life of a run.
PROGRESS_S = 15.0


def write_dataset(prompts: list[str], path: Path) -> None:
    """Prompts as ``bench_serving``'s custom dataset, whose second turn only has to be there."""
    turns = [[{"content": prompt}, {"content": "-"}] for prompt in prompts]
    path.write_text("".join(json.dumps({"conversations": turn}) + "\n" for turn in turns))


def base_command(backend: str, model: str, url: str, output: Path) -> list[str]:
    """What all runs have in common: the server, and a result with the requests' outputs."""
    made = [sys.executable, "-m", "sglang.benchmark.serving", "--backend", backend, "--base-url", url]
    # Prefill is timed, so what earlier runs left in the prefix cache has to go (vLLM: VLLM_SERVER_DEV_MODE=1).
    made += ["--model", model, "--tokenizer", model, "--output-file", str(output), "--output-details", "--flush-cache"]
    return made


def command(cell: Cell, matrix: Matrix, url: str, dataset: Path, output: Path) -> list[str]:
    """The command line of one run."""
    made = base_command(BACKENDS[cell.engine.kind], cell.model, url, output)
    made += ["--dataset-name", "custom", "--dataset-path", str(dataset)]
    made += ["--num-prompts", str(cell.batch), "--max-concurrency", str(cell.batch)]
    made += ["--sharegpt-output-len", str(cell.load.output_length), "--temperature", str(cell.load.temperature)]
    if BACKENDS[cell.engine.kind] == "vllm":
        # --temperature reaches SGLang's own API only.
        made += ["--extra-request-body", json.dumps({"temperature": cell.load.temperature})]
    if not matrix.ignore_eos:
        made.append("--disable-ignore-eos")
    return made


def run_bench_serving(line: list[str], output: Path, log: Path) -> dict[str, Any]:
    """Run a command to its end, with signs of life until then; its result. What it prints goes to ``log``.

    Raises:
        RuntimeError: it failed, with the end of what it printed.
    """
    output.unlink(missing_ok=True)
    begin = log.stat().st_size if log.exists() else 0
    with log.open("ab") as sink, subprocess.Popen(line, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None:
                try:
                    process.wait(PROGRESS_S)
                except subprocess.TimeoutExpired:
                    say(f"  {last_line(log, begin)}")
        except BaseException:
            process.kill()
            raise
    if process.returncode or not output.exists():
        tail = log.read_bytes()[begin:].decode(errors="replace")[-300:]
        raise RuntimeError(f"bench_serving ended with {process.returncode}: {tail}")
    return json.loads(output.read_text().splitlines()[-1])


def last_line(log: Path, begin: int) -> str:
    """The newest line (or state of a progress bar) in ``log`` after byte ``begin``."""
    lines = log.read_bytes()[begin:].decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:100] for line in reversed(lines) if line.strip()), "bench_serving starts")


def as_record(result: dict[str, Any], tokenizer: Any, asked: int) -> dict[str, Any]:
    """A sample's figures from ``bench_serving``'s result.

    Raises:
        RuntimeError: not all requests were answered.
    """
    if result["completed"] != asked:
        errors = [error for error in result["errors"] if error]
        raise RuntimeError(f"{result['completed']} of {asked} requests were answered: {errors[:1]}")
    texts = result["generated_texts"]
    distinct = [distinct_share(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    # Of this run, up to the server's last decode log line: flushing the cache resets the average. None in runs that are
    # shorter than a log interval.
    accept = result.get("accept_length")
    server = result.get("server_info") or {}
    return {
        "server_flags": {name: server[name] for name in SERVER_FLAGS if name in server},
        "timed": "whole requests, prefill included",
        "decode_s": [round(result["duration"], 3)],
        "prompt_tokens": result["total_input_tokens"],
        "output_tokens": result["total_output_tokens"],
        "tokens_per_s": round(result["output_throughput"], 1),
        "median_ttft_ms": round(result["median_ttft_ms"], 2),
        "median_tpot_ms": round(result["median_tpot_ms"], 3),
        "accept_length": round(accept, 3) if accept else None,
        "distinct": round(sum(distinct) / len(distinct), 3),
        "repetitive_prompts": sum(share < LEAST_DISTINCT for share in distinct),
    }


def run_samples(job: Job, matrix: Matrix, url: str, log: Path) -> Iterator[dict[str, Any]]:
    """One record per sample, as each is finished.

    Raises:
        RuntimeError: ``bench_serving`` failed, or the server did not answer everything.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    with tempfile.TemporaryDirectory() as folder:
        dataset, output = Path(folder, "prompts.jsonl"), Path(folder, "result.jsonl")
        for cell, repeat in job.samples:
            ids = cell.dataset.prompts(tokenizer, cell.batch)
            prompts = [tokenizer.decode(prompt) for prompt in ids]
            write_dataset(prompts, dataset)
            result = run_bench_serving(command(cell, matrix, url, dataset, output), output, log)
            yield {
                **cell.sample(matrix, repeat),
                "server_url": url,
                "distinct_prompts": len(set(prompts)),
                **as_record(result, tokenizer, cell.batch),
            }
