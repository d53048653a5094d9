"""Tables of the results' pages: current, made of all runs, with SIMULATED beside what is; what is missing is an error."""

from __future__ import annotations

import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.append(str(REPO / "benchmarks"))

import _result_plots  # noqa: E402
import make_results  # noqa: E402
from _result_tables import Column, Figure, Results, Row, Table, Words, load, load_name, model_name, over, speed  # noqa: E402

FILE = "2026-01-02-h200/loads.jsonl"


def sample(label: str, tokens_per_s: float | None, batch: int = 4, **more: Any) -> dict[str, Any]:
    return {
        "kind": "sample",
        "label": label,
        "model": "qwen3-8b-shapes",
        "dataset": "random:8192",
        "batch": batch,
        "output_length": 512,
        "temperature": 0.6,
        "tokens_per_s": tokens_per_s,
        "load_format": "dummy",
        "simulated_accept_length": 7.0 if label != "plain" else None,
        "commit": "06cf90b4adfc+changes",
        "packages": {"sglang": "0.5.17"},
        "gpu": {"name": "NVIDIA H200"},
        "command": ["throughput.py", "--loads", "x y", "--engines", label, "--results", "r.jsonl", "--child", label],
        **more,
    }


@pytest.fixture
def results(tmp_path: Path) -> Results:
    records = [
        *(sample("plain", rate) for rate in (100.0, 90.0, 130.0)),
        *(sample("sparsespec", rate) for rate in (250.0, 200.0)),
        sample("plain", 10.0, batch=8),
        sample("sparsespec", 9.0, batch=8, simulated_accept_length=None),
        sample("plain", None, batch=16),
    ]
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    return Results(tmp_path)


def table(*batches: int, conclusion: str = "So it is.", **more: Any) -> Table:
    columns = [speed("plain", "plain"), speed("ours", "sparsespec"), over("over plain", "ours", "plain", bold=True)]
    rows = [load(FILE, f"random:8192,{batch},512,0.6") for batch in batches]
    return Table("loads", "Loads", conclusion, {"model": model_name, "load": load_name}, columns, rows, **more)


# --------------------------------------------------------------------------- pages


def test_the_pages_and_plots_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_results.main(["--check"]) == 0, capsys.readouterr().err


def test_every_table_stands_in_a_page_and_a_page_has_no_other() -> None:
    assert {name for page in make_results.PAGES for name in page.tables} == {table.name for table in make_results.TABLES}
    for page in make_results.PAGES:
        text = page.path.read_text(encoding="utf-8")
        assert text.count("<!-- /") == len(page.tables), page.path.name


def test_every_results_file_is_named() -> None:
    pages = [page.path for page in make_results.PAGES] + [make_results.RESULTS / "README.md"]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    files = [path.relative_to(make_results.RESULTS).as_posix() for path in make_results.RESULTS.glob("*/*")]
    assert len(files) > 40 and [name for name in files if name not in text] == []


def test_the_check_sees_a_changed_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = make_results.PAGES[0]
    monkeypatch.setattr(make_results.Page, "root", "")
    changed = tmp_path / "README.md"
    text = page.path.read_text(encoding="utf-8")
    changed.write_text(text.replace("12,631", "12,632"))
    assert changed.read_text() != text, "a figure of the first table"
    monkeypatch.setattr(make_results, "REPO", tmp_path)
    monkeypatch.setattr(make_results, "PAGES", [make_results.Page(changed, page.tables, page.heading, page.plots)])
    monkeypatch.setattr(make_results, "TABLE_PLOTS", {"default-settings": make_results.TABLE_PLOTS["default-settings"]})
    assert make_results.main(["--check"]) == 1 and "12,632" in changed.read_text()
    assert make_results.main([]) == 0 and changed.read_text() == text


# ------------------------------------------------------------------------- figures


def test_a_cell_is_the_median_with_the_spread_and_the_number_of_runs(results: Results) -> None:
    of = table(4, 8)
    text = of.markdown(of.lines(results))
    assert "| model | load | plain | ours | over plain | runs |" in text
    assert "| 100 (90 to 130) | 225 (200 to 250) SIMULATED | **2.25** SIMULATED | 3, 2 |" in text
    assert "|  | 8 x 8,192, T 0.6 | 10 | 9 | **0.90** | 1 |" in text, "a label like the one above is left out"
    assert text.endswith("Medians of the runs; lowest to highest in brackets.")
    (line,) = table(8).lines(results)
    assert table(8).markdown([line]).endswith("One run each.")


def test_a_row_is_named_by_its_records() -> None:
    record = sample("plain", 1.0, output_length=3072, dataset="aime", temperature=0.0, packages={"sglang": "0.5.23"})
    assert load_name(record) == "4 x AIME, 3,072 new, greedy"
    assert model_name(record) == "Qwen3-8B shapes, dummy weights, H200, SGLang 0.5.23"


def test_what_follows_from_simulated_acceptance_says_so(results: Results) -> None:
    simulated, measured = table(4, 8).lines(results)
    assert simulated.labels["model"] == "Qwen3-8B shapes, dummy weights, H200"
    assert [str(simulated.figure(title)).endswith("SIMULATED") for title in ("plain", "ours", "over plain")] == [0, 1, 1]
    assert not any("SIMULATED" in str(cell) for cell in measured.cells.values())
    assert str(Figure((1.0,)).over(Figure((2.0,), simulated=True))) == "0.50 SIMULATED"
    words = Table("n", "N", "", {"load": load_name}, [Words("n", lambda found: str(len(found)))], table(4).rows)
    assert words.lines(results)[0].cells == {"n": "5 SIMULATED"}
    marked = table(4, 8, mark_rows=True)
    text = marked.markdown(marked.lines(results))
    assert "| 4 x 8,192, T 0.6 SIMULATED | 100 (90 to 130) | 225" in text and "| 8 x 8,192, T 0.6 | 10 |" in text


def test_no_simulated_figure_of_the_pages_is_unmarked() -> None:
    results = Results(make_results.RESULTS)
    seen = 0
    for declared in make_results.TABLES:
        lines = declared.lines(results)
        for line, shown in zip(lines, declared.markdown(lines).splitlines()[2:], strict=False):
            assert ("SIMULATED" in shown) == line.simulated, (declared.name, shown)
            seen += line.simulated
    assert seen > 10


def test_sentences_take_their_figures_from_the_table(results: Results) -> None:
    conclusion = "{x[over plain].lowest}, {x[over plain].simulated_highest},\n   {x[plain][4 x 8,192, T 0.6]}"
    text = table(4, 8, conclusion=conclusion).text(results, "../")
    assert text.startswith("## Loads\n\n0.90, 2.25 SIMULATED, 100\n\n| model |")
    with pytest.raises(LookupError, match="0 rows are called '9 x'"):
        table(4, conclusion="{x[plain][9 x]}").text(results, "")
    with pytest.raises(LookupError, match="no measured figure"):
        table(4, conclusion="{x[over plain].highest}").text(results, "")


def test_a_table_says_where_its_figures_come_from(results: Results) -> None:
    text = table(4, command="\npython new.py").text(results, "../", heading=False, plots=["![p](p.png)"])
    assert f"[{FILE}](../benchmarks/results/{FILE}): NVIDIA H200, commit 5cc1318, SGLang 0.5.17, 2026-01-02." in text
    plain = "python benchmarks/throughput.py --loads 'x y' --engines plain"
    ours = "SGLANG_SIMULATE_ACC_LEN=7 python benchmarks/throughput.py --loads 'x y' --engines sparsespec"
    assert f"```sh\n{plain}\n{ours}\n```" in text and "The same today:\n\n```sh\npython new.py\n```" in text
    assert text.startswith("So it is.\n\n![p](p.png)\n\n| model |")
    assert "--engines plain sparsespec\n" in table(8).text(results, ""), "two engines of one command"


def test_batches_that_were_kept_full_are_rows_of_their_own(tmp_path: Path) -> None:
    asked = {"dataset": "aime+olympiadbench", "output_length": 4096}
    records = [
        sample("plain", 50.0, **asked),
        sample("plain", 90.0, requests=8, kept_full=True, **asked),
        sample("vllm", 70.0, requests=8, kept_full=True, packages={"vllm": "0.26.0"}, simulated_accept_length=None, **asked),
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = [load("r.jsonl", "aime+olympiadbench,4,4096,0.6"), load("r.jsonl", "aime+olympiadbench,4,4096,0.6,8")]
    words = {"model": model_name, "load": load_name}
    one, full = Table("n", "N", "", words, [speed("plain", "plain")], rows).lines(Results(tmp_path))
    assert (one.labels["load"], str(one.cells["plain"])) == ("4 x AIME and OlympiadBench, 4,096 new, T 0.6", "50")
    assert full.labels["load"] == "8 x AIME and OlympiadBench, 4 at once, 4,096 new, T 0.6"
    assert str(full.cells["plain"]) == "90"
    (vllm,) = Table("n", "N", "", words, [speed("vLLM", "vllm")], rows[1:]).lines(Results(tmp_path))
    assert (vllm.labels["model"], str(vllm.cells["vLLM"])) == ("Qwen3-8B shapes, dummy weights, H200", "70")


def test_what_is_missing_is_an_error(results: Results) -> None:
    with pytest.raises(FileNotFoundError):
        Table("n", "N", "", {}, [speed("plain", "plain")], [load("2026-01-02-h200/none.jsonl", "aime,1,2,0")]).lines(results)
    with pytest.raises(LookupError, match="holds no record of .*'batch': 5"):
        table(5).lines(results)
    with pytest.raises(LookupError, match="holds no record of .*'label': 'ngram'"):
        Table("n", "N", "", {}, [speed("n-grams", "ngram")], table(4).rows).lines(results)
    with pytest.raises(LookupError, match="a record of plain has no tokens_per_s"):
        table(16).lines(results)
    with pytest.raises(LookupError, match="a record of plain has no draft_step.ms"):
        Table("n", "N", "", {}, [Column("n", "draft_step.ms")], [Row(FILE, {"batch": 8})]).lines(results)


def test_runs_of_several_commits_are_not_mixed(results: Results) -> None:
    records = results.records(FILE)
    records[0]["commit"] = "a" * 12
    with pytest.raises(ValueError, match="plain: runs of several commits, .*'5cc1318', 'aaaaaaa'"):
        table(4).lines(results)
    for record in records[:3]:
        record["commit"] = "a" * 12
    lines = table(4, 8).lines(results)
    text = " ".join(table(4, 8).markdown(lines).split())
    assert text.endswith("Columns are of different commits (5cc1318, aaaaaaa) in these rows: 4 x 8,192, T 0.6.")
    assert table(4).markdown(lines[:1]).endswith("Columns are of different commits (5cc1318, aaaaaaa) in all rows.")
    assert "commits" not in table(8).markdown(lines[1:])


# --------------------------------------------------------------------------- plots


def png(**texts: str) -> bytes:
    """The chunks of an image without pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    chunks = [chunk(b"tEXt", f"{name}\0{text}".encode()) for name, text in texts.items()]
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)) + b"".join(chunks) + chunk(b"IEND", b"")


def test_a_plot_is_current_as_long_as_its_table_is(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plot = _result_plots.Plot("loads", "Loads", lambda plt, lines: None)
    monkeypatch.setattr(_result_plots, "PLOTS", tmp_path)
    monkeypatch.setattr(make_results, "TABLES", [table(4)])
    monkeypatch.setattr(make_results, "TABLE_PLOTS", {"loads": [plot]})
    assert list(make_results.stale_plots(results)) == [plot], "it is not there"
    of_four, of_eight = (_result_plots.digest(table(batch).lines(results)) for batch in (4, 8))
    plot.path.write_bytes(png(Software="matplotlib", Description=of_four))
    assert make_results.stale_plots(results) == {}
    plot.path.write_bytes(png(Software="matplotlib", Description=of_eight))
    assert list(make_results.stale_plots(results)) == [plot]
    plot.path.write_bytes(png(Software="matplotlib"))
    assert list(make_results.stale_plots(results)) == [plot], "it says nothing"


def test_what_was_not_run_is_a_dash_where_a_column_allows_it(results: Results) -> None:
    columns = [
        speed("plain", "plain"),
        Column("vLLM", "tokens_per_s", {"label": "vllm"}, optional=True),
        Column("ours", "tokens_per_s", {"label": "sparsespec"}, optional=True),
        over("over vLLM", "plain", "vLLM"),
        over("over plain", "ours", "plain"),
    ]
    rows = [load(FILE, f"random:8192,{batch},512,0.6") for batch in (4, 8)]
    made = Table("t", "T", "At most {x[ours].simulated_highest}.", {"load": load_name}, columns, rows)
    text = made.text(results, "")
    assert "| 4 x 8,192, T 0.6 | 100 (90 to 130) | - | 225 (200 to 250) SIMULATED | - | 2.25 SIMULATED |" in text
    with pytest.raises(LookupError):
        Table("t", "T", "At most {x[vLLM].highest}.", {"load": load_name}, columns, rows).text(results, "")
