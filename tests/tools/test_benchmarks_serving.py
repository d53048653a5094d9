"""The open-loop benchmark: servers' flags, what is asked of bench_serving, records and the table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.append(str(REPO / "benchmarks"))

import serving  # noqa: E402
from _common import EngineSpec  # noqa: E402

FIGURES = [f"{stat}_{name}_ms" for stat in ("mean", "median", "p99") for name in ("ttft", "tpot", "itl")]
#: What bench_serving writes of two requests, as far as it is read.
RESULT: dict[str, Any] = {
    "completed": 2,
    "errors": ["", ""],
    "duration": 2.0,
    "total_input_tokens": 100,
    "total_output_tokens": 64,
    "output_throughput": 32.0,
    "request_throughput": 1.0,
    "concurrency": 1.5,
    "p99_e2e_latency_ms": 900.0,
    **dict.fromkeys(FIGURES, 10.0),
    "ttfts": [0.01, 0.0302],
    "accept_length": 4.5,
    "generated_texts": ["abcdefghijklmnopqrs", "ab" * 20],
}


def parse(*options: str) -> argparse.Namespace:
    return serving.parse_arguments(["--model-path", "some/model", "--results", "r.jsonl", *options])


def characters(text: str, add_special_tokens: bool) -> Any:
    """A tokenizer whose tokens are characters."""
    return argparse.Namespace(input_ids=list(text))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("engine", ["plain", "plain:triton", "sparsespec:pillar:unified,enable_mixed_chunk=true"])
def test_sglang_takes_the_flags(plugin: None, engine: str, device: str) -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = parse("--device", device, "--engine-args", '{"cuda_graph_bs_decode": [1, 2], "max_total_tokens": 900}')
    found = parser.parse_args(serving.server_flags(EngineSpec.parse(engine), args))
    assert found.max_total_tokens == 900 and found.cuda_graph_bs_decode == [1, 2]
    assert found.speculative_algorithm == ("SPARSESPEC" if engine.startswith("sparsespec") else None)
    assert found.enable_mixed_chunk == ("mixed" in engine)
    backends = {("plain", "cpu"): "torch_native", ("plain:triton", "cpu"): "triton", ("plain:triton", "cuda"): "triton"}
    assert found.attention_backend == backends.get((engine, device))


def test_bench_serving_takes_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sglang.benchmark.serving as bench

    args = parse("--requests", "7", "--new-tokens", "33", "--temperature", "0.6", "--max-concurrency", "5")
    line = serving.bench_command("2.5", "vllm", "http://h:1", tmp_path, args)
    asked: list[argparse.Namespace] = []
    monkeypatch.setattr(bench, "run_benchmark", asked.append)
    monkeypatch.setattr(sys, "argv", line[2:])
    bench.cli_main()
    (found,) = asked
    assert (found.request_rate, found.num_prompts, found.sharegpt_output_len, found.max_concurrency) == (2.5, 7, 33, 5)
    assert found.warmup_requests == 0 and found.flush_cache and not found.disable_ignore_eos
    assert json.loads(found.extra_request_body) == {"temperature": 0.6}


def test_prompts_share_no_prefix(model_path: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    args = parse("--dataset", "code:64", "--requests", "3")
    args.model_path = model_path
    texts = serving.write_prompts(args, AutoTokenizer.from_pretrained(model_path), tmp_path / "p.jsonl")
    assert [text[:7] for text in texts] == ["# 00000", "# 00001", "# 00002"]
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["conversations"][0]["content"] for line in lines] == texts


def test_figures_are_bench_servings() -> None:
    found = serving.figures_of(RESULT, characters, 2)
    assert (found["tokens_per_s"], found["p99_ttft_ms"], found["accept_length"]) == (32.0, 10.0, 4.5)
    assert found["slowest_ttft_ms"] == [30.2, 10.0]
    assert found["repetitive_prompts"] == 1


def test_a_run_with_unanswered_requests_has_no_figures() -> None:
    with pytest.raises(RuntimeError, match="1 of 2 requests were answered.*too long"):
        serving.figures_of({**RESULT, "completed": 1, "errors": ["", "too long"]}, characters, 2)


def record(engine: str, rate: str, **figures: Any) -> dict[str, Any]:
    return {"engine": engine, "request_rate": rate, "model": "m", "dataset": "aime", "output_len": 8, **figures}


def test_the_table_compares_with_plain_at_the_same_rate_and_keeps_marks() -> None:
    figures = {"tokens_per_s": 50.0, "p99_ttft_ms": 20.0, "p99_tpot_ms": 4.0}
    records = [
        record("plain", "2", **figures),
        record("sparsespec", "2", **{**figures, "p99_ttft_ms": 30.0}, simulated_accept_length=7.0),
        record("sparsespec", "inf", error="died"),
    ]
    rows = serving.table(records).splitlines()[2:]
    assert "1.5" in rows[1] and "SIMULATED acceptance" in rows[1]
    assert "FAILED" in rows[2] and "1.5" not in rows[2]
