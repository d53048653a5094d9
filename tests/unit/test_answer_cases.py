"""What the property test over HTTP takes for a difference of two answers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from answer_cases import case_of, difference_of_turns


def chat(*lists: tuple[float, list[float]]) -> dict[str, Any]:
    """A chat answer: of each token its log-probability, and those of its list."""
    content = [
        {"token": "a", "logprob": own, "top_logprobs": [{"token": "a", "logprob": value} for value in best]}
        for own, best in lists
    ]
    return {"choices": [{"logprobs": {"content": content}}], "usage": {"cached_tokens": 3}}


PLAIN = chat((-1.0, [-1.0, -2.0]), (-0.5, [-1.0, -2.0]))  # the second list is the first one's
OURS = chat((-1.0, [-1.0, -2.0]), (-0.5, [-0.5, -3.0]))
SHARED = chat((-1.0, [-1.0, -2.0]), (-0.5, [-3.0]))  # the second token's text is another one's, too
OTHERS = copy.deepcopy(SHARED)
OTHERS["choices"][0]["logprobs"]["content"][1]["top_logprobs"][0]["token"] = "b"


@pytest.mark.parametrize(
    ("plain", "ours", "differs"),
    [
        (PLAIN, OURS, False),
        (OURS, PLAIN, True),
        (PLAIN, SHARED, False),
        (OURS, SHARED, True),
        (PLAIN, OTHERS, True),
        (OURS, chat((-1.0, [-1.0, -2.0]), (-0.5, [-0.5, -3.1])), True),
        (PLAIN, chat((-1.0, [-1.0, -2.0]), (-0.6, [-0.6, -3.0])), True),
    ],
)
def test_only_lists_that_are_another_tokens_are_left_out(plain: Any, ours: Any, differs: bool) -> None:
    turns = [(copy.deepcopy(answer), [{"meta_info": {"cached_tokens": 5, "x_ts": id(answer)}}]) for answer in (plain, ours)]
    assert bool(difference_of_turns(*turns)) == differs


def test_what_the_second_turn_finds_in_the_cache_is_compared() -> None:
    plain, ours = (([{"output_ids": [1]}], [{"meta_info": {"cached_tokens": count}}]) for count in (5, 6))
    assert difference_of_turns(plain, ours) == "second turn[0].meta_info.cached_tokens: plain SGLang 5, here 6"
    assert difference_of_turns(plain, ours, compare_cached=False) is None


def test_a_seed_gives_the_same_case_again() -> None:
    cases = [case_of(seed, 280) for seed in range(200)]
    assert cases == [case_of(seed, 280) for seed in range(200)]
    assert {route for route, _ in cases} == {"generate", "v1/completions", "v1/chat/completions"}
