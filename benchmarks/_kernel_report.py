"""From timed rows to the tables: pure arithmetic, no GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from _common import markdown_table
from _kernel_problem import DRAFT_TOKENS, TOKENS_PER_ROUND

GOAL_DRAFT_SHARE = 0.70
GOAL_DRAFT_SPEEDUP = 8.0
GOAL_SPEEDUP_CONTEXT = 32768
GOAL_VERIFY_RATIO = 1.15
GOAL_SELECT_SHARE = 0.10
GOAL_ROUND = 4.5


def round_speedup(decode_ms: float, draft_ms: float, verify_and_select_ms: float) -> float:
    """Attention time of plainly decoding a round's tokens over that of the round, one layer."""
    return TOKENS_PER_ROUND * decode_ms / (DRAFT_TOKENS * draft_ms + verify_and_select_ms)


def bandwidth(row: dict[str, Any]) -> float:
    """Bytes per second of one row."""
    return row["bytes"] / (row["ms"] * 1e-3)


@dataclass
class Summary:
    """One unit's figures; None where a part was not measured.

    ``copy_*`` are of a contiguous copy of as many bytes as draft attention moves, ``copy_round`` what the round would be
    if draft attention took no longer than that: small copies do not reach the bandwidth of large ones either.
    """

    unit: dict[str, Any]
    draft_us: float | None = None
    draft_share: float | None = None
    draft_speedup: float | None = None
    copy_us: float | None = None
    copy_share: float | None = None
    copy_round: float | None = None
    decode_best: str | None = None
    decode_ms: float | None = None
    decode_share: float | None = None
    full_best: str | None = None
    full_ms: float | None = None
    verify_ms: float | None = None
    verify_ratio: float | None = None
    select_us: float | None = None
    select_share: float | None = None
    round: float | None = None

    def missed(self) -> list[str]:
        """Goals this unit misses, and those that could not be judged (with a question mark)."""
        checks: list[tuple[str, float | None, bool]] = [
            ("bandwidth", self.draft_share, (self.draft_share or 0) >= GOAL_DRAFT_SHARE),
            ("verify", self.verify_ratio, (self.verify_ratio or math.inf) <= GOAL_VERIFY_RATIO),
            ("select", self.select_share, (self.select_share or math.inf) <= GOAL_SELECT_SHARE),
            ("round", self.round, (self.round or 0) >= GOAL_ROUND),
        ]
        if self.unit["context"] >= GOAL_SPEEDUP_CONTEXT:
            checks.insert(1, ("speedup", self.draft_speedup, (self.draft_speedup or 0) >= GOAL_DRAFT_SPEEDUP))
        return [name if value is not None else f"{name}?" for name, value, met in checks if not met]


def usable(row: dict[str, Any]) -> bool:
    """Whether a row was timed and its result was right."""
    return row.get("kind") == "row" and not row.get("wrong") and bool(row.get("ms"))


def best(rows: Iterable[dict[str, Any]], what: str, names: Sequence[str]) -> dict[str, Any] | None:
    """The fastest usable row of kind ``what`` among ``names``."""
    found = [r for r in rows if r["what"] == what and r["name"] in names]
    return min(found, key=lambda r: r["ms"]) if found else None


def summarize_unit(
    rows: Sequence[dict[str, Any]], copy_bytes_per_s: float | None, baselines: Mapping[str, Sequence[str]]
) -> Summary:
    """Figures of one unit from its rows."""
    good = [row for row in rows if usable(row)]
    unit = {name: rows[0][name] for name in ("unit", "shape", "batch", "context", "layout")}
    summary = Summary(unit)

    def one(what: str, name: str) -> dict[str, Any] | None:
        return best(good, what, (name,))

    decode = best(good, "decode", baselines["decode"])
    full = best(good, "verify", baselines["verify"])
    draft, copy = one("draft", "pillar"), one("copy", "torch")
    verify, select, both = one("verify", "pillar"), one("select", "pillar"), one("verify+select", "pillar")
    if decode:
        summary.decode_best, summary.decode_ms = decode["name"], decode["ms"]
        if copy_bytes_per_s:
            summary.decode_share = bandwidth(decode) / copy_bytes_per_s
    if full:
        summary.full_best, summary.full_ms = full["name"], full["ms"]
    if copy:
        summary.copy_us = copy["ms"] * 1e3
        if copy_bytes_per_s:
            summary.copy_share = bandwidth(copy) / copy_bytes_per_s
    if draft:
        summary.draft_us = draft["ms"] * 1e3
        if copy_bytes_per_s:
            summary.draft_share = bandwidth(draft) / copy_bytes_per_s
        if decode:
            summary.draft_speedup = decode["ms"] / draft["ms"]
    if verify:
        summary.verify_ms = verify["ms"]
        if full:
            summary.verify_ratio = verify["ms"] / full["ms"]
    if select:
        summary.select_us = select["ms"] * 1e3
        if verify:
            summary.select_share = select["ms"] / verify["ms"]
    if decode and draft and both:
        summary.round = round_speedup(decode["ms"], draft["ms"], both["ms"])
    if decode and copy and both:
        summary.copy_round = round_speedup(decode["ms"], copy["ms"], both["ms"])
    return summary


def summaries(
    records: Sequence[dict[str, Any]], copy_bytes_per_s: float | None, baselines: Mapping[str, Sequence[str]]
) -> list[Summary]:
    """One summary per unit, in order of shape, context, layout and batch."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record.get("kind") == "row":
            groups.setdefault(record["unit"], []).append(record)
    found = [summarize_unit(rows, copy_bytes_per_s, baselines) for rows in groups.values()]
    found.sort(key=lambda s: (s.unit["shape"], s.unit["context"], s.unit["layout"], s.unit["batch"]))
    return found


def percent(value: float | None) -> str | None:
    """``0.723`` as ``72%``."""
    return None if value is None else f"{100 * value:.0f}%"


def times(value: float | None) -> str | None:
    """``4.512`` as ``4.51x``."""
    return None if value is None else f"{value:.2f}x"


def main_table(found: Sequence[Summary]) -> str:
    """The table that is printed: one line per batch, figures next to the goals."""
    headers = (
        "shape", "context", "slots", "batch", "draft us", "of copy", "vs decode", "verify ms", "vs full", "select",
        "round", "goals missed", "same-size copy us", "of copy", "round with it",
    )
    rows = []
    for s in found:
        rows.append(
            (
                s.unit["shape"], s.unit["context"], s.unit["layout"], s.unit["batch"], s.draft_us,
                percent(s.draft_share), times(s.draft_speedup), s.verify_ms, times(s.verify_ratio),
                percent(s.select_share), times(s.round), ", ".join(s.missed()) or "none", s.copy_us,
                percent(s.copy_share), times(s.copy_round),
            )
        )
    return markdown_table(headers, rows, right=(1, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14))


def baseline_table(found: Sequence[Summary]) -> str:
    """The fastest kernels of SGLang's backends, which the main table compares with."""
    headers = (
        "shape", "context", "slots", "batch", "full decode ms", "of copy", "by", "full verify ms", "by",
    )
    rows = [
        (
            s.unit["shape"], s.unit["context"], s.unit["layout"], s.unit["batch"], s.decode_ms,
            percent(s.decode_share), s.decode_best, s.full_ms, s.full_best,
        )
        for s in found
    ]
    return markdown_table(headers, rows, right=(1, 3, 4, 5, 7))


def detail_table(records: Sequence[dict[str, Any]], copy_bytes_per_s: float | None) -> str:
    """Every timed kernel."""
    headers = (
        "shape", "context", "slots", "batch", "job", "kernel", "ms", "10%", "90%", "GB/s", "of copy", "error",
        "timed by",
    )
    rows = []
    keyed = [r for r in records if r.get("kind") == "row"]
    keyed.sort(key=lambda r: (r["shape"], r["context"], r["layout"], r["batch"], r["what"], r["ms"] or math.inf))
    for r in keyed:
        rate = bandwidth(r) if r["ms"] else None
        share = rate / copy_bytes_per_s if rate and copy_bytes_per_s else None
        errors = r.get("errors") or {}
        worst = max((e if e is not None else math.nan for e in errors.values()), default=None)
        error = None if worst is None else ("WRONG " if r.get("wrong") else "") + f"{worst:.1e}"
        rows.append(
            (
                r["shape"], r["context"], r["layout"], r["batch"], r["what"], r["name"], r["ms"], r["low"], r["high"],
                None if rate is None else round(rate / 1e9), percent(share), error, r["method"],
            )
        )
    return markdown_table(headers, rows, right=(1, 3, 6, 7, 8, 9, 10, 11))


def goal_lines(found: Sequence[Summary]) -> list[str]:
    """How many of the measured batches meet each goal."""
    def count(values: Iterable[tuple[float | None, bool]]) -> str:
        known = [met for value, met in values if value is not None]
        return f"{sum(known)} of {len(known)}"

    long = [s for s in found if s.unit["context"] >= GOAL_SPEEDUP_CONTEXT]
    return [
        f"draft attention at {GOAL_DRAFT_SHARE:.0%} of the copy bandwidth or more: "
        + count((s.draft_share, (s.draft_share or 0) >= GOAL_DRAFT_SHARE) for s in found),
        f"draft attention {GOAL_DRAFT_SPEEDUP:g}x faster than full decoding at {GOAL_SPEEDUP_CONTEXT} tokens: "
        + count((s.draft_speedup, (s.draft_speedup or 0) >= GOAL_DRAFT_SPEEDUP) for s in long),
        f"verification with scores within {GOAL_VERIFY_RATIO:g}x of the best full attention: "
        + count((s.verify_ratio, (s.verify_ratio or math.inf) <= GOAL_VERIFY_RATIO) for s in found),
        f"selection within {GOAL_SELECT_SHARE:.0%} of verification: "
        + count((s.select_share, (s.select_share or math.inf) <= GOAL_SELECT_SHARE) for s in found),
        f"attention of a round {GOAL_ROUND:g}x cheaper than of plain decoding: "
        + count((s.round, (s.round or 0) >= GOAL_ROUND) for s in found),
    ]


def sweep_tables(records: Sequence[dict[str, Any]], copy_bytes_per_s: float | None, top: int = 6) -> str:
    """The fastest configurations of each unit, then the ones best over all units.

    A configuration's mark over all units is the geometric mean of its time over the unit's best; only configurations
    that were right in every unit are listed.
    """
    rows = [r for r in records if usable(r)]
    units = sorted({r["unit"] for r in rows})
    parts = []
    for what in ("draft", "verify", "select"):
        table = []
        for unit in units:
            here = sorted((r for r in rows if r["unit"] == unit and r["what"] == what), key=lambda r: r["ms"])
            for rank, r in enumerate(here[:top], 1):
                rate = bandwidth(r)
                table.append(
                    (unit, rank, r["name"], r["ms"], round(rate / 1e9),
                     percent(rate / copy_bytes_per_s) if copy_bytes_per_s else None)
                )
        if table:
            headers: tuple[str, ...] = ("batch", "rank", "configuration", "ms", "GB/s", "of copy")
            parts.append(f"### {what}: fastest per batch\n\n" + markdown_table(headers, table, right=(1, 3, 4, 5)))
        marks = overall_marks([r for r in rows if r["what"] == what], units)
        if marks:
            headers = ("configuration", "mean of time / best", "worst")
            parts.append(
                f"### {what}: best over all batches\n\n" + markdown_table(headers, marks[: 2 * top], right=(1, 2))
            )
    return "\n\n".join(parts)


def overall_marks(rows: Sequence[dict[str, Any]], units: Sequence[str]) -> list[tuple[str, float, float]]:
    """(name, geometric mean, maximum) of time over the unit's best, best first; names missing in a unit are left out."""
    fastest: dict[str, float] = {}
    for r in rows:
        fastest[r["unit"]] = min(fastest.get(r["unit"], math.inf), r["ms"])
    ratios: dict[str, dict[str, float]] = {}
    for r in rows:
        ratios.setdefault(r["name"], {})[r["unit"]] = r["ms"] / fastest[r["unit"]]
    marks = []
    for name, found in ratios.items():
        if all(unit in found for unit in units):
            mean = math.exp(sum(math.log(x) for x in found.values()) / len(found))
            marks.append((name, mean, max(found.values())))
    return sorted(marks, key=lambda mark: mark[1])
