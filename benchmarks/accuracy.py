"""Accuracy on AIME and OlympiadBench, with and without SPARSESPEC: the same within sampling error?

    python benchmarks/accuracy.py --model-path M --engines plain sparsespec,sparsespec_speculate=always \\
        --datasets aime olympiadbench --temperature 0.6 --max-new-tokens 16384 --results accuracy.jsonl

Questions with numeric answers are asked in the chat template, final answers are graded by math-verify, and every engine is
compared with the first one by McNemar's exact test over the same questions. Written: a JSON line per engine with every
grade, and a line per comparison. An output that is cut by ``--max-new-tokens`` is graded as it is; their number is reported.

Lossless decoding gives equal accuracy by construction. This finds gross errors; it cannot prove equality, and says how large
a difference it could have missed (the 95% interval).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _common import (
    QUESTIONS,
    EngineSpec,
    add_engine_options,
    chat_prompt,
    describe,
    read_data,
    repetition,
    say,
    simulated_accept_length,
    stamp,
    start_engine,
    write_record,
)

# ------------------------------------------------------------------------- grading


@dataclass(frozen=True)
class Question:
    """A question with a numeric answer, or a set of numbers.

    Attributes:
        tolerance: absolute one that the data set allows, or None.
    """

    name: str
    text: str
    answer: str
    tolerance: float | None = None


def load_questions(dataset: str, most: int | None = None) -> list[Question]:
    """The graded questions of ``aime`` or ``olympiadbench``, the first ``most`` of them."""
    rows = read_data(dataset)
    if dataset == "aime":
        return [Question(f"aime/{row['id']}", row["problem"], row["answer"]) for row in rows][:most]
    return [
        Question(
            f"olympiadbench/{row['id']}",
            row["question"],
            row["final_answer"][0],
            float(row["error"]) if row["error"] else None,
        )
        for row in rows
        if row["answer_type"] == "Numerical"
    ][:most]


def final_answer(text: str) -> list[Any]:
    """The answer that an output gives, as math-verify parses it; empty if there is none.

    What is thought aloud before ``</think>`` is not looked at.
    """
    from math_verify import parse

    return parse(text.rpartition("</think>")[2])


def is_correct(answer: list[Any], question: Question) -> bool:
    """Whether a parsed answer is the reference's."""
    from math_verify import parse, verify

    if not answer:
        return False
    reference = parse(f"${question.answer.replace('$', '')}$")
    if question.tolerance is not None:
        try:
            return abs(float(answer[0]) - float(reference[0])) <= question.tolerance
        except (TypeError, ValueError):
            return False
    return verify(reference, answer)


def grade(question: Question, output: dict[str, Any]) -> dict[str, Any]:
    """One output's grade."""
    answer = final_answer(output["text"])
    return {
        "question": question.name,
        "answer": str(answer[0]) if answer else None,
        "correct": is_correct(answer, question),
        "tokens": output["meta_info"]["completion_tokens"],
        "cut": output["meta_info"]["finish_reason"]["type"] == "length",
        "repeats_itself": repetition([output["output_ids"]])[0],
    }


def summarise(grades: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one engine."""
    return {
        "questions": len(grades),
        "accuracy": round(sum(row["correct"] for row in grades) / len(grades), 4),
        "no_answer": sum(row["answer"] is None for row in grades),
        "cut": sum(row["cut"] for row in grades),
        "repetitive_outputs": sum(row["repeats_itself"] for row in grades),
        "output_tokens": sum(row["tokens"] for row in grades),
    }


# ---------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Comparison:
    """Grades of the same questions under two engines.

    Attributes:
        only_first, only_second: questions that only one of them answered correctly.
        p_value: of McNemar's exact test, two-sided: how often such a split, or a more uneven one, comes from equal engines.
        difference: accuracy of the second less that of the first; ``low``, ``high``: its 95% interval (Agresti and Min 2005,
            for pairs).
    """

    questions: int
    first: float
    second: float
    only_first: int
    only_second: int
    p_value: float
    difference: float
    low: float
    high: float

    @property
    def statement(self) -> str:
        """What may be said about it."""
        interval = f"difference {self.difference:+.1%}, 95% interval {self.low:+.1%} to {self.high:+.1%}"
        verdict = "differs by more than sampling error" if self.p_value < 0.05 else "is the same within sampling error"
        return f"accuracy {verdict} (McNemar p = {self.p_value:.3f}; {interval})"


def compare(first: Sequence[bool], second: Sequence[bool]) -> Comparison:
    """Compare the grades of the same questions, in the same order.

    Raises:
        ValueError: there are none, or not equally many.
    """
    from scipy.stats import binomtest

    if len(first) != len(second) or not first:
        raise ValueError(f"grades of the same questions are needed, got {len(first)} and {len(second)}")
    total = len(first)
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    splits = only_first + only_second
    # Half an answer is added to each of the four kinds: few splits do not make the interval vanish.
    padded, shift = total + 2, only_second - only_first
    error = 1.96 * math.sqrt(splits + 1 - shift**2 / padded) / padded
    return Comparison(
        questions=total,
        first=sum(first) / total,
        second=sum(second) / total,
        only_first=only_first,
        only_second=only_second,
        p_value=float(binomtest(only_first, splits, 0.5).pvalue) if splits else 1.0,
        difference=shift / total,
        low=max(-1.0, shift / padded - error),
        high=min(1.0, shift / padded + error),
    )


def compare_with_first(outcomes: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A record for every engine but the first."""
    first, *others = outcomes
    correct = {name: [row["correct"] for row in grades] for name, grades in outcomes.items()}
    records = []
    for other in others:
        found = compare(correct[first], correct[other])
        engines = {"kind": "comparison", "first_engine": first, "second_engine": other}
        records.append({**engines, **asdict(found), "statement": found.statement})
    return records


# ----------------------------------------------------------------------------- main


def run_engine(spec: EngineSpec, questions: Sequence[Question], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Ask an engine everything; grades in the order of the questions."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    prompts = [chat_prompt(tokenizer, question.text) for question in questions]
    engine = start_engine(spec.engine_args(args, args.concurrency))
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "max_new_tokens": args.max_new_tokens}
    outputs = engine.generate(input_ids=prompts, sampling_params=sampling)
    engine.shutdown()
    return [grade(question, output) for question, output in zip(questions, outputs, strict=True)]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser, ["plain", "sparsespec,sparsespec_speculate=always"])
    parser.add_argument("--datasets", nargs="+", choices=sorted(QUESTIONS), default=["aime", "olympiadbench"])
    parser.add_argument("--questions", type=int, help="at most so many of each data set (default: all)")
    parser.add_argument("--samples", type=int, default=1, help="answers to each question")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--max-new-tokens", type=int, default=8192)
    parser.add_argument("--concurrency", type=int, default=64)
    args = parser.parse_args(argv)
    if importlib.util.find_spec("math_verify") is None:
        parser.error("answers are graded by math-verify, which is not installed: pip install 'sglang-sparsespec[bench]'")
    if simulated_accept_length("sparsespec"):
        parser.error("acceptance is SIMULATED (SGLANG_SIMULATE_ACC_LEN): its outputs are no answers")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given command line; 1 if accuracy differs by more than sampling error."""
    args = parse_arguments(argv)
    questions = [question for name in args.datasets for question in load_questions(name, args.questions)] * args.samples
    settings = {name: getattr(args, name) for name in ("temperature", "top_p", "max_new_tokens", "samples", "datasets")}
    about = {**stamp(), "model": Path(args.model_path).name, **settings}
    outcomes: dict[str, list[dict[str, Any]]] = {}
    for spec in args.engines:
        started = time.perf_counter()
        grades = outcomes[spec.label] = run_engine(spec, questions, args)
        figures = {**summarise(grades), "seconds": round(time.perf_counter() - started, 1)}
        say(f"{spec.label}: {figures}")
        write_record(args.results, {**about, **describe(spec, args), "kind": "grades", **figures, "grades": grades})
    comparisons = compare_with_first(outcomes)
    for record in comparisons:
        write_record(args.results, {**about, **record})
        print(f"{record['second_engine']} against {record['first_engine']}: {record['statement']}")
    return int(any(record["p_value"] < 0.05 for record in comparisons))


if __name__ == "__main__":
    sys.exit(main())
