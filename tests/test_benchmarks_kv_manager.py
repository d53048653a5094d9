"""What the KV manager's benchmark reads from an engine's log."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def decode(running: int, usage: float, queued: int) -> str:
    """A decode line as SGLang 0.5.17 writes it."""
    return (
        f"[2026-11-25 08:26:38] Decode batch, #running-req: {running}, #token: 1193, token usage: {usage:.2f}, "
        f"accept len: 3.98, accept rate: 0.37, cpu graph: False, gen throughput (token/s): 2481.33, #queue-req: {queued}"
    )


def prefill(tokens: int) -> str:
    return (
        f"[2026-11-25 08:26:38] Prefill batch, #new-seq: 1, #new-token: {tokens}, #cached-token: 1, token usage: 0.65, "
        "#running-req: 4, #queue-req: 9, #pending-token: 338, cpu graph: False, input throughput (token/s): 30.71"
    )


def manager(gigabytes: float) -> str:
    from sglang_sparsespec.metrics import KVManagerMetrics

    lines: list[str] = []
    metrics = KVManagerMetrics(1, 8, 7, int(gigabytes * 1e9), 0)
    import logging

    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sglang_sparsespec.metrics")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        metrics.log(0.9)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return lines[0]


def test_recomputed_tokens_are_those_beyond_the_prompts() -> None:
    from kv_manager import analyse

    lines = [(0.0, prefill(100)), (1.0, decode(4, 0.9, 2)), (2.0, prefill(30)), (3.0, decode(4, 0.5, 2))]
    found = analyse(lines, prompt_tokens=100, interval=1)
    assert found["recomputed_tokens"] == 30
    assert found["utilisation_steady"] == pytest.approx(0.7)


def test_retractions_are_counted() -> None:
    from kv_manager import analyse

    line = "KV cache pool is full. Retract requests. #retracted_reqs: 3, #new_tokens_gained: 100, #new_token_ratio: 0.1"
    assert analyse([(0.0, line), (0.1, line)], 0, 1)["retracted_requests"] == 6


def test_utilisation_leaves_out_the_time_when_nothing_waits() -> None:
    from kv_manager import analyse

    lines = [(float(i), decode(4, 0.96, 1)) for i in range(5)] + [(5.0, decode(1, 0.1, 0))]
    assert analyse(lines, 0, 1)["utilisation_steady"] == pytest.approx(0.96)


def test_rounds_are_compared_at_equal_batch_sizes() -> None:
    from kv_manager import analyse

    lines = [(0.0, decode(8, 0.9, 1)), (0.0, manager(1))]
    now = 0.0
    for index in range(1, 9):
        moving = index % 2
        now += 0.012 if moving else 0.010
        lines += [(now, decode(8, 0.9, 1)), (now, manager(1 + (index + 1) // 2))]
    assert analyse(lines, 0, 1)["step_ms_ratio_moving"] == pytest.approx(1.2)


def test_rounds_beside_a_prefill_do_not_count() -> None:
    from kv_manager import analyse

    lines = [
        (0.0, decode(8, 0.9, 1)), (0.0, manager(1)),
        (0.01, decode(8, 0.9, 1)), (0.01, manager(1)),
        (0.5, prefill(10)),
        (1.0, decode(8, 0.9, 1)), (1.0, manager(2)),
        (1.02, decode(8, 0.9, 1)), (1.02, manager(3)),
    ]  # fmt: skip
    assert analyse(lines, 0, 1)["step_ms_ratio_moving"] == pytest.approx(2.0)


def test_without_both_kinds_of_rounds_there_is_no_ratio() -> None:
    from kv_manager import analyse

    assert analyse([(0.0, decode(8, 0.9, 1)), (1.0, decode(8, 0.9, 1))], 0, 1)["step_ms_ratio_moving"] is None
