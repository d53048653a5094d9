"""Greedy outputs under SPARSESPEC equal plain SGLang's, token for token (SmolLM2-135M, float32, CPU).

60 prompts: one-liners, competition problems and two long ones, in lock-step, in unified batches, and with plain rounds
between and requests that the KV manager moves to the host and back. ``benchmarks/parity.py`` compares more text.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_process import PLAIN, PLAIN_ENV, EngineProcess, plain_rounds_plugin

from sglang_sparsespec.sglang_compat import HAS_HOST_TIER

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
    "max_running_requests": 16,
    "chunked_prefill_size": 64,
}


def read(name: str, key: str) -> list[str]:
    return [json.loads(line)[key] for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def make_prompts() -> list[str]:
    """20 one-liners, the beginnings of 38 problems, and two prompts of some 600 tokens."""
    aime, olympiad = read("aime24.jsonl", "problem"), read("olympiadbench.jsonl", "question")
    long = ["\n\n".join(olympiad[first : first + 8])[:1700] + "\n\nSolution:" for first in (10, 30)]
    return [*SHORT, *(text[:PROBLEM_CHARACTERS] for text in (aime + olympiad)[:38]), *long]


PROMPTS = make_prompts()


def generate(engine: EngineProcess, prompts: list[str]) -> list[list[int]]:
    sampling = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    return [output["output_ids"] for output in engine.generate(prompt=prompts, sampling_params=sampling)]


@dataclass(frozen=True)
class Reference:
    """Plain SGLang's answers.

    Attributes:
        tokens: by prompt, to the full length.
        ends: sampling parameters by prompt that end the answer early, one way or another, and the answer.
    """

    tokens: dict[str, list[int]]
    ends: dict[str, tuple[dict[str, Any], dict[str, Any]]]


def early_end(index: int, output: dict[str, Any]) -> dict[str, Any]:
    """Parameters that end ``output`` within or at the end of its tokens; the length may come first."""
    text, ids, place = output["text"], output["output_ids"], 3 + index % 13
    ends: list[dict[str, Any]] = [
        {"stop": [text[place : place + 3]]},
        {"stop_token_ids": [ids[place]]},
        {"stop_regex": [re.escape(text[place : place + 2]) + "$"]},
        {"stop": [text[place + 4 : place + 9], text[place : place + 2]], "stop_token_ids": [ids[place + 2]]},
    ]
    return {"temperature": 0.0, "max_new_tokens": place + 1 + index % 7, **ends[index % len(ends)]}


def answers(engine: EngineProcess, ends: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the API says of each prompt's answer."""
    outputs = engine.generate(prompt=list(ends), sampling_params=list(ends.values()))
    found = {}
    for prompt, output in zip(ends, outputs, strict=True):
        info = output["meta_info"]
        counts = {name: info[name] for name in ("finish_reason", "prompt_tokens", "completion_tokens")}
        found[prompt] = {"text": output["text"], "output_ids": output["output_ids"], **counts}
    return found


@pytest.fixture(scope="module")
def reference(model_path: str) -> Reference:
    with EngineProcess(PLAIN_ENV, model_path=model_path, max_running_requests=16, **COMMON, **PLAIN) as engine:
        sampling = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        outputs = engine.generate(prompt=PROMPTS, sampling_params=sampling)
        ends = {PROMPTS[i]: early_end(i // 2, outputs[i]) for i in range(0, 56, 2)}
        ended = answers(engine, ends)
    tokens = {prompt: output["output_ids"] for prompt, output in zip(PROMPTS, outputs, strict=True)}
    assert len(tokens) == 60 and all(len(output) == NEW_TOKENS for output in tokens.values())
    kinds = [answer["finish_reason"]["type"] for answer in ended.values()]
    assert kinds.count("stop") > 10 and kinds.count("length") > 2
    return Reference(tokens, {prompt: (ends[prompt], ended[prompt]) for prompt in ends})


@pytest.fixture(scope="module")
def expected(reference: Reference) -> dict[str, list[int]]:
    """Plain SGLang's tokens by prompt."""
    return reference.tokens


def assert_equal(engine: EngineProcess, prompts: list[str], expected: dict[str, list[int]]) -> None:
    assert dict(zip(prompts, generate(engine, prompts), strict=True)) == {prompt: expected[prompt] for prompt in prompts}


def assert_ends_equal(engine: EngineProcess, reference: Reference) -> None:
    """Answers that end early end as plain SGLang's do, in every field."""
    found = answers(engine, {prompt: sampling for prompt, (sampling, _) in reference.ends.items()})
    assert found == {prompt: answer for prompt, (_, answer) in reference.ends.items()}


def assert_drafted(state: dict[str, Any]) -> None:
    """Drafts were made from few tokens and accepted: this is not plain decoding."""
    assert state["sparsespec_accept_length"] > 1.2
    assert state["sparsespec_kv_read_share"] < 1


@pytest.fixture(scope="module")
def lockstep(model_path: str) -> Iterator[EngineProcess]:
    with EngineProcess(model_path=model_path, **LOCKSTEP) as engine:
        yield engine


def test_lockstep_tokens_are_plain_sglangs(lockstep: EngineProcess, expected: dict[str, list[int]]) -> None:
    assert_equal(lockstep, PROMPTS, expected)
    assert_drafted(lockstep.state())


def test_answers_end_as_plain_sglangs(lockstep: EngineProcess, reference: Reference) -> None:
    assert_ends_equal(lockstep, reference)


def test_tokens_stay_the_same_when_a_running_engine_stops_speculating(
    lockstep: EngineProcess, expected: dict[str, list[int]]
) -> None:
    before = lockstep.state()
    lockstep.set_speculate("never")
    assert_equal(lockstep, PROMPTS[:20], expected)
    never = lockstep.state()
    assert never["sparsespec_speculate"] == "never"
    assert never["sparsespec_accept_histogram"] == before["sparsespec_accept_histogram"]
    assert never["sparsespec_plain_rounds"] > before["sparsespec_plain_rounds"] == 0
    lockstep.set_speculate("always")
    assert_equal(lockstep, PROMPTS[:20], expected)
    always = lockstep.state()
    assert sum(always["sparsespec_accept_histogram"]) > sum(never["sparsespec_accept_histogram"])
    assert always["sparsespec_plain_rounds"] == never["sparsespec_plain_rounds"]


def test_tokens_of_unified_batches_are_plain_sglangs(model_path: str, reference: Reference) -> None:
    settings = {**LOCKSTEP, "sparsespec_schedule": "unified", "speculative_num_steps": 5}
    with EngineProcess(model_path=model_path, **settings) as engine:
        assert_equal(engine, PROMPTS, reference.tokens)
        assert_ends_equal(engine, reference)
        assert_drafted(engine.state())


def test_tokens_of_moved_requests_and_of_rounds_of_all_lengths_are_plain_sglangs(
    model_path: str, reference: Reference, tmp_path: Path
) -> None:
    """Every other round is plain, and in every third a request goes to the host, where there is a host tier."""
    env = {"SPARSESPEC_TEST_OFFLOAD_INTERVAL": "3", **plain_rounds_plugin(tmp_path, every=2)}
    own = {"sparsespec_host_kv_gb": 0.5 if HAS_HOST_TIER else 0, "speculative_num_steps": 5}
    with EngineProcess(env, model_path=model_path, **{**LOCKSTEP, **own}) as engine:
        assert_equal(engine, PROMPTS, reference.tokens)
        assert_ends_equal(engine, reference)
        state = engine.state()
        assert_drafted(state)
        assert state["sparsespec_plain_rounds"] > 10
        assert sum(rounds > 0 for rounds in state["sparsespec_draft_length_histogram"][1:6]) >= 3
        if HAS_HOST_TIER:
            assert state["sparsespec_kv_requests_offloaded"] >= 20 and state["sparsespec_kv_requests_restored"] >= 20


def test_tokens_of_requests_one_by_one_are_plain_sglangs(model_path: str, expected: dict[str, list[int]]) -> None:
    """One draft per round, with FP8 weights, without radix cache and overlap scheduling."""
    own = {
        "speculative_num_steps": 1,
        "sparsespec_draft_weights": "fp8",
        "disable_radix_cache": True,
        "disable_overlap_schedule": True,
    }
    with EngineProcess(model_path=model_path, **{**LOCKSTEP, **own}) as engine:
        for prompt in PROMPTS[::30]:
            assert_equal(engine, [prompt], expected)
        assert_drafted(engine.state())
