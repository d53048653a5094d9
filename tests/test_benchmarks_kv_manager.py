"""What the KV manager's benchmark makes of a scheduler's states."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def sample(t: float, **state: Any) -> Any:
    from kv_manager import Sample

    rounds = state.pop("rounds", t)
    defaults = {"used": 0.5, "running": 8, "waiting": 1, "offloaded": 0, "prefilled": 100, "moved": {}}
    sums = {"batch_sum": 8 * rounds, "round_us": 1e4 * rounds, "generated": 0.0}
    return Sample(t=t, rounds=rounds, **{**defaults, **sums, **state})


def test_the_steady_state_is_from_the_first_to_the_last_contended_sample_after_the_first_round() -> None:
    from kv_manager import steady_state

    samples = [
        sample(0.0, rounds=0.0),
        sample(1.0, rounds=0.0),  # prefills only
        sample(2.0, waiting=0),
        sample(3.0),
        sample(4.0, waiting=0),
        sample(5.0, waiting=0, offloaded=1),
        sample(6.0, waiting=0),
    ]
    assert [s.t for s in steady_state(samples)] == [3.0, 4.0, 5.0]
    assert steady_state([sample(float(t), waiting=0) for t in range(3)]) == []


def test_utilisation_is_weighted_by_time() -> None:
    from kv_manager import mean_over_time

    assert mean_over_time([sample(0, used=0.2), sample(1, used=1.0), sample(4, used=0.0)]) == pytest.approx(0.8)
    assert mean_over_time([sample(0)]) is None


def test_the_steady_throughput_is_that_of_the_contended_samples() -> None:
    from kv_manager import summary

    generated = (0.0, 100.0, 700.0, 900.0)
    samples = [sample(float(t), generated=tokens, waiting=int(0 < t < 3)) for t, tokens in enumerate(generated)]
    assert summary(samples)["tokens_per_s_steady"] == 600.0
    assert summary(samples[:2])["tokens_per_s_steady"] is None  # an instant
    assert summary(samples[:1])["tokens_per_s_steady"] is None


def moving_rounds(size: int, steps: list[tuple[float, bool]], prefill_at: int | None = None) -> list[Any]:
    """One sample per (milliseconds of a round, whether a request was moved in it)."""
    time, batch, moves, prefilled, samples = 0.0, 0.0, 0, 0, []
    for index, (ms, moved) in enumerate([(0.0, False), *steps]):
        time, batch, moves = time + 1e3 * ms, batch + size, moves + moved
        prefilled += index == prefill_at
        state = {"round_us": time, "batch_sum": batch, "prefilled": prefilled, "moved": {"offloads": moves}}
        samples.append(sample(float(index), **state))
    return samples


def test_rounds_are_compared_at_equal_batch_sizes() -> None:
    from kv_manager import summary

    found = summary(moving_rounds(8, [(10, False), (12, True)] * 4))
    assert (found["step_ms_still"], found["step_ms_moving"]) == (10, 12)
    assert found["step_ratio_moving"] == pytest.approx(1.2)
    assert summary(moving_rounds(8, [(10, False)] * 4))["step_ratio_moving"] is None


def test_rounds_beside_a_prefill_do_not_count() -> None:
    from kv_manager import summary

    found = summary(moving_rounds(8, [(10, False), (500, False), (10, False)], prefill_at=2))
    assert found["step_ms_still"] == 10


def test_outputs_that_were_cut_are_not_compared() -> None:
    from kv_manager import equal_share

    assert equal_share([[1], [2], None, [4]], [[1], [3], [5], None]) == 0.5
    assert equal_share([None], [[1]]) is None


class Manager:
    """Stands in for SGLang's tokenizer manager: one request's worth of state."""

    def __init__(self) -> None:
        from _end_plugin import RECOMPUTED, RETRACTIONS
        from kv_manager import COUNTERS

        self.load = SimpleNamespace(
            num_used_tokens=30,
            max_total_num_tokens=100,
            num_running_reqs=0,
            num_waiting_reqs=0,
            total_prefill_uncached_tokens=1000,
            decode_moments=None,
        )
        self.state = {**dict.fromkeys(COUNTERS.values(), 7), RECOMPUTED: 90, RETRACTIONS: 5}
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
        from _end_plugin import RECOMPUTED, RETRACTIONS

        assert all(sampling["ignore_eos"] for sampling in sampling_params)
        self.sampling = sampling_params
        manager = self.tokenizer_manager
        manager.load.total_prefill_uncached_tokens += 60
        manager.load.decode_moments = [3.0, 6.0, 3e4, 12.0, 6e4, 9.0]
        manager.state[RECOMPUTED] += 10
        manager.state[RETRACTIONS] += 2
        await (manager.aborted.wait() if self.endless else asyncio.sleep(0.03))
        reason = {"type": "abort" if self.endless else "length"}
        meta = {"completion_tokens": 4, "finish_reason": reason}
        return [{"meta_info": meta, "output_ids": [1, 2, 3, 4]} for _ in input_ids]


def serve(engine: Engine, lengths: list[int], declared: int = 8) -> dict[str, Any]:
    from kv_manager import run_requests

    time_limit = 0.05 if engine.endless else 0
    args = argparse.Namespace(sample_seconds=0.01, time_limit=time_limit, declared_new_tokens=declared)
    return asyncio.run(run_requests(engine, [[0] * 20, [0] * 30], lengths, args, True))


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
    from kv_manager import Sampler

    with pytest.raises(RuntimeError, match="did not load benchmarks/_end_plugin.py"):
        asyncio.run(Sampler(engine, False).counts())


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
    from _end_plugin import end_at_length

    request = Request(tokens, custom_params)
    end_at_length(Request.update_finish_state, request, 4)
    assert request.finished_len == finished_len
    assert request.sampling_params.max_new_tokens == 100


def test_only_what_retracted_requests_are_prefilled_again_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    import _end_plugin

    monkeypatch.setattr(_end_plugin, "_counts", Counter())
    sizes = [(30, False), (50, True), (7, True)]
    reqs = [SimpleNamespace(retracted_stain=stain, extend_range=SimpleNamespace(length=n)) for n, stain in sizes]
    _end_plugin.count_recomputed(None, SimpleNamespace(reqs=reqs))
    _end_plugin.count_retraction(None, reqs[1])
    answer = SimpleNamespace(internal_state={"other": 1})
    _end_plugin.add_counts(answer, scheduler=None)
    assert answer.internal_state == {"other": 1, _end_plugin.RECOMPUTED: 57, _end_plugin.RETRACTIONS: 1}


def test_processes_that_inherit_the_path_find_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import _end_plugin

    monkeypatch.setattr(sys, "path", list(sys.path))
    _end_plugin.install(tmp_path)
    (found,) = entry_points(group="sglang.srt.plugins", name="zz_benchmark_end")
    assert found.load() is _end_plugin.register


ARGUMENTS = {
    "model_path": "m",
    "load_format": "auto",
    "device": "cuda",
    "dtype": "bfloat16",
    "log_level": "warning",
    "random_prompts": True,
    "prefill_backend": "triton",
    "decode_backend": "flashinfer",
    "k": 8,
    "engine_args": "{}",
    "max_total_tokens": 1000,
    "max_running_requests": 4,
    "publish_interval": 4,
    "host_kv_gb": 2.0,
    "requests": 200,
    "prompt_tokens": 20,
    "min_new_tokens": 10,
    "max_new_tokens": 1000,
    "declared_new_tokens": 1000,
    "seed": 0,
}


def test_engines_differ_in_what_their_names_say() -> None:
    from kv_manager import ENGINES, settings_of

    args = argparse.Namespace(**ARGUMENTS)
    retract = settings_of("sparsespec:retract", args)
    assert settings_of("sparsespec:host", args) == {**retract, "sparsespec_host_kv_gb": 2.0}
    assert settings_of("sparsespec:retract-aggressive", args) == {**retract, "schedule_conservativeness": 0.0}
    assert settings_of("sparsespec:host:unified", args)["sparsespec_schedule"] == "unified"
    assert "speculative_algorithm" not in settings_of("plain:aggressive", args)
    assert all(settings_of(name, args)["max_total_tokens"] == 1000 for name in ENGINES)
    for unknown in ("plain:host", "sparsespec", "plain:default:unified", "other:default"):
        with pytest.raises(SystemExit, match=unknown):
            settings_of(unknown, args)


def test_requests_are_the_same_every_time_and_share_no_prefix() -> None:
    from kv_manager import make_requests

    args = argparse.Namespace(**ARGUMENTS)
    prompts, lengths = make_requests(args)
    assert make_requests(args) == (prompts, lengths)
    assert len({tuple(prompt[:2]) for prompt in prompts}) == 200
    assert all(len(prompt) == 20 for prompt in prompts)
    assert 10 <= min(lengths) < 20 and 500 < max(lengths) <= 1000
    # Log-uniform: half of them are below the geometric mean.
    assert 70 < sum(length < 100 for length in lengths) < 130
