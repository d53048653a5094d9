"""Final answers of mathematics problems: found in an output, compared with the reference; and whether two sets of grades
differ by more than sampling does.

Numbers are graded, with roots, fractions, powers, logarithms and pi; an answer of several numbers is compared as a set.
Expressions with unknowns, tuples and intervals are not graded, so questions with such answers are left out.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

RELATIVE_TOLERANCE = 1e-6
LARGEST_EXPONENT = 1e4

# ---------------------------------------------------------------------- extraction


def boxed(text: str) -> str | None:
    r"""Contents of the last ``\boxed{...}`` (or ``\framebox{...}``) whose braces are closed."""
    for start in reversed([match.end() for match in re.finditer(r"\\(?:boxed|framebox)\s*\{", text)]):
        end = _closing_brace(text, start)
        if end is not None:
            return text[start:end]
    return None


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return None


def final_answer(text: str) -> str | None:
    """The answer that an output gives: boxed, or after "answer is", or its last number; None if there is none.

    What is thought aloud before ``</think>`` is not looked at.
    """
    text = text.rpartition("</think>")[2]
    found = boxed(text)
    if found is not None:
        return found
    stated = re.findall(r"(?i)answer\s*(?:is|:|=)\s*\**\s*(\$[^$]+\$|[-+\d][\d.,/]*)", text)
    if stated:
        return stated[-1].rstrip(".,")
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", text)
    return numbers[-1].rstrip(",") if numbers else None


# ---------------------------------------------------------------------- evaluation

_OPERATORS: dict[type[ast.AST], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Any] = {
    "sqrt": math.sqrt,
    "root": lambda n, x: x ** (1 / n),
    "ln": math.log,
    "log": math.log10,
    "logb": lambda base, x: math.log(x, base),
}
_NAMES = {"pi": math.pi}
_GROUP = r"\{([^{}]*)\}"


def number(text: str) -> float | None:
    """Value of an answer in LaTeX or plain text, or None if it is not a number."""
    try:
        return float(_evaluate(ast.parse(_to_python(text), mode="eval").body))
    except (SyntaxError, ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def _to_python(text: str) -> str:
    """LaTeX as a Python expression; what it does not know stays, and does not parse."""
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}", "", text.strip().strip("$"))
    text = re.sub(r"\\(?:textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right|displaystyle|[,;! ])|\^\s*(?:\\circ|\{\\circ\})|\\%|%|\\?\$", "", text)
    text = text.rpartition("=")[2].rstrip(". ")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text)
    text = text.replace("\\cdot", "*").replace("\\times", "*").replace("\\pi", " pi ").replace("\\ln", "ln")
    before = None
    while before != text:  # from the innermost braces outwards
        before = text
        text = re.sub(rf"\\frac\s*{_GROUP}\s*{_GROUP}", r"((\1)/(\2))", text)
        text = re.sub(rf"\\sqrt\s*\[(\d+)\]\s*{_GROUP}", r" root(\1,\2)", text)
        text = re.sub(rf"\\sqrt\s*{_GROUP}", r" sqrt(\1)", text)
        text = re.sub(rf"\^\s*{_GROUP}", r"**(\1)", text)
        text = re.sub(r"\\log\s*_\s*(?:\{(\d+)\}|(\d))\s*\(?([\d.]+)\)?", r" logb(\1\2,\3)", text)
    text = text.replace("^", "**").replace("\\log", "log")
    text = re.sub(r"\b(log|ln)\s+([\d.]+)", r"\1(\2)", text).strip()
    # Products that are written without a sign.
    text = re.sub(r"(?<=[\d)])\s*(?=[a-z(])", "*", text)
    return re.sub(r"(?<=\bpi)\s+(?=[\d(a-z])|(?<=\))\s*(?=\d)", "*", text)


def _evaluate(node: ast.AST) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.Name):
        return _NAMES[node.id]
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_evaluate(node.operand))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, exponent = float(_evaluate(node.left)), _evaluate(node.right)
        if abs(exponent) > LARGEST_EXPONENT:
            raise ValueError("exponent")
        return base**exponent
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _FUNCTIONS[node.func.id](*map(_evaluate, node.args))
    raise ValueError(ast.dump(node))


def numbers(text: str) -> list[float] | None:
    """Values of an answer that lists several numbers, sorted; None if one of them is not a number."""
    text = re.sub(r"\\text\s*\{\s*(?:and|or)\s*\}|\band\b|\bor\b", ",", text.replace("\\{", "").replace("\\}", ""))
    values = [number(part) for part in text.strip().strip("$").split(",") if part.strip(" $\\")]
    return None if any(value is None for value in values) else sorted(value for value in values if value is not None)


def same_answer(given: str | None, reference: str, several: bool = False, tolerance: float | None = None) -> bool:
    """Whether ``given`` is the reference answer.

    Args:
        several: the answer is a set of numbers.
        tolerance: absolute one; a relative one of 1e-6 otherwise.
    """
    if given is None:
        return False
    if several:
        left, right = numbers(given), numbers(reference)
    else:
        one, other = number(given), number(reference)
        left, right = (None if one is None else [one]), (None if other is None else [other])
    if left is None or right is None or len(left) != len(right):
        return False
    return all(_close(a, b, tolerance) for a, b in zip(left, right, strict=True))


def _close(left: float, right: float, tolerance: float | None) -> bool:
    if tolerance is not None:
        return abs(left - right) <= tolerance
    return math.isclose(left, right, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-9)


# ------------------------------------------------------------------------ comparison


@dataclass(frozen=True)
class Comparison:
    """Grades of the same questions under two engines.

    Attributes:
        only_first, only_second: questions that only one of them answered correctly.
        p_value: of McNemar's exact test, two-sided: how often such a split, or a more uneven one, comes from two equal
            engines.
        difference: accuracy of the second less that of the first; ``low``, ``high``: its 95% interval (Agresti and Min,
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
        if self.p_value < 0.05:
            return f"accuracy differs by more than sampling error (McNemar p = {self.p_value:.3f}; {interval})"
        return f"accuracy is the same within sampling error (McNemar p = {self.p_value:.3f}; {interval})"

    def row(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {**asdict(self), "statement": self.statement}


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test."""
    total = only_first + only_second
    tail = sum(math.comb(total, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**total)


def compare(first: Sequence[bool], second: Sequence[bool]) -> Comparison:
    """Compare the grades of the same questions, in the same order.

    Raises:
        ValueError: there are none, or not equally many.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"grades of the same questions are needed, got {len(first)} and {len(second)}")
    total = len(first)
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    # The interval of Agresti and Min (2005), half an answer added to each kind: few splits do not make it vanish.
    padded, shift = total + 2, only_second - only_first
    middle = shift / padded
    error = 1.96 * math.sqrt(only_first + only_second + 1 - shift**2 / padded) / padded
    return Comparison(
        total,
        sum(first) / total,
        sum(second) / total,
        only_first,
        only_second,
        mcnemar(only_first, only_second),
        shift / total,
        max(-1.0, middle - error),
        min(1.0, middle + error),
    )
