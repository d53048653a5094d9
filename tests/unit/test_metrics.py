"""Counters of drafting: what they are told, and what they say."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_sparsespec.metrics import DRAFT_METRICS, KV_METRICS, DraftMetrics, Exporter, KVManagerMetrics, describe


def metrics(num_steps: int = 8) -> DraftMetrics:
    return DraftMetrics(num_steps, torch.zeros(2, dtype=torch.float64))


def test_means_and_variation_of_a_lockstep_round() -> None:
    told = metrics()
    for _ in range(8):
        told.note_forward(10, 0)
    told.note_forward(0, 90)
    values = told.as_dict()
    assert values["sparsespec_forward_tokens"] == pytest.approx(170 / 9)
    assert values["sparsespec_verify_share"] == pytest.approx(90 / 170)
    # Nine forwards of mean 18.9: the variance is 8/81 * 80^2.
    assert values["sparsespec_forward_tokens_variation"] == pytest.approx((8 / 81 * 6400) ** 0.5 / (170 / 9))


def test_even_forwards_do_not_vary() -> None:
    told = metrics()
    assert told.as_dict()["sparsespec_forward_tokens_variation"] == 0
    for _ in range(9):
        told.note_forward(8, 9)
    assert told.as_dict()["sparsespec_forward_tokens_variation"] == pytest.approx(0, abs=1e-6)


def test_rounds_are_counted_by_kind() -> None:
    told = metrics()
    told.note_lockstep_round()
    told.note_interleaved_round()
    told.note_interleaved_round()
    for drafts in (0, 8, 0, 3, 0):
        told.note_round(drafts)
    values = told.as_dict()
    names = ("lockstep_rounds", "interleaved_rounds", "plain_rounds")
    assert [values[f"sparsespec_{name}"] for name in names] == [1, 2, 3]
    assert values["sparsespec_draft_length_histogram"] == [3, 0, 0, 1, 0, 0, 0, 0, 1]


def test_mean_lengths_count_what_each_verification_drafted_and_accepted() -> None:
    told = metrics()
    told.note_verifications([3, 8], drafted=8)
    told.note_verifications([2, 2], drafted=2)
    values = told.as_dict()
    assert values["sparsespec_draft_length"] == 5
    assert values["sparsespec_accept_length"] == 1 + 15 / 4
    assert values["sparsespec_accept_histogram"] == [0, 0, 2, 1, 0, 0, 0, 0, 1]


def test_histograms_are_exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    exported: Counter[tuple[str, str]] = Counter()

    class FakeCounter:
        def __init__(self, name: str, meaning: str, labelnames: list[str]) -> None:
            self.name = name

        def labels(self, count: str = "", **labels: str) -> Any:
            return SimpleNamespace(inc=lambda value: exported.update({(self.name, count): value}))

    monkeypatch.setattr("prometheus_client.Counter", FakeCounter)
    monkeypatch.setattr(Exporter, "export", lambda self, labels, values: None)
    told = metrics(2)
    for drafts in (0, 2, 2):
        told.note_round(drafts)
        told.note_verifications([drafts], drafts)
        told.export({"rank": "0"})
    assert {count: exported["sparsespec:draft_lengths", count] for count in "012"} == {"0": 1, "1": 0, "2": 2}
    assert {count: exported["sparsespec:accepted_drafts", count] for count in "012"} == {"0": 1, "1": 0, "2": 2}


def test_server_info_has_every_metric_that_is_documented_and_no_other() -> None:
    assert set(metrics().as_dict()) == {f"sparsespec_{metric.name}" for metric in DRAFT_METRICS}
    assert set(KVManagerMetrics(4).as_dict(0.5)) == {f"sparsespec_{metric.name}" for metric in KV_METRICS}
    names = [name for name, _, _ in describe()]
    assert len(names) == len(set(names)) == len(DRAFT_METRICS) + len(KV_METRICS) + 2
