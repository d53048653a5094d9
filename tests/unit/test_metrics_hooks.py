"""Which verifications are counted, who is told, and which ranks report."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_sparsespec.scheduler_patch import metrics_hooks
from sglang_sparsespec.scheduler_patch.metrics_hooks import count_verifications, report_draft_metrics
from sglang_sparsespec.sglang_compat import COUNTS_CORRECT_DRAFTS


class Worker:
    """Stands in for ``SparseSpecWorker``; what it is told is recorded."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.metrics = SimpleNamespace(
            note_verifications=lambda accepted, drafted: self.told.append(("metrics", accepted, drafted)),
            refresh=lambda: None,
            log=lambda: self.told.append("log"),
            export=lambda labels: self.told.append("export"),
        )
        self.planner = SimpleNamespace(
            note_acceptance=lambda accepted, drafted: self.told.append(("planner", accepted, drafted))
        )


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(metrics_hooks, "SparseSpecWorker", Worker)
    return Worker()


class Req:
    """Stands in for SGLang's request after a round of its own."""

    def __init__(self, ended: bool = False, is_retracted: bool = False) -> None:
        self.is_retracted = is_retracted
        self.finished = lambda: ended
        self.spec_verify_ct, self.spec_num_correct_drafts = 1, 3
        self.spec_correct_drafts_histogram = [0, 0, 0, 1]


def settle(worker: Any, reqs: list[Req], accepted: list[int], **outcome: Any) -> SimpleNamespace:
    """SGLang settles a round of ``reqs``; the metrics reporter."""
    values = {"plain_steps": 0, "drafted": 8, **outcome}
    result = SimpleNamespace(outcome=SimpleNamespace(**values), num_correct_drafts_per_req_cpu=accepted)
    reporter = SimpleNamespace(spec_num_forward_ct=10, spec_num_correct_drafts=20)
    processor = SimpleNamespace(model_worker=worker, metrics_reporter=reporter)
    count_verifications(None, processor, result, SimpleNamespace(reqs=reqs))
    return reporter


def test_a_round_is_told_to_metrics_and_planner(worker: Worker) -> None:
    settle(worker, [Req(), Req()], [3, 8])
    assert worker.told == [("metrics", [3, 8], 8), ("planner", [3, 8], 8)]


def test_requests_that_have_ended_or_left_are_not_counted(worker: Worker) -> None:
    settle(worker, [Req(ended=True), Req(), Req(is_retracted=True)], [1, 2, 3])
    assert worker.told == [("metrics", [2], 8), ("planner", [2], 8)]


def test_a_round_of_fewer_drafts_is_told_as_such(worker: Worker) -> None:
    settle(worker, [Req(), Req()], [0, 3], drafted=3)
    assert worker.told == [("metrics", [0, 3], 3), ("planner", [0, 3], 3)]


def test_plain_rounds_count_as_forwards_of_one_token(worker: Worker) -> None:
    """SGLang has counted one forward in which 3 drafts were accepted, of a round of 4 plain steps."""
    reqs = [Req(), Req(ended=True)]
    reporter = settle(worker, reqs, [3, 3], plain_steps=4, drafted=0)
    assert worker.told == []
    assert reporter.spec_num_forward_ct == 10 + 3 * 2
    # SGLang is about to add 3 + 3 where it has such a counter.
    assert reporter.spec_num_correct_drafts == (20 - 6 if COUNTS_CORRECT_DRAFTS else 20)
    assert (reqs[0].spec_verify_ct, reqs[0].spec_num_correct_drafts) == (4, 0)
    assert reqs[0].spec_correct_drafts_histogram == [4, 0, 0, 0]
    assert (reqs[1].spec_verify_ct, reqs[1].spec_num_correct_drafts) == (1, 3)


def test_prefill_batches_are_not_counted(worker: Worker) -> None:
    processor = SimpleNamespace(model_worker=worker)
    count_verifications(None, processor, SimpleNamespace(), SimpleNamespace(reqs=[Req()]))
    assert worker.told == []


def test_rounds_of_other_algorithms_are_left_alone(worker: Worker) -> None:
    other = SimpleNamespace()
    reqs = [Req()]
    assert settle(other, reqs, [3], plain_steps=4).spec_num_forward_ct == 10
    assert reqs[0].spec_verify_ct == 1


def reporter_of(worker: Any, first_rank: bool, enabled: bool) -> SimpleNamespace:
    return SimpleNamespace(
        scheduler=SimpleNamespace(draft_worker=worker),
        forward_ct_decode=40,
        decode_log_interval=40,
        enable_metrics=True,
        is_stats_logging_rank=first_rank,
        current_scheduler_metrics_enabled=enabled,
        metrics_collector=SimpleNamespace(labels={}),
    )


@pytest.mark.parametrize(
    ("first_rank", "enabled", "expected"),
    [
        (True, False, ["log"]),
        (True, True, ["log", "export"]),
        (False, False, []),
        (False, True, ["export"]),  # --enable-metrics-for-all-schedulers
    ],
)
def test_ranks_report_where_sglang_does(
    worker: Worker, first_rank: bool, enabled: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank counts the same rounds: reported by each of them, they would add up to a multiple."""
    monkeypatch.setattr(metrics_hooks, "manager_of", lambda scheduler: None)
    report_draft_metrics(None, reporter_of(worker, first_rank, enabled))
    assert worker.told == expected


def test_the_kv_manager_reports_beside_it(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    manager_metrics = SimpleNamespace(
        log=lambda utilisation: worker.told.append(("manager log", utilisation)),
        export=lambda labels, utilisation: worker.told.append(("manager export", utilisation)),
    )
    manager = SimpleNamespace(metrics=manager_metrics, utilisation=0.5)
    monkeypatch.setattr(metrics_hooks, "manager_of", lambda scheduler: manager)
    report_draft_metrics(None, reporter_of(worker, True, True))
    assert worker.told == ["log", ("manager log", 0.5), "export", ("manager export", 0.5)]


@pytest.mark.parametrize("other", [None, SimpleNamespace()])
def test_nothing_is_reported_between_intervals_or_for_other_algorithms(worker: Worker, other: Any) -> None:
    report_draft_metrics(None, reporter_of(other, True, True))
    reporter = reporter_of(worker, True, True)
    reporter.forward_ct_decode = 41
    report_draft_metrics(None, reporter)
    assert worker.told == []
