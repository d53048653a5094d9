"""Stop patterns match where ``re`` matches, in bounded time."""

from __future__ import annotations

import random
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_sparsespec.scheduler_patch import stop_patterns
from sglang_sparsespec.scheduler_patch.stop_patterns import (
    MAX_POSITIONS,
    MAX_TRANSITIONS,
    Automaton,
    Search,
    are_bounded,
    automaton_of,
    search_in_bounded_time,
)

ATOMS = ["a", "b", ".", r"\w", r"\s", r"\d", "[ab]", "[^a]", r"[^\n]", "\n", "é", "1", "_", "[a-c_]", r"\W", "(?i:É)"]
PLACES = ["^", "$", r"\b", r"\B", r"\A", r"\Z"]
REPEATS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,}", "{1,3}?"]
FLAGS = ["", "", "", "(?i)", "(?m)", "(?s)", "(?a)", "(?im)"]


def pattern_of(dice: random.Random, depth: int = 3) -> str:
    """A random pattern without flags."""
    pieces = []
    for _ in range(dice.randint(1, 3)):
        kind = dice.random()
        if kind < 0.2:
            pieces.append(dice.choice(PLACES))
            continue
        piece = dice.choice(ATOMS)
        if depth and kind > 0.6:
            piece = "(" + dice.choice(["", "?:", "?i:", "?m:"]) + pattern_of(dice, depth - 1) + ")"
            if kind > 0.85:
                piece = piece[:-1] + "|" + pattern_of(dice, depth - 1) + ")"
        pieces.append(piece + (dice.choice(REPEATS) if dice.random() < 0.4 else ""))
    return "".join(pieces)


def text_of(dice: random.Random) -> str:
    return "".join(dice.choices("aabB\n 1_éÉc", k=dice.randint(0, 9)))


def automaton_finds(pattern: str, text: str) -> bool:
    search = Search(pattern)
    search._automaton = Automaton(pattern)
    search._state = search._automaton.start
    return search.found_in(text)


@pytest.mark.parametrize("first", range(0, 2000, 500))
def test_an_automaton_matches_where_re_matches(first: int) -> None:
    matches = 0
    for case in range(first, first + 500):
        dice = random.Random(case)
        pattern = dice.choice(FLAGS) + pattern_of(dice)
        for text in [text_of(dice) for _ in range(6)]:
            expected = re.search(pattern, text) is not None
            assert automaton_finds(pattern, text) == expected, (case, pattern, text)
            matches += expected
    assert 500 < matches < 2900


#: Backtracking takes each of these for longer than anybody waits.
EVIL = [
    ("(a+)+b", "a" * 3000),
    ("(a|a)*b", "a" * 3000),
    (r"(\w+\s?)+$x", "word " * 600),
    ("a*" * 20 + "b", "a" * 3000),
    ("a?" * 30 + "a" * 30 + "b", "a" * 300),
    ("(a|aa|b)" * 30 + "c", "a" * 300),
    ("((a{0,9}){0,9}){0,2}b", "a" * 300),
    ("(.*)*$(?m:^)x", "a" * 3000),
]


@pytest.mark.parametrize(("pattern", "text"), EVIL, ids=[pattern[:20] for pattern, _ in EVIL])
def test_no_pattern_takes_longer_than_its_text_is_long(pattern: str, text: str) -> None:
    assert are_bounded([pattern])
    search = Search(pattern)
    assert search._automaton is not None
    started = time.process_time()
    assert not search.found_in(text)
    # Only the new characters of a growing text are read.
    for count in range(1, 50):
        assert not search.found_in(text + "-" * count)
    assert time.process_time() - started < 5


def test_backtracking_takes_longer() -> None:
    """What the automaton is for: each further letter doubles the time."""
    seconds = []
    for length in (12, 18):
        started = time.process_time()
        assert re.search("(a+)+b", "a" * length) is None
        seconds.append(time.process_time() - started)
    assert seconds[1] > 10 * seconds[0]


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+\1b", "(?=(a+)+b)a", "(?<!a)(a+)+b", "(?(1)a|b)(a+)+b", "(", "a{0,9999}b"],
)
def test_a_pattern_that_can_only_backtrack_without_bound_is_refused(pattern: str) -> None:
    assert not are_bounded([pattern])


@pytest.mark.parametrize("pattern", ["abc", r"\d{4}-\d\d", "(foo|bar)x?", r"\n(?=Human:)", r"(a|b)\1", "(?<!x)y{1,3}"])
def test_a_pattern_that_can_hardly_backtrack_is_left_to_re(pattern: str) -> None:
    assert automaton_of(pattern) is None and are_bounded([pattern])


def test_all_patterns_of_a_request_count_together() -> None:
    size = Automaton("(a+)+b").size
    assert are_bounded(["(a+)+b"] * (MAX_POSITIONS // size))
    assert not are_bounded(["(a+)+b"] * (MAX_POSITIONS // size + 1))
    assert not are_bounded(["a"] * MAX_POSITIONS)


def test_a_growing_text_is_searched_as_a_whole_one() -> None:
    for case in range(300):
        dice = random.Random(case)
        pattern = dice.choice(FLAGS) + pattern_of(dice)
        grown = Search(pattern)
        grown._automaton = Automaton(pattern)
        grown._state = grown._automaton.start
        text = ""
        for _ in range(12):
            text += text_of(dice)
            if dice.random() < 0.1:
                text = text[3:]  # SGLang shows the end of an answer only
            # Python's own search takes for ever for some of these.
            assert grown.found_in(text) == automaton_finds(pattern, text), (case, pattern, text)


def test_an_automaton_forgets_transitions_that_become_too_many() -> None:
    automaton = Automaton("[^b]*a(.*)c")
    state: Any = automaton.start
    for index in range(MAX_TRANSITIONS + 100):
        state = automaton.step(state, chr(0x10000 + index))
    assert len(automaton._states) < 1000
    assert automaton_finds("[^b]*a(.*)c", "aac")


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


@pytest.mark.parametrize("algorithm", ["SPARSESPEC", "NGRAM"])
def test_a_request_ends_at_the_pattern_that_sglang_finds(
    algorithm: str, plugin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = SimpleNamespace(speculative_algorithm=algorithm)
    monkeypatch.setattr(stop_patterns, "get_server_args", lambda: args)
    used: list[str] = []
    original_search = Search.found_in
    monkeypatch.setattr(Search, "found_in", lambda self, text: used.append(text) or original_search(self, text))
    req = make_request(["x(a+)+b", "c$"], "xaab")
    req.update_finish_state(1)
    assert req.finished_reason.to_json() == {"type": "stop", "matched": "x(a+)+b"} and req.finished_len == 4
    assert bool(used) == (algorithm == "SPARSESPEC")
    assert req.sampling_params.stop_regex_strs == ["x(a+)+b", "c$"]
    # Stop strings come first, as in SGLang.
    req = make_request(["x(a+)+b"], "xaab", stop=("ab",))
    req.update_finish_state(1)
    assert req.finished_reason.to_json() == {"type": "stop", "matched": "ab"}


def test_sglangs_search_is_not_used(plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    args = SimpleNamespace(speculative_algorithm="SPARSESPEC")
    monkeypatch.setattr(stop_patterns, "get_server_args", lambda: args)
    req = make_request(["(a+)+b"], "a" * 2000)
    started = time.process_time()
    assert not search_in_bounded_time(type(req)._check_str_based_finish.__wrapped__, req, 1)
    req.update_finish_state(1)
    assert not req.finished() and time.process_time() - started < 2
