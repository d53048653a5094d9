"""Stop patterns (``stop_regex``) that are searched in bounded time.

SGLang's scheduler searches the answer of each request with Python's ``re`` after every token. ``re`` backtracks: with a
pattern such as ``(a+)+b`` the time doubles with each further character, and the server stands still. Here

* a pattern that can backtrack in few ways at each place is left to ``re``;
* any other becomes an automaton, which reads each character once (Thompson 1968; states are sets of its positions, made as
  they are met, as in RE2);
* one that can be neither, because it looks around or back and backtracks, is refused with HTTP 400.

The automaton is made from ``re``'s own syntax tree, and asks ``re`` which characters a piece matches.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sglang.srt.managers.schedule_batch import FINISHED_MATCHED_REGEX
from sglang.srt.runtime_context import get_server_args
from sglang.srt.sampling.sampling_params import sre_parse as syntax

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import is_sparsespec

#: Ways in which ``re`` may match one pattern from one place.
MAX_WAYS = 100
#: Positions of an automaton, and of all patterns of a request together.
MAX_POSITIONS = 500
#: Transitions that an automaton remembers; then it forgets all of them.
MAX_TRANSITIONS = 50_000
_FLAGS = re.IGNORECASE | re.MULTILINE | re.DOTALL | re.ASCII
_CHARACTER = (syntax.LITERAL, syntax.NOT_LITERAL, syntax.ANY, syntax.IN)
_REPEAT = (syntax.MAX_REPEAT, syntax.MIN_REPEAT)
_POSSESSIVE = getattr(syntax, "POSSESSIVE_REPEAT", None)  # Python 3.11


def _ways(pieces: Any) -> int:
    """Ways in which ``pieces`` can match from one place, or more; at most ``MAX_WAYS + 1``, which stands for "too many"."""
    product = 1
    for kind, value in pieces:
        ways = 1
        if kind is syntax.BRANCH:
            ways = sum(map(_ways, value[1]))
        elif kind in _REPEAT or kind is _POSSESSIVE:
            low, high, body = value
            inner = _ways(body)
            ways = MAX_WAYS + 1
            if high is not syntax.MAXREPEAT and (inner == 1 or high <= MAX_WAYS):
                ways = high - low + 1 if inner == 1 else sum(inner**count for count in range(low, high + 1))
        elif kind is syntax.GROUPREF_EXISTS:
            ways = sum(_ways(branch) for branch in value[1:] if branch)
        elif kind not in _CHARACTER:
            ways = _ways(_body(kind, value))
        product = min(product * ways, MAX_WAYS + 1)
    return product


def _body(kind: Any, value: Any) -> Any:
    """What a group or a look-around holds; nothing for other pieces."""
    if kind is syntax.SUBPATTERN or kind in (syntax.ASSERT, syntax.ASSERT_NOT):
        return value[-1]
    return value if kind is getattr(syntax, "ATOMIC_GROUP", None) else ()


class UnboundedPatternError(ValueError):
    """A pattern that would have to backtrack without bound."""


class _State(dict[str, "_State | None"]):
    """A state: the state after each character that has been met; None once the pattern has matched.

    Attributes:
        positions: of the automaton, before those that need no character are followed.
        previous: the character before, "" at the beginning.
    """

    def __init__(self, positions: frozenset[int], previous: str) -> None:
        super().__init__()
        self.positions, self.previous = positions, previous


class Automaton:
    """Whether a text holds a match of ``pattern``.

    Raises:
        UnboundedPatternError: it looks around or back, or has more than ``MAX_POSITIONS`` positions.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        #: By position: what leads on (a test of a character, or of a place between two characters, or None), and where to.
        self._steps: list[tuple[str, Callable[..., bool] | None, tuple[int, ...]]] = []
        self._states: dict[tuple[frozenset[int], str], _State] = {}
        self._transitions = 0
        parsed = syntax.parse(pattern)
        self._final = self._add("final", None)
        self._first = self._build(parsed, parsed.state.flags & _FLAGS, self._final)
        self.start = _State(frozenset(), "")

    @property
    def size(self) -> int:
        """Its positions."""
        return len(self._steps)

    def _add(self, kind: str, test: Callable[..., bool] | None, *targets: int) -> int:
        if len(self._steps) >= MAX_POSITIONS:
            raise UnboundedPatternError
        self._steps.append((kind, test, targets))
        return len(self._steps) - 1

    def _build(self, pieces: Any, flags: int, then: int) -> int:
        """The position from which ``pieces`` lead to ``then``."""
        for kind, value in reversed(list(pieces)):
            then = self._build_piece(kind, value, flags, then)
        return then

    def _build_piece(self, kind: Any, value: Any, flags: int, then: int) -> int:
        if kind in _CHARACTER:
            return self._add("character", _test_of_character((kind, value), flags), then)
        if kind is syntax.AT:
            return self._add("place", _test_of_place(value, flags), then)
        if kind is syntax.SUBPATTERN:
            _, added, removed, body = value
            return self._build(body, (flags | added) & ~removed, then)
        if kind is syntax.BRANCH:
            return self._add("either", None, *[self._build(branch, flags, then) for branch in value[1]])
        if kind in _REPEAT:
            low, high, body = value
            if high is syntax.MAXREPEAT:
                again = self._add("either", None)
                self._steps[again] = ("either", None, (self._build(body, flags, again), then))
                then = again
            else:
                end = then
                for _ in range(high - low):
                    then = self._add("either", None, self._build(body, flags, then), end)
            for _ in range(low):
                then = self._build(body, flags, then)
            return then
        raise UnboundedPatternError

    def step(self, state: _State, character: str, last: bool = False) -> _State | None:
        """The state behind ``character``; None if the pattern has matched before it.

        Args:
            last: it is the text's last one, which ``$`` may ask for.
        """
        key = character + "$" if last else character
        if key in state:
            return state[key]
        self._transitions += 1
        if self._transitions > MAX_TRANSITIONS:
            self._transitions = 0
            self._states.clear()
            self.start.clear()
            state = _State(state.positions, state.previous)
        reached = self._follow(state, character, last)
        following = None
        if reached is not None:
            found = frozenset(
                target
                for position in reached
                for kind, test, targets in [self._steps[position]]
                if kind == "character" and test is not None and test(character)
                for target in targets
            )
            following = self._states.setdefault((found, character), _State(found, character))
        state[key] = following
        return following

    def matches_at_end(self, state: _State) -> bool:
        """Whether the pattern matches at the end of a text that has led to ``state``."""
        return self._follow(state, "", False) is None

    def _follow(self, state: _State, following: str, last: bool) -> set[int] | None:
        """The positions that are reached without a character; None if the final one is."""
        # A match may begin at every place.
        open_, reached = [self._first, *state.positions], set[int]()
        while open_:
            position = open_.pop()
            if position in reached:
                continue
            reached.add(position)
            kind, test, targets = self._steps[position]
            if kind == "final":
                return None
            if kind == "either" or (kind == "place" and test is not None and test(state.previous, following, last)):
                open_.extend(targets)
        return reached


def _test_of_character(piece: tuple[Any, Any], flags: int) -> Callable[[str], bool]:
    """Whether ``re`` lets a piece of one character match a character."""
    compiler: Any = getattr(re, "_compiler", None)  # Python 3.11
    if compiler is None:
        import sre_compile as compiler
    parsed = syntax.SubPattern(syntax.State(), [piece])
    match = compiler.compile(parsed, flags | (0 if flags & re.ASCII else re.UNICODE)).match
    return lambda character: match(character) is not None


def _test_of_place(kind: Any, flags: int) -> Callable[[str, str, bool], bool]:
    """Whether a place lies where ``^``, ``$``, ``\\A``, ``\\Z``, ``\\b`` or ``\\B`` asks for.

    The test takes the characters before and behind the place ("" if there is none), and whether the second is the last one.
    """
    lines = bool(flags & re.MULTILINE)

    def is_word(character: str) -> bool:
        is_text = character.isalnum() or character == "_"
        return is_text and not (flags & re.ASCII and character > "\x7f")

    tests: dict[Any, Callable[[str, str, bool], bool]] = {
        syntax.AT_BEGINNING: lambda before, behind, last: before == "" or (lines and before == "\n"),
        syntax.AT_BEGINNING_STRING: lambda before, behind, last: before == "",
        syntax.AT_END: lambda before, behind, last: behind == "" or (behind == "\n" and (lines or last)),
        syntax.AT_END_STRING: lambda before, behind, last: behind == "",
        syntax.AT_BOUNDARY: lambda before, behind, last: is_word(before) != is_word(behind),
        syntax.AT_NON_BOUNDARY: lambda before, behind, last: is_word(before) == is_word(behind),
    }
    return tests[kind]


@functools.lru_cache(maxsize=1024)
def automaton_of(pattern: str) -> Automaton | None:
    """The automaton of ``pattern``; None if it is left to ``re``.

    Raises:
        re.error, OverflowError, RecursionError: it is no regular expression of Python.
        UnboundedPatternError: it cannot be searched in bounded time.
    """
    re.compile(pattern)
    return None if _ways(syntax.parse(pattern)) <= MAX_WAYS else Automaton(pattern)


def are_bounded(patterns: Sequence[str]) -> bool:
    """Whether ``patterns`` are regular expressions that a request may be searched for."""
    try:
        automata = map(automaton_of, patterns)
        # At least what a pattern takes that is left to ``re``.
        return sum(automaton.size if automaton else MAX_WAYS // 20 for automaton in automata) <= MAX_POSITIONS
    except (re.error, OverflowError, RecursionError, UnboundedPatternError):
        return False


class Search:
    """Searches a text that grows, for one request and one pattern; what has been read is not read again."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._automaton = pattern, automaton_of(pattern)
        self._read = ""
        self._state: _State | None = self._automaton.start if self._automaton else None

    def found_in(self, text: str) -> bool:
        """Whether ``text`` holds a match, as ``re.search`` says."""
        automaton = self._automaton
        if automaton is None or not text:
            return re.search(self._pattern, text) is not None
        state, read = self._state, len(self._read)
        if read >= len(text) or not text.startswith(self._read):
            state, read = automaton.start, 0
        assert state is not None
        for character in text[read:-1]:
            state = state.get(character) or automaton.step(state, character)
            if state is None:
                return True
        self._read, self._state = text[:-1], state
        end = automaton.step(state, text[-1], last=True)
        return end is None or automaton.matches_at_end(end)


def _searches(req: Any) -> Iterator[tuple[str, Search]]:
    searches = req.__dict__.setdefault("sparsespec_stop_searches", {})
    for pattern in req.sampling_params.stop_regex_strs:
        if pattern not in searches:
            searches[pattern] = Search(pattern)
        yield pattern, searches[pattern]


def search_in_bounded_time(original: Callable[..., bool], req: Any, new_accepted_len: int = 1) -> bool:
    """``Req._check_str_based_finish``: SGLang searches for patterns by backtracking.

    With patterns, tokens come one by one (``accepted_run.py``). So a match ends at the last one.
    """
    params = req.sampling_params
    patterns = params.stop_regex_strs
    if not patterns or not is_sparsespec(get_server_args()):
        return original(req, new_accepted_len)
    text = req.tail_str(new_accepted_len)
    params.stop_regex_strs = []
    try:
        if original(req, new_accepted_len):
            return True
    finally:
        params.stop_regex_strs = patterns
    for pattern, search in _searches(req):
        if search.found_in(text):
            req.finished_reason = FINISHED_MATCHED_REGEX(matched=pattern)
            req.finished_len = len(req.output_ids)
            return True
    return False


def register_hooks() -> None:
    """Register the hooks of this module."""
    add_hook("sglang.srt.managers.schedule_batch.Req._check_str_based_finish", search_in_bounded_time, "around")
