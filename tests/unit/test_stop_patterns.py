"""Stop patterns match where ``re`` matches, in bounded time."""

from __future__ import annotations

import re
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_sparsespec.scheduler_patch import stop_patterns
from sglang_sparsespec.scheduler_patch.stop_patterns import are_searchable, time_limit


@pytest.mark.parametrize("pattern", ["(", "a{0,99999}b", "((a{50}){50}){50}", "(a|" * 2000 + "b" + ")" * 2000])
def test_a_pattern_that_cannot_be_compiled_or_is_too_large_is_refused(pattern: str) -> None:
    assert not are_searchable([pattern])


@pytest.mark.parametrize("pattern", ["abc", r"\d{4}-\d\d", "(foo|bar)x?", r"\n(?=Human:)", r"(a|b)\1", "(a+)+b"])
def test_other_patterns_are_searched_for(pattern: str) -> None:
    assert are_searchable([pattern])


def test_all_patterns_of_a_request_count_together() -> None:
    assert are_searchable(["a{5000}"]) and not are_searchable(["a{5000}"] * 2)


def make_request(patterns: list[str], text: str, stop: tuple[str, ...] = ()) -> Any:
    """A request of SGLang's with one character per token."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    tokenizer = SimpleNamespace(
        decode=lambda ids: "".join(map(chr, ids)),
        encode=lambda text, add_special_tokens=True: list(text),
        eos_token_id=0,
        additional_stop_token_ids=None,
    )
    params = SamplingParams(stop_regex=patterns, stop=list(stop), max_new_tokens=10**6)
    params.normalize(tokenizer)
    req = Req("request", "", [1], params, eos_token_ids={0}, vocab_size=2**20)
    req.tokenizer = tokenizer
    req.output_ids.extend(map(ord, text))
    return req


@pytest.fixture
def algorithm(request: pytest.FixtureRequest, plugin: None, monkeypatch: pytest.MonkeyPatch) -> str:
    name = getattr(request, "param", "SPARSESPEC")
    monkeypatch.setattr(stop_patterns, "get_server_args", lambda: SimpleNamespace(speculative_algorithm=name))
    return name


@pytest.mark.parametrize("algorithm", ["SPARSESPEC", "NGRAM"], indirect=True)
def test_a_request_ends_at_the_pattern_that_sglang_finds(algorithm: str) -> None:
    req = make_request(["x(a+)+b", "c$"], "xaab")
    req.update_finish_state(1)
    assert req.finished_reason.to_json() == {"type": "stop", "matched": "x(a+)+b"} and req.finished_len == 4
    assert req.sampling_params.stop_regex_strs == ["x(a+)+b", "c$"]
    # Stop strings come first, as in SGLang.
    req = make_request(["x(a+)+b"], "xaab", stop=("ab",))
    req.update_finish_state(1)
    assert req.finished_reason.to_json() == {"type": "stop", "matched": "ab"}


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        # The control characters from 1C to 1F are spaces, and a superscript is a letter, for ``re`` alone.
        (r"\s\S", "\x1eq"),
        (r"^\w$", "²"),
        # No letter, for ``re`` alone.
        (r"^\W$", "\u0301"),
        # Braces that are no repeat are text.
        ("(?:x){e}", "x{e}"),
        ("(?:x){e}", "q"),
    ],
)
def test_a_pattern_matches_what_it_matches_in_plain_sglang(pattern: str, text: str, algorithm: str) -> None:
    req = make_request([pattern], text)
    req.update_finish_state(1)
    assert req.finished() == (re.search(pattern, text) is not None)


#: Backtracking takes each of these for longer than anybody waits.
EVIL = [
    (["(a+)+b"], "a" * 3000),
    ([r"(a+)+\1b"], "a" * 3000),
    (["(x+x+)+y"] * 32, "x" * 3000),
]


@pytest.mark.parametrize(("patterns", "text"), EVIL, ids=[patterns[0][:20] for patterns, _ in EVIL])
def test_a_request_whose_patterns_take_too_long_ends(patterns: list[str], text: str, algorithm: str) -> None:
    assert are_searchable(patterns)
    req = make_request(patterns, text)
    started = time.process_time()
    req.update_finish_state(1)
    assert time.process_time() - started < 2
    found = req.finished_reason.to_json()
    assert found["type"] == "abort" and found["status_code"] == 400
    assert f"stop_regex {patterns[0]!r} takes too long" in found["message"]


def test_a_request_whose_patterns_do_not_match_goes_on(algorithm: str) -> None:
    req = make_request(["(a+)+b", "c$"], "a" * 10)
    req.update_finish_state(1)
    assert not req.finished()


def test_a_timer_stays_with_its_search(algorithm: str) -> None:
    """What is served after a search is not interrupted, and others may use the signal."""
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(TimeoutError), time_limit(0.01):
        re.search("(a+)+b", "a" * 3000)
    for text in ("a" * 3000, "ab"):
        make_request(["(a+)+b"], text).update_finish_state(1)
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
        assert signal.getsignal(signal.SIGVTALRM) is before
