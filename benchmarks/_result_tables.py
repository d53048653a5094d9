"""Tables from results files: what a table says is declared, its figures are looked up.

A table has rows (a file, and what a record must hold to belong to the row) and columns (what a record must hold to belong to
the column, and which of its fields is shown). A cell is the median over the records that both want, with the lowest and
highest of several. A figure of which any record was made under simulated acceptance says SIMULATED, and so does what is
computed from it. What is not there is an error: a file, a record, a field.
"""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from _common import NOT_LOSSLESS, REPO, SIMULATE, device_name, marks

sys.path.append(str(REPO / "scripts"))

from generated_parts import markdown_table  # noqa: E402

Record = dict[str, Any]
#: What a record must hold: a value by field, or a condition on it.
Where = Mapping[str, Any]
#: A field by its name, with dots into objects; or what is made of the record.
Value = str | Callable[[Record], Any]

#: Commits that a tree copied without git recorded under another name.
COMMITS = {"06cf90b4adfc+changes": "5cc1318"}
#: Commits of files whose records have none.
UNRECORDED = {
    "2026-11-25-cpu/parity-smollm2-135m.jsonl": "42fd051",
    "2026-11-25-cpu/parity-speculate-smollm2-135m-05abc4e.jsonl": "05abc4e",
    "2026-11-25-h100/accept-length-qwen2.5-coder-1.5b.jsonl": "0102b6f",
}
#: In the cell of an optional column.
NOT_RUN = "-"
#: Options that change no figure.
UNSHOWN = ("--results", "--log-level", "--time-limit", "--prompts", "--vllm-python")
#: SGLang's release where a label does not name one.
USUAL_SGLANG = "0.5.17"


class Results:
    """The files of a results folder, each read once.

    Attributes:
        place: the folder's path in the repository, for links.
        used: the records that figures were made of, by file.
    """

    def __init__(self, folder: Path, place: str = "benchmarks/results") -> None:
        self.folder = folder
        self.place = place
        self.used: dict[str, list[Record]] = {}
        self._files: dict[str, list[Record]] = {}

    def records(self, file: str) -> list[Record]:
        """All records of a file.

        Raises:
            FileNotFoundError: it is not there.
        """
        if file not in self._files:
            text = (self.folder / file).read_text(encoding="utf-8")
            self._files[file] = [json.loads(line) for line in text.splitlines() if line]
        return self._files[file]

    def find(self, file: str, *wanted: Where) -> list[Record]:
        """The records that hold all that is wanted, if there are any.

        Raises:
            FileNotFoundError: the file is not there.
        """
        return [record for record in self.records(file) if all(holds(record, where) for where in wanted)]

    def matching(self, file: str, *wanted: Where) -> list[Record]:
        """As :meth:`find`, where there must be some.

        Raises:
            FileNotFoundError: the file is not there.
            LookupError: it holds no such record.
        """
        found = self.find(file, *wanted)
        if not found:
            raise LookupError(f"{file} holds no record of {' and '.join(str(dict(where)) for where in wanted)}")
        return found

    def select(self, file: str, *wanted: Where) -> list[Record]:
        """:meth:`matching`, whose records count as used."""
        found = self.matching(file, *wanted)
        self.used.setdefault(file, []).extend(found)
        return found


def holds(record: Record, where: Where) -> bool:
    """Whether a record holds what is wanted."""
    pairs = ((record.get(name), wanted) for name, wanted in where.items())
    return all(wanted(value) if callable(wanted) else value == wanted for value, wanted in pairs)


def value_of(record: Record, value: Value) -> Any:
    """A field of a record.

    Raises:
        LookupError: it is missing, or None.
    """
    if callable(value):
        return value(record)
    found: Any = record
    for name in value.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    if found is None:
        raise LookupError(f"a record of {record.get('label') or record.get('engine') or record.get('unit')} has no {value}")
    return found


@dataclass(frozen=True)
class Figure:
    """A number, or the numbers of repeated runs.

    Attributes:
        spec: how it is written, for ``format``.
        simulated: it follows from acceptance that was drawn instead of decided.
    """

    values: tuple[float, ...]
    spec: str = ",.0f"
    simulated: bool = False
    bold: bool = False
    marked: bool = True

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def spread(self) -> str:
        """Lowest to highest; empty where both read the same."""
        lowest, highest = (format(value, self.spec) for value in (min(self.values), max(self.values)))
        return f"{lowest} to {highest}" if lowest != highest else ""

    def over(self, *others: Figure, bold: bool = False) -> Figure:
        """Its median over the largest of the others'."""
        against = max(other.median for other in others)
        return Figure((self.median / against,), ".2f", self.simulated or any(o.simulated for o in others), bold)

    def __str__(self) -> str:
        shown = format(self.median, self.spec)
        text = f"**{shown}**" if self.bold else shown
        text += f" ({self.spread})" if self.spread else ""
        return f"{text} SIMULATED" if self.simulated and self.marked else text


@dataclass(frozen=True)
class Row:
    """Records of a file.

    Attributes:
        names: labels that the records do not give, by their heading.
    """

    file: str
    where: Where
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A field of the row's records that hold ``where``.

    Attributes:
        hidden: it is not shown; ratios and sentences are made of it.
        optional: where a row has no such record, the cell and what is computed from it are a dash.
    """

    title: str
    value: Value
    where: Where = field(default_factory=dict)
    spec: str = ",.0f"
    hidden: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Ratio:
    """A column over another, or over the largest of others."""

    title: str
    of: str
    over: tuple[str, ...]
    hidden: bool = False
    bold: bool = False


@dataclass(frozen=True)
class Words:
    """Words made of all of the row's records."""

    title: str
    words: Callable[[list[Record]], str]
    where: Where = field(default_factory=dict)
    hidden: bool = False


@dataclass
class Line:
    """A row with its cells."""

    labels: dict[str, str]
    cells: dict[str, Figure | str]
    #: Runs of each measured column.
    runs: list[int] = field(default_factory=list)
    #: Of the measured columns' records.
    commits: set[str] = field(default_factory=set)
    simulated: bool = False

    def figure(self, title: str) -> Figure:
        """The number in a column.

        Raises:
            TypeError: the column holds words.
        """
        cell = self.cells[title]
        if not isinstance(cell, Figure):
            raise TypeError(f"{title} holds no numbers")
        return cell


class Extremes:
    """The extreme figures of a column, for sentences: of measured rows, and of simulated ones."""

    def __init__(self, title: str, lines: Sequence[Line]) -> None:
        self._title = title
        self._lines = lines

    def _figures(self, simulated: bool) -> list[Figure]:
        found = [line.figure(self._title) for line in self._lines if line.cells[self._title] != NOT_RUN]
        found = [figure for figure in found if figure.simulated == simulated]
        if not found:
            raise LookupError(f"{self._title} has no {'simulated' if simulated else 'measured'} figure")
        return sorted(found, key=lambda figure: figure.median)

    @staticmethod
    def _text(figure: Figure) -> str:
        return str(Figure((figure.median,), figure.spec, figure.simulated))

    @property
    def lowest(self) -> str:
        return self._text(self._figures(False)[0])

    @property
    def highest(self) -> str:
        return self._text(self._figures(False)[-1])

    @property
    def simulated_lowest(self) -> str:
        return self._text(self._figures(True)[0])

    @property
    def simulated_highest(self) -> str:
        return self._text(self._figures(True)[-1])

    def __getitem__(self, label: str) -> str:
        """The figure of the row that a label names.

        Raises:
            LookupError: no row has it, or several have.
        """
        found = [line for line in self._lines if label in line.labels.values()]
        if len(found) != 1:
            raise LookupError(f"{len(found)} rows are called {label!r}")
        return self._text(found[0].figure(self._title))


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        name: of its place in the pages.
        conclusion: what a reader should take from it. ``{x[COLUMN].lowest}``, ``.highest``, ``.simulated_lowest``,
            ``.simulated_highest`` and ``{x[COLUMN][ROW LABEL]}`` stand for its figures.
        labels: the first columns, by their headings: what tells its rows apart.
        command: what repeats the measurement today, where the recorded program has another name now.
        note: what else must be known to read it.
        mark_rows: SIMULATED stands beside the row's name instead of beside each number.
    """

    name: str
    title: str
    conclusion: str
    labels: Mapping[str, Value]
    columns: Sequence[Column | Ratio | Words]
    rows: Sequence[Row]
    command: str = ""
    note: str = ""
    mark_rows: bool = False

    def lines(self, results: Results) -> list[Line]:
        """Its rows with their cells.

        Raises:
            LookupError: a record or a field is not there.
            FileNotFoundError: a file is not there.
            ValueError: the runs of a cell are of several commits.
        """
        return [self._line(results, row) for row in self.rows]

    def _line(self, results: Results, row: Row) -> Line:
        first = results.matching(row.file, row.where)[0]
        labels = {title: row.names.get(title) or str(value_of(first, value)) for title, value in self.labels.items()}
        line = Line(labels, {})
        for column in self.columns:
            if isinstance(column, Ratio):
                if NOT_RUN in [line.cells[title] for title in (column.of, *column.over)]:
                    line.cells[column.title] = NOT_RUN
                    continue
                figure = line.figure(column.of).over(*map(line.figure, column.over), bold=column.bold)
                line.cells[column.title] = figure
                continue
            if isinstance(column, Column) and column.optional and not results.find(row.file, row.where, column.where):
                line.cells[column.title] = NOT_RUN
                continue
            found = results.select(row.file, row.where, column.where)
            simulated = any("SIMULATED acceptance" in marks(record) for record in found)
            line.simulated |= simulated
            if isinstance(column, Words):
                line.cells[column.title] = column.words(found) + (" SIMULATED" if simulated and not self.mark_rows else "")
                continue
            commits = {commit_of(record) for record in found if record.get("commit")}
            if len(commits) > 1:
                raise ValueError(f"{row.file}, {column.title}: runs of several commits, {sorted(commits)}; name one there")
            line.commits |= commits
            values = tuple(value_of(record, column.value) for record in found)
            line.cells[column.title] = Figure(values, column.spec, simulated, marked=not self.mark_rows)
            line.runs.append(len(values))
        return line

    def markdown(self, lines: Sequence[Line]) -> str:
        """The table, with its runs counted: in a column, or in a sentence below where all have as many."""
        counts = {count for line in lines for count in line.runs}
        titles = [column.title for column in self.columns if not column.hidden]
        rows, above = [], [""] * len(self.labels)
        for line in lines:
            labels = list(line.labels.values())
            # A label that repeats the one above, and so do all before it, is left out.
            same = [labels[: place + 1] == above[: place + 1] for place in range(len(labels) - 1)]
            shown = ["" if equal else label for label, equal in zip(labels, [*same, False], strict=True)]
            above = labels
            if self.mark_rows and line.simulated:
                shown[-1] += " SIMULATED"
            cells = [str(line.cells[title]) for title in titles]
            runs = line.runs[:1] if len(set(line.runs)) == 1 else line.runs
            rows.append([*shown, *cells, *([", ".join(map(str, runs))] if len(counts) > 1 else [])])
        header = [*self.labels, *titles, *(["runs"] if len(counts) > 1 else [])]
        text = markdown_table(header, rows, len(self.labels))
        remarks = self._remarks(lines, titles)
        return "\n\n".join([text, *([paragraph(" ".join(remarks))] if remarks else [])])

    @staticmethod
    def _remarks(lines: Sequence[Line], titles: Sequence[str]) -> list[str]:
        """What is said of the rows below them: runs, and commits where they differ within a row."""
        counts = {count for line in lines for count in line.runs}
        shown = [cell for line in lines for title in titles if isinstance(cell := line.cells[title], Figure)]
        found = ["One run each."] if counts == {1} else []
        if counts > {1} or counts and min(counts) > 1:
            runs = "the runs" if len(counts) > 1 else f"{min(counts)} runs"
            spread = "; lowest to highest in brackets" if any(figure.spread for figure in shown) else ""
            found.append(f"Medians of {runs}{spread}.")
        mixed = [line for line in lines if len(line.commits) > 1]
        if mixed:
            names = ", ".join(sorted(set().union(*(line.commits for line in mixed))))
            rows = "; ".join(list(line.labels.values())[-1] for line in mixed)
            where = "all rows" if mixed == list(lines) else f"these rows: {rows}"
            found.append(f"Columns are of different commits ({names}) in {where}.")
        return found

    def text(self, results: Results, root: str, heading: bool = True, plots: Sequence[str] = ()) -> str:
        """The table as it stands in a page: title, conclusion, plots, rows, where they come from.

        Args:
            root: the way from the page to the repository's root, "" or ending in a slash.
            plots: Markdown of its plots.
        """
        results.used.clear()
        lines = self.lines(results)
        columns = {column.title: Extremes(column.title, lines) for column in self.columns}
        parts = [f"## {self.title}"] if heading else []
        parts += [paragraph(" ".join(self.conclusion.split()).format(x=columns)), *plots, self.markdown(lines)]
        parts += [paragraph(self.note)] if self.note else []
        return "\n\n".join([*parts, sources(results, root, self.command)])


def paragraph(text: str) -> str:
    """``text`` in lines of a page's width, however it was broken before."""
    return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False, break_long_words=False)


# ------------------------------------------------------------------------- where figures come from


def sources(results: Results, root: str, command: str = "") -> str:
    """The files that were used, each with its device, date, commits and commands, folded away."""
    parts = ["<details><summary>Files and commands</summary>"]
    for file, records in results.used.items():
        link = f"[{file}]({root}{results.place}/{file})"
        every = [record.get("stamp", record) for record in results.records(file)]
        origins = [record for record in records if "packages" in record] or [r for r in every if "packages" in r]
        releases = sorted({f"SGLang {r['packages']['sglang']}" for r in origins if "sglang" in r["packages"]})
        commits = sorted({commit_of(record) for record in records if record.get("commit")})
        if file in UNRECORDED:
            commits = [UNRECORDED[file]]
        facts = [device_of(file, records[0]), f"commit {', '.join(commits)}" if commits else "commit not recorded"]
        parts.append(f"{link}: {', '.join([*facts, *releases, file[:10]])}.")
        if recorded := shown_commands([record for record in origins if record.get("command")]):
            parts.append("\n".join(["```sh", *recorded, "```"]))
    if command:
        parts += ["The same today:", f"```sh\n{command.strip()}\n```"]
    return "\n\n".join([*parts, "</details>"])


def commit_of(record: Record) -> str:
    """The commit of a record."""
    name = str(record["commit"])
    return COMMITS.get(name, name)[:7]


def device_of(file: str, record: Record) -> str:
    """The device of a record; a folder is one machine on one day, and says so where a record does not."""
    if record.get("gpu"):
        return device_name(record)
    return file.split("/")[0][11:].upper()


def shown_commands(records: Sequence[Record]) -> list[str]:
    """The commands that made records, as shells take them; those that differ in their engines alone are shown as one."""
    engines: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        program, *arguments = record["command"]
        if "--child" in arguments:  # what only child processes were told follows
            arguments = arguments[: arguments.index("--child")]
        options: dict[str, list[str]] = {}
        for argument in arguments:
            if argument.startswith("--"):
                options[argument] = []
            else:
                options.setdefault(list(options)[-1] if options else "", []).append(argument)
        ran = options.pop("--engines", [])
        for name in UNSHOWN:
            options.pop(name, None)
        there = (REPO / "benchmarks" / program).exists()
        simulated = record.get("simulated_accept_length")
        begin = [f"{SIMULATE}={simulated:g}"] if simulated is not None else []
        begin += ["python", f"benchmarks/{program}"] if there else [program]
        command = (*begin, *(word for name, values in options.items() for word in (name, *values) if word))
        known = engines.setdefault(command, [])
        known += [name for name in ran if name not in known]
    return [shlex.join([*command, *(["--engines", *ran] if ran else [])]) for command, ran in engines.items()]


# ------------------------------------------------------------------------- throughput

#: Names of models in tables; another's is the record's.
MODELS = {
    "qwen2.5-coder-1.5b": "Qwen2.5-Coder-1.5B",
    "qwen2.5-1.5b-shapes": "Qwen2.5-1.5B shapes",
    "qwen3-8b-shapes": "Qwen3-8B shapes",
    "qwen3-14b-shapes": "Qwen3-14B shapes",
    "qwen3-30b-a3b-shapes": "Qwen3-30B-A3B shapes",
    "qwen3-8b-fp8-block-shapes": "Qwen3-8B shapes in FP8 by block",
    "gpt-oss-20b-shapes": "gpt-oss-20b shapes",
    "gemma3-1b-shapes": "Gemma 3 1B shapes",
    "smollm2-135m": "SmolLM2-135M",
    "smollm2-135m-float32": "SmolLM2-135M, float32",
}
#: Names of the questions that have no length.
QUESTIONS = {
    "aime": "AIME",
    "olympiadbench": "OlympiadBench",
    "aime+olympiadbench": "AIME and OlympiadBench",
    "code-reading": "code to read",
}
USUAL_OUTPUT = 512


def load(file: str, text: str, **where: Any) -> Row:
    """The row of a load: DATASET,BATCH,NEW_TOKENS,TEMPERATURE[,REQUESTS] as throughput.py takes it."""
    dataset, batch, new_tokens, temperature, *requests = text.split(",")
    about = {"dataset": dataset, "batch": int(batch), "output_length": int(new_tokens), "temperature": float(temperature)}
    kept_full = {"kept_full": True, "requests": int(requests[0])} if requests else {"kept_full": lambda value: not value}
    return Row(file, {"kind": "sample", **about, **kept_full, **where})


def model_name(record: Record) -> str:
    """The model of a record, what its weights are, its devices, and SGLang's release if it is not the usual one.

    What only some engines are, such as not lossless, the columns' titles must say.
    """
    name = MODELS.get(str(record["model"]), str(record["model"]))
    parts = [name, *(mark for mark in marks(record) if mark not in ("SIMULATED acceptance", NOT_LOSSLESS))]
    gpus = record.get("tp_size", 1)
    parts.append((f"{gpus} " if gpus > 1 else "") + device_name(record).removeprefix("NVIDIA ").split()[0])
    release = record["packages"].get("sglang")  # a Python of vLLM's own has none
    return ", ".join([*parts, *([f"SGLang {release}"] if release not in (None, USUAL_SGLANG) else [])])


def load_name(record: Record) -> str:
    """Requests x context, and what is unusual about the outputs."""
    name, _, context = record["dataset"].partition(":")
    requests = f"{record['requests']} x" if record.get("kept_full") else f"{record['batch']} x"
    parts = [f"{requests} {f'{int(context):,}' if context else QUESTIONS[name]}"]
    if record.get("kept_full"):
        parts.append(f"{record['batch']} at once")
    if record["output_length"] != USUAL_OUTPUT:
        parts.append(f"{record['output_length']:,} new")
    parts.append(f"T {record['temperature']:g}" if record["temperature"] else "greedy")
    return ", ".join(parts)


def speed(title: str, label: str, spec: str = ",.0f", hidden: bool = False) -> Column:
    """Output tokens per second of an engine, by the label in its records."""
    return Column(title, "tokens_per_s", {"label": label}, spec, hidden)


def over(title: str, of: str, *others: str, hidden: bool = False, bold: bool = False) -> Ratio:
    """A column over another, or over the largest of others."""
    return Ratio(title, of, others, hidden, bold)
