"""A request ends where plain decoding would have ended it, however many tokens a round yields."""

from __future__ import annotations

import inspect
import random
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_parts import needs_hook

from sglang_sparsespec.scheduler_patch.accepted_run import (
    finish_token_by_token,
    top_logprobs_of_each_token,
    true_accept_length,
)
from sglang_sparsespec.sglang_compat import kv_of

VOCAB = 12
#: The text of each token: some are two letters, so that a stop string can begin or end inside of a token.
TEXTS = ["<eos>", "a", "b", "c", "ab", "bc", "ca", "aa", "\n", ". ", "<end>", "x"]
PROMPT = [1, 2, 3]


class Tokenizer:
    """As much of a tokenizer as SGLang's checks ask for."""

    eos_token_id = 0
    additional_stop_token_ids = {10}

    def decode(self, ids: Any) -> str:
        return "".join(TEXTS[token] for token in ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[str]:
        """As many tokens as a text can have."""
        return list(text)


class Grammar:
    """Ends with a token that it has been told beforehand."""

    def __init__(self) -> None:
        self.ended = False

    def is_terminated(self) -> bool:
        return self.ended


@pytest.fixture
def original(plugin: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's own ``Req.update_finish_state``, and its own search for patterns."""
    from sglang.srt.managers.schedule_batch import Req

    monkeypatch.setattr(Req, "_check_str_based_finish", inspect.unwrap(Req._check_str_based_finish))
    return inspect.unwrap(Req.update_finish_state)


def make_request(**sampling: Any) -> Any:
    """A request of SGLang's with the fake tokenizer."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    params = SamplingParams(**sampling)
    params.normalize(Tokenizer())
    req = Req("request", "", array("q", PROMPT), params, eos_token_ids={0}, vocab_size=VOCAB)
    req.tokenizer = Tokenizer()
    return req


def outcome(req: Any) -> tuple[Any, ...]:
    """What the API tells of a request, and what stays of it."""
    kept = req.output_ids_through_stop
    reason = req.finished_reason.to_json() if req.finished_reason else None
    # The output streamer settles the length of a request that ended without one.
    return list(kept), reason, kv_of(req).kv_committed_len if reason else None, req.reasoning_tokens


def decode(req: Any, update: Any, tokens: list[int], runs: list[int], think_end: int = 9, grammar_end: int = 10**9) -> Any:
    """Append ``tokens`` in runs of the given lengths until the request ends, as SGLang's result processor does."""
    done = 0
    for run in runs:
        accepted = tokens[done : done + run]
        if grammar_end <= done + run:
            accepted = tokens[done:grammar_end]  # SGLang cuts a run behind the grammar's end
        if not accepted or req.finished():
            break
        done += len(accepted)
        kv_of(req).kv_committed_len += len(accepted)
        if req.grammar is not None:
            req.grammar.ended = done >= grammar_end
        req.output_ids.extend(accepted)
        req.update_reasoning_tokens(accepted, [think_end])
        update(req, len(accepted))
    return req


SAMPLING: list[dict[str, Any]] = [
    {},
    {"stop": ["bc"]},
    {"stop": ["abca", "\n"]},
    {"stop_token_ids": [6]},
    {"stop": ["c"], "stop_token_ids": [4, 8]},
    {"stop_regex": [r"a+\n"]},
    {"stop_regex": [r"b$"], "stop": ["cab"]},
    {"ignore_eos": True, "stop": [". a"]},
    {"ignore_eos": True},
]


def settle(case: int, update: Any, original: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], bool]:
    """The outcomes of plain decoding and of rounds of random lengths, and whether something stopped the request."""
    dice = random.Random(case)
    sampling = {**dice.choice(SAMPLING), "max_new_tokens": dice.randint(1, 30)}
    # End tokens are rare enough for the other ends to have a chance.
    weights = [1, 8, 8, 8, 4, 4, 4, 4, 2, 2, 1, 8]
    tokens = dice.choices(range(VOCAB), weights, k=40)
    has_grammar, grammar_end = dice.random() < 0.2, dice.randint(1, 20)
    found = []
    for rule, runs in ((original, [1] * 40), (update, [dice.randint(1, 9) for _ in range(40)])):
        req = make_request(**sampling)
        kv_of(req).kv_committed_len = len(PROMPT) - 1
        if has_grammar:
            req.grammar = Grammar()
        found.append(outcome(decode(req, rule, tokens, runs, grammar_end=grammar_end if has_grammar else 10**9)))
    return found[0], found[1], found[0][1] is not None and found[0][1]["type"] == "stop"


def serve(monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    args = SimpleNamespace(speculative_algorithm=algorithm)
    monkeypatch.setattr("sglang_sparsespec.scheduler_patch.accepted_run.get_server_args", lambda: args)


@pytest.mark.parametrize("first", range(0, 600, 100))
def test_requests_end_where_plain_decoding_ends_them(first: int, original: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, "SPARSESPEC")
    stopped = 0
    for case in range(first, first + 100):
        plain, ours, is_stop = settle(case, lambda req, count: finish_token_by_token(original, req, count), original)
        assert ours == plain, case
        stopped += is_stop
    assert stopped > 20


def test_sglangs_own_rule_is_found(original: Any) -> None:
    differing = [case for case in range(100) if len({str(found) for found in settle(case, original, original)[:2]}) > 1]
    assert len(differing) > 5


def test_another_algorithms_requests_are_left_alone(original: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, "NGRAM")
    for case in range(50):
        dice = random.Random(case)
        tokens, runs = dice.choices(range(VOCAB), k=40), [dice.randint(1, 9) for _ in range(40)]
        rules = (original, lambda req, count: finish_token_by_token(original, req, count))
        ours, theirs = (
            outcome(decode(make_request(max_new_tokens=20, stop=["ab"]), rule, tokens, runs)) for rule in rules
        )
        assert ours == theirs


@pytest.mark.parametrize("algorithm,expected", [("SPARSESPEC", 1 + 13 / 2), ("NGRAM", 9.5)])
def test_accept_length_is_that_of_verifications(algorithm: str, expected: float) -> None:
    manager = SimpleNamespace(server_args=SimpleNamespace(speculative_algorithm=algorithm))
    info = {"spec_verify_ct": 2, "spec_num_correct_drafts": 13, "spec_accept_length": 9.5}
    true_accept_length(None, manager, info)
    assert info["spec_accept_length"] == expected
    nothing: dict[str, Any] = {}
    true_accept_length(None, manager, nothing)
    assert nothing == {}


@needs_hook("top_logprobs_of_each_token")
@pytest.mark.parametrize("algorithm", ["SPARSESPEC", "NGRAM"])
def test_streamed_tokens_have_their_own_top_logprobs(algorithm: str, plugin: None) -> None:
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat

    original = inspect.unwrap(OpenAIServingChat._process_logprobs_tokens)
    args = SimpleNamespace(speculative_algorithm=algorithm)
    serving = SimpleNamespace(tokenizer_manager=SimpleNamespace(server_args=args))
    chunk = SimpleNamespace(
        tokens=["a", "b"], token_logprobs=[-0.1, -0.2], top_logprobs=[{"a": -0.1, "c": -3.0}, {"b": -0.2, "d": -2.0}]
    )
    found = top_logprobs_of_each_token(original, serving, chunk, False)
    first = [token.top_logprobs[0].token for token in found]
    assert first == (["a", "b"] if algorithm == "SPARSESPEC" else ["a", "a"])
