"""The plots of the results' pages: images of tables, each with a digest of what it shows."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import REPO, pyplot
from _result_tables import Line

PLOTS = REPO / "docs" / "plots"


@dataclass(frozen=True)
class Plot:
    """An image of a table, in docs/plots."""

    name: str
    words: str
    draw: Callable[[Any, Sequence[Line]], None]

    @property
    def path(self) -> Path:
        return PLOTS / f"{self.name}.png"

    def markdown(self, root: str) -> str:
        """The image, as a page shows it."""
        return f"![{self.words}]({root}{self.path.relative_to(REPO).as_posix()})"


BLUE, GREY, ORANGE = "#1f6fb4", "#9aa5b1", "#d9822b"


def draw_ratios(plt: Any, lines: Sequence[Line]) -> None:
    """A bar for each load, hatched if simulated."""
    models = list(dict.fromkeys(line.labels["model"] for line in lines))
    figure, axes = plt.subplots(figsize=(11, 0.5 + 0.32 * len(lines)), layout="constrained")
    for place, line in enumerate(lines):
        ratio = line.figure("over plain")
        colour = (BLUE, ORANGE, GREY)[models.index(line.labels["model"]) % 3]
        axes.barh(place, ratio.median, color=colour, hatch="//" if ratio.simulated else "", edgecolor="white")
        words = f" {ratio.median:.2f}{' SIMULATED' if ratio.simulated else ''}"
        axes.text(ratio.median, place, words, va="center", fontsize=8, bbox={"color": "white", "pad": 0.5}, zorder=3)
    names = [f"{line.labels['model'].partition(',')[0]}, {line.labels['requests x context']}" for line in lines]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="#333333", linewidth=1, linestyle="--")
    axes.set_xlabel("tokens/s over plain SGLang's (dashed), default settings")
    axes.set_xlim(0, 1.15 * max(line.figure("over plain").median for line in lines))
    axes.spines[["top", "right"]].set_visible(False)


def draw_batches(plt: Any, lines: Sequence[Line]) -> None:
    """Tokens per second by the number of requests, of the loads with 8,192 tokens of context."""
    series: dict[str, list[tuple[int, Line]]] = {}
    for line in lines:
        requests, _, rest = line.labels["requests x context"].partition(" x ")
        if rest.startswith("8,192,"):
            series.setdefault(line.labels["model"], []).append((int(requests), line))
    series = {model: sorted(points, key=lambda point: point[0]) for model, points in series.items() if len(points) > 1}
    figure, panels = plt.subplots(1, len(series), figsize=(4.6 * len(series), 3.8), layout="constrained", squeeze=False)
    for axes, (model, points) in zip(panels[0], series.items(), strict=True):
        for title, colour, style in (("plain", GREY, "o--"), ("SPARSESPEC", BLUE, "o-")):
            simulated = any(line.figure(title).simulated for _, line in points)
            label = f"{title}{' SIMULATED' if simulated else ''}"
            rates = [line.figure(title).median for _, line in points]
            axes.plot([n for n, _ in points], rates, style, color=colour, label=label)
            for (n, _), rate in zip(points, rates, strict=True):
                below = title == "plain"
                place = {"xytext": (0, -13 if below else 7), "textcoords": "offset points", "ha": "center", "fontsize": 8}
                axes.annotate(f"{rate:,.0f}", (n, rate), **place)
        axes.set(xscale="log", yscale="log", ylabel="tokens/s")
        axes.set_xlabel("requests of 8,192 tokens, temperatures as in the table")
        axes.margins(0.1)
        axes.set_xticks([n for n, _ in points], [str(n) for n, _ in points])
        axes.minorticks_off()
        axes.set_title(model, fontsize=10)
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)


def draw_accept_lengths(plt: Any, lines: Sequence[Line]) -> None:
    """A line for each temperature and kind of weights, by context."""
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    temperatures = list(dict.fromkeys(line.labels["T"] for line in lines))
    for temperature, colour in zip(temperatures, (BLUE, ORANGE, "#3a8f5a", GREY), strict=False):
        of = [line for line in lines if line.labels["T"] == temperature]
        contexts = [int(line.labels["context"].replace(",", "")) for line in of]
        for title, style in (("FP8", "o-"), ("own weights", "o--")):
            label = f"{title}, T {temperature}"
            axes.plot(contexts, [line.figure(title).median for line in of], style, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set(xlabel="tokens of context", ylabel="accept length, of 9 at most", ylim=(6, 9))
    axes.legend(fontsize=8, frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def draw_step(plt: Any, lines: Sequence[Line]) -> None:
    """A bar for each model and batch, by kind of kernel, and what bytes take."""
    figure, axes = plt.subplots(figsize=(8.5, 3.6), layout="constrained")
    parts = ("products", "attention", "small kernels", "rest", "idle")
    colours = (BLUE, ORANGE, "#3a8f5a", GREY, "#e3e6ea")
    places = range(len(lines))
    left = [0.0] * len(lines)
    for part, colour in zip(parts, colours, strict=True):
        widths = [line.figure(part).median for line in lines]
        axes.barh(places, widths, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.plot([line.figure("bytes").median for line in lines], places, "k|", markersize=18, label="bytes at 4.8 TB/s")
    axes.set_yticks(places, [", ".join(line.labels.values()) for line in lines], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("ms of one draft step, 8,192 tokens of context, SIMULATED acceptance")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


OVER_PLAIN = Plot("over-plain", "Throughput of default settings over plain SGLang's, by load", draw_ratios)
BATCHES = Plot("tokens-by-batch", "Tokens per second by number of requests", draw_batches)
ACCEPT_LENGTHS = Plot("accept-length", "Accept length by context and temperature", draw_accept_lengths)
STEP = Plot("draft-step", "A draft step by kind of kernel", draw_step)


def digest(lines: Sequence[Line]) -> str:
    """Of all that a plot of these rows can show."""
    shown = [[line.labels, {title: str(cell) for title, cell in line.cells.items()}] for line in lines]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def digest_in(image: Path) -> str | None:
    """The digest that a PNG file holds; None without one, or without the file."""
    if not image.is_file():
        return None
    data, place = image.read_bytes(), 8
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        keyword, _, text = data[place + 8 : place + 8 + length].partition(b"\0")
        if kind == b"tEXt" and keyword == b"Description":
            return text.decode("latin-1")
        place += length + 12
    return None


def save(plot: Plot, lines: Sequence[Line]) -> None:
    """Draw a plot into its file."""
    PLOTS.mkdir(exist_ok=True)
    plt = pyplot()
    plot.draw(plt, lines)
    plt.savefig(plot.path, dpi=130, metadata={"Description": digest(lines)})
    plt.close("all")
