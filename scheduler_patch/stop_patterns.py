"""Stop patterns (``stop_regex``) that are searched in bounded time.

SGLang's scheduler searches the answer of each request with Python's ``re`` after every token. ``re`` backtracks: with a
pattern such as ``(a+)+b`` the time doubles with each further character, and the server stands still. But ``re`` looks for
signals while it searches, so a timer ends the search, and a request whose patterns take longer ends. Other libraries with a
time limit match other texts.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISHED_MATCHED_REGEX
from sglang.srt.runtime_context import get_server_args
from sglang.srt.sampling.sampling_params import sre_parse as syntax

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import is_sparsespec

#: Seconds that all patterns of a request may take after one token.
MAX_SECONDS = 0.05
#: Characters of all patterns of a request, with what is repeated written out.
MAX_SIZE = 10_000
_REPEATS = (syntax.MAX_REPEAT, syntax.MIN_REPEAT, getattr(syntax, "POSSESSIVE_REPEAT", None))


def are_searchable(patterns: Sequence[str]) -> bool:
    """Whether ``patterns`` are regular expressions of Python that a request may be searched for."""
    try:
        if sum(_size(syntax.parse(pattern)) for pattern in patterns) > MAX_SIZE:
            return False
        for pattern in patterns:
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _size(value: Any) -> int:
    """Pieces of a part of ``re``'s syntax tree, with what is repeated written out; at most ``MAX_SIZE + 1``."""
    size = 0
    if isinstance(value, syntax.SubPattern):
        for kind, argument in value:
            times = 1
            if kind in _REPEATS:
                low, high, argument = argument
                times = max(low if high is syntax.MAXREPEAT else high, 1)
            size += times * (1 + _size(argument))
    elif isinstance(value, list | tuple):
        size = sum(map(_size, value))
    return min(size, MAX_SIZE + 1)


def search_in_bounded_time(original: Callable[..., bool], req: Any, new_accepted_len: int = 1) -> bool:
    """``Req._check_str_based_finish``: SGLang searches for patterns without a limit of time.

    With patterns, tokens come one by one (``accepted_run.py``), so a match ends at the last one.
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
    searches = [re.compile(pattern).search for pattern in patterns]
    pattern = patterns[0]
    try:
        with time_limit(MAX_SECONDS):
            for pattern, search in zip(patterns, searches, strict=True):
                if search(text):
                    req.finished_reason = FINISHED_MATCHED_REGEX(matched=pattern)
                    break
    except TimeoutError:
        message = f"stop_regex {pattern!r} takes too long to be searched for; write it without nested repeats."
        req.finished_reason = FINISH_ABORT(message, HTTPStatus.BAD_REQUEST, "BadRequestError")
    if req.finished_reason is not None:
        req.finished_len = len(req.output_ids)
    return req.finished_reason is not None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` in a block that has run for ``seconds``, and for as much processor time of this process.

    So neither what other processes do nor threads beside this one shorten the time. Only the main thread may enter it.
    """
    deadline = time.perf_counter() + seconds
    is_running = True

    def ring(*_: Any) -> None:
        left = deadline - time.perf_counter()
        if is_running and left > 0:
            signal.setitimer(signal.ITIMER_VIRTUAL, left)
        elif is_running:
            raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        is_running = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def register_hooks() -> None:
    """Register the hooks of this module."""
    add_hook("sglang.srt.managers.schedule_batch.Req._check_str_based_finish", search_in_bounded_time, "around")
