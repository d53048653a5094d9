"""What the benchmarks of parity, accuracy, accept length and rounds make of outputs and traces."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import accept_length  # noqa: E402
import accuracy  # noqa: E402
import parity  # noqa: E402
import profile_round  # noqa: E402
from _common import SIMULATE, read_data, read_records  # noqa: E402
from accuracy import Question, compare, final_answer, is_correct  # noqa: E402
from profile_round import Event, breakdown  # noqa: E402

# -------------------------------------------------------------------------- parity

BEST = [[[-0.1, 5, None]], [[-0.5, 7, None], [-0.75, 8, None]]]
PLAIN = {"output_ids": [5, 7], "meta_info": {"output_top_logprobs": BEST}}


def output(*tokens: int) -> dict[str, Any]:
    return {"output_ids": list(tokens)}


def test_divergences_have_a_position_and_a_margin() -> None:
    outputs = [output(5, 7), output(5, 8), output(5, 9), output(5)]
    found = parity.divergences([PLAIN] * 4, outputs)
    assert [(item["prompt"], item["at"], item["margin"]) for item in found] == [
        (1, 1, pytest.approx(0.25)),
        (2, 1, None),  # not among the baseline's best
        (3, 1, None),
    ]


def test_only_shown_ties_pass() -> None:
    assert parity.are_ties([{"margin": 0.0}, {"margin": 0.25}], 0.25)
    assert not parity.are_ties([{"margin": 0.0}, {"margin": 0.26}], 0.25)
    assert not parity.are_ties([{"margin": None}], 0.25)


def with_alternatives(tokens: list[int], best: list[list[list[Any]]]) -> dict[str, Any]:
    return {"output_ids": tokens, "meta_info": {"output_top_logprobs": best}}


def test_a_control_shows_how_far_small_margins_move_between_kernels() -> None:
    close = [[-0.5, 7, None], [-0.75, 8, None]]
    moved = [[-0.5, 7, None], [-0.625, 8, None]]
    swapped = [[-0.5, 8, None], [-0.625, 7, None]]
    far = [[-0.1, 7, None], [-4.0, 8, None]]
    farther = [[-0.1, 7, None], [-9.0, 8, None]]
    plain = with_alternatives([7, 7], [close, far])
    assert parity.margin_noise([plain], [with_alternatives([7, 7], [close, far])]) == 0
    assert parity.margin_noise([plain], [with_alternatives([7, 7], [moved, far])]) == pytest.approx(0.125)
    assert parity.margin_noise([plain], [with_alternatives([7, 7], [close, farther])]) == 0, "no candidate for a tie"
    # At the first difference both had the same past; afterwards they have not.
    assert parity.margin_noise([plain], [with_alternatives([8, 7], [swapped, moved])]) == pytest.approx(0.375)


def test_ten_thousand_prompts_are_all_different() -> None:
    prompts = parity.cut_prompts(10_000)
    assert len(set(prompts)) == 10_000 and prompts[:50] == parity.cut_prompts(50)
    assert min(map(len, prompts)) >= 60 and max(map(len, prompts)) <= 1500


def test_controls_are_asked_fewer_prompts_and_all_others_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    close = [[-0.7, 7, None], [-0.825, 8, None]]
    asked: dict[str, int] = {}

    def run_engine(spec: Any, prompts: list[str], args: Any, logprobs: bool) -> Any:
        asked[spec.label] = len(prompts)
        token = 8 if spec.kind == "sparsespec" else 7
        outputs = [with_alternatives([token], [close]) for _ in prompts]
        for item in outputs:
            item["meta_info"]["prompt_tokens"] = 9
        return outputs, {"seconds": 1.0, "attention_backend": "fa3"}

    monkeypatch.setattr(parity, "run_engine", run_engine)
    command = ["parity.py", "--model-path", "m", "--short", "0", "--problems", "0", "--long", "0", "--cuts", "30"]
    monkeypatch.setattr("sys.argv", [*command, "--control-prompts", "4", "--engines", "plain:triton", "sparsespec"])
    assert parity.main() == 0
    assert asked == {"plain": 30, "plain:triton": 4, "sparsespec": 30}
    assert "4 of 4" in (table := capsys.readouterr().out) and "0 of 30" in table
    monkeypatch.setattr("sys.argv", [*command, "--tie-margin", "0.1"])
    assert parity.main() == 1


def test_parity_takes_no_simulated_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    parity.parse_arguments(["--model-path", "m"])
    monkeypatch.setenv(SIMULATE, "7")
    with pytest.raises(SystemExit):
        parity.parse_arguments(["--model-path", "m"])


# ------------------------------------------------------------------------ accuracy


def test_accuracy_asks_no_engine_without_a_grader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        accuracy.parse_arguments(["--model-path", "m"])
    accuracy.parse_arguments(["--model-path", "m", "--generate-only", "--results", "r.jsonl"])


def test_answers_that_nobody_would_find_are_not_generated() -> None:
    with pytest.raises(SystemExit):
        accuracy.parse_arguments(["--model-path", "m", "--generate-only"])


@pytest.fixture
def grader() -> None:
    pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("text", "reference", "tolerance", "correct"),
    [
        (r"so $x=3$ and \boxed{204}.", "204", None, True),
        (r"so \boxed{205}", "204", None, False),
        (r"<think>\boxed{5}? no</think> It is \boxed{6}", "6", None, True),
        ("The answer is **42**.", "42", None, True),
        ("we get 12 and then 1,024", "1024", None, True),
        (r"\boxed{0.5}", r"$\frac{1}{2}$", None, True),
        (r"\boxed{0.50001}", r"$\frac{1}{2}$", None, False),
        (r"\boxed{\frac{2}{7} \sqrt{53}}", r"$\frac{2\sqrt{53}}{7}$", None, True),
        (r"\boxed{0.55}", "0.5", 0.1, True),
        (r"\boxed{0.65}", "0.5", 0.1, False),
        (r"\boxed{2, 1}", "1,2", None, True),
        (r"\boxed{1}", "1,2", None, False),
        (r"\boxed{1,2,3}", "1,2", None, False),
        (r"\boxed{many}", "1", 0.1, False),
        ("nothing here", "1", None, False),
    ],
)
def test_answers_are_graded(grader: None, text: str, reference: str, tolerance: float | None, correct: bool) -> None:
    assert is_correct(final_answer(text), Question("q", "t", reference, tolerance)) is correct


def test_the_solutions_of_aime_are_graded_correct(grader: None) -> None:
    for question, row in zip(accuracy.load_questions("aime"), read_data("aime"), strict=True):
        assert is_correct(final_answer(row["solution"]), question), row["id"]


def test_every_question_has_an_answer_that_equals_itself_and_no_other(grader: None) -> None:
    questions = accuracy.load_questions("olympiadbench")
    assert len(questions) == 291
    for question in questions[::12]:
        given = question.answer.replace("$", "")
        assert is_correct(final_answer(rf"\boxed{{{given}}}"), question), question
        assert not is_correct(final_answer(r"\boxed{123456.75}"), question), question
    assert accuracy.load_questions("olympiadbench", 3) == questions[:3]


def test_an_output_is_graded(grader: None) -> None:
    meta = {"completion_tokens": 120, "finish_reason": {"type": "length"}}
    given = {"text": r"\boxed{5}", "output_ids": [1, 2, 3] * 40, "meta_info": meta}
    graded = accuracy.grade(Question("q", "2 + 3", "5"), accuracy.to_grade(given))
    assert graded["correct"] and graded["cut"] and graded["repeats_itself"] and graded["answer"] == "5"
    assert accuracy.summarise([graded, {**graded, "correct": False, "answer": None}])["accuracy"] == 0.5


def test_an_answer_of_too_many_digits_for_python_is_shown_as_such() -> None:
    assert accuracy.shown(10**4000) == str(10**4000)
    assert accuracy.shown(10**5000) == "a number of too many digits to show"


def test_few_splits_are_within_sampling_error_and_many_are_not() -> None:
    same = compare([True] * 10 + [False] * 90, [False] * 2 + [True] * 10 + [False] * 88)
    assert same.only_first == same.only_second == 2
    assert "same within sampling error" in same.statement
    worse = compare([True] * 20 + [False] * 80, [True] * 8 + [False] * 92)
    assert worse.p_value == pytest.approx(2 / 2**12)  # 12 splits, all one way
    assert worse.difference == pytest.approx(-0.12) and worse.high < 0
    assert "differs by more than sampling error" in worse.statement
    with pytest.raises(ValueError, match="same questions"):
        compare([True], [])


def test_the_interval_is_wide_where_little_was_asked_and_narrow_where_much_was() -> None:
    def width(questions: int) -> float:
        found = compare([True] * questions, [True] * questions)
        assert found.low < 0 < found.high and found.p_value == 1
        return found.high - found.low

    assert width(2) > 0.9
    assert width(300) < 0.02


def test_every_engine_is_compared_with_the_first() -> None:
    grades = {name: [{"correct": correct}] * 4 for name, correct in (("plain", True), ("a", True), ("b", False))}
    records = accuracy.compare_with_first(grades)
    assert [(record["first_engine"], record["second_engine"]) for record in records] == [("plain", "a"), ("plain", "b")]
    assert records[1]["only_first"] == 4


def test_simulated_answers_are_not_graded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIMULATE, "7")
    with pytest.raises(SystemExit):
        accuracy.parse_arguments(["--model-path", "m"])


H200 = {"name": "H200"}


class Answering:
    """A machine, of which tests choose the commit and the GPU, and its engines. Plain ones always answer 5, others 6.

    Attributes:
        fails_at: the kind of engine that fails.
        answered: kinds of the engines that have answered, and what each was asked.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.commit, self.date, self.fails_at = "abc", 0, ""
        self.gpu: dict[str, Any] | None = H200
        self.answered: list[tuple[str, list[str]]] = []
        self.results = folder / "accuracy.jsonl"
        monkeypatch.setattr(accuracy, "stamp", self.stamp)
        monkeypatch.setattr(accuracy, "start_engine", self.start_engine)
        monkeypatch.setattr(accuracy, "chat_prompt", lambda tokenizer, question: question)
        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda path: None)
        questions = [Question("a", "A", "5"), Question("b", "B", "6")]
        monkeypatch.setattr(accuracy, "load_questions", lambda name, most: questions)

    def stamp(self) -> dict[str, Any]:
        self.date += 1
        return {"date": self.date, "commit": self.commit, "gpu": self.gpu, "command": ["accuracy.py"]}

    def start_engine(self, settings: dict[str, Any]) -> Any:
        kind = settings.get("speculative_algorithm", "plain")
        text = r"\boxed{5}" if kind == "plain" else "\N{LINE SEPARATOR}\ud800 \\boxed{6}"

        def generate(input_ids: list[str], sampling_params: dict[str, Any]) -> list[dict[str, Any]]:
            if kind == self.fails_at:
                raise RuntimeError("killed")
            self.answered.append((kind, input_ids))
            meta = {"completion_tokens": 30, "finish_reason": {"type": "length"}}
            return [{"text": text, "output_ids": [7] * 30, "meta_info": meta} for _ in input_ids]

        return SimpleNamespace(generate=generate, shutdown=lambda: None)

    def run(self, *options: str) -> None:
        command = ["--model-path", "folder/m", "--datasets", "aime", "--results", str(self.results), *options]
        assert accuracy.main(command) == 0

    @property
    def records(self) -> list[dict[str, Any]]:
        return read_records(self.results)

    @property
    def answers(self) -> list[dict[str, Any]]:
        return [record for path in sorted(self.results.parent.glob("*.answers.jsonl")) for record in read_records(path)]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Answering:
    return Answering(monkeypatch, tmp_path)


def test_generated_answers_are_written_and_not_graded(answering: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    answering.run("--generate-only", "--engines", "plain", "sparsespec,a=B", "--samples", "2")
    assert answering.answered == [("plain", ["A", "B"] * 2), ("SPARSESPEC", ["A", "B"] * 2)]
    names = {path.name for path in answering.results.parent.iterdir()}
    assert names == {"accuracy-plain.answers.jsonl", "accuracy-sparsespec-a-.answers.jsonl"}
    plain, _ = answering.answers
    assert plain["answers"] == [{"text": r"\boxed{5}", "tokens": 30, "finish_reason": "length", "repeats_itself": True}] * 4
    assert (plain["commit"], plain["gpu"], plain["samples"]) == ("abc", H200, 2)


def test_answers_are_graded_later_as_at_once(answering: Answering, grader: None, monkeypatch: pytest.MonkeyPatch) -> None:
    answering.run()
    at_once = answering.records
    assert [record["kind"] for record in at_once] == ["grades", "grades", "comparison"]
    assert [row["correct"] for row in at_once[0]["grades"] + at_once[1]["grades"]] == [True, False, False, True]
    answering.results.unlink()
    # Another machine: without a GPU, the model and its tokenizer.
    answering.gpu = None
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)
    answering.run()
    assert answering.records == at_once, "with the date, commit and device of the answers"
    assert at_once[2]["gpu"] == H200 and at_once[2]["date"] == at_once[1]["date"] > at_once[0]["date"]
    assert len(answering.answered) == len(answering.answers) == 2, "nothing is generated twice"


def test_answers_outlive_the_failure_of_a_later_engine(answering: Answering, grader: None) -> None:
    answering.fails_at = "SPARSESPEC"
    with pytest.raises(RuntimeError, match="killed"):
        answering.run("--generate-only")
    answering.fails_at = ""
    answering.run()
    assert [kind for kind, _ in answering.answered] == ["plain", "SPARSESPEC"]
    assert [record["kind"] for record in answering.records] == ["grades", "grades", "comparison"]


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "0.7"],
        ["--top-p", "0.9"],
        ["--max-new-tokens", "9"],
        ["--samples", "2"],
        ["--questions", "1"],
        ["--concurrency", "2"],
        ["--dtype", "float32"],
        ["--device", "cpu"],
        ["--datasets", "olympiadbench"],
        ["--model-path", "folder/n"],
        ["--engine-args", '{"tp_size": 2}'],
    ],
)
def test_answers_to_other_arguments_are_not_reused(answering: Answering, options: list[str]) -> None:
    answering.run("--generate-only", "--engines", "plain")
    answering.run("--generate-only", "--engines", "plain", *options)
    assert len(answering.answered) == 2
    answering.run("--generate-only", "--engines", "plain")
    assert len(answering.answered) == 2, "the former ones are still there"


@pytest.mark.parametrize("change", [{"commit": "abc+changes"}, {"gpu": {"name": "H100"}}])
def test_answers_of_another_commit_or_device_are_not_reused(answering: Answering, change: dict[str, Any]) -> None:
    answering.run("--generate-only")
    vars(answering).update(change)
    answering.run("--generate-only")
    assert [kind for kind, _ in answering.answered] == ["plain", "SPARSESPEC"] * 2
    assert [record["commit"] for record in answering.answers] == ["abc", answering.commit] * 2


def test_engines_that_are_compared_answered_on_the_same_device(answering: Answering, grader: None) -> None:
    answering.run("--generate-only", "--engines", "plain")
    answering.run("--generate-only", "--engines", "sparsespec")
    answering.gpu = {"name": "H100"}
    answering.run("--generate-only", "--engines", "sparsespec")
    answering.gpu = None
    answering.run("--engines", "plain", "sparsespec")
    assert [record["gpu"] for record in answering.records] == [H200] * 3 and len(answering.answered) == 3


def test_engines_whose_labels_differ_in_a_sign_have_answers_of_their_own(answering: Answering) -> None:
    engines = ["plain,schedule_conservativeness=1", "plain,schedule_conservativeness=-1"]
    answering.run("--generate-only", "--engines", *engines)
    answering.run("--generate-only", "--engines", *engines)
    assert [record["label"] for record in answering.answers] == engines and len(answering.answered) == 2


# ------------------------------------------------------------------- accept length


def test_accept_length_is_accepted_drafts_and_the_bonus_token() -> None:
    assert accept_length.accept_length([1, 0, 0, 3]) == 1 + 9 / 4
    outputs = [
        {"output_ids": list(range(40)), "meta_info": {"spec_correct_drafts_histogram": [0, 0, 2]}},
        {"output_ids": [1] * 40, "meta_info": {"spec_correct_drafts_histogram": [0, 0, 0, 0, 1]}},
    ]
    found = accept_length.summarise(outputs)
    assert (found["accept_length"], found["accept_length_not_repetitive"], found["repetitive_prompts"]) == (4.0, 3.0, 1)


# ------------------------------------------------------------------------- profile


def test_the_shares_of_a_step_and_its_idle_time_are_the_whole() -> None:
    # b overlaps a by 5 us and adds 8; 2 us (a launch gap) and 20 us (waiting) are free.
    events = [Event("_draft_kernel", 0, 10), Event("nvjet_x", 5, 13)]
    events += [Event("norm", 20, 10), Event("norm", 50, 50)]
    found = breakdown(events, steps=2)
    assert found["ms_per_step"] == pytest.approx(0.05)
    assert found["shares"] == pytest.approx({"attention": 0.1, "matrix products": 0.08, "other": 0.6, "idle": 0.22})
    assert found["gpu_idle_waiting"] == pytest.approx(0.2) and found["longest_gap_us"] == 20
    assert found["kernels"][0] == {"kernel": "norm", "launches": 1.0, "ms": pytest.approx(0.03)}


def test_an_event_inside_another_does_not_shorten_it() -> None:
    assert breakdown([Event("long", 0, 100), Event("short", 10, 1), Event("next", 100, 1)], 1)["gpu_idle"] == 0


def test_the_kernels_of_a_draft_step_are_told_from_those_of_a_verification() -> None:
    def layers(name: str, at: float) -> list[Event]:
        return [event for i in range(2) for event in (Event(name, at + 10 * i, 4), Event("gemm", at + 10 * i + 4, 6))]

    steps = [
        ("_draft_kernel", 0),
        ("_draft_kernel", 20),
        ("_verify_kernel", 40),
        ("_draft_kernel", 100),
        ("_draft_kernel", 120),
    ]
    events = [event for name, at in steps for event in layers(name, at)]
    found = profile_round.draft_step(events, layers=2)
    assert found is not None
    assert found["launches"] == 4 and found["ms"] == pytest.approx(0.02)
    assert found["kernels"][0] == {"kernel": "gemm", "launches": 2.0, "ms": pytest.approx(0.012)}
    assert profile_round.draft_step(layers("_verify_kernel", 0), layers=2) is None


def test_a_written_trace_reads_back_sorted_and_without_host_events(tmp_path: Path) -> None:
    source = tmp_path / "full.json"
    event = {"ph": "X", "ts": 30, "dur": 2, "name": "later", "cat": "kernel"}
    host = {"ph": "X", "ts": 0, "dur": 99, "name": "python", "cat": "cpu_op"}
    copy = {"ph": "X", "ts": 10.5, "dur": 1.25, "name": "Memcpy", "cat": "gpu_memcpy"}
    source.write_text(json.dumps({"traceEvents": [event, host, copy]}))
    (events,) = profile_round.load_events(source, profile_round.GPU_CATEGORIES)
    small = tmp_path / "small.json.gz"
    profile_round.write_small_trace(events, small)
    (read,) = profile_round.load_events(small, profile_round.GPU_CATEGORIES)
    assert read == [Event("Memcpy", 0, 1.25), Event("later", 19.5, 2)]
    source.write_text(json.dumps({"traceEvents": [host]}))
    with pytest.raises(ValueError, match="no events of gpu_memcpy, gpu_memset, kernel"):
        profile_round.load_events(source, profile_round.GPU_CATEGORIES)


def test_the_hosts_calls_are_counted_by_step_with_the_longest(tmp_path: Path) -> None:
    rows = [("cudaGraphLaunch", 0, 10), ("cudaEventSynchronize", 20, 4000), ("cudaGraphLaunch", 9000, 30)]
    events = [{"ph": "X", "ts": ts, "dur": dur, "name": name, "cat": "cuda_runtime"} for name, ts, dur in rows]
    source = tmp_path / "trace.json"
    source.write_text(json.dumps({"traceEvents": [*events, {"ph": "X", "ts": 1, "dur": 9, "name": "k", "cat": "kernel"}]}))
    (calls,) = profile_round.load_events(source, profile_round.HOST_CATEGORIES)
    assert profile_round.host_calls(calls, steps=2) == [
        {"call": "cudaEventSynchronize", "calls": 0.5, "ms": 2.0, "longest_ms": 4.0},
        {"call": "cudaGraphLaunch", "calls": 1.0, "ms": pytest.approx(0.02), "longest_ms": pytest.approx(0.03)},
    ]


def test_profiles_keep_their_marks() -> None:
    record = {**breakdown([Event("a", 0, 10)], 1), "engine": "sparsespec", "batch": 1, "dataset": "random:8"}
    assert "SIMULATED acceptance" in profile_round.table([{**record, "simulated_accept_length": 7.0}])
