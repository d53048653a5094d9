"""Draws README's plot from files of ``benchmarks/results``.

    python benchmarks/plot_results.py   # writes docs/plots/readme.png
"""

from __future__ import annotations

import sys
from statistics import median
from typing import Any

from _common import REPO, pyplot, read_records

RESULTS = REPO / "benchmarks" / "results"
PLOT = REPO / "docs" / "plots" / "readme.png"
LOADS_FILE = "2026-11-25-h100/run-schedules-qwen2.5-coder-1.5b-1e875a9.jsonl"
LARGEST_FILE = "2026-11-25-h100/throughput-qwen2.5-coder-1.5b-fbcdd84.jsonl"
RIVALS_FILE = "2026-11-27-h100/run-rivals-qwen2.5-coder-1.5b-d090498.jsonl"
PLAIN = "plain:flashinfer"
#: Engines of the right panel: name in the records, name in the plot, colour.
RIVALS = (
    ("sparsespec", "SPARSESPEC (default: speculate auto)", "#1f6fb4"),
    ("standalone", "STANDALONE (0.5B draft model)", "#9aa5b1"),
    ("ngram", "NGRAM", "#c9d1d9"),
)
WORKLOADS = (("code:8192", 36, "36 x 8,192 code"), ("aime", 72, "72 AIME"), ("olympiadbench", 72, "72 OlympiadBench"))


def speed(records: list[dict[str, Any]], **facts: Any) -> float:
    """Median tokens per second of the records with these values."""
    found = [record["tokens_per_s"] for record in records if facts.items() <= record.items() and "tokens_per_s" in record]
    if not found:
        raise SystemExit(f"no record has {facts}")
    return median(found)


def label(axes: Any, bars: Any) -> None:
    """Write each bar's value above it."""
    axes.bar_label(bars, fmt="%.2f", fontsize=9, padding=2)


def draw_loads(axes: Any) -> None:
    """Every round speculates: where that pays."""
    records, largest = read_records(RESULTS / LOADS_FILE), read_records(RESULTS / LARGEST_FILE)
    names, ratios = [], []
    for context, batch in ((1024, 256), (2048, 128), (8192, 32), (4096, 64)):
        load = {"dataset": f"code:{context}", "batch": batch, "temperature": 0.0}
        names.append(f"{batch} x\n{context:,}")
        ratios.append(speed(records, label="lock-step", **load) / speed(records, label=PLAIN, **load))
    load = {"context": 8192, "batch": 224, "temperature": 0.0}
    names.append("224 x\n8,192")
    ratios.append(speed(largest, engine="sparsespec", **load) / speed(largest, engine=PLAIN, **load))
    label(axes, axes.bar(names, ratios, color=["#1f6fb4" if ratio > 1 else "#c06060" for ratio in ratios], width=0.65))
    axes.set_title("Every round speculates, greedy, 512 new tokens", fontsize=10)
    axes.set_xlabel("requests x context")
    axes.set_ylabel("tokens/s over plain decoding's")
    axes.set_ylim(0, 2.4)


def draw_rivals(axes: Any) -> None:
    """The default beside SGLang's own speculation."""
    records = read_records(RESULTS / RIVALS_FILE)
    width = 0.26
    for number, (engine, name, colour) in enumerate(RIVALS):
        ratios = [
            speed(records, label=engine, dataset=dataset, batch=batch)
            / speed(records, label=PLAIN, dataset=dataset, batch=batch)
            for dataset, batch, _ in WORKLOADS
        ]
        places = [place + (number - 1) * width for place in range(len(WORKLOADS))]
        label(axes, axes.bar(places, ratios, width, color=colour, label=name))
    axes.set_xticks(range(len(WORKLOADS)), [name for _, _, name in WORKLOADS])
    axes.set_title("Default settings, temperature 0.6, whole runs", fontsize=10)
    axes.set_ylim(0, 1.85)
    axes.legend(fontsize=8, frameon=False, loc="upper right")


def main() -> int:
    """The program."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
    draw_loads(axes[0])
    draw_rivals(axes[1])
    for panel in axes:
        panel.axhline(1, color="#333333", linewidth=1, linestyle="--")
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Qwen2.5-Coder-1.5B on one H100; dashed: plain SGLang with FlashInfer decoding", fontsize=11)
    figure.savefig(PLOT, dpi=130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
