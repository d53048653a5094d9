"""The generated parts of ``docs/``: tables from the result files, and the performance model's.

    python benchmarks/make_docs.py           # write them
    python benchmarks/make_docs.py --check   # exit status 1 if they are not what the files give

In ``docs/benchmarks.md`` a table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``;
``docs/performance-model.md`` is written whole. So every number there comes from a file of ``results/``, or from the model,
which says so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import model
from _common import REPO, markdown_table

from sglang_sparsespec import perf_model
from sglang_sparsespec.advise import LABEL

RESULTS = model.RESULTS
DOCS = REPO / "docs"


def read(path: str) -> list[dict[str, Any]]:
    """The records of a results file."""
    return [json.loads(line) for line in (RESULTS / path).read_text().splitlines()]


def throughput() -> str:
    """Every record of ``throughput.py``."""
    rows = []
    for path in sorted(RESULTS.glob("*/throughput-*.jsonl")):
        for record in read(str(path.relative_to(RESULTS))):
            accepted = record["accept_length"]
            simulated = record.get("simulated_accept_length")
            rows.append(
                [
                    record["model"],
                    record["engine"],
                    f"{record['batch']} x {record['context']:,}",
                    record["new_tokens"],
                    f"{record['temperature']:g}",
                    f"{record['tokens_per_s']:,.0f}",
                    ", ".join(f"{seconds:.2f}" for seconds in record["decode_s"]),
                    f"{accepted:.2f}{' (SIMULATED)' if simulated else ''}" if accepted else None,
                    f"{record['repetitive_prompts']} of {record['batch']}",
                    f"`{path.relative_to(RESULTS)}`",
                ]
            )
    headers = ["model", "engine", "requests x context", "new tokens", "temperature", "tokens/s", "s a run", "accept length"]
    return markdown_table([*headers, "repeating outputs", "file"], rows, right=range(3, 8))


def accept_length() -> str:
    """Every record of ``accept_length.py``."""
    rows = []
    for path in sorted(RESULTS.glob("*/accept-length-*.jsonl")):
        for record in read(str(path.relative_to(RESULTS))):
            rows.append(
                [
                    record["model"],
                    record["device"],
                    record["policy"],
                    record["context"],
                    f"{record['temperature']:g}",
                    f"{record['accept_length']:.2f}",
                    f"{record['accept_length_not_repetitive']:.2f}" if record["accept_length_not_repetitive"] else None,
                    f"{record['repetitive_prompts']} of {record['prompts']}",
                    f"`{path.relative_to(RESULTS)}`",
                ]
            )
    headers = ["model", "device", "policy", "context", "temperature", "accept length", "(not repeating)"]
    return markdown_table([*headers, "repeating outputs", "file"], rows, right=range(3, 7))


def smoke() -> str:
    """The CPU run of ``run.py``."""
    from _report import aggregate, table

    return table(aggregate(read("2026-11-25-cpu/run-smoke-cpu.jsonl")))


def runs(pattern: str) -> str:
    """The results of ``run.py`` in files like ``pattern``, and what it could not run."""
    from _report import aggregate, latest_not_run, not_run_table, table

    paths = sorted(RESULTS.glob(pattern))
    records = [record for path in paths for record in read(str(path.relative_to(RESULTS)))]
    parts = [table(aggregate(record for record in records if record["kind"] == "sample"))]
    parts.append("Files: " + ", ".join(f"`{path.relative_to(RESULTS)}`" for path in paths) + ".")
    if missing := [record for record in latest_not_run(records) if "time limit" not in record["reason"]]:
        parts.append("Not run:\n\n" + not_run_table(missing))
    return "\n\n".join(parts)


def crossover() -> str:
    """Shortest contexts that pay, one H100."""
    rows: list[list[Any]] = []
    for name in model.MODELS:
        setup = perf_model.Setup(perf_model.find_model(name), perf_model.GPUS["h100"], 1, 1)
        if setup.kv_capacity:
            rows.append([name, *model.crossover_cells(setup)])
    return f"On one H100 ({LABEL}):\n\n" + markdown_table(
        ["model", *(f"batch {batch}" for batch in model.CROSSOVER_BATCHES)], rows, right=range(1, 6)
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "throughput": throughput,
    "accept-length": accept_length,
    "smoke-cpu": smoke,
    "rivals": partial(runs, "2026-11-27-h100/run-rivals-*.jsonl"),
    "speculate": partial(runs, "2026-11-27-h200/run-speculate-*.jsonl"),
    "policies": partial(runs, "*/run-policies-*.jsonl"),
    "schedules": partial(runs, "*/run-schedules-*.jsonl"),
    "crossover": crossover,
}


def filled(text: str) -> str:
    """The page with every block made anew.

    Raises:
        ValueError: a block of the page, or of this program, is not in the other.
    """
    found = re.findall(r"<!-- begin ([\w-]+) -->\n.*?<!-- end \1 -->", text, flags=re.DOTALL)
    if sorted(found) != sorted(BLOCKS):
        raise ValueError(f"the page has the blocks {sorted(found)}, this program makes {sorted(BLOCKS)}")

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- begin {name} -->\n{BLOCKS[name]()}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin ([\w-]+) -->\n.*?<!-- end \1 -->", block, text, flags=re.DOTALL)


def pages() -> dict[Path, str]:
    """What the generated pages should hold."""
    page = DOCS / "benchmarks.md"
    return {page: filled(page.read_text()), DOCS / "performance-model.md": model.page()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(path.relative_to(REPO), "is not current: run python benchmarks/make_docs.py" if args.check else "written")
    if args.check:
        return 1 if stale else 0
    for path, text in pages().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
