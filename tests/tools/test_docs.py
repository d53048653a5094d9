"""README.md and docs/ say what is there: flags, draft policies, files."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from sglang_sparsespec.settings import POLICIES, Settings, default_by_policy, flag_of

REPO = Path(__file__).resolve().parents[2]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def rows_of_flags() -> dict[str, str]:
    """The default in the table of each flag."""
    rows = re.findall(r"^\| `(--[\w-]+)` +\| ([^|]+) \|", TEXT, re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a flag is described in one place"
    return {flag: default.strip().strip("`") for flag, default in rows}


def test_every_flag_is_listed_with_its_default() -> None:
    rows = rows_of_flags()
    assert rows["--speculative-num-steps"] == default_by_policy("num_steps") == "8 (6 with vegas)"
    for field in dataclasses.fields(Settings):
        if field.metadata:
            shown = field.metadata.get("shown_default") or str(field.default)
            assert rows[flag_of(field.name)] == shown, field.name


def test_every_draft_policy_is_listed() -> None:
    assert set(POLICIES) <= set(re.findall(r"^\| `(\w+)`", TEXT, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_links_to_exist(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link.partition("#")[0]).exists()] == []


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_headings_that_a_page_links_to_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^):]*\.md|)#([^)]+)\)", page.read_text(encoding="utf-8"))
    targets = [(page.parent / name if name else page, anchor) for name, anchor in links]
    assert [(target.name, anchor) for target, anchor in targets if anchor not in anchors_of(target)] == []
