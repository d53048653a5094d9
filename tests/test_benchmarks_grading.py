"""Final answers: found in outputs, compared with references; and when two accuracies differ."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import accuracy  # noqa: E402
from _grading import compare, final_answer, mcnemar, number, same_answer  # noqa: E402
from _workloads import read_data  # noqa: E402


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $x=3$ and \boxed{204}.", "204"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{7} and an unfinished \boxed{\frac{1}", "7"),
        ("The answer is **42**.", "42"),
        ("The answer is $\\frac{3}{4}$, I think, of 12", "$\\frac{3}{4}$"),
        ("we get 12 and then 1,024", "1,024"),
        (r"<think>\boxed{5}? no</think> It is \boxed{6}", "6"),
        ("nothing here", None),
    ],
)
def test_the_final_answer_is_found(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("204", 204),
        ("025", 25),
        ("-3.5", -3.5),
        ("$1,234,567$", 1234567),
        (r"\frac{25}{2}", 12.5),
        (r"\dfrac12", 0.5),
        (r"-\frac{4}{5}", -0.8),
        (r"4 \pi^{2}-1", 38.47841760435743),
        (r"\frac{2}{7} \sqrt{53}", 2.0800313969372906),
        (r"5 \sqrt[3]{4}", 7.937005259840997),
        (r"\frac{15-8 \sqrt{3}}{33}", 0.034654349680272194),
        (r"2\sqrt{3}\,\text{cm}", 3.4641016151377544),
        (r"x = 7", 7),
        (r"90^\circ", 90),
        (r"8 \%", 8),
        (r"2^{10}", 1024),
        (r"-\log _{10} 250", -2.3979400086720375),
        (r"\textbf{(113) }", 113),
        ("3/4", 0.75),
    ],
)
def test_answers_are_evaluated(text: str, value: float) -> None:
    assert number(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", ["k+1", "", "n!", "[0, 1)", "__import__('os')", "1/0", "9**9**9**9", r"\frac{1}{"])
def test_what_is_not_a_number_is_none(text: str) -> None:
    assert number(text) is None


@pytest.mark.parametrize(
    ("given", "reference", "several", "tolerance", "same"),
    [
        ("0.5", r"$\frac{1}{2}$", False, None, True),
        ("0.50001", r"$\frac{1}{2}$", False, None, False),
        ("0.55", "0.5", False, 0.1, True),
        ("0.65", "0.5", False, 0.1, False),
        (r"2, 1", "1,2", True, None, True),
        (r"1 \text{ and } 2", "1,2", True, None, True),
        ("1", "1,2", True, None, False),
        ("1,2,3", "1,2", True, None, False),
        (None, "1", False, None, False),
        ("many", "1", False, None, False),
    ],
)
def test_answers_are_compared(given: str | None, reference: str, several: bool, tolerance: float | None, same: bool) -> None:
    assert same_answer(given, reference, several, tolerance) is same


def test_the_solutions_of_aime_are_graded_correct() -> None:
    for row in read_data("aime"):
        assert same_answer(final_answer(row["solution"]), row["answer"]), row["id"]


@pytest.mark.parametrize(("dataset", "count"), [("aime", 15), ("olympiadbench", 288)])
def test_questions_with_numeric_answers_are_loaded(dataset: str, count: int) -> None:
    questions = accuracy.load_questions(dataset)
    assert len(questions) == count
    for question in questions:
        assert same_answer(question.answer, question.answer, question.several, question.tolerance)
        assert not same_answer("123456.75", question.answer, question.several, question.tolerance)
    assert accuracy.load_questions(dataset, 3) == questions[:3]


def test_an_output_is_graded() -> None:
    output = {
        "text": r"\boxed{5}",
        "output_ids": [1, 2, 3] * 40,
        "meta_info": {"completion_tokens": 120, "finish_reason": {"type": "length"}},
    }
    graded = accuracy.grade(accuracy.Question("q", "2 + 3", "5"), output)
    assert graded["correct"] and graded["cut"] and graded["repeats_itself"]


def test_mcnemar_is_the_binomial_test_of_the_splits() -> None:
    from scipy.stats import binomtest

    for first, second in ((0, 0), (3, 3), (1, 8), (10, 2), (0, 5)):
        expected = binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
        assert mcnemar(first, second) == pytest.approx(expected)


def test_few_splits_are_within_sampling_error_and_many_are_not() -> None:
    same = compare([True] * 10 + [False] * 90, [False] * 2 + [True] * 10 + [False] * 88)
    assert same.only_first == same.only_second == 2
    assert "same within sampling error" in same.statement
    worse = compare([True] * 20 + [False] * 80, [True] * 8 + [False] * 92)
    assert worse.difference == pytest.approx(-0.12) and worse.high < 0
    assert "differs by more than sampling error" in worse.statement


def test_the_interval_is_wide_where_little_was_asked_and_narrow_where_much_was() -> None:
    def width(questions: int) -> float:
        found = compare([True] * questions, [True] * questions)
        assert found.low < 0 < found.high and found.p_value == 1
        return found.high - found.low

    assert width(2) > 0.9
    assert width(300) < 0.02


def test_grades_of_other_questions_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same questions"):
        compare([True], [])


def test_every_engine_is_compared_with_the_first() -> None:
    grades = {name: [{"correct": correct}] * 4 for name, correct in (("plain", True), ("a", True), ("b", False))}
    records = accuracy.compare_with_first(grades)
    assert [(record["first_engine"], record["second_engine"]) for record in records] == [("plain", "a"), ("plain", "b")]
    assert records[1]["only_first"] == 4
