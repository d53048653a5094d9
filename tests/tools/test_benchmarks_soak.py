"""The soak: what it asks, what it takes for a well-formed answer, and when memory has grown."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.append(str(REPO / "benchmarks"))

import soak  # noqa: E402

PROMPTS = ["Hello", [1, 2, 3]]


def answer(ids: list[int], kind: str = "length", text: str = "x", **info: Any) -> dict[str, Any]:
    meta = {"completion_tokens": len(ids), "finish_reason": {"type": kind}, **info}
    return {"text": text, "output_ids": ids, "meta_info": meta}


def request(kind: str, max_new_tokens: int = 2, **sampling: Any) -> soak.Request:
    body: dict[str, Any] = {"sampling_params": {"max_new_tokens": max_new_tokens, **sampling}}
    if kind == "logprobs":
        body["return_logprob"] = True
    return soak.Request(kind, "generate", body)


def test_requests_are_of_all_kinds_and_the_same_in_every_run() -> None:
    first, second = (soak.make_requests(3000, PROMPTS, 96, True) for _ in range(2))
    assert first == second
    counts = Counter(item.kind for item in first)
    assert set(counts) == set(soak.SHARES) and min(counts.values()) > 80
    assert "penalties" not in {item.kind for item in soak.make_requests(3000, PROMPTS, 96, False)}


@pytest.mark.parametrize(
    ("asked", "given", "events"),
    [
        (request("greedy"), answer([1]), []),  # ended by its length too early
        (request("greedy"), answer([1, 2, 3]), []),
        (request("greedy"), answer([1, 2], completion_tokens=3), []),
        (request("greedy"), answer([1], "abort"), []),
        (request("stops", 1, stop=["x"]), answer([1], text="an x, and more tokens after it"), []),
        (request("regex"), answer([1], "stop", "2024-1-1"), []),
        (
            request("logprobs"),
            answer([1, 2], output_token_logprobs=[[-1, 1], [-2, 2]], output_top_logprobs=[[[-1, 1]], [[-1, 3]]]),
            [],
        ),
        (request("logprobs"), answer([1, 2], output_token_logprobs=[[-1, 1]], output_top_logprobs=[[[-1, 1]]]), []),
        (request("stream"), answer([1, 2]), [answer([5]), answer([1, 2])]),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_malformed(asked: soak.Request, given: Any, events: list[Any]) -> None:
    with pytest.raises(soak.MalformedError):
        soak.check_answer(asked, given, events)


def test_other_answers_are_well_formed() -> None:
    soak.check_answer(request("greedy"), answer([1, 2]))
    soak.check_answer(request("stops", 2, stop=["x"]), answer([1, 2], text="at its length the last token is an x"))
    soak.check_answer(request("abort"), answer([1], "abort"))
    soak.check_answer(request("stream"), answer([1, 2]), [answer([1]), answer([1, 2])])
    tops = {"output_token_logprobs": [[-1, 1], [-2, 2]], "output_top_logprobs": [[[-1, 1]], [[-2, 2]]]}
    soak.check_answer(request("logprobs"), answer([1, 2], **tops))
    asked = soak.Request("json", "v1/chat/completions", {})
    person = {"message": {"content": json.dumps({"name": "A", "age": 5})}, "finish_reason": "stop"}
    soak.check_chat(asked, {"choices": [person]})
    person["message"] = {"content": '{"name": "A"}'}
    with pytest.raises(soak.MalformedError):
        soak.check_chat(asked, {"choices": [person]})


@pytest.mark.parametrize(("slope", "grown"), [(0, 0), (10, 300)])
def test_memory_that_rises_over_the_last_half_has_grown(slope: int, grown: float) -> None:
    sampler = soak.MemorySampler()
    # The first half rises in any case, as caches fill.
    sampler.samples = [{"a 1": (min(i, 40) * 100 + max(0, i - 40) * slope) * soak.MEGABYTE} for i in range(80)]
    assert sampler.growth()["a 1"]["growth_mb"] == pytest.approx(grown, abs=1)


def test_a_process_in_a_session_of_its_own_is_sampled() -> None:
    import subprocess

    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    try:
        found = soak.processes_of_children()
        assert any(name.endswith(f" {child.pid}") and size > 0 for name, size in found.items()), (os.getpid(), found)
    finally:
        child.communicate(b"\n")


def test_ends_and_divergences_are_told_apart() -> None:
    asked = {index: request("greedy") for index in range(3)}
    plain = soak.Outcome()
    tops = [[[-1.0, 1, None], [-1.1, 9, None]]] * 2
    plain.answers = {index: answer([1, 1], output_top_logprobs=tops) for index in range(3)}
    ours = {0: answer([1, 1]), 1: answer([1, 9]), 2: answer([1, 1], text="other")}
    found = soak.compare(asked, ours, plain, 0.25)
    assert found["compared"] == 3 and found["equal"] == 2 and found["other_ends_of_equal_tokens"] == 1
    assert found["divergences"][0]["margin"] == pytest.approx(0.1) and not found["ties_only"]
    del ours[2]
    assert soak.compare(asked, ours, plain, 0.25)["ties_only"] and not soak.compare(asked, ours, plain, 0.0)["ties_only"]
