"""Tables and plots of ``run.py``'s samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from _common import markdown_table

#: What tells two rows of the table apart, and what makes rows comparable with each other.
LOAD = ("model", "gpu_name", "commit", "dataset", "batch", "requests", "output_length", "temperature", "timed")
#: What a plot of several loads shows on its axis.
OF_A_LOAD = ("dataset", "batch", "requests", "output_length", "temperature")
NO_MATPLOTLIB = "Plots need matplotlib: pip install sglang-sparsespec[bench]"


# ---------------------------------------------------------------------- aggregation


def aggregate(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per cell, device and commit: medians over the repeats, with their spread.

    ``times_plain`` is the throughput over that of the fastest engine without speculation under the same load; None where
    none was measured.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for sample in samples:
        gpu = sample.get("gpu")
        # Records of before there were loads of more requests have as many as their batch.
        sample = {"requests": sample["batch"], **sample, "gpu_name": gpu["name"] if gpu else "CPU"}
        groups.setdefault((sample["key"], *(sample[name] for name in LOAD)), []).append(sample)
    rows = [_row(group) for group in groups.values()]
    for row in rows:
        plain = [other["tokens_per_s"] for other in rows if other["kind"] == "plain" and _same_load(row, other)]
        row["times_plain"] = row["tokens_per_s"] / max(plain) if plain else None
    return rows


def _same_load(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(left[name] == right[name] for name in (*LOAD, "ignore_eos"))


def _row(samples: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [sample["tokens_per_s"] for sample in samples]
    first = samples[0]
    return {
        **{name: first[name] for name in LOAD},
        "engine": first["label"],
        "kind": first["engine"].partition(":")[0],
        "ignore_eos": first["ignore_eos"],
        "simulated": first.get("simulated_accept_length") is not None,
        "interleaved": first["interleaved"],
        "resident": len(first.get("resident_engines", ())),
        "repeats": len(samples),
        "context": round(mean(sample["prompt_tokens"] / sample["requests"] for sample in samples)),
        "output_tokens": median(sample["output_tokens"] for sample in samples),
        "tokens_per_s": median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "accept_length": _median_of(samples, "accept_length"),
        "accept_length_not_repetitive": _median_of(samples, "accept_length_not_repetitive"),
        "repetitive": max(sample["repetitive_prompts"] for sample in samples),
        "repeated_prompts": first["requests"] - first["distinct_prompts"],
        "retractions": max(sample.get("retractions") or 0 for sample in samples),
    }


def _median_of(samples: list[dict[str, Any]], name: str) -> float | None:
    values = [sample[name] for sample in samples if sample.get(name) is not None]
    return median(values) if values else None


# --------------------------------------------------------------------------- table


def remarks(row: dict[str, Any]) -> str:
    """What a reader must know before using the row's figures."""
    found = []
    if row["simulated"]:
        found.append("SIMULATED acceptance")
    if row["repetitive"]:
        found.append(f"{row['repetitive']} of {row['requests']} outputs repeat themselves, which flatters every drafter")
    if row["ignore_eos"]:
        found.append("ignore_eos: outputs go on past their end")
    if row["repeated_prompts"]:
        found.append(f"{row['repeated_prompts']} prompts are asked more than once")
    if row["retractions"]:
        found.append(f"{row['retractions']} retractions")
    if row["repeats"] < 3:
        found.append("fewer than three repeats")
    if not row["interleaved"]:
        found.append("repeats within one engine start")
    if row["resident"]:
        found.append(f"one of {row['resident']} engines on the device, others idle")
    if row["requests"] > row["batch"]:
        found.append(f"{row['requests']} requests, {row['batch']} at once")
    if row["timed"].startswith("whole"):
        found.append("prefill is timed")
    return "; ".join(found)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the rows of one load beside each other."""
    headers = ["model", "device", "dataset", "prompt tokens", "batch", "new tokens", "temperature", "engine", "repeats"]
    headers += ["tokens/s", "lowest", "highest", "times fastest plain", "accept length", "(not repeating)", "remarks"]
    cells = []
    for row in sorted(rows, key=lambda row: (*(str(row[name]) for name in LOAD), -row["tokens_per_s"])):
        load = [row[name] for name in ("model", "gpu_name", "dataset", "context", "batch", "output_length")]
        rates = [f"{row[name]:,.1f}" for name in ("tokens_per_s", "lowest", "highest")]
        accepted = [row["accept_length"], row["accept_length_not_repetitive"]]
        load += [f"{row['temperature']:g}", row["engine"], row["repeats"]]
        cells.append([*load, *rates, row["times_plain"], *accepted, remarks(row)])
    return markdown_table(headers, cells, right=(3, 4, 5, 6, *range(8, 15)))


def latest_not_run(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of what was not run and has no sample since."""
    left: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["kind"] == "sample":
            left.pop(record["key"], None)
        else:
            left[record["key"]] = record
    return list(left.values())


def not_run_table(records: Iterable[dict[str, Any]]) -> str:
    """Markdown: what was not run, and why; one line per engine and reason."""
    counts: dict[tuple[str, str, str], int] = {}
    for record in records:
        key = (record["model"], record["label"], record["reason"])
        counts[key] = counts.get(key, 0) + 1
    rows = [[model, label, count, reason] for (model, label, reason), count in counts.items()]
    return markdown_table(["model", "engine", "cells", "why not"], rows, right=(2,))


def report(samples: list[dict[str, Any]], not_run: list[dict[str, Any]]) -> str:
    """The whole Markdown report of a results file."""
    parts = ["# Benchmark"]
    if samples:
        stamps = {(s["commit"], s["gpu"]["name"] if s.get("gpu") else "CPU", s["packages"].get("sglang")) for s in samples}
        parts += [f"Commit {commit}, {device}, SGLang {version}." for commit, device, version in sorted(stamps, key=str)]
        parts += ["Medians over the repeats, lowest and highest beside them.", table(aggregate(samples))]
    if not_run:
        parts += ["Not run:", not_run_table(not_run)]
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------- plots


def load_pyplot() -> Any:
    """Matplotlib without a display.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit(NO_MATPLOTLIB) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def load_name(row: dict[str, Any], *without: str) -> str:
    """A load in words, without what a plot's axis shows."""
    parts = {
        "model": row["model"],
        "dataset": row["dataset"],
        "batch": f"batch {row['batch']}",
        "requests": f"{row['requests']} requests",
        "output_length": f"{row['output_length']} new tokens",
        "temperature": f"temperature {row['temperature']:g}",
        "gpu_name": row["gpu_name"],
        "commit": f"commit {row['commit']}",
        "timed": row["timed"],
    }
    return ", ".join(text for name, text in parts.items() if name not in without)


Series = dict[str, list[tuple[Any, float, float, float]]]


def series_by(rows: list[dict[str, Any]], x: Callable[[dict[str, Any]], Any], value: str) -> Series:
    """Points (x, value, lowest, highest) by engine, sorted by x; rows without the value are left out."""
    found: Series = {}
    for row in rows:
        if row[value] is not None:
            low, high = (row["lowest"], row["highest"]) if value == "tokens_per_s" else (row[value], row[value])
            found.setdefault(row["engine"], []).append((x(row), row[value], low, high))
    return {engine: sorted(points, key=lambda point: point[0]) for engine, points in found.items()}


def split_by(rows: list[dict[str, Any]], *without: str) -> dict[str, list[dict[str, Any]]]:
    """Rows by everything of their load but ``without``: one plot each."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(load_name(row, *without), []).append(row)
    return found


def draw_bars(axes: Any, series: Series, unit: str) -> None:
    """Bars in groups (x), one per engine, with the spread of the repeats."""
    groups = sorted({point[0] for points in series.values() for point in points})
    width = 0.8 / max(1, len(series))
    for index, (engine, points) in enumerate(series.items()):
        at = [groups.index(x) + (index - (len(series) - 1) / 2) * width for x, *_ in points]
        heights = [value for _, value, *_ in points]
        spread = [[v - low for _, v, low, _ in points], [high - v for _, v, _, high in points]]
        axes.bar(at, heights, width, yerr=spread, label=engine, capsize=2)
    axes.set_xticks(range(len(groups)), [str(group) for group in groups])
    axes.set_ylabel(unit)


def draw_lines(axes: Any, series: Series, x_name: str, unit: str) -> None:
    """Lines, one per engine, with the spread of the repeats."""
    for engine, points in series.items():
        spread = [[v - low for _, v, low, _ in points], [high - v for _, v, _, high in points]]
        axes.errorbar([p[0] for p in points], [p[1] for p in points], yerr=spread, marker="o", capsize=2, label=engine)
    axes.set_xlabel(x_name)
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)


def draw_ablation(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Horizontal bars of throughput by engine, the accept length written at each."""
    ordered = sorted(rows, key=lambda row: row["tokens_per_s"])
    bars = axes.barh([row["engine"] for row in ordered], [row["tokens_per_s"] for row in ordered])
    accepted = [f"accept {row['accept_length']:.2f}" if row["accept_length"] else "" for row in ordered]
    axes.bar_label(bars, labels=accepted, padding=3, fontsize=8)
    axes.margins(x=0.2)
    axes.set_xlabel("tokens/s")


def relative(row: dict[str, Any]) -> dict[str, float]:
    """The row's throughput and its spread over that of the fastest plain engine."""
    plain = row["tokens_per_s"] / row["times_plain"]
    return {name: row[name] / plain for name in ("tokens_per_s", "lowest", "highest")}


def short_load(row: dict[str, Any]) -> str:
    """A load in two lines, for an axis."""
    return f"{row['dataset']} x {row['batch']}\n{row['output_length']} new, T {row['temperature']:g}"


def draw_plots(samples: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write every plot that the samples give; returns the files.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    plt = load_pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    rows = aggregate(samples)
    written: list[Path] = []

    def save(name: str, title: str, draw: Callable[[Any], None], legend: bool = True) -> None:
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        draw(axes)
        axes.set_title(title, fontsize=9)
        if legend:
            axes.legend(fontsize=8)
        path = folder / f"{name}-{len(written)}.png"
        figure.savefig(path, dpi=150)
        plt.close(figure)
        written.append(path)

    compared = [{**row, **relative(row)} for row in rows if row["times_plain"]]
    for title, part in split_by(compared, *OF_A_LOAD).items():
        if len({short_load(row) for row in part}) > 1:
            gains = series_by(part, short_load, "tokens_per_s")
            save("times-plain", title, partial(draw_bars, series=gains, unit="throughput / fastest plain decoding"))
    for title, part in split_by(rows, "dataset").items():
        rates = series_by(part, lambda row: row["dataset"], "tokens_per_s")
        save("throughput-by-dataset", title, partial(draw_bars, series=rates, unit="tokens/s"))
    for title, part in split_by(rows, "dataset").items():
        accepted = series_by(part, lambda row: row["context"], "accept_length")
        if accepted:
            draw = partial(draw_lines, series=accepted, x_name="prompt tokens", unit="accept length")
            save("accept-length-by-context", title, draw)
    for title, part in split_by(rows, "batch", "requests").items():
        if len({row["batch"] for row in part}) > 1:
            rates = series_by(part, lambda row: row["batch"], "tokens_per_s")
            save("throughput-by-batch", title, partial(draw_lines, series=rates, x_name="batch", unit="tokens/s"))
    for title, part in split_by(rows).items():
        if sum(row["kind"] == "sparsespec" for row in part) > 1:
            save("ablation", title, partial(draw_ablation, rows=part), legend=False)
    return written
