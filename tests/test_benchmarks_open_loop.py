"""The open-loop benchmark: servers' flags, what is asked of bench_serving, records and the table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_serving_result import TWO_REQUESTS

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _server_job  # noqa: E402
import open_loop  # noqa: E402

#: What bench_serving writes, as far as it is read.
RESULT: dict[str, Any] = {
    **TWO_REQUESTS,
    "request_throughput": 1.0,
    "concurrency": 1.5,
    "p99_e2e_latency_ms": 900.0,
    **{f"{stat}_{name}_ms": 10.0 * (1 + index) for index, stat in enumerate(("mean", "median", "p99"))
       for name in ("ttft", "tpot", "itl")},
    "ttfts": [0.01, 0.0302],
    "accept_length": 4.5,
    "server_info": {"version": "0.5.17", "speculative_algorithm": "SPARSESPEC"},
    "generated_texts": ["a b c d e f g h i j k l m n o p", "q r s t u v w x y z"],
}


def parse(*options: str) -> argparse.Namespace:
    return open_loop.parse_arguments(["--model-path", "some/model", "--results", "r.jsonl", *options])


class Characters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return type("Encoding", (), {"input_ids": list(text)})

    def decode(self, tokens: list[str]) -> str:
        return "".join(tokens)


# -------------------------------------------------------------------------- servers


def test_servers_differ_by_algorithm_only() -> None:
    args = parse("--engine-args", '{"chunked_prefill_size": 2048, "disable_radix_cache": true, "enable_metrics": false}')
    plain = open_loop.server_flags("plain:triton", args)
    sparse = open_loop.server_flags("sparsespec:window:unified+mixed-chunk", args)
    for flags in (plain, sparse):
        assert flags[flags.index("--model-path") + 1] == "some/model"
        assert flags[flags.index("--chunked-prefill-size") + 1] == "2048"
        assert "--disable-radix-cache" in flags and "--enable-metrics" not in flags
        assert "--skip-tokenizer-init" not in flags  # bench_serving sends and wants text
    assert plain[plain.index("--decode-attention-backend") + 1] == "triton"
    assert "--speculative-algorithm" not in plain and "--enable-mixed-chunk" not in plain
    assert sparse[sparse.index("--sparsespec-draft-policy") + 1] == "window"
    assert sparse[sparse.index("--sparsespec-schedule") + 1] == "unified"
    assert "--enable-mixed-chunk" in sparse
    assert set(sparse) - set(open_loop.server_flags("sparsespec:window:unified", args)) == {"--enable-mixed-chunk"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("engine", ["plain:torch_native", "sparsespec+mixed-chunk", "sparsespec+late-launch"])
def test_sglang_takes_the_flags(plugin: None, engine: str, device: str) -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = parse("--device", device, "--engine-args", '{"cuda_graph_bs_decode": [1, 2], "max_total_tokens": 900}')
    found = parser.parse_args(open_loop.server_flags(engine, args))
    assert (found.device, found.max_total_tokens, found.cuda_graph_bs_decode) == (device, 900, [1, 2])
    assert found.enable_mixed_chunk == engine.endswith("+mixed-chunk")
    assert found.sparsespec_late_launch == engine.endswith("+late-launch")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--engines", "triton"], "--engines triton"),
        (["--engines", "sparsespec", "sparsespec"], "--engines"),
        (["--rates", "0"], "--rates"),
        (["--dataset", "random"], "random-ids"),
        (["--prompt-file", "missing.jsonl"], "--prompt-file missing.jsonl"),
        (["--dataset", "aime", "--prompt-file", "x"], "--prompt-file"),
    ],
)
def test_wrong_options_are_named(options: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*options)
    assert named in str(ended.value) + capsys.readouterr().err


# ----------------------------------------------------------------------------- load


def option(line: list[str], name: str) -> str:
    return line[line.index(name) + 1]


def test_prompts_are_code_that_no_other_prompt_begins_with(tmp_path: Path) -> None:
    args = parse("--dataset", "code:128", "--num-prompts", "3", "--output-len", "32")
    dataset = open_loop.make_dataset(args, Characters(), tmp_path / "prompts.jsonl")
    turns = [json.loads(line)["conversations"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert len({turn[0]["content"].splitlines()[0] for turn in turns}) == len(turns) == 3
    line = open_loop.command("2.5", 3, dataset, "http://u", tmp_path / "o", args)
    assert option(line, "--dataset-path") == str(tmp_path / "prompts.jsonl")
    assert option(line, "--request-rate") == "2.5" and option(line, "--num-prompts") == "3"
    assert option(line, "--sharegpt-output-len") == "32"
    assert "--max-concurrency" not in line  # an open loop does not wait for answers
    assert "--disable-ignore-eos" not in line


def test_random_ids_are_bench_servings(tmp_path: Path) -> None:
    args = parse("--dataset", "random-ids", "--input-len", "100", "--output-len", "32", "--random-range-ratio", "0.25")
    made = open_loop.make_dataset(args, None, tmp_path / "p")
    line = open_loop.command("inf", 5, made, "http://u", tmp_path / "o", args)
    assert option(line, "--dataset-name") == "random-ids" and option(line, "--random-input-len") == "100"
    assert option(line, "--random-output-len") == "32" and option(line, "--random-range-ratio") == "0.25"
    assert "--sharegpt-output-len" not in line and not (tmp_path / "p").exists()


def test_bench_serving_has_all_the_options(tmp_path: Path) -> None:
    """They are read by its own parser, in a process that ends where it would begin."""
    program = (
        "import sys; from sglang.benchmark import serving\n"
        "serving.run_benchmark = lambda args: print(args.request_rate, args.dataset_name, args.warmup_requests)\n"
    )
    for dataset in ("code:128", "random-ids"):
        args = parse("--dataset", dataset, "--num-prompts", "2")
        made = open_loop.make_dataset(args, Characters(), tmp_path / "prompts.jsonl")
        line = open_loop.command("inf", 2, made, "http://u", tmp_path / "o", args)
        program += f"sys.argv = {line[2:]!r}; serving.cli_main()\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["inf", "custom", "0", "inf", "random-ids", "0"], done.stderr[-2000:]


# ------------------------------------------------------------------------- records

FAKE_BENCH = """
import json, sys
print("50 of 100", file=sys.stderr)
result = json.loads({result!r})
if {fails}:
    sys.exit("the server is gone")
open(sys.argv[1], "w").write(json.dumps({{"old": True}}) + "\\n" + json.dumps(result) + "\\n")
"""


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``loop(*options)``: an ``OpenLoop`` with a server that does nothing, and a bench_serving that writes ``RESULT``."""
    state: dict[str, Any] = {"fails": set(), "started": [], "asked": [], "stopped": 0, "dies_after": 99}

    class FakeServer:
        def __init__(self, line: list[str], port: int, log: Path, env: dict[str, str]) -> None:
            state["started"].append(line)
            self.checks = 0

        def __enter__(self) -> FakeServer:
            return self

        def __exit__(self, *_: object) -> None:
            state["stopped"] += 1

        def wait_until_ready(self, timeout: float) -> None:
            assert timeout == 1800

        def check_alive(self) -> None:
            self.checks += 1
            if self.checks >= state["dies_after"]:
                raise open_loop.ServerError("the server ended")

    def command(
        rate: str, count: int, dataset: list[str], url: str, output: Path, args: argparse.Namespace
    ) -> list[str]:
        state["asked"].append((rate, count))
        program = FAKE_BENCH.format(result=json.dumps(RESULT), fails=rate in state["fails"])
        return [sys.executable, "-c", program, str(output)]

    def warm_up(url: str, prompts: dict[str, Any]) -> None:
        state["asked"].append(("warm up", len(prompts["text"])))
        if "warm up" in state["fails"]:
            raise RuntimeError("the server is gone")

    monkeypatch.setattr(open_loop, "Server", FakeServer)
    monkeypatch.setattr(open_loop, "command", command)
    monkeypatch.setattr(open_loop, "warm_up", warm_up)
    monkeypatch.setattr(open_loop, "metrics_of", lambda name, url: {"sparsespec_plain_rounds": 7})
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda path: Characters())

    def make(*options: str) -> Any:
        results = tmp_path / "r.jsonl"
        options = ("--results", str(results), "--num-prompts", "2", "--dataset", "code:128", *options)
        made = open_loop.OpenLoop(parse(*options), tmp_path)
        made.state = state
        return made

    return make


def written(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]


def test_each_rate_becomes_a_line(loop: Any, tmp_path: Path) -> None:
    made = loop("--rates", "2", "inf")
    made.run_engine("sparsespec:pillar:unified+mixed-chunk")
    first, second = written(tmp_path)
    assert (first["request_rate"], second["request_rate"]) == ("2", "inf")
    assert first["engine"] == "sparsespec:pillar:unified+mixed-chunk" and "--enable-mixed-chunk" in first["flags"]
    assert first["forced_lengths"] is True and first["arrivals"] == "Poisson" and first["dataset"] == "code:128"
    assert (first["mean_ttft_ms"], first["median_ttft_ms"], first["p99_ttft_ms"]) == (10.0, 20.0, 30.0)
    assert (first["p99_tpot_ms"], first["p99_itl_ms"], first["tokens_per_s"]) == (30.0, 30.0, 32.0)
    assert first["accept_length"] == 4.5 and first["requests_per_s"] == 1.0
    assert first["metrics"] == {"sparsespec_plain_rounds": 7}
    assert {"date", "commit", "packages", "command"} <= set(first)
    assert made.state["stopped"] == 1
    assert made.state["asked"] == [("warm up", 2), ("2", 2), ("inf", 2)]
    logs = [path for path in tmp_path.glob("r-*.bench.log")]
    assert len(logs) == 1 and "50 of 100" in logs[0].read_text()


def test_a_servers_metrics_are_those_of_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"sparsespec_plain_rounds": 7, "avg_spec_accept_length": 2.0}
    answer = SimpleNamespace(raise_for_status=lambda: None, json=lambda: {"internal_states": [state]})
    monkeypatch.setattr(open_loop.requests, "get", lambda url, timeout: answer)
    assert open_loop.metrics_of("sparsespec:window", "http://server") == {"sparsespec_plain_rounds": 7}
    assert open_loop.metrics_of("plain:triton", "http://server") is None


def test_a_server_that_answers_no_more_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, timeout: float) -> None:
        raise open_loop.requests.ConnectionError("refused")

    monkeypatch.setattr(open_loop.requests, "get", refuse)
    with pytest.raises(RuntimeError, match="server_info: refused"):
        open_loop.metrics_of("sparsespec", "http://server")


def test_a_server_that_answers_no_warm_up_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def post(url: str, json: dict[str, Any], timeout: float) -> Any:
        asked.append((url, json["input_ids"]))
        answer = open_loop.requests.Response()
        answer.status_code = 500
        return answer

    monkeypatch.setattr(open_loop.requests, "post", post)
    with pytest.raises(RuntimeError, match="generate: 500"):
        open_loop.warm_up("http://server", open_loop.first_prompts(["--dataset-name", "random-ids"], 3))
    ((url, prompts),) = asked
    assert url == "http://server/generate" and len({tuple(prompt) for prompt in prompts}) == 3


def test_a_failed_run_is_recorded_and_the_next_one_runs(loop: Any, tmp_path: Path) -> None:
    made = loop("--rates", "2", "4", "8")
    made.state["fails"] = {"4"}
    made.run_engine("sparsespec")
    records = written(tmp_path)
    assert ["error" in record for record in records] == [False, True, False]
    assert "the server is gone" in records[1]["error"]


def test_rates_that_a_dead_server_did_not_serve_are_recorded(loop: Any, tmp_path: Path) -> None:
    made = loop("--rates", "2", "4", "8")
    made.state["dies_after"] = 1
    made.run_engine("sparsespec")
    records = written(tmp_path)
    assert [record.get("error") for record in records] == [None, "the server ended", "the server ended"]
    assert made.state["stopped"] == 1


def test_a_server_that_cannot_be_warmed_up_is_recorded_for_every_rate(loop: Any, tmp_path: Path) -> None:
    made = loop("--rates", "2", "4")
    made.state["fails"] = {"warm up"}
    made.run_engine("sparsespec")
    assert ["the server is gone" in record["error"] for record in written(tmp_path)] == [True, True]
    assert made.state["stopped"] == 1


def test_the_longest_times_to_first_token_come_first() -> None:
    assert open_loop.figures_of(RESULT, Characters(), 2)["slowest_ttft_ms"] == [30.2, 10.0]


def test_a_missing_answer_fails_the_run() -> None:
    with pytest.raises(RuntimeError, match="1 of 2 requests"):
        open_loop.figures_of({**RESULT, "completed": 1, "errors": ["", "boom"]}, Characters(), 2)


def test_a_long_run_shows_its_progress(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown: list[str] = []
    monkeypatch.setattr(_server_job, "PROGRESS_S", 0.2)
    monkeypatch.setattr(_server_job, "say", shown.append)
    output = tmp_path / "o"
    program = (
        "import sys, time; sys.stderr.write('10%\\r20%\\r'); sys.stderr.flush(); time.sleep(1.5)\n"
        "open(sys.argv[1], 'w').write('{}')"
    )
    line = [sys.executable, "-c", program, str(output)]
    assert _server_job.run_bench_serving(line, output, tmp_path / "log") == {}
    assert "  20%" in shown


# --------------------------------------------------------------------------- report


def record(engine: str, rate: str, tokens: float = 100.0, ttft: float = 50.0, **more: Any) -> dict[str, Any]:
    figures = {"tokens_per_s": tokens, "p99_ttft_ms": ttft, "model": "m", "dataset": "code:128", "output_len": 8}
    return {"engine": engine, "request_rate": rate, **figures, **more}


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_ratios_are_against_the_first_plain_engine_at_the_same_rate() -> None:
    records = [
        record("sparsespec", "2", tokens=300.0, ttft=25.0),
        record("plain:a", "2"),
        record("plain:b", "2", tokens=1.0),
        record("plain:a", "inf", tokens=1000.0),
        record("sparsespec", "inf", tokens=1500.0),
        record("sparsespec", "8"),  # no plain engine ran at this rate
    ]
    head, _, *rows = rows_of(open_loop.table(records))
    throughput, ttft = head.index("tokens/s") + 1, head.index("TTFT p99, ms") + 1
    assert head[throughput] == head[ttft] == "x plain"
    found = {(row[0], row[1]): (row[throughput], row[ttft]) for row in rows}
    assert found["2", "sparsespec"] == ("3.00", "0.500")
    assert found["2", "plain:a"] == ("1.00", "1.00")
    assert found["inf", "sparsespec"] == ("1.50", "1.00")
    assert found["8", "sparsespec"] == ("-", "-")


def test_a_failed_run_is_in_the_table() -> None:
    failed = {"engine": "sparsespec", "request_rate": "2", "error": "boom"}
    assert "sparsespec FAILED" in open_loop.table([record("plain:a", "2"), failed])


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [record(engine, rate) for engine in ("plain:a", "sparsespec") for rate in ("2", "inf")]
    open_loop.plot(records, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


# ---------------------------------------------------------------------- end to end


@pytest.mark.slow
@pytest.mark.skipif("SPARSESPEC_TEST_BENCHMARK" not in os.environ, reason="2 minutes; set SPARSESPEC_TEST_BENCHMARK=1")
def test_two_engines_are_measured_at_two_rates(model_path: str, tmp_path: Path) -> None:
    results = tmp_path / "r.jsonl"
    options = ["--model-path", model_path, "--device", "cpu", "--dtype", "float32", "--prefill-backend", "torch_native"]
    options += ["--engines", "plain:torch_native", "sparsespec+mixed-chunk", "--rates", "1", "inf", "--num-prompts", "4"]
    options += ["--dataset", "code:256", "--output-len", "16", "--max-running-requests", "8", "--warmup-requests", "1"]
    options += ["--engine-args", '{"max_total_tokens": 8000}', "--results", str(results)]
    assert open_loop.main(options) == 0
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(r["engine"], r["request_rate"], r["output_tokens"]) for r in records] == [
        (engine, rate, 64) for engine in ("plain:torch_native", "sparsespec+mixed-chunk") for rate in ("1", "inf")
    ]
