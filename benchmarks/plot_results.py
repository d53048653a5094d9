"""Draws README's plot from a file of ``benchmarks/results``.

python benchmarks/plot_results.py   # writes docs/plots/readme.png
"""

from __future__ import annotations

import sys
from statistics import median
from typing import Any

from _common import REPO, pyplot, read_records

RESULTS = REPO / "benchmarks" / "results"
PLOT = REPO / "docs" / "plots" / "readme.png"
#: Loads of a later file take the place of those of an earlier one.
LOADS_FILES = (
    "2026-11-29-h200/throughput-twelve-loads-qwen2.5-coder-1.5b-48b05a3.jsonl",
    "2026-11-29-h200/throughput-four-loads-qwen2.5-coder-1.5b-d657e13.jsonl",
)
#: Engines in the records, their names in the plot, and colours.
PLAIN = "plain"
ENGINES = (
    ("sparsespec", "default settings", "#1f6fb4"),
    ("sparsespec,sparsespec_speculate=always", "every round speculates", "#9aa5b1"),
)


def speeds(records: list[dict[str, Any]]) -> dict[tuple[int, int, float], dict[str, float]]:
    """Median tokens per second by load (context, requests, temperature) and engine, by context."""
    samples: dict[tuple[int, int, float], dict[str, list[float]]] = {}
    for record in records:
        if record["kind"] == "sample":
            load = (int(record["dataset"].partition(":")[2]), record["batch"], record["temperature"])
            samples.setdefault(load, {}).setdefault(record["label"], []).append(record["tokens_per_s"])
    return {load: {engine: median(of) for engine, of in samples[load].items()} for load in sorted(samples)}


def main() -> int:
    """The program."""
    plt = pyplot()
    by_load: dict[tuple[int, int, float], dict[str, float]] = {}
    for name in LOADS_FILES:
        by_load |= speeds(read_records(RESULTS / name))
    found = dict(sorted(by_load.items()))
    figure, axes = plt.subplots(figsize=(10, 3.9), layout="constrained")
    width = 0.4
    for number, (engine, name, colour) in enumerate(ENGINES):
        ratios = [of[engine] / of[PLAIN] for of in found.values()]
        places = [place + (number - 0.5) * width for place in range(len(ratios))]
        bars = axes.bar(places, ratios, width, color=colour, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    names = [f"{batch} x\n{context:,}\nT {temperature:g}" for context, batch, temperature in found]
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_ylabel("tokens/s over plain SGLang's")
    axes.set_xlabel("requests x context, temperature")
    axes.set_ylim(0, 1.95)
    axes.axhline(1, color="#333333", linewidth=1, linestyle="--")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False, loc="upper left")
    axes.set_title("Qwen2.5-Coder-1.5B on one H200; dashed: plain SGLang with FlashAttention 3", fontsize=11)
    figure.savefig(PLOT, dpi=130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
