"""The benchmark's matrix, its resuming, its tables and plots, and what it says about workloads and repetition."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_serving_result import TWO_REQUESTS

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _engine_job  # noqa: E402
import _report  # noqa: E402
import _server_job  # noqa: E402
import run  # noqa: E402
from _matrix import MATRICES, EngineSpec, Job, Matrix, cells, jobs, load_matrix, turns  # noqa: E402
from _workloads import Dataset, distinct_share, question_prompts  # noqa: E402
from throughput import engine_arguments, keep_full  # noqa: E402

SMALL: dict[str, Any] = {
    "models": ["folder/tiny"],
    "engines": ["plain:torch_native", "sparsespec"],
    "datasets": ["aime", "code:512"],
    "batches": [2],
    "output_lengths": [8],
    "repeats": 2,
    "device": "cpu",
}


# -------------------------------------------------------------------------- matrix


@pytest.mark.parametrize("preset", sorted(file.stem for file in MATRICES.glob("*.json")))
def test_presets_are_valid(preset: str) -> None:
    matrix = Matrix.parse(load_matrix(preset))
    assert matrix.repeats >= 3
    # Two 8B models leave no room for a third.
    assert {engine.kind for engine in matrix.engines} >= {"sparsespec"} | ({"plain"} if "8b" not in preset else set())


def test_the_presets_of_the_docs_are_there() -> None:
    names = {file.stem for file in MATRICES.glob("*.json")}
    assert names >= {"ablation", "h100-main", "h100-policies", "h100-rivals", "h100-schedules", "smoke-cpu"}


def test_a_matrix_is_every_combination() -> None:
    matrix = Matrix.parse({**SMALL, "batches": [1, 2, 4], "temperatures": [0, 0.6]})
    found = cells(matrix, "m", matrix.engines[0])
    assert len(found) == 2 * 3 * 2
    assert len({cell.key(matrix) for cell in found}) == len(found)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch": [1]}, "unknown keys batch"),
        ({"engines": []}, "no engines"),
        ({"engines": ["magic"]}, "magic"),
        ({"engines": ["sparsespec", "sparsespec"]}, "labels of their own"),
        ({"engines": [{"engine": "sparsespec", "args": {"a": 1}}]}, "needs a label"),
        ({"engines": [{"engine": "sparsespec", "arguments": {}}]}, "unknown keys arguments"),
        ({"datasets": ["aime:100"]}, "aime:100"),
        ({"datasets": ["code"]}, "code:TOKENS"),
        ({"repeats": 0}, "repeats"),
        ({"resident": True, "interleave": True}, "interleave or resident"),
        ({"resident": True, "device": "cuda"}, "max_total_tokens"),
        ({"resident": True, "engines": ["sparsespec", "vllm"]}, "not for vllm"),
        ({"loads": [{"dataset": "aime", "batch": 1}]}, "a load has no output_length"),
        ({"loads": [{"dataset": "aime", "batch": 1, "output_length": 2, "tokens": 1}]}, "load has unknown keys tokens"),
        ({"loads": [{"dataset": "aime", "batch": 4, "requests": 3, "output_length": 2}]}, "3 requests cannot have 4"),
    ],
)
def test_mistakes_in_a_matrix_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Matrix.parse({**SMALL, **changes})


def test_a_missing_list_is_named() -> None:
    with pytest.raises(ValueError, match="the matrix has no output_lengths"):
        Matrix.parse({key: value for key, value in SMALL.items() if key != "output_lengths"})


def test_the_command_line_overrides_a_preset() -> None:
    line = ["smoke-cpu", "--results", "r", "--model-path", "m", "--engines", "sparsespec:window", "--batches", "1", "4"]
    matrix = run.make_matrix(run.parse_arguments([*line, "--no-ignore-eos", "--interleave", "--temperatures", "0.6"]))
    assert [engine.policy for engine in matrix.engines] == ["window"]
    assert (matrix.batches, matrix.ignore_eos, matrix.interleave, matrix.temperatures) == ((1, 4), False, True, (0.6,))
    assert matrix.device == "cpu"  # the preset's


def test_engines_picked_by_label_keep_their_arguments() -> None:
    line = ["ablation", "--results", "r", "--model-path", "m", "--engines", "pillar, k 4", "plain:flashinfer"]
    first, second = run.make_matrix(run.parse_arguments(line)).engines
    assert (first.engine, first.args) == ("sparsespec", {"speculative_num_steps": 4})
    assert second == EngineSpec("plain:flashinfer")


def test_settings_that_change_results_change_the_key() -> None:
    matrix = Matrix.parse(SMALL)
    (cell, *_) = cells(matrix, "m", matrix.engines[1])
    others = [{"ignore_eos": True}, {"k": 4}, {"dtype": "float16"}, {"engine_args": {"a": 1}}, {"interleave": True}]
    for changes in [*others, {"resident": True}]:
        assert cell.key(Matrix.parse({**SMALL, **changes})) != cell.key(matrix), changes


def test_interleaving_starts_every_engine_for_every_repeat() -> None:
    def order(interleave: bool) -> list[tuple[str, list[int]]]:
        matrix = Matrix.parse({**SMALL, "interleave": interleave})
        return [(job.engine.label, [repeat for _, repeat in job.samples]) for job in jobs(matrix, set())]

    assert order(True) == [("plain:torch_native", [0, 0]), ("sparsespec", [0, 0])] + [
        ("plain:torch_native", [1, 1]),
        ("sparsespec", [1, 1]),
    ]
    assert order(False) == [("plain:torch_native", [0, 0, 1, 1]), ("sparsespec", [0, 0, 1, 1])]


def test_loads_take_the_place_of_the_combinations() -> None:
    loads = [
        {"dataset": "aime", "batch": 8, "output_length": 4096, "temperature": 0.6},
        {"dataset": "code:512", "batch": 2, "output_length": 16},
    ]
    matrix = Matrix.parse({"engines": ["sparsespec"], "loads": loads})
    found = [cell.sample(matrix, 0) for cell in cells(matrix, "m", matrix.engines[0])]
    expected = [("aime", 8, 4096, 0.6), ("code:512", 2, 16, 0.0)]
    assert [(s["dataset"], s["batch"], s["output_length"], s["temperature"]) for s in found] == expected


def test_a_load_of_more_requests_is_another_cell() -> None:
    load = {"dataset": "aime", "batch": 2, "output_length": 16}
    matrix = Matrix.parse({"engines": ["sparsespec"], "loads": [load, {**load, "requests": 6}]})
    closed, open_end = cells(matrix, "m", matrix.engines[0])
    assert closed.key(matrix) != open_end.key(matrix)
    assert [cell.sample(matrix, 0)["requests"] for cell in (closed, open_end)] == [2, 6]


class CountingEngine:
    """Answers after two turns of the event loop each; remembers how many requests it had at once."""

    def __init__(self) -> None:
        self.running, self.most = 0, 0

    async def async_generate(self, input_ids: list[int], sampling_params: dict[str, Any]) -> dict[str, Any]:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.running -= 1
        return {"output_ids": input_ids}


def test_a_full_batch_is_kept_and_no_more() -> None:
    engine = CountingEngine()
    answers = asyncio.run(keep_full(engine, [[i] for i in range(7)], {}, at_once=3))
    assert engine.most == 3
    assert [answer["output_ids"] for answer in answers] == [[i] for i in range(7)]


def test_resident_engines_take_turns_at_every_load_of_every_repeat() -> None:
    matrix = Matrix.parse({**SMALL, "resident": True})
    planned = list(jobs(matrix, set()))
    assert list(turns(planned, matrix)) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)]
    first = (planned[0].samples[0][0].key(matrix), 0)
    planned = list(jobs(matrix, {first}))  # a sample of an earlier run
    labels = [(planned[job].engine.label, *planned[job].samples[at][::-1]) for job, at in turns(planned, matrix)]
    assert [(label, repeat, str(cell.dataset)) for label, repeat, cell in labels][:4] == [
        ("sparsespec", 0, "aime"),
        ("plain:torch_native", 0, "code:512"),
        ("sparsespec", 0, "code:512"),
        ("plain:torch_native", 1, "aime"),
    ]


# ------------------------------------------------------------------------- running


def figures(**changes: Any) -> dict[str, Any]:
    """A sample's figures, as an engine gives them."""
    return {
        "timed": "decoding, prompts in the cache",
        "prompt_tokens": 200,
        "distinct_prompts": 2,
        "prefill_s": 0.1,
        "decode_s": [1.0],
        "output_tokens": 16,
        "tokens_per_s": 16.0,
        "retractions": 0,
        "accept_length": None,
        "accept_length_not_repetitive": None,
        "distinct": 1.0,
        "repetitive_prompts": 0,
        **changes,
    }


class FakeEngines:
    """Stands for ``run.run_job``: gives figures, and fails where it is told to."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, str, int]] = []
        self.fail_after: int | None = None
        self.interrupt = False

    def __call__(self, job: Job, matrix: Matrix, args: Any, log: Path) -> Iterator[dict[str, Any]]:
        for cell, repeat in job.samples:
            if self.fail_after == len(self.ran):
                if self.interrupt:
                    raise KeyboardInterrupt
                raise run.NotRun("out of memory")
            self.ran.append((job.engine.label, str(cell.dataset), repeat))
            load = {"dataset": str(cell.dataset), "batch": cell.batch, "output_length": 8, "temperature": 0.0}
            yield {"key": cell.key(matrix), "repeat": repeat, **load, **figures()}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> FakeEngines:
    fake = FakeEngines()
    monkeypatch.setattr(run, "run_job", fake)
    stamped = {"date": "d", "commit": "abc", "gpu": None, "packages": {"sglang": "0.5.17"}}
    monkeypatch.setattr(run, "stamp", lambda: dict(stamped))
    return fake


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    matrix = tmp_path / "matrix.json"
    matrix.write_text(json.dumps(SMALL))
    return [str(matrix), "--results", str(tmp_path / "results.jsonl")]


def test_an_interrupted_run_goes_on_where_it_was(engines: FakeEngines, line: list[str]) -> None:
    engines.fail_after, engines.interrupt = 3, True
    with pytest.raises(KeyboardInterrupt):
        run.main(line)
    first = list(engines.ran)
    assert len(first) == 3
    engines.fail_after = None
    assert run.main(line) == 0
    assert len(engines.ran) == len(set(engines.ran)) == 8  # 2 engines, 2 data sets, 2 repeats: none twice, none missing
    assert run.main(line) == 0
    assert len(engines.ran) == 8


def test_a_line_that_was_cut_short_is_run_again(engines: FakeEngines, line: list[str], tmp_path: Path) -> None:
    run.main(line)
    results = tmp_path / "results.jsonl"
    results.write_text(results.read_text()[:-30])
    engines.ran.clear()
    assert run.main(line) == 0
    assert len(engines.ran) == 1
    assert len(run.read_results(results)) == 8


def test_samples_of_another_commit_do_not_count(
    engines: FakeEngines, line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.main(line)
    monkeypatch.setattr(run, "stamp", lambda: {"commit": "other", "gpu": None, "packages": {}})
    engines.ran.clear()
    run.main(line)
    assert len(engines.ran) == 8


def test_what_failed_is_recorded_with_the_reason_and_tried_again(
    engines: FakeEngines, line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines.fail_after = 4  # the first sample of the second engine
    assert run.main(line) == 1
    records = run.read_results(tmp_path / "results.jsonl")
    assert {record["label"] for record in records if record["kind"] == "not run"} == {"sparsespec"}
    assert "out of memory" in capsys.readouterr().out
    engines.fail_after = None
    assert run.main(line) == 0
    assert "out of memory" not in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ("standalone", "no --draft-model-path"),
        ("eagle3", "no --eagle3-path"),
        ("server", "no --server-url"),
        ("vllm", "no --vllm-url"),
        ("vllm-ngram", "no --vllm-ngram-url"),
        ("sparsespec:magic", "--sparsespec-draft-policy magic"),
    ],
)
def test_engines_that_lack_something_are_not_run(line: list[str], tmp_path: Path, engine: str, reason: str) -> None:
    assert run.main([*line, "--engines", engine]) == 1
    records = run.read_results(tmp_path / "results.jsonl")
    assert [record["kind"] for record in records] == ["not run", "not run"]
    assert reason in records[0]["reason"]


def test_a_draft_model_path_reaches_the_engine_it_is_for() -> None:
    arguments = ["h100-main", "--results", "r", "--model-path", "m", "--draft-model-path", "small"]
    matrix = run.make_matrix(run.parse_arguments(arguments))
    given = {engine.label: engine.args for engine in matrix.engines}
    assert given["standalone"] == {"speculative_draft_model_path": "small"}
    assert given["eagle3"] == given["sparsespec"] == {}


def engine_process(folder: Path, program: str, monkeypatch: pytest.MonkeyPatch, timeout: float = 30) -> list[dict[str, Any]]:
    """Samples from ``run_engine`` with a program of two samples in the engine's place."""
    (folder / "_engine_job.py").write_text(program)
    monkeypatch.setattr(run, "HERE", folder)
    log = folder / "log"
    log.touch()
    return list(run.run_engine({"samples": [1, 2]}, timeout, log))


def test_samples_come_through_the_engines_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import os, sys\nprint('noise')\nos.write(int(sys.argv[2]), b'{\"a\": 1}\\n{\"a\": 2}\\n')"
    assert engine_process(tmp_path, program, monkeypatch) == [{"a": 1}, {"a": 2}]
    assert (tmp_path / "log").read_text() == "noise\n"


def test_an_engine_that_dies_tells_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(run.NotRun, match="status 1: ValueError: --k is wrong"):
        engine_process(tmp_path, "raise ValueError('--k is wrong')", monkeypatch)


def test_an_engine_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(run.NotRun, match="nothing for 0.2 s"):
        engine_process(tmp_path, "import time; time.sleep(600)", monkeypatch, timeout=0.2)


RESIDENT_PROGRAM = """
import json, os, sys
job, out = json.load(open(sys.argv[1])), int(sys.argv[2])
def say(value): os.write(out, json.dumps(value).encode() + b"\\n")
if job["engine"] == "plain:torch_native" and WHAT == "start": raise ValueError("no memory")
say({"started": 1.0})
for sample in job["samples"]:
    if not sys.stdin.readline(): break
    if job["engine"] == "sparsespec" and WHAT == "sample" and sample["repeat"]: raise ValueError("crashed")
    with open(ORDER, "a") as file: file.write(job["engine"] + "\\n")
    say({**sample, **FIGURES})
"""


@pytest.mark.parametrize("failure", ["nothing", "start", "sample"])
def test_resident_engines_run_in_turn_and_one_that_fails_leaves_the_others(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    monkeypatch.setattr(run, "stamp", lambda: {"commit": "abc", "gpu": None, "packages": {"sglang": "0.5.17"}})
    folder = tmp_path / "programs"
    folder.mkdir()
    order = tmp_path / "order"
    constants = f"WHAT, ORDER, FIGURES = {failure!r}, {str(order)!r}, {figures()!r}\n"
    (folder / "_engine_job.py").write_text(constants + RESIDENT_PROGRAM)
    monkeypatch.setattr(run, "HERE", folder)
    assert run.main([*line, "--resident"]) == (failure != "nothing")
    ran = order.read_text().split()
    both = ["plain:torch_native", "sparsespec"]
    assert ran == {"nothing": both * 4, "start": both[1:] * 4, "sample": both * 2 + both[:1] * 2}[failure]
    records = run.read_results(tmp_path / "results.jsonl")
    samples = [record for record in records if record["kind"] == "sample"]
    assert len(samples) == len(ran)
    assert all(record["resident_engines"] == both and record["interleaved"] for record in samples)
    reasons = {record["label"]: record["reason"] for record in records if record["kind"] == "not run"}
    expected = {"nothing": {}, "start": {both[0]: "no memory"}, "sample": {both[1]: "crashed"}}[failure]
    assert reasons.keys() == expected.keys() and all(expected[label] in reasons[label] for label in expected)
    assert "one of 2 engines on the device" in (tmp_path / "results.md").read_text()


def test_no_sample_is_begun_after_the_time_limit(engines: FakeEngines, line: list[str], tmp_path: Path) -> None:
    assert run.main([*line, "--time-limit", "1e-9"]) == 1
    assert len(engines.ran) == 1
    records = run.read_results(tmp_path / "results.jsonl")
    assert all("time limit" in record["reason"] for record in records if record["kind"] == "not run")
    assert run.main(line) == 0
    assert len(engines.ran) == 8


def test_a_missing_model_is_named(line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "matrix.json").write_text(json.dumps({**SMALL, "models": []}))
    assert run.main(line) == 2
    assert "--model-path" in capsys.readouterr().err


def engine_settings(engine: EngineSpec, **changes: Any) -> dict[str, Any]:
    """``sglang.Engine`` arguments of an engine of the matrix."""
    matrix = Matrix.parse({**SMALL, "device": "cuda", "engines": ["plain:triton"], **changes})
    job = Job("m", engine, tuple((cell, 0) for cell in cells(matrix, "m", engine)))
    contents = _engine_job.job_contents(job, matrix, "warning")
    return engine_arguments(contents["engine"], 4, argparse.Namespace(**contents["settings"]))


def test_engines_become_sglang_arguments() -> None:
    plain = engine_settings(EngineSpec("plain:triton"))
    assert plain["decode_attention_backend"] == "triton" and "speculative_algorithm" not in plain
    sparse = engine_settings(EngineSpec("sparsespec:window", "k 4", {"speculative_num_steps": 4}))
    assert sparse["speculative_algorithm"] == "SPARSESPEC" and sparse["sparsespec_draft_policy"] == "window"
    assert sparse["speculative_num_steps"] == 4  # the engine's own, not the matrix's
    standalone = engine_settings(EngineSpec("standalone", args={"speculative_draft_model_path": "d"}, label="s"))
    assert standalone["speculative_algorithm"] == "STANDALONE" and standalone["speculative_draft_model_path"] == "d"
    assert "speculative_num_steps" not in standalone  # SGLang's default
    shared = {key: plain[key] for key in ("model_path", "dtype", "max_running_requests", "random_seed")}
    assert all(shared.items() <= other.items() for other in (sparse, standalone))


def test_arguments_of_the_matrix_reach_every_engine() -> None:
    settings = {"engine_args": {"max_total_tokens": 9}}
    assert engine_settings(EngineSpec("plain:triton"), **settings)["max_total_tokens"] == 9
    assert engine_settings(EngineSpec("ngram"), **settings)["max_total_tokens"] == 9


class BusyEngine:
    """Refuses to flush its cache ``busy`` times."""

    def __init__(self, busy: int) -> None:
        self.busy = busy

    def flush_cache(self) -> Any:
        self.busy -= 1
        return type("Output", (), {"success": self.busy < 0})


def test_a_refused_flush_is_tried_again_and_not_passed_over() -> None:
    _engine_job.flush(BusyEngine(2))
    with pytest.raises(RuntimeError, match="could not be flushed"):
        _engine_job.flush(BusyEngine(1000), timeout=0.1)


# ------------------------------------------------------------------------- servers

RESULT: dict[str, Any] = {
    **TWO_REQUESTS,
    "median_ttft_ms": 10.0,
    "median_tpot_ms": 5.0,
    "accept_length": 4.5,
    "server_info": {"version": "0.5.17", "speculative_algorithm": "SPARSESPEC", "port": 1},
    "generated_texts": ["a b c d e f g h i j k l m n o p", "x " * 40],
}


class Words:
    """A tokenizer whose tokens are words."""

    chat_template: str | None = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return type("Encoding", (), {"input_ids": ["<s>"] * add_special_tokens + text.split()})

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return f"<user> {messages[0]['content']} <assistant>"


def test_a_servers_result_becomes_a_sample() -> None:
    record = _server_job.as_record(RESULT, Words(), asked=2)
    assert (record["tokens_per_s"], record["accept_length"], record["repetitive_prompts"]) == (32.0, 4.5, 1)
    assert record["timed"] == "whole requests, prefill included"
    assert record["server_flags"] == {"version": "0.5.17", "speculative_algorithm": "SPARSESPEC"}
    assert "dtype" not in run.describe(Matrix.parse(SMALL), "m", EngineSpec("server"))  # the matrix's is not the server's


def test_unanswered_requests_are_no_result() -> None:
    with pytest.raises(RuntimeError, match="1 of 2 requests"):
        _server_job.as_record({**RESULT, "completed": 1, "errors": ["", "boom"]}, Words(), asked=2)


def test_vllm_is_given_the_temperature_in_the_request(tmp_path: Path) -> None:
    matrix = Matrix.parse({**SMALL, "engines": ["server", "vllm"], "temperatures": [0.6]})
    lines = [
        _server_job.command(cells(matrix, "m", engine)[0], matrix, "http://u", tmp_path / "d", tmp_path / "o")
        for engine in matrix.engines
    ]
    assert [line[line.index("--backend") + 1] for line in lines] == ["sglang", "vllm"]
    assert "--extra-request-body" not in lines[0]
    assert json.loads(lines[1][lines[1].index("--extra-request-body") + 1]) == {"temperature": 0.6}
    assert "--disable-ignore-eos" in lines[0]


# ------------------------------------------------------------------------ workloads


def test_repetition_is_seen() -> None:
    assert distinct_share(list(range(100))) == 1.0
    assert distinct_share([1, 2, 3] * 40) < 0.05
    assert distinct_share([1, 2, 3]) == 1.0


def test_questions_are_asked_in_the_chat_template_if_there_is_one() -> None:
    words = Words()
    assert question_prompts(words, "aime", 1)[0][:2] == ["<s>", "Every"]
    words.chat_template = "yes"
    (prompt,) = question_prompts(words, "aime", 1)
    assert (prompt[0], prompt[-1]) == ("<user>", "<assistant>")  # and no special token more


def test_questions_begin_again_where_there_are_too_few() -> None:
    prompts = question_prompts(Words(), "aime", 17)
    assert prompts[15] == prompts[0] and len(set(map(tuple, prompts))) == 15


class Fours(Words):
    """A tokenizer whose tokens are four characters each."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return type("Encoding", (), {"input_ids": [text[i : i + 4] for i in range(0, len(text), 4)]})


def test_a_corpus_that_is_too_short_is_named() -> None:
    with pytest.raises(ValueError, match="math has no 1000000 tokens"):
        Dataset.parse("math:1000000").prompts(Fours(), 1)


def test_cut_prompts_have_the_asked_length() -> None:
    for corpus in ("code", "math"):
        assert [len(prompt) for prompt in Dataset.parse(f"{corpus}:300").prompts(Fours(), 3)] == [300] * 3
    assert [len(prompt) for prompt in Dataset.parse("random:64").prompts(None, 2)] == [64] * 2


# ---------------------------------------------------------------------------- report


def sample(engine: str, rate: float, **changes: Any) -> dict[str, Any]:
    """A record of the results file."""
    load = {"dataset": "code:8192", "batch": 2, "output_length": 8, "temperature": 0.0, "model": "m", **changes}
    return {
        "kind": "sample",
        "key": f"{engine}{sorted(load.items())}",
        "engine": engine,
        "label": engine,
        "commit": "abc",
        "gpu": {"name": "GPU"},
        "packages": {"sglang": "0.5.17"},
        "ignore_eos": False,
        "interleaved": True,
        **figures(tokens_per_s=rate),
        **load,
    }


def fixture_records() -> list[dict[str, Any]]:
    """Two engines without speculation and two with, over two batches and three repeats."""
    records = []
    for batch in (2, 4):
        for repeat in range(3):
            records += [
                sample("plain:triton", 90 * batch + repeat, batch=batch),
                sample("plain:flashinfer", 100 * batch + repeat, batch=batch),
                sample("sparsespec", 250 * batch + repeat, batch=batch, accept_length=7.5, repetitive_prompts=1),
                sample("sparsespec:window", 150 * batch + repeat, batch=batch, accept_length=4.5),
            ]
    return records


def test_rows_are_medians_with_their_spread_beside_the_fastest_plain_engine() -> None:
    rows = {(row["engine"], row["batch"]): row for row in _report.aggregate(fixture_records())}
    assert len(rows) == 8
    row = rows["sparsespec", 2]
    assert (row["tokens_per_s"], row["lowest"], row["highest"], row["repeats"]) == (501, 500, 502, 3)
    assert row["times_plain"] == pytest.approx(501 / 201)
    assert rows["plain:triton", 4]["times_plain"] == pytest.approx(361 / 401)


def test_no_comparison_across_loads_or_ways_of_timing() -> None:
    records = [sample("plain:flashinfer", 100), sample("server", 300, timed="whole requests, prefill included")]
    records += [sample("sparsespec", 250, batch=4)]
    rows = {row["engine"]: row for row in _report.aggregate(records)}
    assert rows["server"]["times_plain"] is None and rows["sparsespec"]["times_plain"] is None


def test_the_table_says_what_flatters_or_weakens_a_row() -> None:
    records = [
        sample("plain:flashinfer", 100),
        sample("sparsespec", 300, ignore_eos=True, repetitive_prompts=2, distinct_prompts=1, interleaved=False),
    ]
    text = _report.report([*records, sample("sparsespec:window", 9, simulated_accept_length=7.0)], [])
    assert "2 of 2 outputs repeat themselves" in text
    assert "ignore_eos" in text and "SIMULATED acceptance" in text
    assert "1 prompts are asked more than once" in text
    assert "fewer than three repeats; repeats within one engine start" in text


def test_what_was_not_run_is_in_the_report() -> None:
    missing = [{"model": "m", "label": "eagle3", "reason": "no --eagle3-path was given"}] * 2
    assert "| m     | eagle3 |     2 | no --eagle3-path was given |" in _report.report([], missing)


def test_plots_without_matplotlib_name_the_extra(monkeypatch: pytest.MonkeyPatch, line: list[str], tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"pip install sglang-sparsespec\[bench\]"):
        run.main([*line, "--plots", str(tmp_path)])
    assert not (tmp_path / "results.jsonl").exists()  # before anything was run


def test_plots_are_drawn_for_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = {path.name.rpartition("-")[0] for path in _report.draw_plots(fixture_records(), tmp_path)}
    assert names == {"throughput-by-dataset", "accept-length-by-context", "throughput-by-batch", "ablation"}
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))


def test_series_hold_the_points_of_each_engine_in_order() -> None:
    series = _report.series_by(_report.aggregate(fixture_records()), lambda row: row["batch"], "tokens_per_s")
    assert series["sparsespec"] == [(2, 501, 500, 502), (4, 1001, 1000, 1002)]
    assert "plain:triton" not in _report.series_by(_report.aggregate(fixture_records()), lambda row: 0, "accept_length")


# ---------------------------------------------------------------------- end to end


@pytest.mark.slow
@pytest.mark.skipif("SPARSESPEC_TEST_BENCHMARK" not in os.environ, reason="3 to 5 minutes; set SPARSESPEC_TEST_BENCHMARK=1")
def test_the_smoke_preset_runs_from_end_to_end(model_path: str, tmp_path: Path) -> None:
    results = tmp_path / "smoke.jsonl"
    assert run.main(["smoke-cpu", "--model-path", model_path, "--results", str(results)]) == 0
    records = run.read_results(results)
    assert len(records) == 12
    digests: dict[str, set[str]] = {record["dataset"]: set() for record in records}
    for record in records:
        digests[record["dataset"]].add(record["outputs_digest"])
    assert all(len(found) == 1 for found in digests.values())  # both engines, all repeats: the same tokens
