"""Step time and tokens of each forward over time, lock-step's beside the unified schedule's, as an SVG.

    SPARSESPEC_FORWARD_TRACE=lockstep.jsonl python -m sglang.launch_server ... --sparsespec-schedule lockstep
    SPARSESPEC_FORWARD_TRACE=unified.jsonl  python -m sglang.launch_server ... --sparsespec-schedule unified
    (the same load on both)
    python benchmarks/plot_schedule.py lockstep.jsonl unified.jsonl --output schedule.svg --results schedule.jsonl

A trace has one JSON line per decode forward (``sglang_sparsespec/forward_stats.py``). Means and
variations are those of the steady state, by default the middle of the trace: the first fifth, in which
requests arrive, and the last, in which they end, are left out. The picture shows ``--show-ms`` of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any
from xml.sax.saxutils import escape

from _common import append_json_line

WIDTH, PANEL, MARGIN, GAP = 960, 200, 64, 44
COLOURS = ("#c0392b", "#2060b0", "#3a8a3a", "#8e44ad")


@dataclass(frozen=True)
class Trace:
    """Forwards of one run, in order.

    Attributes:
        at_ms, ms: when each began, and how long it took until the next began.
        tokens, verify_tokens: what it took, and its part in verify windows.
    """

    name: str
    at_ms: list[float]
    ms: list[float]
    tokens: list[int]
    verify_tokens: list[int]

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read a JSON-lines trace.

        Raises:
            ValueError: it has no forwards.
        """
        records = [json.loads(line) for line in path.read_text().splitlines()]
        if not records:
            raise ValueError(f"{path} has no forwards; was the server started with SPARSESPEC_FORWARD_TRACE={path}?")
        return cls(
            path.stem,
            [record["at_ms"] for record in records],
            [record["ms"] for record in records],
            [record["draft_tokens"] + record["verify_tokens"] for record in records],
            [record["verify_tokens"] for record in records],
        )

    def between(self, begin_ms: float, end_ms: float) -> Trace:
        """The forwards that began in [begin, end), with times from ``begin`` on."""
        kept = [i for i, at in enumerate(self.at_ms) if begin_ms <= at < end_ms]
        return Trace(
            self.name,
            [self.at_ms[i] - begin_ms for i in kept],
            [self.ms[i] for i in kept],
            [self.tokens[i] for i in kept],
            [self.verify_tokens[i] for i in kept],
        )

    def steady(self, skip: float) -> Trace:
        """Without the first and the last ``skip`` of its time."""
        length = self.at_ms[-1] + self.ms[-1]
        return self.between(skip * length, (1 - skip) * length)

    def summary(self) -> dict[str, Any]:
        """Means and coefficients of variation."""
        return {
            "schedule": self.name,
            "forwards": len(self.ms),
            "tokens": round(fmean(self.tokens), 1),
            "tokens_variation": round(variation(self.tokens), 4),
            "step_ms": round(fmean(self.ms), 3),
            "step_ms_variation": round(variation(self.ms), 4),
            "verify_share": round(sum(self.verify_tokens) / sum(self.tokens), 4),
            "tokens_per_ms": round(sum(self.tokens) / sum(self.ms), 2),
        }


def variation(values: list[float] | list[int]) -> float:
    """Coefficient of variation."""
    return pstdev(values) / fmean(values)


def staircase(trace: Trace, values: list[float] | list[int], x_of: float, y_of: float, bottom: float) -> str:
    """SVG points: each forward's value for as long as it lasted; ``x_of``, ``y_of`` in pixels per unit."""
    points = []
    for at, ms, value in zip(trace.at_ms, trace.ms, values, strict=True):
        y = bottom - value * y_of
        points += [f"{MARGIN + at * x_of:.2f},{y:.2f}", f"{MARGIN + (at + ms) * x_of:.2f},{y:.2f}"]
    return " ".join(points)


def draw(traces: list[Trace], show_ms: float) -> str:
    """The picture: a panel of step times over one of tokens."""
    shown = [trace.between(0, show_ms) for trace in traces]
    panels: list[tuple[str, list[list[Any]]]] = [
        ("step time (ms)", [trace.ms for trace in shown]),
        ("tokens per forward", [trace.tokens for trace in shown]),
    ]
    inner = WIDTH - 2 * MARGIN
    height = len(panels) * (PANEL + GAP) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{height}" fill="white"/>'
    ]
    for index, (title, rows) in enumerate(panels):
        top = GAP + index * (PANEL + GAP)
        bottom = top + PANEL
        highest = max(max(values) for values in rows)
        parts.append(
            f'<text x="{MARGIN}" y="{top - 8}">{title}</text>'
            f'<path d="M{MARGIN},{top}V{bottom}H{MARGIN + inner}" fill="none" stroke="#888"/>'
            f'<text x="{MARGIN - 6}" y="{top + 4}" text-anchor="end">{highest:.4g}</text>'
            f'<text x="{MARGIN - 6}" y="{bottom + 4}" text-anchor="end">0</text>'
        )
        for trace, values, colour in zip(shown, rows, COLOURS, strict=False):
            points = staircase(trace, values, inner / show_ms, PANEL / highest, bottom)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-opacity="0.8"/>')
    end = height - MARGIN
    parts.append(f'<text x="{MARGIN + inner}" y="{end + 4}" text-anchor="end">{show_ms:.0f} ms</text>')
    for index, (trace, colour) in enumerate(zip(traces, COLOURS, strict=False)):
        text = "{schedule}: {tokens} tokens per forward (variation {tokens_variation:.1%}), {step_ms} ms (variation "
        legend = escape((text + "{step_ms_variation:.1%})").format(**trace.summary()))
        parts.append(f'<text x="{MARGIN}" y="{end + 18 * (index + 1)}" fill="{colour}">{legend}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path, help="traces; their file names without suffix are the labels")
    parser.add_argument("--output", type=Path, required=True, help="SVG to write")
    parser.add_argument("--skip", type=float, default=0.2, help="share of time left out at either end")
    parser.add_argument("--show-ms", type=float, default=0, help="time that the picture shows (0: 40 forwards)")
    parser.add_argument("--results", help="JSON-lines file to append the summaries to")
    args = parser.parse_args()
    if len(args.traces) > len(COLOURS):
        parser.error(f"at most {len(COLOURS)} traces")
    traces = [Trace.read(path).steady(args.skip) for path in args.traces]
    for trace in traces:
        if not trace.ms:
            parser.error(f"{trace.name} is too short: no forward is left in its steady state; use a smaller --skip")
        print(append_json_line(args.results, trace.summary()))
    show_ms = args.show_ms or max(sum(trace.ms[:40]) for trace in traces)
    args.output.write_text(draw(traces, show_ms))
    return 0


if __name__ == "__main__":
    sys.exit(main())
