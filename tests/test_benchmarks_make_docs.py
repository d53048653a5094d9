"""The generated pages: current, and complete."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import make_docs as docs  # noqa: E402


@pytest.mark.parametrize("name", ["benchmarks.md", "performance-model.md"])
def test_generated_pages_are_what_the_results_give(name: str) -> None:
    path = docs.DOCS / name
    assert path.read_text() == docs.pages()[path], "run python benchmarks/make_docs.py"


def test_a_block_that_nobody_makes_is_named() -> None:
    with pytest.raises(ValueError, match="invented"):
        docs.filled("<!-- begin invented -->\n<!-- end invented -->")


def test_files_that_the_page_links_to_exist() -> None:
    for name in ("benchmarks.md", "performance-model.md"):
        text = (docs.DOCS / name).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (docs.DOCS / target).exists(), target
        for source in re.findall(r"`(20[\w-]+/[\w.-]+)`", text):
            assert (docs.RESULTS / source).is_file(), source


def test_every_table_of_predictions_is_labelled() -> None:
    text = (docs.DOCS / "performance-model.md").read_text()
    predictions = text.partition("## Predictions")[2]
    tables = predictions.split("\n\n|")
    assert len(tables) == 4
    assert all("model prediction, not measured" in before.rpartition("\n\n")[2] for before in tables[:-1])
