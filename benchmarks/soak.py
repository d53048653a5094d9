"""Requests of all kinds at ten times the KV pool, and faults: every answer well-formed, greedy ones plain's, nothing left.

    python benchmarks/soak.py --model-path M --results soak.jsonl

Streams, aborts, disconnects, grammars, tools, penalties, log-probabilities, stop strings, samples and n = 4 go to a server
with SPARSESPEC, so many at once that they ask for ``--overload`` times the tokens of its KV pool. The default engine has a
small pool and a small host tier: requests must have been moved to the host and back, the host tier must have been full, and
requests must have been retracted. Meanwhile come the ``--events``:

  malformed   ``--malformed`` bodies made from the server's OpenAPI schema. None may be answered with a status from 500 on,
              except where plain SGLang does so too (_openapi_fuzz.py).
  pause       ``/pause_generation`` in each of its modes; no round may run until ``/continue_generation``.
  weights     ``/update_weights_from_disk`` with the same checkpoint, in a pause, and once all that run have ended.
  kill        last of all, SIGKILL to the scheduler under load. The server must end, with no process and no shared memory
              left, and the next one must give the same greedy answers.

After the load the KV pool and the host tier must be empty, ``/flush_cache`` must succeed, and the memory of the processes
must have been flat over the last half. Then a plain server answers the greedy requests; where an answer differs, the margin
shows whether two tokens were tied (parity.py). ``--plain same`` asks the same server again with speculation switched off,
which saves a start but shows less. It ends by itself at ``--time-limit``; a run that was cut short has not passed.

The record has the counts by kind and event, statuses of malformed bodies, moves and retractions, the first failures, the
divergences, the memory by process, and what came of the restart. Exit status 1: not passed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests
from _common import (
    Dataset,
    EngineSpec,
    add_engine_options,
    describe,
    say,
    stamp,
    write_record,
)
from _openapi_fuzz import Call, Fuzz
from parity import are_ties, divergences, load_prompts
from serving import server, server_flags

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
DATE = r"\d{4}-\d\d-\d\d"
#: Characters of a text that its last token may be.
LONGEST_TOKEN = 16
#: Kinds of requests, and their shares.
SHARES = {
    "greedy": 20,
    "stream": 12,
    "logprobs": 10,
    "stops": 10,
    "sampled": 10,
    "n=4": 6,
    "regex": 6,
    "json": 5,
    "tool": 5,
    "penalties": 8,
    "abort": 4,
    "disconnect": 4,
}
MALFORMED = "malformed"
EVENTS = (MALFORMED, "pause", "weights", "kill")
#: Routes that end, stop or let go on the requests of others: their bodies are sent after the load.
QUIET_ROUTES = ("/abort_request", "/continue_generation", "/update_weight", "/set_internal_state")
#: What happens after so large a share of the well-formed requests: event, and how. Weights come early, since reading them
#: takes memory that stays.
SCHEDULE = (
    (0.15, "weights", "paused"),
    (0.25, "pause", "in_place"),
    (0.35, "weights", "waiting"),
    (0.5, "pause", "retract"),
    (0.6, "pause", "abort"),
)
#: Seconds between two looks at a paused server.
PAUSE_SECONDS = 1.0
#: Seconds for an answer, which may wait behind ten pools of others, and for an update of weights, which waits for them.
ANSWER_SECONDS = 600.0
#: A pool that some twenty requests of the default sizes overflow, and a host tier for less.
SMALL_ENGINE = "sparsespec,max_total_tokens=16384,sparsespec_host_kv_gb=0.05"
#: Settings of the engine that plain SGLang's has, too.
SHARED_SETTINGS = ("max_total_tokens", "context_length")
#: In the answer, with HTTP 400, to a request that SGLang 0.5.17 aborts while its grammar is compiled.
ABORTED_EARLY = "Aborted by AbortReq."
#: Most requests in flight; status of an answer of several that was aborted.
MOST_AT_ONCE, ABORTED_STATUS = 2000, 499
#: Requests that plain SGLang is asked at once.
PLAIN_AT_ONCE = 50
#: Seconds until a killed server must have ended.
END_SECONDS = 60.0
#: What SGLang 0.5.17 and 0.5.23 say of an update of weights beside a request that has not left its batch.
STILL_RUNS = ("Cache flush failed", "the cache was not flushed")
#: Files of /dev/shm that SGLang, and joblib which it imports, leave behind whenever a server ends.
SGLANGS_FILES = ("/dev/shm/sglang_loads_", "/dev/shm/sem.loky-")
#: Requests that are asked before the kill and after the restart.
RESTART_QUESTIONS = 8
#: Characters of a token, at least, in the mean of a text.
TOKEN_CHARACTERS = 4
#: Share of the requests whose prompts begin with a line of their own, so that their KV is theirs alone.
OWN_PROMPTS = 0.75
#: The KV manager's counters (docs/operations.md) that may not be 0 after the load, and all that a record has.
MUST_HAPPEN = ("kv_requests_offloaded", "kv_requests_restored", "kv_host_full", "kv_requests_retracted")
KV_COUNTERS = (*MUST_HAPPEN, "kv_tokens_recomputed", "kv_bytes_to_host", "kv_bytes_from_host", "kv_transfer_waits")
#: Kinds whose answers are compared with plain SGLang's.
COMPARED = ("greedy", "stream", "logprobs", "stops", "penalties")
MEGABYTE = 1 << 20
SHOWN = 20
#: Log-probabilities of plain SGLang at each position: 16 bits may give the same logit to more tokens than a few.
SHOWN_TOKENS = 20


@dataclass(frozen=True)
class Request:
    """Kind, route and body of a request.

    Attributes:
        tokens: KV tokens that it asks for and shares with no other request, at most.
        call: what is sent instead, if it is malformed.
    """

    kind: str
    route: str
    body: dict[str, Any]
    tokens: int = 0
    call: Call | None = None


def own_prompt(prompt: str | list[int], index: int) -> str | list[int]:
    """The prompt with a beginning that no other request has."""
    if isinstance(prompt, str):
        return f"{index:05}. {prompt}"
    return [100 + index % 97, 100 + index // 97, *prompt]


def make_requests(count: int, prompts: Sequence[Any], max_new_tokens: int, penalties: bool) -> list[Request]:
    """``count`` requests, the same in every run; ``prompts`` are texts and lists of token ids."""
    shares = {kind: share for kind, share in SHARES.items() if penalties or kind != "penalties"}
    found = []
    chat_tokens = min(200, 4 * max_new_tokens)
    for index in range(count):
        dice = random.Random(index)
        kind = dice.choices(list(shares), shares.values())[0]
        prompt, tokens = dice.choice(prompts), 0
        if dice.random() < OWN_PROMPTS:
            prompt = own_prompt(prompt, index)
            tokens = len(prompt) // TOKEN_CHARACTERS if isinstance(prompt, str) else len(prompt)
        sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": dice.randint(1, max_new_tokens)}
        body: dict[str, Any] = {"rid": f"soak-{index:05}", "sampling_params": sampling}
        body["text" if isinstance(prompt, str) else "input_ids"] = prompt
        if kind in ("stream", "abort", "disconnect"):
            body["stream"] = True
        if kind in ("abort", "disconnect"):
            sampling.update(max_new_tokens=4 * max_new_tokens, ignore_eos=True)
        elif kind == "logprobs":
            body.update(return_logprob=True, top_logprobs_num=dice.choice([1, 3]), stream=dice.random() < 0.5)
            if dice.random() < 0.3:
                body["token_ids_logprob"] = [5, 6]
        elif kind == "stops":
            sampling["stop"] = dice.sample([".", "\n", " the", ")", "1", " is"], 2)
            sampling.update({"stop_regex": r"(\w+ )+\d"} if dice.random() < 0.3 else {})
            body["stream"] = dice.random() < 0.5
        elif kind == "sampled":
            sampling.update(temperature=0.8, top_p=dice.choice([1.0, 0.9]), top_k=dice.choice([-1, 40]))
        elif kind == "n=4":
            sampling.update(temperature=dice.choice([0, 0.8]), n=4)
            del body["rid"]
        elif kind == "regex":
            sampling.update(regex=DATE, max_new_tokens=40)
        elif kind == "penalties":
            names = ("frequency_penalty", "presence_penalty", "repetition_penalty")
            sampling[dice.choice(names)] = dice.choice([0.4, 1.1])
        if kind in ("json", "tool"):
            asked = prompt if isinstance(prompt, str) else "Introduce yourself."
            chat: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": asked[:2000]}]}
            chat.update(temperature=0, max_tokens=chat_tokens)
            schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
            tool = {"type": "function", "function": {"name": "greet", "parameters": PERSON}}
            chat.update({"response_format": schema} if kind == "json" else {"tools": [tool], "tool_choice": "required"})
            found.append(Request(kind, "v1/chat/completions", chat, tokens + chat_tokens))
        else:
            found.append(Request(kind, "generate", body, tokens + sampling["max_new_tokens"] * sampling.get("n", 1)))
    return found


def with_malformed(asked: Sequence[Request], calls: Sequence[Call]) -> list[Request]:
    """``asked`` with a malformed request at every so many places."""
    malformed = [Request(MALFORMED, call.path, {}, call=call) for call in calls]
    keyed = [
        ((place + 0.5) / len(part), item) for part in (list(asked), malformed) for place, item in enumerate(part)
    ]
    return [item for _, item in sorted(keyed, key=lambda pair: pair[0])]


# ------------------------------------------------------------------------------ answers


class MalformedError(Exception):
    """An answer is not what its request asked for."""


class AbortedError(MalformedError):
    """An answer was aborted though its client did not ask for that."""


def brief(error: Exception) -> str:
    """What a record says of an error."""
    return f"{type(error).__name__}: {error}"[:300]


def expect(fact: object, what: str) -> None:
    """Raise ``MalformedError`` unless ``fact``."""
    if not fact:
        raise MalformedError(what)


def check_answer(request: Request, answer: dict[str, Any], events: Sequence[dict[str, Any]] = ()) -> None:
    """Check one answer of ``/generate``; ``events`` are what came before it in a stream.

    Raises:
        MalformedError: it is not what the request asked for.
    """
    sampling, info, ids = request.body["sampling_params"], answer["meta_info"], answer["output_ids"]
    reason = info["finish_reason"]
    expect(isinstance(answer["text"], str) and reason, "no text or no finish reason")
    if reason["type"] == "abort" and request.kind != "abort":
        raise AbortedError(f"{request.kind} ended by {reason}")
    # A stream that is aborted while its request waits, as after a retraction, ends with the last id alone.
    waited = reason["type"] == "abort" and len(ids) == 1
    expect(
        (info["completion_tokens"] == len(ids) or waited) and info["completion_tokens"] <= sampling["max_new_tokens"],
        f"{info['completion_tokens']} tokens, {len(ids)} ids",
    )
    if reason["type"] == "abort":
        return
    expect(reason["type"] in ("stop", "length"), f"finish reason {reason}")
    expect(reason["type"] == "stop" or len(ids) == sampling["max_new_tokens"], "ended by its length before its length")
    # Before the stop string that ended the answer another may stand in the same token. SGLang looks at the length first, so
    # that an answer may end by it with a token that holds a stop string.
    by_length = reason["type"] == "length"
    text = answer["text"][:-LONGEST_TOKEN] if by_length else answer["text"]
    for stop in sampling.get("stop", ()) if by_length else [reason.get("matched")]:
        expect(not isinstance(stop, str) or stop not in text, f"the text holds {stop!r}")
    if request.kind == "regex" and reason["type"] == "stop":
        expect(re.fullmatch(DATE, answer["text"]), f"{answer['text']!r} is no date")
    if "return_logprob" in request.body:
        values, best = info["output_token_logprobs"], info["output_top_logprobs"]
        expect([entry[1] for entry in values] == ids, "the tokens with log-probabilities are others")
        expect(len(best) == len(ids), f"{len(best)} lists of top log-probabilities of {len(ids)} tokens")
        for value, alternatives in zip(values, best, strict=True):
            expect(abs(value[0] - alternatives[0][0]) < 1e-3, "a greedy token is not the best of its list")
    before: list[int] = []
    for event in events:
        expect(event["output_ids"][: len(before)] == before, "a chunk does not begin as the one before")
        before = event["output_ids"]


def check_chat(request: Request, answer: dict[str, Any]) -> None:
    """Check an answer of ``/v1/chat/completions`` that a schema shapes.

    Raises:
        MalformedError: it does not follow the schema.
    """
    (choice,) = answer["choices"]
    content = choice["message"]["content"]
    if choice["finish_reason"] == "abort":
        raise AbortedError(f"{request.kind} was aborted")
    if choice["finish_reason"] == "length":
        return
    if request.kind == "tool" and choice["message"].get("tool_calls"):
        people = [json.loads(call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]
    else:
        try:
            # Grammars allow line breaks in a text, which strict JSON does not.
            value = json.loads(content, strict=False)
        except ValueError as error:
            raise MalformedError(f"{content!r}: {error}") from error
        people = [call["parameters"] for call in value] if request.kind == "tool" else [value]
    expect(people and all(set(person) == {"name", "age"} for person in people), f"{content!r} does not follow the schema")


def send_malformed(url: str, call: Call) -> str:
    """The status of the answer, with a mark where it is an error of plain SGLang as well.

    Raises:
        MalformedError: it is an error of the server's, or there is no answer.
    """
    status, text = call.send(url, ANSWER_SECONDS)
    if 0 < status < 500:
        return str(status)
    what = f"HTTP {status} to {call.method} {call.path} {call.body[:200]!r}: {text[:200]}"
    expect(call.is_sglangs_own(status, text), what)
    return f"{status} (plain SGLang's too)"


def send(url: str, request: Request) -> list[dict[str, Any]] | None:
    """The checked answers; None if the client has left.

    Raises:
        MalformedError: HTTP status or answer are wrong.
    """
    if request.call:
        return [{"status": send_malformed(url, request.call)}]
    stream = bool(request.body.get("stream"))
    with requests.post(f"{url}/{request.route}", json=request.body, stream=stream, timeout=ANSWER_SECONDS) as response:
        if response.status_code == ABORTED_STATUS or (response.status_code == 400 and ABORTED_EARLY in response.text):
            raise AbortedError(response.text[:200])
        expect(
            response.status_code == 200,
            f"HTTP {response.status_code}: {response.text[:200]}" if not stream else "HTTP status",
        )
        if not stream:
            answer = response.json()
            if request.route != "generate":
                check_chat(request, answer)
                return [answer]
            answers = answer if isinstance(answer, list) else [answer]
            expect(len(answers) == request.body["sampling_params"].get("n", 1), f"{len(answers)} answers")
            for item in answers:
                check_answer(request, item)
            return answers
        events: list[dict[str, Any]] = []
        last = b""
        for line in filter(None, response.iter_lines()):
            last = line
            if line.startswith(b"data: {"):
                events.append(json.loads(line[6:]))
                expect("error" not in events[-1], str(events[-1])[:200])
            if len(events) == 2 and request.kind == "disconnect":
                return None
            if len(events) == 2 and request.kind == "abort":
                requests.post(f"{url}/abort_request", json={"rid": request.body["rid"]}, timeout=60)
        expect(last == b"data: [DONE]" and events, "the stream has no end")
        check_answer(request, events[-1], events)
        return events[-1:]


@dataclass
class Outcome:
    """What came of the requests, also while they run.

    Attributes:
        answers: by index, of kinds that are compared.
        aborted: by kind, of requests that an event ended.
        statuses: of malformed requests.
        aborting: when events aborted requests (``time.monotonic``, from and to).
        held, over: while the first is set no request is sent, and once the second is set, none any more.
        well_formed: requests that have ended, without malformed ones.
        tokens: that the requests in flight ask for, and the most of them.
    """

    done: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    aborted: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    aborting: list[tuple[float, float]] = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    retractions: int = 0
    well_formed: int = 0
    tokens: int = 0
    most_tokens: int = 0
    seconds: float = 0.0

    @property
    def ended(self) -> int:
        """Requests that have ended in any way."""
        return self.done.total() + self.aborted.total() + len(self.failures)

    def aborts_since(self, started: float) -> bool:
        """Whether an event may have aborted a request that was begun then."""
        return any(end >= started for _, end in self.aborting)

    def note(self, index: int, request: Request, answers: Sequence[dict[str, Any]] | None) -> None:
        """Count a request that was answered."""
        self.done[request.kind] += 1
        for answer in answers or ():
            self.retractions += answer.get("meta_info", {}).get("num_retractions", 0)
        if request.kind in COMPARED and answers:
            self.answers[index] = answers[0]
        if request.kind == MALFORMED and answers:
            self.statuses[answers[0]["status"]] += 1


def run_requests(
    url: str,
    asked: dict[int, Request],
    workers: int,
    deadline: float,
    ask: Callable[[str, Request], Any] = send,
    outcome: Outcome | None = None,
    tokens: float = float("inf"),
) -> Outcome:
    """Send all requests until ``deadline`` (``time.monotonic``), in their order.

    Args:
        workers: requests that may be in flight.
        outcome: where to note what comes of them; default: a new one.
        tokens: none is sent while those in flight ask for so many.
    """
    found, started = outcome or Outcome(), time.monotonic()
    lock = threading.Condition()
    shown = started

    def one(index: int) -> None:
        nonlocal shown
        begun = time.monotonic()
        request = asked[index]
        answers, error = None, None
        try:
            answers = ask(url, request)
        except (MalformedError, requests.RequestException, ValueError, KeyError, TypeError) as caught:
            error = caught
        with lock:
            found.tokens -= request.tokens
            found.well_formed += request.kind != MALFORMED
            lock.notify()
            if isinstance(error, AbortedError) and found.aborts_since(begun):
                found.aborted[request.kind] += 1
            elif error is not None:
                found.failures.append({"request": index, "kind": request.kind, "error": brief(error)})
                if len(found.failures) <= SHOWN:
                    say(f"  request {index}, {request.kind}: {brief(error)}")
            else:
                found.note(index, request, answers)
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                say(f"  {found.ended} of {len(asked)} ended, {len(found.failures)} failed")

    free = threading.Semaphore(workers)
    pool = ThreadPoolExecutor(workers)
    try:
        for index, request in asked.items():
            free.acquire()
            with lock:
                while not (over := time.monotonic() > deadline or found.over.is_set()) and (
                    found.held.is_set() or found.tokens >= tokens
                ):
                    lock.wait(0.1)
                if over:
                    break
                found.tokens += request.tokens
                found.most_tokens = max(found.most_tokens, found.tokens)
            pool.submit(one, index).add_done_callback(lambda _: free.release())
        pool.shutdown()
    except BaseException:
        # Who ends this program does not wait for the requests in flight: they fail once the server is stopped.
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    found.seconds = time.monotonic() - started
    return found


# ------------------------------------------------------------------------------- events


def state_of(url: str) -> dict[str, Any]:
    """What the scheduler says of itself."""
    return requests.get(f"{url}/server_info", timeout=240).json()["internal_states"][0]


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer of a route that controls the server.

    Raises:
        MalformedError: its status is not 200.
    """
    response = requests.post(url, json=body, timeout=240)
    expect(response.status_code == 200, f"HTTP {response.status_code}: {response.text[:200]}")
    return response.json()


@contextlib.contextmanager
def paused(url: str, mode: str) -> Iterator[None]:
    """Generation is paused while in ``with``."""
    post(f"{url}/pause_generation", {"mode": mode})
    try:
        yield
    finally:
        post(f"{url}/continue_generation", {})


def pause(url: str, mode: str) -> dict[str, Any]:
    """Pause and go on.

    Raises:
        MalformedError: a round was run meanwhile.
    """
    with paused(url, mode):
        looks = []
        for seconds in (PAUSE_SECONDS, 0):
            looks.append(sum(state_of(url)["sparsespec_draft_length_histogram"]))
            time.sleep(seconds)
        expect(looks[0] == looks[1], f"{looks[1] - looks[0]} rounds ran in a pause ({mode})")
    return {"rounds_before": looks[0], "rounds_while_paused": looks[1] - looks[0]}


def update_weights(url: str, model: str, how: str, held: threading.Event) -> dict[str, Any]:
    """Load the same weights again, in a pause or once all requests that run have ended.

    Args:
        held: set, so that no further request is sent, where the update waits for those that run.

    Raises:
        MalformedError: they were not loaded.
    """
    body: dict[str, Any] = {"model_path": model}
    if how == "paused":
        # SGLang flushes no cache while requests wait.
        body["flush_cache"] = False
    else:
        held.set()
    refused = 0
    with paused(url, "retract") if how == "paused" else contextlib.nullcontext():
        while True:
            answer = requests.post(f"{url}/update_weights_from_disk", json=body, timeout=ANSWER_SECONDS).json()
            if answer["success"]:
                return {"refused": refused}
            # A request that was answered, or whose client has left, has not left its batch yet.
            refused += 1
            expected = refused < 10 and any(message in answer["message"] for message in STILL_RUNS)
            expect(expected, f"weights were not updated: {answer['message']}")
            time.sleep(0.2)


def tokens_in_use(state: dict[str, Any]) -> dict[str, int]:
    """KV tokens that are not free: of the device's pool, and of the host's if there is one."""
    pools = {"device": "kv_tokens", "host": "host_kv_tokens"}
    return {
        name: state[f"{pool}_total"] - state[f"{pool}_free"] for name, pool in pools.items() if f"{pool}_total" in state
    }


class Events(threading.Thread):
    """Lets the events of ``SCHEDULE`` happen, one after another, as requests end.

    Args:
        total: well-formed requests.

    Attributes:
        records: of each event, with ``error`` where it went wrong.
    """

    def __init__(self, url: str, model: str, names: Sequence[str], outcome: Outcome, total: int) -> None:
        super().__init__(daemon=True)
        self._url, self._model, self._outcome, self._total = url, model, outcome, total
        self._plan = [item for item in SCHEDULE if item[1] in names]
        self._over = threading.Event()
        self.records: list[dict[str, Any]] = []

    def run(self) -> None:
        for share, event, how in self._plan:
            # After a pause that aborts requests, or an update that waits for them, the next ones come first.
            while self._outcome.well_formed < share * self._total or not self._outcome.tokens:
                if self._over.wait(0.05):
                    return
            self._happen(event, how)

    def _happen(self, event: str, how: str) -> None:
        began, ended = time.monotonic(), self._outcome.well_formed
        say(f"  event: {event}, {how}")
        record: dict[str, Any] = {"event": event, "how": how, "after_requests": ended}
        record["tokens_in_flight"] = self._outcome.tokens
        if how == "abort":
            self._outcome.aborting.append((began, float("inf")))
        try:
            if event == "pause":
                record |= pause(self._url, how)
            else:
                record |= update_weights(self._url, self._model, how, self._outcome.held)
        except (MalformedError, requests.RequestException, ValueError, KeyError) as error:
            record["error"] = brief(error)
            say(f"  {event}, {how}: {record['error']}")
        self._outcome.held.clear()
        if how == "abort":
            self._outcome.aborting[-1] = (began, time.monotonic())
        self.records.append({**record, "seconds": round(time.monotonic() - began, 2)})

    def stop(self) -> None:
        """No further event begins; the one that happens is waited for."""
        self._over.set()
        self.join()

    @property
    def went_well(self) -> bool:
        """Whether all that were planned have happened, under load and without an error."""
        happened = [record for record in self.records if "error" not in record and record["tokens_in_flight"] > 0]
        return len(happened) == len(self._plan)


# ------------------------------------------------------------------------- kill, restart


class Family:
    """The processes of the server that this program has started for ``url``, and their files of shared memory."""

    def __init__(self, url: str) -> None:
        port = url.rpartition(":")[2]
        roots = [child for child in psutil.Process().children() if port in command_of(child)]
        self.processes = [process for root in roots for process in (root, *root.children(recursive=True))]
        self.shared_memory = {path for process in self.processes for path in shared_memory_of(process.pid)}

    def schedulers(self) -> list[psutil.Process]:
        """SGLang's schedulers."""
        return [process for process in self.processes if "scheduler" in " ".join(command_of(process))]

    def left(self, timeout: float) -> dict[str, list[str]]:
        """The processes that have not ended after ``timeout`` seconds, and the shared memory that is still there.

        Files that SGLang leaves behind itself do not count, and are removed.
        """
        deadline = time.monotonic() + timeout
        while (alive := [process for process in self.processes if command_of(process)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        found = {path for path in self.shared_memory if os.path.exists(path)}
        sglangs = {path for path in found if path.startswith(SGLANGS_FILES)}
        if not alive:
            for path in sglangs:
                os.unlink(path)
        return {
            "processes": [f"{process.pid} {' '.join(command_of(process))[:80]}" for process in alive],
            "shared_memory": sorted(found - sglangs),
        }


def command_of(process: psutil.Process) -> list[str]:
    """Its command line; empty if it has ended."""
    try:
        return process.cmdline() if process.is_running() and process.status() != psutil.STATUS_ZOMBIE else []
    except psutil.Error:
        return []


def shared_memory_of(pid: int) -> set[str]:
    """Files of /dev/shm that a process has mapped, or that carry its number in their name."""
    found = {str(path) for path in Path("/dev/shm").glob(f"*-{pid}-*")}
    with contextlib.suppress(OSError):
        names = [line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        found |= {name for name in names if name.startswith("/dev/shm/") and not name.endswith(" (deleted)")}
    return found


def kill_scheduler(url: str, asked: dict[int, Request], tokens: float, deadline: float) -> dict[str, Any]:
    """Kill the schedulers while requests run, and be there when the server ends."""
    family, outcome = Family(url), Outcome()
    arguments = (url, asked, MOST_AT_ONCE, deadline, send, outcome, tokens)
    load = threading.Thread(target=run_requests, args=arguments, daemon=True)
    load.start()
    patience = min(time.monotonic() + 30, deadline)
    while time.monotonic() < patience and (outcome.ended < 4 or not tokens_in_use(state_of(url)).get("host", 1)):
        time.sleep(0.1)
    ended, in_flight = outcome.ended, outcome.tokens
    say("  event: kill")
    killed = time.monotonic()
    schedulers = family.schedulers()
    for process in schedulers:
        process.kill()
    left = family.left(END_SECONDS)
    seconds = time.monotonic() - killed
    outcome.over.set()
    load.join(END_SECONDS)
    return {
        "killed": len(schedulers),
        "after_requests": ended,
        "tokens_in_flight": in_flight,
        "ended_after_s": round(seconds, 1),
        "clients_left_waiting": load.is_alive(),
        "left": left,
    }


# ------------------------------------------------------------------------------- memory


def processes_of_children() -> dict[str, int]:
    """Resident bytes of the processes that this program's children lead, by name and process id."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().partition(" (")[2].rpartition(") ")
            state, parent, _, session, *_ = rest.split()
            stats[int(path.parent.name)] = (name, int(parent), int(session), state)
    mine = {pid for pid, (_, parent, session, _) in stats.items() if session == pid and parent == os.getpid()}
    found = {}
    for pid, (name, _, session, state) in stats.items():
        if session in mine and state != "Z":
            with contextlib.suppress(OSError):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                found[f"{name} {pid}"] = pages * 4096
    return found


def gpu_bytes(processes: Iterable[str]) -> dict[str, int]:
    """GPU memory of ``processes``, as :func:`processes_of_children` names them.

    Where the driver names no process, that of each GPU which this program may use, whoever uses it; empty where there is
    no nvidia-smi.
    """
    if shutil.which("nvidia-smi") is None:
        return {}
    by_pid = {name.rpartition(" ")[2]: name for name in processes}
    used = {f"GPU memory of {by_pid[pid]}": amount for pid, amount in smi("compute-apps=pid,used_memory") if pid in by_pid}
    return used or {f"GPU {index}": amount for index, amount in smi("gpu=index,memory.used")}


def smi(query: str) -> list[tuple[str, int]]:
    """What nvidia-smi answers to a query of something and its memory; lines without a number are left out."""
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible}")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        pairs = [line.split(", ") for line in lines]
        return [(name, int(amount) * MEGABYTE) for name, amount in pairs if amount.isdecimal()]
    return []


class MemorySampler(threading.Thread):
    """Samples the memory of the server's processes and of the GPUs until it is stopped."""

    def __init__(self, interval: float = 1.0) -> None:
        super().__init__(daemon=True)
        self._interval, self._stopped = interval, threading.Event()
        self.samples: list[dict[str, int]] = []

    def run(self) -> None:
        while not self._stopped.wait(self._interval):
            processes = processes_of_children()
            self.samples.append({**processes, **gpu_bytes(processes)})

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def growth(self) -> dict[str, dict[str, float]]:
        """By process: megabytes at the end, and how much the last half grew (medians of its first and last quarter)."""
        half = self.samples[len(self.samples) // 2 :]
        quarter = max(1, len(half) // 4)
        found = {}
        for name in half[-1] if half else ():
            early, late = ([sample[name] for sample in part if name in sample] for part in (half[:quarter], half[-quarter:]))
            if early and late:
                start, end = statistics.median(early), statistics.median(late)
                found[name] = {"mb": round(end / MEGABYTE, 1), "growth_mb": round((end - start) / MEGABYTE, 1)}
        return found


# ---------------------------------------------------------------------------------- run


def is_empty(url: str, timeout: float) -> dict[str, Any]:
    """Whether the pool becomes empty and the cache can be flushed, with the numbers that say so."""
    deadline = time.monotonic() + timeout
    while True:
        flushed = requests.post(f"{url}/flush_cache", timeout=60).status_code == 200
        state = state_of(url)
        used = tokens_in_use(state)
        if (flushed and not any(used.values())) or time.monotonic() > deadline:
            names = ("accept_length", "plain_rounds", "accept_histogram")
            return {
                "flushed": flushed,
                "pool_empty": not any(used.values()),
                "kv_tokens_total": state["kv_tokens_total"],
                "host_kv_tokens_total": state.get("host_kv_tokens_total"),
                "kv_tokens_left": used,
                **{name: state.get(f"sparsespec_{name}") for name in names},
                "kv": {name: state[f"sparsespec_{name}"] for name in KV_COUNTERS if f"sparsespec_{name}" in state},
            }
        time.sleep(0.5)


def as_baseline(request: Request) -> Request:
    """The request as plain SGLang is asked it: not streamed, with the log-probabilities that show ties."""
    body = {**request.body, "stream": False, "return_logprob": True, "top_logprobs_num": SHOWN_TOKENS}
    return Request(request.kind, request.route, {name: value for name, value in body.items() if name != "token_ids_logprob"})


def ask_unchecked(url: str, request: Request) -> list[dict[str, Any]]:
    """The answer of plain SGLang."""
    response = requests.post(f"{url}/{request.route}", json=request.body, timeout=ANSWER_SECONDS)
    expect(response.status_code == 200, f"HTTP {response.status_code}: {response.text[:200]}")
    return [response.json()]


def set_speculate(url: str, value: str) -> None:
    body = {"server_args": {"sparsespec_speculate": value}}
    expect(
        requests.post(f"{url}/set_internal_state", json=body, timeout=60).json() == [True], "speculation was not switched"
    )


def serves_penalties(url: str) -> bool:
    """Whether the server serves penalties; an earlier version refuses them with HTTP 400."""
    body = {"text": "Hi", "sampling_params": {"max_new_tokens": 1, "frequency_penalty": 0.5}}
    return requests.post(f"{url}/generate", json=body, timeout=60).status_code == 200


def compare(asked: dict[int, Request], ours: dict[int, Any], plain: Outcome, tie_margin: float) -> dict[str, Any]:
    """Figures on greedy answers against plain SGLang's."""
    indices = [index for index in ours if index in plain.answers]
    baseline, outputs = ([found[index] for index in indices] for found in (plain.answers, ours))
    found = divergences(baseline, outputs)
    for item in found:
        item["prompt"] = indices[item["prompt"]]
        item["kind"] = asked[item["prompt"]].kind
    ends = 0
    differing = {item["prompt"] for item in found}
    for index, left, right in zip(indices, baseline, outputs, strict=True):
        same = left["text"] == right["text"] and left["meta_info"]["finish_reason"] == right["meta_info"]["finish_reason"]
        ends += index not in differing and not same
    return {
        "compared": len(indices),
        "equal": len(indices) - len(found),
        "other_ends_of_equal_tokens": ends,
        "divergences": found[:SHOWN],
        "plain_failures": plain.failures[:SHOWN],
        "ties_only": are_ties(found, tie_margin) and not ends and not plain.failures,
    }


def fill(
    url: str, args: argparse.Namespace, prompts: Sequence[Any], penalties: bool
) -> tuple[dict[int, Request], list[Call]]:
    """The requests of the load by number, malformed ones among them; and malformed ones that come after it."""
    asked = make_requests(args.requests, prompts, args.max_new_tokens, penalties)
    if MALFORMED not in args.events:
        return dict(enumerate(asked)), []
    fuzz = Fuzz(requests.get(f"{url}/openapi.json", timeout=60).json())
    calls = [fuzz.call(seed) for seed in range(args.malformed)]
    quiet = [call for call in calls if call.path.startswith(QUIET_ROUTES)]
    return dict(enumerate(with_malformed(asked, [call for call in calls if call not in quiet]))), quiet


def questions_of(asked: dict[int, Request], outcome: Outcome, most: int) -> dict[int, Request]:
    """At most so many of the requests whose answers are compared, as plain SGLang is asked them."""
    return {index: as_baseline(asked[index]) for index in list(outcome.answers)[:most]}


def stop(stack: contextlib.ExitStack, url: str) -> dict[str, list[str]]:
    """Stop the server of ``url``, which is the one in ``stack``; what is left of it."""
    family = Family(url)
    stack.close()
    return family.left(10)


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Run it all; the record without stamp."""
    started = time.monotonic()
    deadline = started + args.time_limit
    (spec,) = args.engines
    prompts: list[Any] = [
        *load_prompts(20, 20, 0, 0),
        *Dataset.parse(f"math:{args.prompt_tokens}").prompts(args.model_path, 24),
    ]
    # Under overlap scheduling plain SGLang counts penalties one token late.
    plain_spec = EngineSpec.parse("plain,disable_overlap_schedule=true")
    plain_spec.settings.update({name: spec.settings[name] for name in SHARED_SETTINGS if name in spec.settings})
    logs = Path(tempfile.mkdtemp(prefix="soak-"))
    record: dict[str, Any] = {}
    restart: dict[str, Any] = {}
    after: dict[str, Any] = {"flushed": False, "pool_empty": False, "kv": {}}
    left: dict[str, list[str]] = {}
    plain = Outcome()
    tie_margin = 0.0 if args.device == "cpu" else args.tie_margin
    with contextlib.ExitStack() as stack:
        flags = server_flags(spec, args)
        say(f"{spec.label}: starting; its log is {logs / 'sparsespec.log'}")
        url = stack.enter_context(server(flags, logs / "sparsespec.log", args.device, args.start_seconds))
        record["start_s"] = round(time.monotonic() - started, 1)
        # What the second start, and plain SGLang's start and answers, may take is kept free.
        reserve = args.plain_seconds + ("kill" in args.events) * (1.5 * record["start_s"] + END_SECONDS)
        penalties = serves_penalties(url)
        asked, quiet = fill(url, args, prompts, penalties)
        pool = state_of(url)["kv_tokens_total"]
        most = args.overload * pool
        say(f"ready after {record['start_s']} s; {len(asked)} requests for a pool of {pool} tokens; penalties: {penalties}")
        # What compiles at its first use, grammars and samples of prompts, would have all others wait.
        first = {request.kind: index for index, request in reversed(asked.items()) if request.kind != MALFORMED}
        warm = run_requests(url, {index: asked[index] for index in first.values()}, len(first), deadline - reserve)
        say(f"one of each kind took {warm.seconds:.0f} s")
        sampler, outcome = MemorySampler(), Outcome()
        events = Events(url, args.model_path, args.events, outcome, args.requests)
        sampler.start()
        events.start()
        run_requests(url, asked, MOST_AT_ONCE, deadline - reserve, outcome=outcome, tokens=most)
        sampler.stop()
        events.stop()
        say(f"{outcome.ended} ended in {outcome.seconds:.0f} s; {len(outcome.failures)} failed")
        later = {len(asked) + place: request for place, request in enumerate(with_malformed([], quiet))}
        most_tokens, seconds = outcome.most_tokens, outcome.seconds
        try:
            run_requests(url, later, 4, deadline - reserve, outcome=outcome)
            after = is_empty(url, 30)
            if "kill" in args.events:
                few = dict(list(questions_of(asked, outcome, args.compare).items())[:RESTART_QUESTIONS])
                before = run_requests(url, few, 1, deadline, ask_unchecked)
                valid = {index: request for index, request in asked.items() if request.kind != MALFORMED}
                restart = kill_scheduler(url, valid, most, deadline - args.plain_seconds)
                stack.close()
                say(f"{spec.label}: starting again; its log is {logs / 'again.log'}")
                again = time.monotonic()
                url = stack.enter_context(server(flags, logs / "again.log", args.device, max(1.0, deadline - again)))
                restart["start_s"] = round(time.monotonic() - again, 1)
                answers = run_requests(url, few, 1, deadline, ask_unchecked).answers
                restart |= compare(asked, answers, before, tie_margin)
            if args.plain == "same":
                set_speculate(url, "never")
            else:
                left = stop(stack, url)
                say(f"plain: starting; its log is {logs / 'plain.log'}")
                limit = max(1.0, deadline - time.monotonic())
                url = stack.enter_context(server(server_flags(plain_spec, args), logs / "plain.log", args.device, limit))
            plain = run_requests(url, questions_of(asked, outcome, args.compare), PLAIN_AT_ONCE, deadline, ask_unchecked)
            if args.plain == "same":
                left = stop(stack, url)
        except (RuntimeError, MalformedError, requests.RequestException) as error:
            # A server has ended, or has not started: the record shows how far it came.
            say(brief(error))
            record["error"] = brief(error)
    memory = sampler.growth()
    grown = {name: item["growth_mb"] for name, item in memory.items() if item["growth_mb"] > args.max_growth_mb}
    ours = {index: outcome.answers[index] for index in questions_of(asked, outcome, args.compare)}
    found = compare(asked, ours, plain, tie_margin)
    finished = "error" not in record and outcome.ended == len(asked) + len(later) and found["compared"] == len(ours)
    return {
        **record,
        **describe(spec, args),
        "device": args.device,
        "requests": args.requests,
        "overload": {"asked": args.overload, "reached": round(most_tokens / pool, 2)},
        "penalties": penalties,
        "seconds": round(seconds, 1),
        "done": dict(outcome.done),
        "failed": len(outcome.failures),
        "failures": outcome.failures[:SHOWN],
        "aborted_by_pause": dict(outcome.aborted),
        "malformed": {"after_the_load": len(later), "statuses": dict(sorted(outcome.statuses.items()))},
        "retractions": outcome.retractions,
        **after,
        "events": events.records,
        "restart": restart,
        "left": left,
        "plain": args.plain,
        "tie_margin": tie_margin,
        **found,
        "memory": memory,
        "memory_samples": len(sampler.samples),
        "grown": grown,
        "total_s": round(time.monotonic() - started, 1),
        "passed": finished
        and not outcome.failures
        and after["flushed"]
        and after["pool_empty"]
        and most_tokens >= most
        and was_full(after["kv"], outcome.retractions)
        and events.went_well
        and came_back(restart)
        and not any(left.values())
        and found["ties_only"]
        and not grown,
    }


def was_full(kv: dict[str, int], retractions: int) -> bool:
    """Whether requests were retracted for want of room; with a host tier, moved there and back before it was full."""
    return all(kv[name] for name in MUST_HAPPEN) if kv else retractions > 0


def came_back(restart: dict[str, Any]) -> bool:
    """Whether a killed server ended with nothing left, and the next one answers as it did; or none was killed."""
    return not restart or bool(
        restart["killed"]
        and not restart["clients_left_waiting"]
        and not any(restart["left"].values())
        and restart.get("compared")
        and restart.get("ties_only")
    )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser, [SMALL_ENGINE])
    parser.add_argument("--requests", type=int, default=2000, help="well-formed ones")
    parser.add_argument("--malformed", type=int, default=2000, help="malformed bodies")
    parser.add_argument("--overload", type=float, default=10, help="KV pools that the requests in flight ask for together")
    parser.add_argument("--events", nargs="*", choices=EVENTS, default=list(EVENTS), help="what happens meanwhile")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, help="most tokens of an answer; aborted ones ask for four times as many"
    )
    parser.add_argument("--prompt-tokens", type=int, default=500, help="tokens of the longer half of the prompts")
    parser.add_argument("--max-running-requests", type=int, default=64)
    parser.add_argument("--compare", type=int, default=1200, help="at most so many answers are compared")
    parser.add_argument("--plain", choices=("server", "same"), default="server", help="who gives plain SGLang's answers")
    parser.add_argument(
        "--tie-margin", type=float, default=0.25, help="largest log-probability margin of a tie (0 on a CPU)"
    )
    parser.add_argument("--max-growth-mb", type=float, default=64, help="most that a process may grow over the last half")
    parser.add_argument("--time-limit", type=float, default=460, help="seconds for everything")
    parser.add_argument("--start-seconds", type=float, default=150, help="seconds for the first server's start")
    parser.add_argument(
        "--plain-seconds", type=float, default=120, help="seconds of the limit that are kept for plain's answers"
    )
    args = parser.parse_args(argv)
    if len(args.engines) != 1 or args.engines[0].kind != "sparsespec":
        parser.error("--engines takes one engine, a sparsespec one")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    # So that a program that is ended stops its server, which is in a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    record = {**stamp(), **soak(args)}
    line = write_record(args.results, record)
    if not args.results:
        print(line)
    names = ("done", "failed", "aborted_by_pause", "malformed", "overload", "kv", "events", "restart", "left")
    for name in (*names, "flushed", "pool_empty", "compared", "equal", "ties_only", "grown", "total_s", "passed"):
        say(f"{name}: {record[name]}")
    return int(not record["passed"])


if __name__ == "__main__":
    sys.exit(main())
