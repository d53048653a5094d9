"""Counters of drafting: what they are told, and what they say."""

from __future__ import annotations

import pytest
import torch

from sglang_sparsespec.metrics import DRAFT_METRICS, KV_METRICS, DraftMetrics, KVManagerMetrics, describe


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
    for _ in range(3):
        told.note_plain_round()
    values = told.as_dict()
    names = ("lockstep_rounds", "interleaved_rounds", "plain_rounds")
    assert [values[f"sparsespec_{name}"] for name in names] == [1, 2, 3]


def test_server_info_has_every_metric_that_is_documented_and_no_other() -> None:
    assert set(metrics().as_dict()) == {f"sparsespec_{metric.name}" for metric in DRAFT_METRICS}
    assert set(KVManagerMetrics(4).as_dict(0.5)) == {f"sparsespec_{metric.name}" for metric in KV_METRICS}
    names = [name for name, _, _ in describe()]
    assert len(names) == len(set(names)) == len(DRAFT_METRICS) + len(KV_METRICS) + 1
