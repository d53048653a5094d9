"""Greedy outputs under SPARSESPEC equal plain SGLang's, token for token (SmolLM2-135M, float32, CPU).

One-liners, competition problems and long prompts, in lock-step, in unified batches, and with plain rounds between and
requests that the KV manager moves to the host and back: 13 prompts, with ``--all`` 60. ``benchmarks/parity.py`` compares
more text. How answers end, and all else that they say, is compared in ``tests/server/test_answers.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_process import PLAIN, PLAIN_ENV, EngineProcess, plain_rounds_plugin

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from parity import SHORT  # noqa: E402

pytestmark = pytest.mark.slow

DATA = BENCHMARKS / "data"
PROBLEM_CHARACTERS = 240
NEW_TOKENS = 18  # two whole windows of 9
COMMON: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "random_seed": 0,
    "log_level": "warning",
    "max_total_tokens": 12000,
}
LOCKSTEP: dict[str, Any] = {
    **COMMON,
    "speculative_algorithm": "SPARSESPEC",
    "sparsespec_speculate": "always",
    "speculative_num_steps": 8,
    "sparsespec_min_budget": 32,
    "max_running_requests": 8,
    "chunked_prefill_size": 64,
}


def read(name: str, key: str) -> list[str]:
    return [json.loads(line)[key] for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def make_prompts() -> list[str]:
    """20 one-liners, the beginnings of 38 problems, and two prompts of some 600 tokens."""
    aime, olympiad = read("aime24.jsonl", "problem"), read("olympiadbench.jsonl", "question")
    long = ["\n\n".join(olympiad[first : first + 8])[:1700] + "\n\nSolution:" for first in (10, 30)]
    return [*SHORT, *(text[:PROBLEM_CHARACTERS] for text in (aime + olympiad)[:38]), *long]


@pytest.fixture(scope="module")
def prompts(request: pytest.FixtureRequest) -> list[str]:
    """Those that are compared; without ``--all`` a fifth, still more than run at a time."""
    made = make_prompts()
    return made if request.config.getoption("--all") else [*made[::5], made[-1]]


def generate(engine: EngineProcess, prompts: list[str], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    sampling = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return [output["output_ids"] for output in engine.generate(prompt=prompts, sampling_params=sampling)]


@pytest.fixture(scope="module")
def expected(model_path: str, prompts: list[str]) -> dict[str, list[int]]:
    """Plain SGLang's tokens by prompt."""
    with EngineProcess(PLAIN_ENV, model_path=model_path, max_running_requests=16, **COMMON, **PLAIN) as engine:
        tokens = dict(zip(prompts, generate(engine, prompts), strict=True))
    assert len(tokens) > LOCKSTEP["max_running_requests"] and all(len(output) == NEW_TOKENS for output in tokens.values())
    return tokens


def assert_equal(
    engine: EngineProcess, prompts: list[str], expected: dict[str, list[int]], new_tokens: int = NEW_TOKENS
) -> None:
    found = generate(engine, prompts, new_tokens)
    assert dict(zip(prompts, found, strict=True)) == {prompt: expected[prompt][:new_tokens] for prompt in prompts}


def assert_drafted(state: dict[str, Any]) -> None:
    """Drafts were made from few tokens and accepted: this is not plain decoding."""
    assert state["sparsespec_accept_length"] > 1.2
    assert state["sparsespec_kv_read_share"] < 1


@pytest.fixture(scope="module")
def lockstep(model_path: str) -> Iterator[EngineProcess]:
    with EngineProcess(model_path=model_path, **LOCKSTEP) as engine:
        yield engine


def test_lockstep_tokens_are_plain_sglangs(
    lockstep: EngineProcess, prompts: list[str], expected: dict[str, list[int]]
) -> None:
    assert_equal(lockstep, prompts, expected)
    assert_drafted(lockstep.state())


def test_tokens_stay_the_same_when_a_running_engine_stops_speculating(
    lockstep: EngineProcess, prompts: list[str], expected: dict[str, list[int]]
) -> None:
    before = lockstep.state()
    lockstep.set_speculate("never")
    assert_equal(lockstep, prompts[:6], expected)
    never = lockstep.state()
    assert never["sparsespec_speculate"] == "never"
    assert never["sparsespec_accept_histogram"] == before["sparsespec_accept_histogram"]
    assert never["sparsespec_plain_rounds"] > before["sparsespec_plain_rounds"] == 0
    lockstep.set_speculate("always")
    assert_equal(lockstep, prompts[:6], expected)
    always = lockstep.state()
    assert sum(always["sparsespec_accept_histogram"]) > sum(never["sparsespec_accept_histogram"])
    assert always["sparsespec_plain_rounds"] == never["sparsespec_plain_rounds"]


def test_tokens_of_unified_batches_are_plain_sglangs(
    model_path: str, prompts: list[str], expected: dict[str, list[int]]
) -> None:
    settings = {**LOCKSTEP, "sparsespec_schedule": "unified", "speculative_num_steps": 5}
    with EngineProcess(model_path=model_path, **settings) as engine:
        assert_equal(engine, prompts, expected)
        assert_drafted(engine.state())


def test_tokens_of_moved_requests_and_of_rounds_of_all_lengths_are_plain_sglangs(
    model_path: str, prompts: list[str], expected: dict[str, list[int]], tmp_path: Path
) -> None:
    """Every other round is plain, and in every other one a request goes to the host."""
    env = {"SPARSESPEC_TEST_OFFLOAD_INTERVAL": "2", **plain_rounds_plugin(tmp_path, every=2)}
    own = {"sparsespec_host_kv_gb": 0.5, "speculative_num_steps": 5}
    with EngineProcess(env, model_path=model_path, **{**LOCKSTEP, **own}) as engine:
        assert_equal(engine, prompts, expected)
        state = engine.state()
        assert_drafted(state)
        assert state["sparsespec_plain_rounds"] > 5
        assert sum(rounds > 0 for rounds in state["sparsespec_draft_length_histogram"][1:6]) >= 3
        assert state["sparsespec_kv_requests_offloaded"] >= 8 and state["sparsespec_kv_requests_restored"] >= 8


@pytest.mark.parametrize("weights", ["model", pytest.param("fp8", marks=pytest.mark.nightly)])
def test_tokens_of_requests_one_by_one_are_plain_sglangs(
    weights: str, model_path: str, prompts: list[str], expected: dict[str, list[int]]
) -> None:
    """One draft per round, without radix cache and overlap scheduling."""
    own = {
        "speculative_num_steps": 1,
        "sparsespec_draft_weights": weights,
        "disable_radix_cache": True,
        "disable_overlap_schedule": True,
    }
    with EngineProcess(model_path=model_path, **{**LOCKSTEP, **own}) as engine:
        for prompt in (prompts[0], prompts[len(prompts) // 2]):
            assert_equal(engine, [prompt], expected, new_tokens=6)
        assert_drafted(engine.state())
