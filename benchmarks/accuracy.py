"""Accuracy on AIME and OlympiadBench, with and without SPARSESPEC: the same within sampling error?

    python benchmarks/accuracy.py --model-path M --engines plain:flashinfer sparsespec --datasets aime olympiadbench \
        --temperature 0.6 --max-new-tokens 16384 --results accuracy.jsonl

Questions with numeric answers are asked in the chat template (all of AIME, 288 of OlympiadBench's 338), final answers are
graded (``_grading.py``), and every engine is compared with the first one by McNemar's exact test over the same questions.
Written: a JSON line per engine with every grade, and a line per comparison. An output that is cut by
``--max-new-tokens`` is graded as it is; their number is reported.

Lossless decoding gives equal accuracy by construction. This finds gross errors; it cannot prove equality, and says how
large a difference it could have missed (the 95% interval).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import append_json_line, say, stamp
from _grading import compare, final_answer, same_answer
from _workloads import LEAST_DISTINCT, QUESTIONS, chat_prompt, distinct_share, read_data
from throughput import engine_arguments

from sglang_sparsespec.cpu_bridge import CPU_BRIDGE_ENV


@dataclass(frozen=True)
class Question:
    """A question with a numeric answer.

    Attributes:
        several: the answer is a set of numbers.
        tolerance: absolute one that the data set allows, or None.
    """

    name: str
    text: str
    answer: str
    several: bool = False
    tolerance: float | None = None


def load_questions(dataset: str, most: int | None = None) -> list[Question]:
    """The graded questions of ``aime`` or ``olympiadbench``, the first ``most`` of them."""
    rows = read_data(dataset)
    if dataset == "aime":
        found = [Question(f"aime/{row['id']}", row["problem"], row["answer"]) for row in rows]
    else:
        found = [
            Question(
                f"olympiadbench/{row['id']}",
                row["question"],
                row["final_answer"][0],
                row["is_multiple_answer"],
                float(row["error"]) if row["error"] else None,
            )
            for row in rows
            if row["answer_type"] == "Numerical"
        ]
    # Some answers that are called numerical have unknowns in them.
    return [item for item in found if same_answer(item.answer, item.answer, item.several)][:most]


def grade(question: Question, output: dict[str, Any]) -> dict[str, Any]:
    """One output's grade."""
    answer = final_answer(output["text"])
    return {
        "question": question.name,
        "answer": answer,
        "correct": same_answer(answer, question.answer, question.several, question.tolerance),
        "tokens": output["meta_info"]["completion_tokens"],
        "cut": output["meta_info"]["finish_reason"]["type"] == "length",
        "repeats_itself": distinct_share(output["output_ids"]) < LEAST_DISTINCT,
    }


def run_engine(name: str, questions: list[Question], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Ask an engine everything; grades in the order of the questions."""
    import sglang
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    prompts = [chat_prompt(tokenizer, question.text) for question in questions]
    templated = bool(getattr(tokenizer, "chat_template", None))
    ids = [tokenizer(prompt, add_special_tokens=not templated).input_ids for prompt in prompts]
    engine = sglang.Engine(**engine_arguments(name, args.concurrency, args, speculate="always"))
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "max_new_tokens": args.max_new_tokens}
    outputs = engine.generate(input_ids=ids, sampling_params=sampling)
    engine.shutdown()
    return [grade(question, output) for question, output in zip(questions, outputs, strict=True)]


def summarise(grades: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one engine."""
    return {
        "questions": len(grades),
        "accuracy": round(sum(row["correct"] for row in grades) / len(grades), 4),
        "no_answer": sum(row["answer"] is None for row in grades),
        "cut": sum(row["cut"] for row in grades),
        "repetitive_outputs": sum(row["repeats_itself"] for row in grades),
        "output_tokens": sum(row["tokens"] for row in grades),
        "grades": grades,
    }


def compare_with_first(outcomes: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A record for every engine but the first."""
    first, *others = outcomes
    correct = {name: [row["correct"] for row in grades] for name, grades in outcomes.items()}
    return [
        {
            "kind": "comparison",
            "first_engine": first,
            "second_engine": other,
            **compare(correct[first], correct[other]).row(),
        }
        for other in others
    ]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--engines", nargs="+", default=["plain:flashinfer", "sparsespec"])
    parser.add_argument("--datasets", nargs="+", choices=sorted(QUESTIONS), default=["aime", "olympiadbench"])
    parser.add_argument("--questions", type=int, help="at most so many of each data set (default: all)")
    parser.add_argument("--samples", type=int, default=1, help="answers to each question")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--max-new-tokens", type=int, default=8192)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prefill-backend", default="triton")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--engine-args", default="{}", help="JSON object of further sglang.Engine arguments")
    parser.add_argument("--log-level", default="warning")
    parser.add_argument("--results", help="JSON-lines file to append to")
    parser.set_defaults(load_format="auto", random_prompts=False)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run with the given command line; 1 if accuracy differs by more than sampling error."""
    args = parse_arguments(argv)
    if args.device == "cpu":
        os.environ[CPU_BRIDGE_ENV] = "1"  # plain SGLang needs it too on a processor without AMX
    questions = [question for name in args.datasets for question in load_questions(name, args.questions)] * args.samples
    settings = {name: getattr(args, name) for name in ("temperature", "top_p", "max_new_tokens", "samples", "datasets", "k")}
    about = {**stamp(), "model": Path(args.model_path).name, **settings}
    outcomes = {}
    for name in args.engines:
        started = time.perf_counter()
        outcomes[name] = run_engine(name, questions, args)
        record = {**about, "kind": "grades", "engine": name, **summarise(outcomes[name])}
        append_json_line(args.results, {**record, "seconds": round(time.perf_counter() - started, 1)})
        shown = {key: value for key, value in summarise(outcomes[name]).items() if key != "grades"}
        say(f"{name}: {shown}")
    comparisons = compare_with_first(outcomes)
    for record in comparisons:
        append_json_line(args.results, {**about, **record})
        print(f"{record['second_engine']} against {record['first_engine']}: {record['statement']}")
    return 1 if any(record["p_value"] < 0.05 for record in comparisons) else 0


if __name__ == "__main__":
    sys.exit(main())
