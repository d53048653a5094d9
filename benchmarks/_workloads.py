"""Prompts of the benchmarks, and what an output says about itself (repetition).

Two kinds of workload:

- questions as they are asked: ``aime`` and ``olympiadbench`` (``data/``), in the tokenizer's chat template if it has one;
- prompts cut to a number of tokens from a corpus: ``math``, OlympiadBench problems one after the other, then the request
  to solve one; ``code``, installed Python standard library sources, to be continued with a summary. ``code`` is in the
  style of LiveCodeBench's code-reading tasks, is not one of them, and depends on the installed Python.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent / "data"
#: Data files of questions, and the key of the question in each line.
QUESTIONS = {"aime": ("aime24.jsonl", "problem"), "olympiadbench": ("olympiadbench.jsonl", "question")}
CORPORA = ("math", "code")
INSTRUCTION = "\n\nReason step by step, and put the final answer within \\boxed{}."
NGRAM = 8
#: Below this share of distinct n-grams an output counts as repeating itself.
LEAST_DISTINCT = 0.5


def read_data(name: str) -> list[dict[str, Any]]:
    """The lines of one question file."""
    return [json.loads(line) for line in (DATA / QUESTIONS[name][0]).read_text().splitlines()]


def questions(name: str) -> list[str]:
    """The questions of ``aime`` or ``olympiadbench``."""
    return [row[QUESTIONS[name][1]] for row in read_data(name)]


def corpus(name: str, index: int) -> tuple[str, str]:
    """Text to cut a prompt from, and what follows the cut."""
    if name == "code":
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        files = files[index * 3 % len(files) :] + files
        text = "\n\n".join(f"# {path.name}\n{path.read_text(errors='replace')}" for path in files[:60])
        return text, "\n\n# A summary of the functions above, each with what it returns:\n"
    asked = questions("olympiadbench")
    asked = asked[index * 37 % len(asked) :] + asked
    text = "\n\n".join(f"Problem {i + 1}. {question}" for i, question in enumerate(asked))
    return text, "\n\nA detailed solution of Problem 1, step by step.\n\nSolution:"


def make_prompts(tokenizer: Any, corpora: Sequence[str], context: int, count: int) -> list[list[int]]:
    """``count`` prompts of ``context`` tokens, the corpora in turn.

    Raises:
        ValueError: a corpus is too short for that.
    """
    prompts = []
    for index in range(count):
        text, ending = corpus(corpora[index % len(corpora)], index // len(corpora))
        tail = tokenizer(ending, add_special_tokens=False).input_ids
        head = tokenizer(text[: 8 * context], add_special_tokens=False).input_ids
        if len(head) + len(tail) < context:
            raise ValueError(f"the corpus {corpora[index % len(corpora)]} has no {context} tokens; use a shorter context")
        prompts.append(head[: context - len(tail)] + tail)
    return prompts


def random_prompts(context: int, count: int) -> list[list[int]]:
    """Random token ids, for dummy weights; the same in every run."""
    generator = random.Random(0)
    return [[generator.randrange(1000, 30000) for _ in range(context)] for _ in range(count)]


def chat_prompt(tokenizer: Any, question: str) -> str:
    """A question as the model is asked it: in its chat template, or as plain text if it has none."""
    text = question + INSTRUCTION
    if not getattr(tokenizer, "chat_template", None):
        return text + "\n\nSolution:"
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)


def question_prompts(tokenizer: Any, name: str, count: int) -> list[list[int]]:
    """``count`` prompts of a question file; from the start again where it has fewer."""
    asked = questions(name)
    templated = bool(getattr(tokenizer, "chat_template", None))
    texts = [chat_prompt(tokenizer, asked[index % len(asked)]) for index in range(count)]
    # A template writes the special tokens itself.
    return [tokenizer(text, add_special_tokens=not templated).input_ids for text in texts]


@dataclass(frozen=True)
class Dataset:
    """A workload: ``aime``, ``olympiadbench``, or ``code:TOKENS``, ``math:TOKENS``, ``random:TOKENS``.

    Attributes:
        context: prompt length in tokens, None for questions as they are.
    """

    name: str
    context: int | None = None

    @classmethod
    def parse(cls, text: str) -> Dataset:
        """From its text form.

        Raises:
            ValueError: no such dataset, or a length where there is none, or none where one is needed.
        """
        name, _, length = text.partition(":")
        if name in QUESTIONS and not length:
            return cls(name)
        if name in (*CORPORA, "random") and length.isdigit() and int(length) > 0:
            return cls(name, int(length))
        forms = ", ".join([*QUESTIONS, *(f"{corpus}:TOKENS" for corpus in (*CORPORA, "random"))])
        raise ValueError(f"dataset {text!r}: expected one of {forms}")

    def __str__(self) -> str:
        return self.name if self.context is None else f"{self.name}:{self.context}"

    def prompts(self, tokenizer: Any, count: int) -> list[list[int]]:
        """``count`` prompts as token ids; ``tokenizer`` is not used for ``random``."""
        if self.context is None:
            return question_prompts(tokenizer, self.name, count)
        if self.name == "random":
            return random_prompts(self.context, count)
        return make_prompts(tokenizer, [self.name], self.context, count)


def distinct_share(tokens: Sequence[Any]) -> float:
    """Share of distinct 8-grams among all 8-grams of an output: 1.0 if none repeats."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
