"""Engines, workloads, records and tables of the benchmarks: nothing is run twice, and no figure loses its marks."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.append(str(REPO / "benchmarks"))

import _common  # noqa: E402
import throughput  # noqa: E402
from _common import Dataset, EngineSpec  # noqa: E402

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
    for wrong in ("magic", "plain:a:b", "sparsespec:a:b:c"):
        with pytest.raises(argparse.ArgumentTypeError, match="no engine"):
            EngineSpec.parse(wrong)


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

    def generate(self, input_ids: list[list[int]], sampling_params: Any) -> list[dict[str, Any]]:
        each = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(input_ids)
        self.asked.append(each[0]["max_new_tokens"])
        meta = {"spec_accept_length": 5.0, "num_retractions": 0}
        return [
            {"output_ids": list(range(p["max_new_tokens"])), "meta_info": {**meta, "completion_tokens": p["max_new_tokens"]}}
            for p in each
        ]

    def flush_cache(self) -> Any:
        return argparse.Namespace(success=True)

    def get_server_info(self) -> dict[str, Any]:
        return {"internal_states": [{"last_gen_throughput": 0.0, "attention_backend": "fa3"}]}

    def shutdown(self) -> None:
        pass


def test_sglangs_own_function_times_decoding_of_cached_prompts() -> None:
    engine = FakeEngine()
    load = throughput.Load.parse("code:8,2,24,0.6")
    found = throughput.run_sample(engine, load, [[1, 2], [3]], ignore_eos=True)
    assert engine.asked == [1, 16, 24]
    assert (found["prompt_tokens"], found["output_tokens"], found["accept_length"]) == (3, 48, 5.0)
    assert found["tokens_per_s"] > 0 and found["repetitive_prompts"] == 0


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

    def run_apart(spec: EngineSpec, repeats: list[int], args: argparse.Namespace, argv: Any) -> str:
        state.started.append((spec.label, list(repeats)))
        try:
            throughput.run_engine(spec, repeats, args)
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
    assert (row["tokens_per_s"], row["lowest"], row["highest"], row["repeats"]) == (120.0, 100.0, 300.0, 3)
    assert row["times_plain"] == 2.0


def test_tables_say_what_a_reader_must_know() -> None:
    changes = {"simulated_accept_length": 7.16, "load_format": "dummy", "repetitive_prompts": 1, "retractions": 3}
    text = throughput.report([sample("sparsespec", 100.0, **changes, interleaved=False), sample("plain", 50.0)])
    (row,) = (line for line in text.splitlines() if "sparsespec" in line)
    remarks = ["SIMULATED acceptance", "dummy weights", "1 of 2 outputs repeat", "3 retractions", "one run", "go on past"]
    assert [remark for remark in remarks if remark not in row] == []
    assert "SIMULATED" not in next(line for line in text.splitlines() if "plain " in line)


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


def test_the_programs_take_what_a_gpu_session_gives_them(tmp_path: Path) -> None:
    environment = {**os.environ, "MODEL": "m", "DRAFT": "d", "OUT": str(tmp_path), "PYTHON": "echo"}
    subprocess.run([str(REPO / "benchmarks/gpu_session.sh")], env=environment, check=True, timeout=60)
    commands = [path.read_text().split() for path in tmp_path.glob("*.log")]
    assert {Path(program).stem for program, *_ in commands} >= {"throughput", "serving", "parity", "kernel_table"}
    for program, *arguments in commands:
        name = Path(program).stem
        if name != "kernel_table":  # which looks for a GPU
            importlib.import_module(name).parse_arguments(arguments)
