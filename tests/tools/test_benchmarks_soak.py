"""The soak: what it asks, what it takes for a well-formed answer, and when memory has grown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.append(str(REPO / "benchmarks"))

import soak  # noqa: E402
from _openapi_fuzz import Call  # noqa: E402

PROMPTS = ["Hello", [1, 2, 3]]


def answer(ids: list[int], kind: str = "length", text: str = "x", **info: Any) -> dict[str, Any]:
    meta = {"completion_tokens": len(ids), "finish_reason": {"type": kind}, **info}
    return {"text": text, "output_ids": ids, "meta_info": meta}


def request(kind: str, max_new_tokens: int = 2, **sampling: Any) -> soak.Request:
    body: dict[str, Any] = {"sampling_params": {"max_new_tokens": max_new_tokens, **sampling}}
    if kind == "logprobs":
        body["return_logprob"] = True
    return soak.Request(kind, "generate", body)


@contextmanager
def http_server(answer_to: Callable[[str, Any], tuple[int, Any]]) -> Iterator[str]:
    """The URL of a server whose answers, status and JSON, are ``answer_to(path, body)``."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, value = answer_to(self.path, json.loads(text) if text else None)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as stub:
        thread = threading.Thread(target=stub.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{stub.server_address[1]}"
        finally:
            stub.shutdown()
            thread.join()


def state(**values: Any) -> dict[str, Any]:
    found = {"sparsespec_draft_length_histogram": [1], "kv_tokens_total": 9, "kv_tokens_free": 9}
    return {"internal_states": [{**found, **values}]}


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
        (request("abort"), answer([1, 2], "abort", completion_tokens=1), []),
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
    soak.check_answer(request("abort", 9), answer([4], "abort", completion_tokens=4))  # it waited
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


def test_most_prompts_are_shared_with_no_other_request_and_ask_for_their_tokens() -> None:
    asked = soak.make_requests(400, ["a b" * 50], 96, True)
    texts = Counter(item.body.get("text") or item.body["messages"][0]["content"] for item in asked)
    assert 200 < sum(count == 1 for count in texts.values()) < 400
    for item in asked:
        if item.route == "generate":
            sampling = item.body["sampling_params"]
            own = item.body["text"].startswith("0")
            least = sampling["max_new_tokens"] * sampling.get("n", 1)
            assert item.tokens == least + (own and len(item.body["text"]) // soak.TOKEN_CHARACTERS)


def test_malformed_requests_come_evenly_among_the_others() -> None:
    calls = [Call("POST", f"/{index}", b"{}") for index in range(20)]
    mixed = soak.with_malformed([request("greedy")] * 30, calls)
    kinds = [item.kind for item in mixed]
    assert [item.call for item in mixed if item.call] == calls
    assert all(kinds[start : start + 5].count(soak.MALFORMED) == 2 for start in range(0, 50, 5))


def test_requests_are_sent_until_those_in_flight_ask_for_so_many_tokens() -> None:
    asked = {index: soak.Request("greedy", "generate", {}, tokens=10) for index in range(40)}
    outcome, seen = soak.Outcome(), []

    def ask(url: str, item: soak.Request) -> list[Any]:
        seen.append(outcome.tokens)
        time.sleep(0.01)
        return [{"meta_info": {"num_retractions": 2}}]

    soak.run_requests("", asked, 100, time.monotonic() + 60, ask, outcome, tokens=75)
    assert outcome.most_tokens == max(seen) == 80 and outcome.tokens == 0
    assert outcome.done == {"greedy": 40} and outcome.retractions == 80
    late = soak.run_requests("", asked, 100, time.monotonic() - 1, ask)
    assert late.ended == 0


def test_a_program_that_is_ended_does_not_wait_for_requests_in_flight() -> None:
    done = threading.Event()

    def interrupt(signum: int, frame: Any) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    started = time.monotonic()
    try:
        with pytest.raises(SystemExit):
            asked = dict.fromkeys(range(20), request("greedy"))
            soak.run_requests("", asked, 4, started + 60, lambda url, item: done.wait(20))
    finally:
        done.set()
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        (soak.ABORTED_STATUS, "", soak.AbortedError),
        (400, '{"error":{"message":"Aborted by AbortReq."}}', soak.AbortedError),
        (400, '{"error":{"message":"top_p must be in (0, 1]"}}', soak.MalformedError),
    ],
)
def test_statuses_of_aborted_answers_are_told_from_those_of_refused_ones(
    status: int, text: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = SimpleNamespace(status_code=status, text=text)
    monkeypatch.setattr("requests.post", lambda *args, **kwargs: nullcontext(answer))
    with pytest.raises(soak.MalformedError) as raised:
        soak.send("", request("regex"))
    assert type(raised.value) is error


def test_an_answer_that_is_aborted_is_a_failure_unless_an_event_aborted_it() -> None:
    def ask(url: str, item: soak.Request) -> list[Any]:
        raise soak.AbortedError("aborted")

    for when, failed in ((None, 2), ((-100.0, -50.0), 2), ((-1.0, float("inf")), 0)):
        outcome, now = soak.Outcome(), time.monotonic()
        if when:
            outcome.aborting.append((now + when[0], now + when[1]))
        soak.run_requests("", dict.fromkeys(range(2), request("greedy")), 2, now + 60, ask, outcome)
        assert (len(outcome.failures), outcome.aborted.total()) == (failed, 2 - failed)
        assert outcome.ended == 2


def test_statuses_of_malformed_requests_are_counted_and_errors_of_the_server_are_failures() -> None:
    def answer_to(path: str, body: Any) -> tuple[int, Any]:
        return (400, {}) if body == {"a": 1} else (500, {})

    calls = [Call("POST", "/generate", b'{"a": 1}'), Call("POST", "/v1/tokenize", b"{}"), Call("POST", "/generate", b"{}")]
    with http_server(answer_to) as url:
        found = soak.run_requests(url, dict(enumerate(soak.with_malformed([], calls))), 1, time.monotonic() + 60)
    assert found.statuses == {"400": 1, "500 (plain SGLang's too)": 1}
    assert [item["request"] for item in found.failures] == [2] and "HTTP 500 to POST /generate" in found.failures[0]["error"]


@pytest.mark.parametrize("rounds", [0, 3])
def test_no_round_may_run_in_a_pause(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    monkeypatch.setattr(soak, "PAUSE_SECONDS", 0.01)
    paths: list[str] = []

    def answer_to(path: str, body: Any) -> tuple[int, Any]:
        paths.append(path)
        return 200, state(sparsespec_draft_length_histogram=[1, 4 + rounds * paths.count("/server_info")])

    with http_server(answer_to) as url:
        if rounds:
            with pytest.raises(soak.MalformedError, match="3 rounds ran in a pause"):
                soak.pause(url, "retract")
        else:
            assert soak.pause(url, "retract")["rounds_while_paused"] == 0
    # Also after an error the server goes on.
    assert paths == ["/pause_generation", "/server_info", "/server_info", "/continue_generation"]


@pytest.mark.parametrize("message", [*soak.STILL_RUNS, "no such file"])
def test_an_update_of_weights_that_a_request_stands_in_the_way_of_is_tried_again(message: str) -> None:
    tries, held = [], threading.Event()

    def answer_to(path: str, body: Any) -> tuple[int, Any]:
        tries.append(held.is_set())
        refused = len(tries) == 1
        return (400 if refused else 200), {"success": not refused, "message": message}

    with http_server(answer_to) as url:
        if message in soak.STILL_RUNS:
            assert soak.update_weights(url, "m", "waiting", held) == {"refused": 1}
            assert tries == [True, True]
        else:
            with pytest.raises(soak.MalformedError, match=message):
                soak.update_weights(url, "m", "waiting", held)


def events_of(answer_to: Callable[[str, Any], tuple[int, Any]], names: list[str], under_load: bool = True) -> soak.Events:
    """The events while requests of a stub end, or after them."""
    outcome = soak.Outcome()

    def ask(url: str, item: soak.Request) -> list[Any]:
        time.sleep(0.005)
        plan = [share for share, event, _ in soak.SCHEDULE if event in names]
        while under_load and sum(share * 200 + 8 < outcome.well_formed for share in plan) > len(events.records):
            time.sleep(0.002)
        return [{}]

    asked = dict.fromkeys(range(200), soak.Request("sampled", "generate", {}, tokens=10))
    with http_server(answer_to) as url:
        events = soak.Events(url, "m", names, outcome, len(asked))
        if under_load:
            events.start()
        soak.run_requests("", asked, 4, time.monotonic() + 60, ask, outcome)
        if not under_load:
            events.start()
        events.stop()
    return events


def answer_well(path: str, body: Any) -> tuple[int, Any]:
    return 200, state() if path == "/server_info" else {"success": True}


def test_events_happen_in_order_while_requests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "PAUSE_SECONDS", 0.01)
    events = events_of(answer_well, ["pause", "weights"])
    assert [(item["event"], item["how"]) for item in events.records] == [item[1:] for item in soak.SCHEDULE]
    for item, (share, *_) in zip(events.records, soak.SCHEDULE, strict=True):
        assert item["after_requests"] >= share * 200
    assert events.went_well
    after = events_of(answer_well, ["pause"], under_load=False)
    assert not after.records and not after.went_well
    assert events_of(answer_well, []).went_well


def test_an_event_that_goes_wrong_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "PAUSE_SECONDS", 0.01)
    events = events_of(lambda path, body: (500, {}) if path.startswith("/pause") else answer_well(path, body), ["pause"])
    assert len(events.records) == 3 and all("HTTP 500" in item["error"] for item in events.records)
    assert not events.went_well


CHILD = """
import mmap, os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
kept = []
for path in sys.argv[3:]:
    with open(path, "w+b") as file:
        file.truncate(4096)
        kept.append(mmap.mmap(file.fileno(), 4096))
print("ready", flush=True)
input()
"""


@contextmanager
def child(name: str, url: str, *shared_memory: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the server of ``url``, with shared memory of its own."""
    command = [sys.executable, "-c", CHILD, name, url.rpartition(":")[2], *shared_memory]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()
        for path in shared_memory:
            Path(path).unlink(missing_ok=True)


def test_processes_and_shared_memory_that_are_left_are_found() -> None:
    ours, sglangs = f"/dev/shm/soak-test.{os.getpid()}", f"/dev/shm/sglang_loads_test{os.getpid()}"
    url = "http://x:test"
    with child("first", url, ours, sglangs) as first, child("second", url) as second, child("other's", "x:other"):
        family = soak.Family(url)
        first.kill()
        (line,) = family.left(0.5)["processes"]
        assert line.startswith(f"{second.pid} ") and Path(sglangs).exists()
        second.kill()
        assert family.left(5) == {"processes": [], "shared_memory": [ours]}
        assert not Path(sglangs).exists()
        Path(ours).unlink()
        assert family.left(5) == {"processes": [], "shared_memory": []}


@pytest.mark.parametrize("survives", [False, True])
def test_a_killed_server_must_end_with_all_of_its_processes(monkeypatch: pytest.MonkeyPatch, survives: bool) -> None:
    monkeypatch.setattr(soak, "END_SECONDS", 2.0 if survives else 20.0)
    asked = dict.fromkeys(range(5000), soak.Request("n=4", "generate", {"sampling_params": {"max_new_tokens": 1}}, tokens=1))

    def answer_to(path: str, body: Any) -> tuple[int, Any]:
        if not survives and path == "/generate" and scheduler.poll() is not None:
            return 500, {}
        return 200, state(host_kv_tokens_total=5, host_kv_tokens_free=4) if path == "/server_info" else answer([1])

    with http_server(answer_to) as url, child("sglang::scheduler", url) as scheduler, child("x", url) as other:
        if not survives:
            threading.Thread(target=lambda: (scheduler.wait(), other.kill())).start()
        found = soak.kill_scheduler(url, asked, 20, time.monotonic() + 60)
    assert found["killed"] == 1 and found["after_requests"] >= 4 and not found["clients_left_waiting"]
    assert [line.split()[0] for line in found["left"]["processes"]] == [str(other.pid)] * survives
    assert soak.came_back({**found, "compared": 8, "ties_only": True}) is not survives
    assert not soak.came_back({**found, "compared": 8, "ties_only": False})


def test_a_run_that_did_not_fill_the_pool_and_the_host_has_not_passed() -> None:
    full = dict.fromkeys(soak.MUST_HAPPEN, 1)
    assert soak.was_full(full, 0) and soak.was_full({}, 3)
    assert not soak.was_full({**full, "kv_host_full": 0}, 3) and not soak.was_full({}, 0)
