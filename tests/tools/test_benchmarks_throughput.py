"""Engines, workloads, records and tables of the benchmarks: nothing is run twice, and no figure loses its marks."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import fcntl
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.append(str(REPO / "benchmarks"))

import _common  # noqa: E402
import throughput  # noqa: E402
from _common import Dataset, EngineSpec, OutOfTime, Progress, Served  # noqa: E402
from _vllm import VllmEngine  # noqa: E402

FAKE_VLLM = REPO / "tests" / "fake_vllm"

RIVALS = REPO / "benchmarks/results/2026-11-27-h100/run-rivals-qwen2.5-coder-1.5b-d090498.jsonl"


def options(*extra: str) -> argparse.Namespace:
    return throughput.parse_arguments(["--model-path", "folder/m", "--results", "r.jsonl", *extra])


# ------------------------------------------------------------------------- engines


@pytest.mark.parametrize("name", ["plain", "ngram", "standalone,speculative_draft_model_path=d", "sparsespec"])
def test_no_attention_backend_is_set_unless_it_is_asked_for(name: str) -> None:
    settings = EngineSpec.parse(name).engine_args(options(), 64)
    assert not [key for key in settings if "attention_backend" in key]
    assert settings["max_running_requests"] == settings["cuda_graph_max_bs_decode"] == 64


def test_engines_are_what_their_names_say() -> None:
    def settings(name: str, *extra: str) -> dict[str, Any]:
        return EngineSpec.parse(name).engine_args(options(*extra), 4)

    assert settings("plain:triton")["attention_backend"] == "triton"
    assert "speculative_algorithm" not in settings("plain")
    assert settings("ngram")["speculative_algorithm"] == "NGRAM"
    unified = settings("sparsespec:window:unified,speculative_num_steps=4,sparsespec_kernels=flashinfer")
    assert (unified["sparsespec_draft_policy"], unified["sparsespec_schedule"]) == ("window", "unified")
    assert (unified["speculative_num_steps"], unified["sparsespec_kernels"]) == (4, "flashinfer")
    assert settings('plain,cuda_graph_bs_decode=[1, 2],sleep=true')["cuda_graph_bs_decode"] == [1, 2]
    assert settings("plain", "--device", "cpu")["attention_backend"] == "torch_native"
    assert settings("sparsespec", "--engine-args", '{"tp_size": 2}')["tp_size"] == 2
    for wrong in ("magic", "plain:a:b", "sparsespec:a:b:c", "vllm:fa3"):
        with pytest.raises(argparse.ArgumentTypeError, match="no engine"):
            EngineSpec.parse(wrong)


def test_vllm_has_its_own_arguments_and_only_throughput_starts_it() -> None:
    args = options("--engine-args", '{"tp_size": 2, "cuda_graph_bs_decode": [1]}')
    settings = EngineSpec.parse("vllm:ngram,gpu_memory_utilization=0.9").vllm_args(args, 64)
    assert (settings["max_num_seqs"], settings["tensor_parallel_size"], settings["gpu_memory_utilization"]) == (64, 2, 0.9)
    assert settings["speculative_config"]["method"] == "ngram" and "cuda_graph_bs_decode" not in settings
    assert "speculative_config" not in EngineSpec.parse("vllm").vllm_args(args, 64)
    with pytest.raises(argparse.ArgumentTypeError, match="serving.py measures its server with --attach"):
        EngineSpec.parse_sglang("vllm")


def test_simulated_acceptance_and_dummy_weights_are_in_every_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_common.SIMULATE, "7.16")
    args = options("--load-format", "dummy")
    records = {name: _common.describe(EngineSpec.parse(name), args) for name in ("plain", "sparsespec", "ngram")}
    for name in ("sparsespec", "ngram"):
        assert _common.marks(records[name]) == ["SIMULATED acceptance", "dummy weights"]
    assert _common.marks(records["plain"]) == ["dummy weights"]
    monkeypatch.delenv(_common.SIMULATE)
    assert _common.marks(_common.describe(EngineSpec.parse("sparsespec"), options())) == []


# ----------------------------------------------------------------------- workloads


def test_workloads_by_name(model_path: str) -> None:
    assert str(Dataset.parse("code+math:64")) == "code+math:64"
    for wrong in ("aime:100", "code", "code:0", "random", "poems:10"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected aime"):
            Dataset.parse(wrong)
    prompts = Dataset.parse("code+math:64").prompts(model_path, 4)
    assert [len(prompt) for prompt in prompts] == [64] * 4 and len(set(map(tuple, prompts))) == 4
    assert Dataset.parse("random:9").prompts("nothing", 2) == Dataset.parse("random:9").prompts("nothing", 2)
    asked = Dataset.parse("aime").prompts(model_path, 16)
    assert asked[15] == asked[0] != asked[1]  # there are 15 questions
    both = Dataset.parse("aime+olympiadbench").prompts(model_path, 17)
    assert both[:15] == asked[:15] and len(set(map(tuple, both))) == 17


def test_code_is_read_in_the_shape_of_livecodebench(model_path: str) -> None:
    from transformers import AutoTokenizer

    prompts = Dataset.parse("code-reading").prompts(model_path, 3)
    assert len(set(map(tuple, prompts))) == 3
    text = AutoTokenizer.from_pretrained(model_path).decode(prompts[0])
    places = [text.find(part) for part in ("### Question:", "def ", "### Format:", "# YOUR CODE HERE", "### Answer:")]
    assert -1 not in places and places == sorted(places)


def test_prompts_are_made_once_for_all_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = tmp_path / "p.json", Dataset.parse("random:5")
    _common.make_prompts(path, "folder/m", [(asked, 2), (asked, 4), (Dataset.parse("random:3"), 1)])
    found = _common.prompts_of(path, asked, 4)
    assert found == asked.prompts("", 4) and _common.prompts_of(path, asked, 2) == found[:2]
    with pytest.raises(ValueError, match="4 prompts of random:5, 5 are needed"):
        _common.prompts_of(path, asked, 5)
    with pytest.raises(ValueError, match="of m, not of other"):
        _common.make_prompts(path, "other", [(asked, 1)])
    monkeypatch.setattr(Dataset, "prompts", lambda *_: pytest.fail("made again"))
    _common.make_prompts(path, "another/folder/m", [(asked, 3)])


def test_engines_start_side_by_side_and_are_measured_alone(tmp_path: Path) -> None:
    turns = tmp_path / "turns"

    def could(what: str) -> bool:
        """Whether another process gets a lock at once."""
        with turns.open("a") as file:
            try:
                fcntl.flock(file, {"start": fcntl.LOCK_SH, "be measured": fcntl.LOCK_EX}[what] | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    with _common.starting(turns):
        assert could("start") and not could("be measured")
        forked = os.fork()
        if not forked:  # as a compiler's workers, which outlive the start
            signal.pause()
    try:
        assert could("be measured")
    finally:
        os.kill(forked, signal.SIGKILL)
        os.waitpid(forked, 0)
    with _common.measuring(turns):
        assert not could("start") and not could("be measured")
    with pytest.raises(ZeroDivisionError), _common.measuring(turns):
        1 / 0  # noqa: B018
    assert could("be measured")


def test_outputs_that_repeat_themselves_are_told_from_others() -> None:
    assert _common.repetition([list(range(100)), [1, 2, 3] * 40, []]) == [False, True, False]


# ------------------------------------------------------------------------- records


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    _common.write_record(path, {"a": float("nan"), "b": [float("inf"), 1.0]})
    path.write_text(path.read_text() + '{"a": 1')
    assert _common.read_records(path) == [{"a": None, "b": [None, 1.0]}]
    _common.write_record(path, {"a": 2})
    assert [record["a"] for record in _common.read_records(path)] == [None, 2]


class FakeEngine:
    """Answers with consecutive tokens; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def generate(self, input_ids: list[list[int]], sampling_params: dict[str, Any]) -> list[dict[str, Any]]:
        tokens = sampling_params["max_new_tokens"]
        self.asked.append(tokens)
        return [answer(tokens) for _ in input_ids]

    def flush_cache(self) -> Any:
        return argparse.Namespace(success=True)

    def get_server_info(self) -> dict[str, Any]:
        return {"internal_states": [{"last_gen_throughput": 0.0, "attention_backend": "fa3"}]}

    def shutdown(self) -> None:
        pass


def answer(tokens: int) -> dict[str, Any]:
    meta = {"spec_accept_length": 5.0, "num_retractions": 0, "completion_tokens": tokens}
    return {"output_ids": list(range(tokens)), "meta_info": meta}


def test_decoding_of_cached_prompts_is_timed() -> None:
    engine = FakeEngine()
    load = throughput.Load.parse("code:8,2,24,0.6")
    found = throughput.run_sample(engine, load, [[1, 2], [3]], ignore_eos=True, deadline=0)
    assert engine.asked == [1, 16, 24]
    assert (found["prompt_tokens"], found["output_tokens"], found["accept_length"]) == (3, 48, 5.0)
    assert found["tokens_per_s"] > found["tokens_per_s_whole"] > 0 and found["repetitive_prompts"] == 0


# ---------------------------------------------------------------- a batch that is kept full


class OwnTime(asyncio.SelectorEventLoop):
    """A loop whose clock goes on when it would wait, at once and by just so much; a busy machine does not change it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        select = self._selector.select  # type: ignore[attr-defined]

        def pass_time(timeout: float | None) -> Any:
            self.now += timeout or 0.0
            return select(0)

        self._selector.select = pass_time  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> OwnTime:
    """A loop; ``throughput`` goes by its clock."""
    loop = OwnTime()
    monkeypatch.setattr(throughput, "time", argparse.Namespace(time=loop.time))
    return loop


class FakeAsyncEngine(FakeEngine):
    """Makes one token for each running request every 2 ms; the first two requests are twice as fast as others."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.loop = loop
        self.tokenizer_manager = self.load_snapshot_reader = self
        self.running: set[int] = set()
        self.most = self.generated = 0
        self.order: list[int] = []
        self.aborted = False

    async def async_generate(self, input_ids: list[int], sampling_params: dict[str, Any]) -> dict[str, Any]:
        (number,) = input_ids
        self.order.append(number)
        self.running.add(number)
        self.most = max(self.most, len(self.running))
        for _ in range(sampling_params["max_new_tokens"] // (2 if number < 2 else 1)):
            if not self.aborted:
                await asyncio.sleep(0.002)
                self.generated += 2 if number < 2 else 1
        self.running.remove(number)
        return answer(sampling_params["max_new_tokens"])

    def read_all(self) -> list[Any]:
        moments = [1.0] * 5 + [float(self.generated)] if self.generated else None
        return [argparse.Namespace(timestamp=self.loop.time(), decode_moments=moments, num_running_reqs=len(self.running))]

    def abort_request(self, abort_all: bool) -> None:
        self.aborted = abort_all


def test_requests_are_sent_as_others_end(loop: OwnTime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "SAMPLE_SECONDS", 0.019)  # no sample comes as requests end
    engine = FakeAsyncEngine(loop)
    load = throughput.Load.parse("random:1,3,60,0.6,7")
    found = throughput.run_sample(engine, load, [[i] for i in range(7)], ignore_eos=True, deadline=float("inf"))
    assert engine.most == 3 and engine.order == list(range(7)) and engine.asked == [16]
    assert found["output_tokens"] == found["counted_tokens"] == 420
    # Requests 2 to 6 take 120 ms each and 0 and 1 half of it: the first of the last three ends at 240 ms, the run at 300.
    assert 0 <= found["full_from_s"] < 0.15 and found["full_to_s"] < found["seconds"]
    assert found["mean_running_full"] == pytest.approx(3, abs=0.35)
    assert found["full_to_s"] == pytest.approx(0.24, abs=0.01)
    assert found["tokens_per_s"] > found["tokens_per_s_whole"]


def test_a_run_that_the_time_limit_cuts_is_given_up(loop: OwnTime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "SAMPLE_SECONDS", 0.02)
    engine = FakeAsyncEngine(loop)
    load = throughput.Load.parse("random:1,2,1000,0.6,4")
    with pytest.raises(OutOfTime):
        throughput.run_sample(engine, load, [[i] for i in range(4)], ignore_eos=True, deadline=loop.time() + 0.1)
    assert engine.aborted and not engine.running and len(engine.order) == 2
    late = FakeAsyncEngine(loop)
    with pytest.raises(OutOfTime):  # the limit had been reached before the first request
        throughput.run_sample(late, load, [[i] for i in range(4)], ignore_eos=True, deadline=loop.time() - 1)
    assert not late.order
    short = throughput.Load.parse("random:1,1,40,0.6,3")
    monkeypatch.setattr(throughput, "SAMPLE_SECONDS", 5.0)
    with pytest.raises(OutOfTime):  # all that were sent ended between two looks at the clock
        throughput.run_sample(late, short, [[i] for i in range(3)], ignore_eos=True, deadline=loop.time() + 0.06)
    assert late.order and len(late.order) < 3 and not late.aborted


def test_tokens_are_counted_while_the_batch_is_full() -> None:
    # 2 requests of 100 tokens at once, of 3; the engine counts one too many of each. The batch is full from 1 s to 9 s.
    samples = [Progress(10, 500, 0), Progress(11, 520, 2), Progress(15, 620, 2), Progress(21, 770, 2), Progress(22, 803, 0)]
    served = Served([answer(100)] * 3, samples, started=10.0, turns=16.0, drains=19.0, ended=22.0)
    found = throughput.full_batch_figures(served, 2)
    assert found["tokens_per_s"] == pytest.approx(200 / 303 * 300 / 8, abs=0.06)
    assert (found["full_from_s"], found["full_to_s"], found["tokens_per_s_whole"]) == (1.0, 9.0, 25.0)
    # Where the pool is too small for three, two that run from 1 s on are all that the batch has.
    assert throughput.full_batch_figures(served, 3)["full_from_s"] == 1.0
    late = [sample._replace(running=3) if sample.t == 21 else sample for sample in samples]
    assert throughput.full_batch_figures(dataclasses.replace(served, progress=late, drains=21.5), 3)["full_from_s"] == 1.0
    with pytest.raises(RuntimeError, match="never full"):
        throughput.full_batch_figures(dataclasses.replace(served, drains=10.5), 2)
    with pytest.raises(RuntimeError, match="does not change"):
        throughput.full_batch_figures(dataclasses.replace(served, progress=samples[:1] * 2), 2)


def test_a_load_must_fill_its_batch() -> None:
    assert throughput.Load.parse("aime,4,8,0,4").prompts == 4
    with pytest.raises(argparse.ArgumentTypeError, match="never full"):
        throughput.Load.parse("aime,4,8,0,3")


# --------------------------------------------------------------------------------- vLLM


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FAKE_VLLM))
    yield lambda name: VllmEngine(EngineSpec.parse(name).vllm_args(options(), 3))
    sys.modules.pop("vllm", None)


def test_vllm_keeps_a_batch_full_and_answers_in_order(vllm: Any) -> None:
    engine = vllm("vllm:ngram")
    sampling = {"temperature": 0.6, "ignore_eos": True, "max_new_tokens": 10}
    served = engine.serve([[1]] * 7, sampling, 3)
    assert [output["output_ids"] for output in served.outputs] == [list(range(10))] * 7
    assert served.started <= served.drains <= served.ended and served.progress[-1].generated == 70
    # Slow requests need 4 forwards and fast ones 2.
    assert engine.figures == {"accept_length": round(70 / (5 * 4 + 2 * 2), 3), "retractions": 0}
    with pytest.raises(OutOfTime):
        engine.serve([[1]] * 7, sampling, 3, deadline=0.0)
    assert engine.generate(input_ids=[[5]], sampling_params=sampling)[0]["meta_info"]["completion_tokens"] == 10
    engine.shutdown()
    plain = vllm("vllm")
    plain.generate(input_ids=[[5]], sampling_params=sampling)
    assert plain.figures["accept_length"] is None


def test_vllm_runs_in_a_python_of_its_own_with_the_same_prompts(tmp_path: Path) -> None:
    python = shlex.join(["env", f"PYTHONPATH={FAKE_VLLM}", sys.executable])
    start = ["--model-path", "m", "--engines", "vllm", "vllm:ngram", "--results", str(tmp_path / "r.jsonl")]
    loads = ["--repeats", "1", "--loads", "random:8,2,24,0", "random:8,2,2000,0,5", "--device", "cpu"]
    assert throughput.main([*start, *loads, "--vllm-python", python]) == 0, (tmp_path / "r.log").read_text()
    records = _common.read_records(tmp_path / "r.jsonl")
    assert [(r["label"], r["kept_full"], r["output_tokens"]) for r in records] == [
        ("vllm", False, 48),
        ("vllm", True, 10_000),
        ("vllm:ngram", False, 48),
        ("vllm:ngram", True, 10_000),
    ]
    assert len({(r["requests"], r["prompts_digest"]) for r in records}) == 2
    assert {r["label"]: r["accept_length"] for r in records}["vllm"] is None
    report = throughput.report(records)
    assert "5 x random:8, 2 at once, 2000 new" in report and "vLLM" in report
    prompts = json.loads((tmp_path / "r.prompts.json").read_text())["prompts"]
    assert {name: len(made) for name, made in prompts.items()} == {"random:8": 5}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Engines that run in this process; one that is told to fails after so many samples."""
    state = argparse.Namespace(started=[], fail_after=None, results=str(tmp_path / "r.jsonl"), commit="abc")
    stamped = {"date": "d", "command": [], "gpu": None, "packages": {"sglang": "0.5.17"}}
    monkeypatch.setattr(throughput, "stamp", lambda: {**stamped, "commit": state.commit})
    monkeypatch.setattr(throughput, "start_engine", lambda settings: FakeEngine())
    sample = throughput.run_sample
    state.samples = 0

    def limited(*given: Any) -> dict[str, Any]:
        if state.samples == state.fail_after:
            raise RuntimeError("out of memory")
        state.samples += 1
        return sample(*given)

    def run_apart(specs: list[EngineSpec], repeats: list[int], args: argparse.Namespace, argv: Any) -> str:
        state.started.append((*(spec.label for spec in specs), list(repeats)))
        try:
            throughput.run_engine(specs, repeats, args)
        except RuntimeError as error:
            return str(error)
        return ""

    monkeypatch.setattr(throughput, "run_sample", limited)
    monkeypatch.setattr(throughput, "run_apart", run_apart)
    return state


def line(state: Any, *extra: str) -> list[str]:
    loads = ["--loads", "random:8,2,24,0", "random:9,2,24,0.6"]
    start = ["--model-path", "m", "--engines", "plain", "sparsespec", "--repeats", "2"]
    return [*start, "--results", state.results, *loads, *extra]


def test_a_failure_is_recorded_and_the_same_command_goes_on(engines: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engines.fail_after = 5
    assert throughput.main(line(engines)) == 1
    records = _common.read_records(engines.results)
    assert [record["kind"] for record in records].count("sample") == 5
    assert {record["label"] for record in records if record["kind"] == "not run"} == {"sparsespec"}
    assert "Not run: sparsespec: out of memory" in capsys.readouterr().out
    engines.fail_after = None
    assert throughput.main(line(engines)) == 0
    taken = [(r["key"], r["repeat"]) for r in _common.read_records(engines.results) if r["kind"] == "sample"]
    assert len(taken) == len(set(taken)) == 8  # 2 engines, 2 loads, 2 repeats: none twice, none missing
    assert "Not run" not in capsys.readouterr().out
    assert throughput.main(line(engines)) == 0 and engines.samples == 8
    engines.commit = "other"
    assert throughput.main(line(engines)) == 0 and engines.samples == 16


def test_interleaving_starts_every_engine_for_every_repeat(engines: Any) -> None:
    throughput.main(line(engines, "--interleave"))
    assert engines.started == [("plain", [0]), ("sparsespec", [0]), ("plain", [1]), ("sparsespec", [1])]
    assert _common.read_records(engines.results)[0]["attention_backend"] == "fa3"


def test_engines_that_differ_in_what_a_running_one_can_be_told_share_one(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    switched: list[str] = []
    monkeypatch.setattr(throughput, "switch", lambda engine, rounds: switched.append(rounds))
    always = "sparsespec,sparsespec_speculate=always"
    other = "sparsespec,sparsespec_speculate=always,speculative_num_steps=4"
    command = [*line(engines), "--engines", "plain", "sparsespec", always, other, "--repeats", "1"]
    assert throughput.main(command) == 0
    assert engines.started == [("plain", [0]), ("sparsespec", always, [0]), (other, [0])]
    assert switched == ["auto", "always"] * 2  # each load by both
    found = [(record["label"], record["temperature"]) for record in _common.read_records(engines.results)]
    assert found[2:6] == [("sparsespec", 0.0), (always, 0.0), ("sparsespec", 0.6), (always, 0.6)]


# ------------------------------------------------------------------ servers that run already


class FakeServer(ThreadingHTTPServer):
    """Answers as a server of SGLang; a prompt takes 0.1 s, twice a round of its own."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.running = self.generated = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), FakeServerHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class FakeServerHandler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *given: Any) -> None:
        pass

    def send(self, found: Any) -> None:
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        server = self.server
        if self.path == "/server_info":
            self.send({"internal_states": [{"attention_backend": "sparsespec"}]})
        elif self.path == "/v1/loads?include=core":
            with server.lock:
                moments = [1.0] * 5 + [float(server.generated)] if server.generated else None
                load = {"timestamp": time.time(), "decode_moments": moments, "num_running_reqs": server.running}
            self.send({"loads": [load]})

    def do_POST(self) -> None:
        server = self.server
        server.asked.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        if self.path != "/generate":
            return self.send({})
        ids, tokens = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        prompts = ids if isinstance(ids[0], list) else [ids]
        with server.lock:
            server.running += len(prompts)
        for _ in range(2):
            time.sleep(0.05)
            with server.lock:
                server.generated += len(prompts) * tokens // 2
        with server.lock:
            server.running -= len(prompts)
        answers = [answer(tokens) for _ in prompts]
        self.send(answers if isinstance(ids[0], list) else answers[0])


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    found = [FakeServer(), FakeServer()]
    for server in found:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    for server in found:
        server.shutdown()
        server.server_close()


def test_servers_that_run_already_take_turns(
    servers: list[FakeServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "SAMPLE_SECONDS", 0.02)
    results = str(tmp_path / "r.jsonl")
    command = ["--model-path", "m", "--engines", "--results", results, "--repeats", "2"]
    command += ["--loads", "random:8,2,24,0", "random:9,2,24,0.6,6"]
    command += ["--attach", f"plain=sglang@{servers[0].url}", f"new=sglang@{servers[1].url}"]
    assert throughput.main(command) == 0
    records = _common.read_records(results)
    assert [(r["label"], r["kept_full"], r["repeat"]) for r in records] == [
        *(("plain", False, 0), ("new", False, 0), ("new", True, 0), ("plain", True, 0)),
        *(("plain", False, 1), ("new", False, 1), ("new", True, 1), ("plain", True, 1)),
    ]
    assert {(r["server_url"], r["attention_backend"], r["accept_length"]) for r in records if r["label"] == "new"} == {
        (servers[1].url, "sparsespec", 5.0)
    }
    kept_full = next(r for r in records if r["kept_full"])
    assert kept_full["output_tokens"] == 6 * 24 and 0.2 < kept_full["seconds"] < 2 and kept_full["mean_running_full"] == 2
    rows = throughput.aggregate(records)
    assert all(row["times_plain"] is not None for row in rows)
    asked = len(servers[0].asked)
    assert throughput.main(command) == 0 and len(servers[0].asked) == asked, "nothing is measured twice"
    assert throughput.main([*command[:-1], "new=sglang@http://127.0.0.1:9", "--repeats", "3"]) == 1
    failed = [record for record in _common.read_records(results) if record["kind"] == "not run"]
    assert len(failed) == 2 and all("refused" in record["reason"] for record in failed)


def test_only_servers_of_sglang_are_attached(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options("--attach", "a=vllm@http://127.0.0.1:1")
    assert "--attach a: only servers of SGLang (LABEL=sglang@URL)" in capsys.readouterr().err


# --------------------------------------------------------------------------- tables


def sample(engine: str, rate: float, **changes: Any) -> dict[str, Any]:
    load = {"dataset": "aime", "batch": 2, "output_length": 8, "temperature": 0.0, "ignore_eos": True}
    own = {"tokens_per_s": rate, "accept_length": 4.0, "accept_length_not_repetitive": None, "repetitive_prompts": 0}
    rest = {"model": "m", "commit": "c", "gpu": None, "interleaved": True, "distinct_prompts": 2, "packages": {}}
    names = {"kind": "sample", "key": engine, "label": engine, "engine": engine, "repeat": 0}
    return {**names, **load, **own, **rest, **changes}


def test_rows_are_medians_beside_the_fastest_plain_engine() -> None:
    samples = [sample("sparsespec", rate) for rate in (100.0, 300.0, 120.0)]
    samples += [sample("plain", 50.0), sample("plain:triton", 60.0), sample("plain", 999.0, output_length=9)]
    rows = {(row["engine"], row["output_length"]): row for row in throughput.aggregate(samples)}
    row = rows["sparsespec", 8]
    assert row["requests"] == row["batch"] == 2  # records of before there were more
    assert (row["tokens_per_s"], row["lowest"], row["highest"], row["repeats"]) == (120.0, 100.0, 300.0, 3)
    assert row["times_plain"] == 2.0


def test_what_is_not_lossless_is_marked_and_no_baseline() -> None:
    args = options()
    described = {name: _common.describe(EngineSpec.parse(name), args) for name in ("plain", "plain,quantization=fp8")}
    assert [_common.marks(record) for record in described.values()] == [[], ["not lossless"]]
    fast = sample("plain,quantization=fp8", 90.0, lossless=False)
    rows = {row["engine"]: row for row in throughput.aggregate([fast, sample("plain", 60.0), sample("vllm", 30.0)])}
    assert {name: row["times_plain"] for name, row in rows.items()} == {
        "plain,quantization=fp8": 1.5,
        "plain": 1.0,
        "vllm": 0.5,
    }
    assert "not lossless" in throughput.remarks(rows["plain,quantization=fp8"])


def test_tables_say_what_a_reader_must_know() -> None:
    changes = {"simulated_accept_length": 7.16, "load_format": "dummy", "repetitive_prompts": 1, "retractions": 3}
    text = throughput.report([sample("sparsespec", 100.0, **changes, interleaved=False), sample("plain", 50.0)])
    (row,) = (line for line in text.splitlines() if "sparsespec" in line)
    remarks = ["SIMULATED acceptance", "dummy weights", "1 of 2 outputs repeat", "3 retractions", "one run", "go on past"]
    assert [remark for remark in remarks if remark not in row] == []
    assert "SIMULATED" not in next(line for line in text.splitlines() if "plain " in line)


def test_a_batch_that_does_not_fit_is_told() -> None:
    full = {"kept_full": True, "requests": 4, "full_share_of_tokens": 0.75, "mean_running_full": 1.2, "distinct_prompts": 4}
    (row,) = throughput.aggregate([sample("plain", 50.0, **full)])
    assert "full for 75% of the tokens; 1.2 of 2 ran on average" in (found := throughput.remarks(row))
    assert "asked more than once" not in found and throughput.load_name(row) == "4 x aime, 2 at once, 8 new, T 0"


def test_the_kept_results_can_be_shown() -> None:
    records = _common.read_records(RIVALS)
    rows = throughput.aggregate(records)
    best = next(row for row in rows if row["engine"] == "sparsespec" and row["dataset"] == "code:8192")
    assert best["times_plain"] == pytest.approx(1.24, abs=0.005)  # as docs and results/README say
    assert throughput.report(records).count("sparsespec") == 3


def test_a_plot_marks_simulated_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = throughput.aggregate([sample("sparsespec", 9.0, simulated_accept_length=7.0), sample("plain", 3.0)])
    throughput.plot(rows, tmp_path / "p.svg")
    assert "SIMULATED" in (tmp_path / "p.svg").read_text()


@pytest.mark.parametrize(
    "others",
    [
        {},
        {
            "DRAFT": "d",
            "VLLM_PYTHON": "env A=b python3",
            "SHAPES": "qwen3-8b",
            "SERVERS": "plain=sglang@http://a:1 new=sglang@http://a:2",
        },
    ],
)
def test_the_programs_take_what_a_gpu_session_gives_them(others: dict[str, str], tmp_path: Path) -> None:
    (python := tmp_path / "python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    environment = {**os.environ, "MODEL": "m", "OUT": str(tmp_path), "PYTHON": str(python), **others}
    subprocess.run([str(REPO / "benchmarks/gpu_session.sh")], env=environment, check=True, timeout=60)
    commands = {path.stem: path.read_text().splitlines() for path in tmp_path.glob("*.log")}
    assert {Path(program).stem for program, *_ in commands.values()} >= {"throughput", "serving", "parity", "kernel_table"}
    assert {"long-shapes" in commands, "builds" in commands, "vllm:ngram" in commands["rivals"]} == {bool(others)}
    for program, *arguments in commands.values():
        name = Path(program).stem
        if name != "kernel_table":  # which looks for a GPU
            importlib.import_module(name).parse_arguments(arguments)
