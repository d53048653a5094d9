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
    "itls": [[0.04, 0.05, 0.06], [0.02, 0.14]],
    "output_lens": [4, 3],
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

    args = parse("--requests", "7", "--temperature", "0.6", "--max-concurrency", "5")
    line = serving.bench_command("2.5", "vllm", "http://h:1", tmp_path, args)
    asked: list[argparse.Namespace] = []
    monkeypatch.setattr(bench, "run_benchmark", asked.append)
    monkeypatch.setattr(sys, "argv", line[2:])
    bench.cli_main()
    (found,) = asked
    assert (found.request_rate, found.num_prompts, found.sharegpt_output_len, found.max_concurrency) == (2.5, 7, None, 5)
    assert found.warmup_requests == 0 and found.flush_cache and not found.disable_ignore_eos
    assert json.loads(found.extra_request_body) == {"temperature": 0.6}


def test_requests_of_mixed_lengths_share_no_prefix(model_path: str, tmp_path: Path) -> None:
    from sglang.benchmark.datasets.custom import sample_custom_requests
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    args = parse("--dataset", "code:64", "code:128", "--requests", "12", "--new-tokens", "5", "700")
    args.model_path, args.prompts = model_path, tmp_path / "prompts.json"
    texts = serving.write_prompts(args, tokenizer, tmp_path / "p.jsonl")
    assert [text[:7] for text in texts] == [f"# {index:05d}" for index in range(12)]
    rows = sample_custom_requests(str(tmp_path / "p.jsonl"), 12, tokenizer)
    assert sorted(row.prompt for row in rows) == texts
    assert {row.output_len for row in rows} == {5, 700}
    lengths = {row.prompt_len for row in rows}
    assert [length for length in lengths if length < 80] and [length for length in lengths if length > 120]


def test_a_tokenizer_without_short_words_is_refused() -> None:
    with pytest.raises(ValueError, match="8 tokens of 4 words"):
        serving.words(argparse.Namespace(encode=list), 4)


def test_figures_are_bench_servings() -> None:
    found = serving.figures_of(RESULT, characters, 2, tpot_limit_ms=50)
    assert (found["tokens_per_s"], found["p99_ttft_ms"], found["accept_length"]) == (32.0, 10.0, 4.5)
    assert found["slowest_ttft_ms"] == [30.2, 10.0]
    assert found["repetitive_prompts"] == 1
    # 150 ms for three tokens after the first, and 160 ms for two.
    assert (found["requests_within_tpot_limit"], found["goodput_requests_per_s"]) == (1, 0.5)


def test_a_run_with_unanswered_requests_has_no_figures() -> None:
    with pytest.raises(RuntimeError, match="1 of 2 requests were answered.*too long"):
        serving.figures_of({**RESULT, "completed": 1, "errors": ["", "too long"]}, characters, 2, 50)


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


def line(tmp_path: Path, *options: str) -> list[str]:
    start = ["--model-path", "some/model", "--results", str(tmp_path / "r.jsonl"), "--requests", "2"]
    return [*start, "--rates", "inf", "25%", "90%", *options]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Servers and rates of the runs; no server is started, and the second engine's last run fails once."""
    import contextlib

    import transformers

    found: list[tuple[str, str]] = []
    running: list[str] = []

    @contextlib.contextmanager
    def server(flags: list[str], *_: Any) -> Any:
        running.append("sparsespec" if "SPARSESPEC" in flags else "plain")
        yield "http://h"

    def bench(command: list[str], *_: Any) -> dict[str, Any]:
        rate = command[command.index("--request-rate") + 1]
        found.append((running[-1], rate))
        if found.count(("sparsespec", "3.600")) == 1 and found[-1] == ("sparsespec", "3.600"):
            raise RuntimeError("died")
        return {**RESULT, "request_throughput": 4.0 if running[-1] == "plain" else 5.0}

    monkeypatch.setattr(serving, "server", server)
    monkeypatch.setattr(serving, "run_bench_serving", bench)
    monkeypatch.setattr(serving, "write_prompts", lambda *_: ["a", "b"])
    monkeypatch.setattr(serving, "ask", lambda url, body=None: {"internal_states": [{"attention_backend": "fa3"}]})
    monkeypatch.setattr(serving, "stamp", lambda: {"date": "d", "command": [], "gpu": None, "commit": "abc"})
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: characters)
    return found


def test_rates_are_shares_of_what_plain_answers_and_the_same_command_goes_on(
    asked: list[tuple[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serving.main(line(tmp_path)) == 1
    rates = ["inf", "1.000", "3.600"]
    assert asked == [(engine, rate) for engine in ("plain", "sparsespec") for rate in rates]
    assert serving.main(line(tmp_path)) == 0
    assert asked[6:] == [("sparsespec", "3.600")]  # only what had failed
    table = capsys.readouterr().out
    assert "1.000 (25%)" in table and table.count("FAILED") == 1  # of the first time
    assert serving.main(line(tmp_path, "--temperature", "0.6")) == 0 and len(asked) == 13
    assert serving.main(line(tmp_path, "--seed", "1", "--time-limit", "1e-9")) == 1 and len(asked) == 13


def test_shares_need_a_capacity(tmp_path: Path) -> None:
    for wrong in (["--engines", "sparsespec"], ["--rates", "25%", "inf"]):
        with pytest.raises(SystemExit):
            serving.parse_arguments(line(tmp_path, *wrong))
    assert serving.parse_arguments(line(tmp_path, "--engines", "sparsespec", "--capacity", "4")).capacity == 4
