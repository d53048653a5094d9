"""Parts of pages that a program writes: each stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int | None = None) -> str:
    """Rows of cells as Markdown; the first ``texts`` columns hold words (None: all do), the others numbers."""
    rule = ["---" if texts is None or place < texts else "---:" for place in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def filled(text: str, parts: Mapping[str, str]) -> str:
    """``text`` with every one of ``parts`` in its place.

    Raises:
        ValueError: a part has no place in it, or more than one.
    """
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if (count := len(place.findall(text))) != 1:
            raise ValueError(f"{begin} ... {end} stands {count} times in the page; it must stand there once")
        block = f"{begin}\n{part}\n{end}"
        text = place.sub(lambda match, block=block: block, text)  # type: ignore[misc]
    return text
