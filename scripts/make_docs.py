"""Writes the generated tables of ``docs/operations.md``: flags from ``settings.py``, metrics from ``metrics.py``.

    python scripts/make_docs.py           # write them
    python scripts/make_docs.py --check   # exit status 1 if the page is not current

A table stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import generated_parts
from generated_parts import markdown_table

from sglang_sparsespec import ALGORITHM, metrics
from sglang_sparsespec.settings import FLAGS, default_by_policy, flag_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "operations.md"

#: SGLang's own flags that mean something of their own here: flag, default, meaning.
SGLANG_FLAGS = (
    (f"--speculative-algorithm {ALGORITHM}", "", "Turns it on."),
    (
        "--speculative-num-steps",
        default_by_policy("num_steps"),
        "k, the tokens that a round drafts. --speculative-num-draft-tokens, which is k + 1, may be given instead. By "
        "default one fewer where a KV head has 8, 15, 16 or 29 to 32 query heads: the verify kernel would need tiles twice "
        "as wide.",
    ),
    (
        "--enable-mixed-chunk",
        "off",
        "Requests go on decoding while others are prefilled: prefill batches and decode rounds take turns. A long prompt "
        "does not stop the others, at the price of a later first token of its own.",
    ),
)


def flag_table() -> str:
    """Every flag with its default and its help."""
    own = [(flag_of(name), facts["shown_default"], facts["help"]) for name, facts in FLAGS.items()]
    rows = [(f"`{flag}`", default, meaning) for flag, default, meaning in (*SGLANG_FLAGS, *own)]
    return markdown_table(["flag", "default", "meaning"], rows)


def metric_table() -> str:
    """Every metric of the plugin."""
    return markdown_table(
        ["metric", "kind", "meaning"], [(f"`{name}`", kind, meaning) for name, kind, meaning in metrics.describe()]
    )


TABLES: dict[str, Callable[[], str]] = {"flags": flag_table, "metrics": metric_table}


def filled(text: str) -> str:
    """``text`` with every table made anew.

    Raises:
        ValueError: a table has no place in it, or more than one.
    """
    return generated_parts.filled(text, {name: make() for name, make in TABLES.items()})


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    text = PAGE.read_text(encoding="utf-8")
    new = filled(text)
    if new == text:
        return 0
    if args.check:
        print(f"docs/{PAGE.name} is not current: run python scripts/make_docs.py", file=sys.stderr)
        return 1
    PAGE.write_text(new, encoding="utf-8")
    print(f"docs/{PAGE.name} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
