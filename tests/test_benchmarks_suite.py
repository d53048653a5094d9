"""The suite runs steps on free GPUs, in order, within its time; here they are small programs that need none."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.append(str(REPO / "benchmarks"))

import accuracy  # noqa: E402
import open_loop  # noqa: E402
import run  # noqa: E402
import suite  # noqa: E402
from suite import Step, Suite  # noqa: E402

FOREVER = float("inf")


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def record(folder: Path) -> dict[str, dict]:
    """The last line of each step."""
    return {line["step"]: line for line in map(json.loads, (folder / "suite.jsonl").read_text().splitlines())}


def run_suite(steps: list[Step], folder: Path, gpus: str = "0", seconds: float = FOREVER, patience: float = 0) -> Suite:
    done = Suite(steps, gpus.split(","), folder, time.monotonic() + seconds, patience)
    done.run(poll=0.02)
    return done


def test_steps_share_no_gpu_and_are_told_theirs(tmp_path: Path) -> None:
    note = "import os, pathlib, time; p = pathlib.Path('{}') / os.environ['CUDA_VISIBLE_DEVICES']; p.touch(exist_ok=False)"
    steps = [Step(f"step{i}", python(f"{note.format(tmp_path)}; time.sleep(0.3); p.unlink()"), 20) for i in range(5)]
    done = run_suite(steps, tmp_path, gpus="3,5")
    assert done.succeeded == {f"step{i}" for i in range(5)}
    assert {gpu for line in record(tmp_path).values() for gpu in line["gpus"]} == {"3", "5"}


def test_a_step_for_two_gpus_is_not_overtaken(tmp_path: Path) -> None:
    log = tmp_path / "order"
    steps = [
        Step(name, python(f"import time; time.sleep(0.2); open({str(log)!r}, 'a').write('{name} ')"), 20, gpus)
        for name, gpus in (("one", 1), ("two", 2), ("three", 1))
    ]
    run_suite(steps, tmp_path, gpus="0,1")
    assert log.read_text().split() == ["one", "two", "three"]
    assert record(tmp_path)["two"]["gpus"] == ["1", "0"] or record(tmp_path)["two"]["gpus"] == ["0", "1"]


def test_what_comes_after_a_failure_is_not_run(tmp_path: Path) -> None:
    steps = [
        Step("bad", python("raise SystemExit(3)"), 20),
        Step("next", python("pass"), 20, after=("bad",)),
        Step("last", python("pass"), 20, after=("next",)),
        Step("other", python("pass"), 20),
    ]
    done = run_suite(steps, tmp_path)
    assert done.succeeded == {"other"} and done.failed == {"bad", "next", "last"}
    assert record(tmp_path)["bad"]["status"] == 3 and "next" not in record(tmp_path)


def test_a_step_waits_for_its_model_and_lets_others_go_first(tmp_path: Path) -> None:
    model = tmp_path / "config.json"
    steps = [
        Step("measured", python("pass"), 20, needs=(model,)),
        Step("maker", python(f"import time; time.sleep(0.3); open({str(model)!r}, 'w')"), 20),
    ]
    assert run_suite(steps, tmp_path).succeeded == {"measured", "maker"}
    missing = run_suite([Step("waits", python("pass"), 20, needs=(tmp_path / "no",))], tmp_path, patience=0.2)
    assert missing.failed == {"waits"}


def test_times_are_kept(tmp_path: Path) -> None:
    sleeper = python("import time; time.sleep(60)")
    steps = [Step("slow", sleeper, 0.3), Step("long", python("pass"), 100), Step("short", python("pass"), 5)]
    done = run_suite(steps, tmp_path, seconds=30)
    assert done.succeeded == {"short"} and done.failed == {"slow", "long"}
    assert record(tmp_path)["slow"]["why"] == "took too long"


def test_more_gpus_than_there_are_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_suite([Step("pair", python("pass"), 20, gpus=2)], tmp_path).failed == {"pair"}
    assert "pair: not run: it needs 2 GPUs" in capsys.readouterr().err


ARGUMENTS = ["--model-path", "m", "--draft-model-path", "d", "--small-model-path", "s"]


def test_the_same_command_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flag = tmp_path / "flag"
    steps = [
        Step("first", python(f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"), 20),
        Step("second", python(f"import os; raise SystemExit(not os.path.exists({str(flag)!r}))"), 20),
    ]
    monkeypatch.setattr(suite, "all_steps", lambda args: steps)
    line = [*ARGUMENTS, "--results", str(tmp_path)]
    assert suite.main(line) == 1
    flag.touch()
    assert suite.main(line) == 0
    assert (tmp_path / "runs").read_text() == "x"


def test_a_whole_name_means_no_other_step_that_begins_so(tmp_path: Path) -> None:
    args = suite.parse_arguments([*ARGUMENTS, "--results", str(tmp_path)])
    found = [step.name for step in suite.chosen(suite.all_steps(args), ["kv-sparsespec-retract", "open-"])]
    assert "kv-sparsespec-retract" in found and "kv-sparsespec-retract-aggressive" not in found
    assert sum(name.startswith("open-") for name in found) > 1


def test_steps_are_chosen_by_how_their_names_begin_with_what_they_come_after(tmp_path: Path) -> None:
    args = suite.parse_arguments([*ARGUMENTS, "--results", str(tmp_path)])
    names = ["open-", "parity-tp2-host"]
    found = [step.name for step in suite.in_order(suite.chosen(suite.all_steps(args), names), names)]
    assert found[-2:] == ["parity-tp2-baseline", "parity-tp2-host"]
    assert {"open-plain-flashinfer", "open-sparsespec"} < set(found)
    assert not any(name.startswith("kv-") for name in found)


def test_the_programs_take_what_the_suite_gives_them(tmp_path: Path) -> None:
    args = suite.parse_arguments([*ARGUMENTS, "--results", str(tmp_path)])
    programs = (run, open_loop, accuracy)
    parsers = {f"{module.__name__}.py": module.parse_arguments for module in programs}
    seen = set()
    for step in suite.all_steps(args):
        name = Path(step.command[1]).name
        if name in parsers:
            parsers[name](list(step.command[2:]))
            seen.add(name)
        else:
            assert name == "-m" or (REPO / "benchmarks" / name).exists()
    assert seen == set(parsers)


def test_shapes_are_written_as_a_checkpoint_without_weights(tmp_path: Path) -> None:
    suite.write_shapes(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["num_key_value_heads"] == 8
