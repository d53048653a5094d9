"""Accuracy on AIME and OlympiadBench, with and without SPARSESPEC: the same within sampling error?

    python benchmarks/accuracy.py --model-path M --engines plain sparsespec,sparsespec_speculate=always \\
        --datasets aime olympiadbench --temperature 0.6 --max-new-tokens 16384 --results accuracy.jsonl

Questions with numeric answers are asked in the chat template, final answers are graded by math-verify, and every engine is
compared with the first one by McNemar's exact test over the same questions. Written: a JSON line per engine with every
grade, and a line per comparison. An output that is cut by ``--max-new-tokens`` is graded as it is; their number is reported.

An engine's answers lie beside the results (RESULTS-ENGINE.answers.jsonl) as soon as it has given all of them, and
``--generate-only`` ends there, and needs no math-verify. The same command without it grades them later, on any machine: one
without a GPU takes the answers of any GPU. Records have the date, commit and device of the answers. Answers are given anew
where there are none of the same commit, device and arguments.

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
    read_records,
    repetition,
    same_origin,
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


def to_grade(output: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one output until it is graded."""
    return {
        "text": output["text"],
        "tokens": output["meta_info"]["completion_tokens"],
        "finish_reason": output["meta_info"]["finish_reason"]["type"],
        "repeats_itself": repetition([output["output_ids"]])[0],
    }


def shown(answer: Any) -> str:
    """A parsed answer as text. Python writes no integers of thousands of digits, which some outputs do give."""
    try:
        return str(answer)
    except ValueError:
        return "a number of too many digits to show"


def grade(question: Question, given: dict[str, Any]) -> dict[str, Any]:
    """The grade of one output, of which :func:`to_grade` has kept what matters."""
    answer = final_answer(given["text"])
    return {
        "question": question.name,
        "answer": shown(answer[0]) if answer else None,
        "correct": is_correct(answer, question),
        "tokens": given["tokens"],
        "cut": given["finish_reason"] == "length",
        "repeats_itself": given["repeats_itself"],
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


# ------------------------------------------------------------------------- answers


def answers_file(results: str, spec: EngineSpec) -> Path:
    """Where an engine's answers lie. Engines whose labels differ in signs alone share a file."""
    path = Path(results)
    return path.with_name(f"{path.stem}-{spec.file_name}.answers.jsonl")


def find_answers(path: Path, wanted: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any] | None:
    """The newest record of answers to what is ``wanted``, of the commit and device of ``origin``.

    A machine without a GPU gives no answers on ``cuda``: there those of any GPU are taken.
    """
    records = read_records(path)
    for record in reversed(records):
        here = {**origin, "gpu": record["gpu"]} if wanted["device"] == "cuda" and not origin["gpu"] else origin
        if same_origin(record, here) and all(record.get(name) == value for name, value in wanted.items()):
            return record
    if records:
        say(f"{path}: its answers are of another commit than {origin['commit']}, another device, or other arguments")
    return None


def run_engine(spec: EngineSpec, questions: Sequence[Question], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Ask an engine everything; what is to be graded, in the order of the questions."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    prompts = [chat_prompt(tokenizer, question.text) for question in questions]
    engine = start_engine(spec.engine_args(args, args.concurrency))
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "max_new_tokens": args.max_new_tokens}
    outputs = engine.generate(input_ids=prompts, sampling_params=sampling)
    engine.shutdown()
    return [to_grade(output) for output in outputs]


def answers_of(
    spec: EngineSpec, questions: Sequence[Question], args: argparse.Namespace, load: dict[str, Any], origin: dict[str, Any]
) -> dict[str, Any]:
    """The record of an engine's answers: an earlier one, or else a new one, which is on disk when this returns."""
    wanted = {**load, **describe(spec, args)}
    path = answers_file(args.results, spec) if args.results else None
    found = find_answers(path, wanted, origin) if path else None
    if found is None:
        say(f"{spec.label}: {len(questions)} answers are generated")
        about, started = stamp(), time.perf_counter()
        answers = run_engine(spec, questions, args)
        seconds = round(time.perf_counter() - started, 1)
        found = {**about, **wanted, "kind": "answers", "seconds": seconds, "answers": answers}
        write_record(path, found)
    return found


# ----------------------------------------------------------------------------- main


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
    parser.add_argument("--generate-only", action="store_true", help="write the answers beside --results, and grade none")
    args = parser.parse_args(argv)
    if args.generate_only and not args.results:
        parser.error("--generate-only needs --results, beside which the answers lie")
    if not args.generate_only and importlib.util.find_spec("math_verify") is None:
        parser.error("answers are graded by math-verify, which is not installed: pip install 'sglang-sparsespec[bench]'")
    if simulated_accept_length("sparsespec"):
        parser.error("acceptance is SIMULATED (SGLANG_SIMULATE_ACC_LEN): its outputs are no answers")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given command line; 1 if answers were graded and accuracy differs by more than sampling error."""
    args = parse_arguments(argv)
    questions = [question for name in args.datasets for question in load_questions(name, args.questions)] * args.samples
    names = ("device", "temperature", "top_p", "max_new_tokens", "samples", "datasets", "concurrency")
    load = {"model": Path(args.model_path).name, "most_questions": args.questions, **{n: getattr(args, n) for n in names}}
    origin, origins = stamp(), {}
    outcomes: dict[str, list[dict[str, Any]]] = {}
    for spec in args.engines:
        found = answers_of(spec, questions, args, load, origin)
        # All engines that are compared are of one commit and device.
        origin = origins[spec.label] = {name: found[name] for name in origin}
        if args.generate_only:
            continue
        answers = found.pop("answers")
        grades = outcomes[spec.label] = [grade(*pair) for pair in zip(questions, answers, strict=True)]
        figures = summarise(grades)
        say(f"{spec.label}: {figures}")
        write_record(args.results, {**found, "kind": "grades", **figures, "grades": grades})
    if args.generate_only:
        return 0
    comparisons = compare_with_first(outcomes)
    for record in comparisons:
        write_record(args.results, {**origins[record["second_engine"]], **load, **record})
        print(f"{record['second_engine']} against {record['first_engine']}: {record['statement']}")
    return int(any(record["p_value"] < 0.05 for record in comparisons))


if __name__ == "__main__":
    sys.exit(main())
