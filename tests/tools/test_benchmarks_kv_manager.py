"""What the KV manager's benchmark makes of a scheduler's states."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import kv_manager  # noqa: E402
from kv_manager import MOVES, RECOMPUTED, RETRACTIONS, Sample, summary  # noqa: E402


def sample(t: float, **state: Any) -> Sample:
    rounds = state.pop("rounds", t)
    defaults = {"used": 0.5, "running": 8, "waiting": 1, "offloaded": 0, "prefilled": 100, "moved": {}}
    sums = {"batch_sum": 8 * rounds, "round_us": 1e4 * rounds, "generated": 0.0}
    return Sample(t=t, rounds=rounds, **{**defaults, **sums, **state})


def test_the_steady_state_is_from_the_first_to_the_last_contended_sample_after_the_first_round() -> None:
    samples = [
        sample(0.0, rounds=0.0),
        sample(1.0, rounds=0.0),  # prefills only
        sample(2.0, waiting=0),
        sample(3.0),
        sample(4.0, waiting=0),
        sample(5.0, waiting=0, offloaded=1),
        sample(6.0, waiting=0),
    ]
    assert [s.t for s in kv_manager.steady_state(samples)] == [3.0, 4.0, 5.0]
    assert kv_manager.steady_state([sample(float(t), waiting=0) for t in range(3)]) == []


def test_utilisation_is_weighted_by_time() -> None:
    assert kv_manager.mean_over_time([sample(0, used=0.2), sample(1, used=1.0), sample(4, used=0.0)]) == pytest.approx(0.8)
    assert kv_manager.mean_over_time([sample(0)]) is None


def test_the_steady_throughput_is_that_of_the_contended_samples() -> None:
    generated = (0.0, 100.0, 700.0, 900.0)
    samples = [sample(float(t), generated=tokens, waiting=int(0 < t < 3)) for t, tokens in enumerate(generated)]
    assert summary(samples)["tokens_per_s_steady"] == 600.0
    assert summary(samples[:2])["tokens_per_s_steady"] is None  # an instant
    assert summary(samples[:1])["tokens_per_s_steady"] is None


def rounds(*steps: tuple[int, float, float, bool], prefill_at: int | None = None) -> list[Sample]:
    """One sample per (batch size, tokens a request, milliseconds of a round, whether a request was moved in it)."""
    time, batch, tokens, moves, prefilled, samples = 0.0, 0.0, 0.0, 0, 0, []
    for index, (size, per_request, ms, moved) in enumerate([(0, 0.0, 0.0, False), *steps]):
        time, batch, tokens, moves = time + 1e3 * ms, batch + size, tokens + size * per_request, moves + moved
        prefilled += index == prefill_at
        state = {"round_us": time, "batch_sum": batch, "generated": tokens, "prefilled": prefilled}
        samples.append(sample(float(index), **state, moved={"offloads": moves}))
    return samples


def ratio(samples: list[Sample]) -> float | None:
    return summary(samples)["step_ratio_moving"]


def test_rounds_with_moves_are_compared_with_rounds_without_and_without_prefills() -> None:
    assert ratio(rounds(*[(8, 4, 10, False), (8, 4, 12, True)] * 4)) == pytest.approx(1.2)
    assert ratio(rounds(*[(8, 4, 10, False)] * 4)) is None
    beside = rounds((8, 4, 10, False), (8, 4, 500, True), (8, 4, 12, True), prefill_at=2)
    assert ratio(beside) == pytest.approx(1.2)


def test_rounds_of_more_requests_or_more_drafts_are_not_taken_for_slower_ones() -> None:
    """Requests move when many run and drafts are long; a round's time is 2 + size / 2 + tokens, and 3 more for a move."""
    cases = [(size, tokens) for size in (8, 16, 32) for tokens in (1.0, 4.0, 7.0)]
    for extra in (0, 3):
        steps = []
        for size, tokens in cases:
            moved = size + 4 * tokens > 30
            steps += [(size, tokens, 2 + size / 2 + tokens + extra * moved, moved)] * 2
            steps += [(size, tokens, 2 + size / 2 + tokens, False)] * (not moved or size == 16)
        mean = sum(ms - extra * moved for _, _, ms, moved in steps) / len(steps)
        assert ratio(rounds(*steps)) == pytest.approx(1 + extra / mean, abs=1e-3)
        assert summary(rounds(*steps))["step_ratio_moving_error"] == pytest.approx(0, abs=1e-3)


def test_a_noisy_ratio_has_an_error() -> None:
    noisy = rounds(*[(8, 4, 9, False), (8, 4, 11, False), (8, 4, 10, True), (8, 4, 14, True)] * 4)
    assert ratio(noisy) == pytest.approx(1.2)
    # sqrt((8 * 1 + 8 * 4) / 14 * (1 / 8 + 1 / 8)) ms of 10
    assert summary(noisy)["step_ratio_moving_error"] == pytest.approx(0.0845, abs=1e-3)


def test_outputs_that_were_cut_are_not_compared() -> None:
    assert kv_manager.equal_share([[1], [2], None, [4]], [[1], [3], [5], None]) == 0.5
    assert kv_manager.equal_share([None], [[1]]) is None


class Manager:
    """Stands in for SGLang's tokenizer manager: one request's worth of state."""

    def __init__(self) -> None:
        self.load = SimpleNamespace(
            num_used_tokens=30,
            max_total_num_tokens=100,
            num_running_reqs=0,
            num_waiting_reqs=0,
            total_prefill_uncached_tokens=1000,
            decode_moments=None,
        )
        self.state = {**dict.fromkeys(MOVES.values(), 7), RECOMPUTED: 90, RETRACTIONS: 5}
        self.load_snapshot_reader = SimpleNamespace(read_all=lambda: [self.load])
        self.aborted = asyncio.Event()

    async def get_internal_state(self) -> list[dict[str, int]]:
        return [dict(self.state)]

    def abort_request(self, abort_all: bool) -> None:
        assert abort_all
        self.aborted.set()


class Engine:
    """Stands in for ``sglang.Engine``: prefills 60 tokens for prompts of 50; endless if ``endless``."""

    def __init__(self, endless: bool) -> None:
        self.endless = endless
        self.tokenizer_manager = Manager()
        self.sampling: list[dict[str, Any]] = []

    async def async_generate(self, input_ids: list[list[int]], sampling_params: list[dict[str, Any]]) -> Any:
        assert all(sampling["ignore_eos"] for sampling in sampling_params)
        self.sampling = sampling_params
        manager = self.tokenizer_manager
        manager.load.total_prefill_uncached_tokens += 60
        manager.load.decode_moments = [3.0, 6.0, 3e4, 12.0, 6e4, 9.0]
        manager.state[RECOMPUTED] += 10
        manager.state[RETRACTIONS] += 2
        await (manager.aborted.wait() if self.endless else asyncio.sleep(0.03))
        meta = {"completion_tokens": 4, "finish_reason": {"type": "abort" if self.endless else "length"}}
        return [{"meta_info": meta, "output_ids": [1, 2, 3, 4]} for _ in input_ids]


def serve(engine: Engine, lengths: list[int], declared: int = 8) -> dict[str, Any]:
    time_limit = 0.05 if engine.endless else 0
    args = argparse.Namespace(sample_seconds=0.01, time_limit=time_limit, declared_new_tokens=declared)
    return asyncio.run(kv_manager.run_requests(engine, [[0] * 20, [0] * 30], lengths, args))


@pytest.mark.parametrize("endless", [False, True])
def test_recomputed_tokens_and_retractions_are_those_of_the_run_even_if_it_is_cut(endless: bool) -> None:
    found = serve(Engine(endless), [4, 4])
    assert found["cut_by_time_limit"] == endless
    assert (found["recomputed_tokens"], found["retractions"], found["prefilled_tokens"]) == (10, 2, 60)
    assert found["output_tokens"] == (9 if endless else 8)
    assert found["outputs"] == ([None, None] if endless else [[1, 2, 3, 4]] * 2)
    assert found["offloads"] == 0
    assert len(found["samples"]) > 1 and found["utilisation_mean"] == pytest.approx(0.3)


@pytest.mark.parametrize("declared", [0, 8])
def test_requests_declare_one_length_and_end_at_their_own(declared: int) -> None:
    engine = Engine(endless=False)
    serve(engine, [4, 4], declared)
    assert [sampling["max_new_tokens"] for sampling in engine.sampling] == [declared or 4] * 2
    ends = [sampling.get("custom_params") for sampling in engine.sampling]
    assert ends == [{"end_at": 4} if declared else None] * 2


def test_an_output_of_another_length_than_drawn_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="has 4 tokens instead of 5"):
        serve(Engine(endless=False), [4, 5])


def test_an_engine_without_the_plugin_is_an_error() -> None:
    engine = Engine(endless=False)
    engine.tokenizer_manager.state = {}
    with pytest.raises(RuntimeError, match="did not load this benchmark's plugin"):
        asyncio.run(kv_manager.read_sample(engine.tokenizer_manager, 0.0))


class Request:
    """Stands in for SGLang's ``Req``: ends at max_new_tokens."""

    def __init__(self, tokens: int, custom_params: dict[str, int] | None) -> None:
        self.output_ids = [0] * tokens
        self.sampling_params = SimpleNamespace(max_new_tokens=100, custom_params=custom_params)
        self.finished_len: int | None = None

    def update_finish_state(self, new_accepted_len: int = 1) -> None:
        if len(self.output_ids) >= self.sampling_params.max_new_tokens:
            self.finished_len = self.sampling_params.max_new_tokens


@pytest.mark.parametrize(
    ("tokens", "custom_params", "finished_len"),
    [(9, {"end_at": 10}, None), (13, {"end_at": 10}, 10), (13, None, None), (100, {"end_at": 200}, 100)],
)
def test_a_request_ends_at_its_length_and_declares_another(
    tokens: int, custom_params: dict[str, int] | None, finished_len: int | None
) -> None:
    request = Request(tokens, custom_params)
    kv_manager.end_at_length(Request.update_finish_state, request, 4)
    assert request.finished_len == finished_len
    assert request.sampling_params.max_new_tokens == 100


def test_only_what_retracted_requests_are_prefilled_again_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_manager, "_counts", Counter())
    sizes = [(30, False), (50, True), (7, True)]
    reqs = [SimpleNamespace(retracted_stain=stain) for _, stain in sizes]
    kv_manager.count_recomputed(None, SimpleNamespace(reqs=reqs, extend_lens=[length for length, _ in sizes]))
    kv_manager.count_retraction(None, reqs[1])
    answer = SimpleNamespace(internal_state={"other": 1})
    kv_manager.add_counts(answer, scheduler=None)
    assert answer.internal_state == {"other": 1, RECOMPUTED: 57, RETRACTIONS: 1}
