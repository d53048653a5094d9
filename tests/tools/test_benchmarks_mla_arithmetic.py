"""``benchmarks/mla_arithmetic.py``: its models are the published ones, and its tables those of ``docs/mla.md``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.append(str(REPO / "benchmarks"))

import mla_arithmetic as mla  # noqa: E402


@pytest.mark.parametrize(
    ("shape", "total", "active"), zip(mla.SHAPES, (15.7e9, 30e9, 671e9, 1.03e12), (2.4e9, 3.6e9, 37e9, 32e9), strict=True)
)
def test_sizes_are_those_published(shape: mla.Shape, total: float, active: float) -> None:
    expert, others = shape.weights
    number, top_k, _, _ = shape.experts
    assert number * expert + others + shape.vocab * shape.hidden == pytest.approx(total, rel=0.01)
    assert top_k * expert + others == pytest.approx(active, rel=0.03)


def test_attention_is_bound_by_bytes_until_its_rows_fill_two_tiles() -> None:
    by_bytes = mla.TOKEN_BYTES / mla.BANDWIDTH
    assert mla.attend(1, 1) == mla.attend(1, 64) == by_bytes
    assert mla.attend(1, 65) == mla.attend(1, 128) > by_bytes


def test_the_page_has_what_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    mla.main()
    rows = capsys.readouterr().out.splitlines()
    page = (REPO / "docs" / "mla.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 32 and [row for row in rows if row not in page] == []
