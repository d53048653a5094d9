"""Requests of all kinds at once against one server: every answer well-formed, greedy ones plain SGLang's, nothing left over.

    python benchmarks/soak.py --model-path M --results soak.jsonl

Streams, aborts, disconnects, grammars, tools, penalties, log-probabilities, stop strings, samples and n = 4 go to a server
with SPARSESPEC. Afterwards its KV pool must be empty, ``/flush_cache`` must succeed, and the memory of its processes must
have been flat over the last half. Then a plain server answers the greedy requests; where an answer differs, the margin shows
whether two tokens were tied (parity.py). ``--plain same`` asks the same server again with speculation switched off, which
saves a start but shows less. It ends by itself at ``--time-limit``; a run that was cut short has not passed.

The record has the counts by kind, the first failures, the divergences and the memory by process. Exit status 1: not passed.
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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
#: Kinds whose answers are compared with plain SGLang's.
COMPARED = ("greedy", "stream", "logprobs", "stops", "penalties")
MEGABYTE = 1 << 20
SHOWN = 20
#: Log-probabilities of plain SGLang at each position: 16 bits may give the same logit to more tokens than a few.
SHOWN_TOKENS = 20


@dataclass(frozen=True)
class Request:
    """Kind, route and body of a request."""

    kind: str
    route: str
    body: dict[str, Any]


def make_requests(count: int, prompts: Sequence[Any], max_new_tokens: int, penalties: bool) -> list[Request]:
    """``count`` requests, the same in every run; ``prompts`` are texts and lists of token ids."""
    shares = {kind: share for kind, share in SHARES.items() if penalties or kind != "penalties"}
    found = []
    for index in range(count):
        dice = random.Random(index)
        kind = dice.choices(list(shares), shares.values())[0]
        prompt = dice.choice(prompts)
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
            chat.update(temperature=0, max_tokens=200)
            schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
            tool = {"type": "function", "function": {"name": "greet", "parameters": PERSON}}
            chat.update({"response_format": schema} if kind == "json" else {"tools": [tool], "tool_choice": "required"})
            found.append(Request(kind, "v1/chat/completions", chat))
        else:
            found.append(Request(kind, "generate", body))
    return found


# ------------------------------------------------------------------------------ answers


class MalformedError(Exception):
    """An answer is not what its request asked for."""


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
    expect(
        info["completion_tokens"] == len(ids) <= sampling["max_new_tokens"],
        f"{info['completion_tokens']} tokens, {len(ids)} ids",
    )
    if request.kind == "abort" and reason["type"] == "abort":
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
    if choice["finish_reason"] == "length":
        return
    if request.kind == "tool" and choice["message"].get("tool_calls"):
        people = [json.loads(call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]
    else:
        value = json.loads(content)
        people = [call["parameters"] for call in value] if request.kind == "tool" else [value]
    expect(people and all(set(person) == {"name", "age"} for person in people), f"{content!r} does not follow the schema")


def send(url: str, request: Request) -> list[dict[str, Any]] | None:
    """The checked answers; None if the client has left.

    Raises:
        MalformedError: HTTP status or answer are wrong.
    """
    stream = bool(request.body.get("stream"))
    with requests.post(f"{url}/{request.route}", json=request.body, stream=stream, timeout=240) as response:
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
    """What came of the requests.

    Attributes:
        answers: by index, of kinds that are compared.
    """

    done: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0


def run_requests(
    url: str, asked: dict[int, Request], at_once: int, deadline: float, ask: Callable[[str, Request], Any] = send
) -> Outcome:
    """Send all requests, ``at_once`` at a time, until ``deadline`` (``time.monotonic``)."""
    outcome, lock, started = Outcome(), threading.Lock(), time.monotonic()
    shown = started

    def one(index: int) -> None:
        nonlocal shown
        if time.monotonic() > deadline:
            return
        request = asked[index]
        try:
            answers = ask(url, request)
        except (MalformedError, requests.RequestException, ValueError, KeyError, TypeError) as error:
            with lock:
                outcome.failures.append(
                    {"request": index, "kind": request.kind, "error": f"{type(error).__name__}: {error}"[:300]}
                )
            return
        with lock:
            outcome.done[request.kind] += 1
            if request.kind in COMPARED and answers:
                outcome.answers[index] = answers[0]
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                say(f"  {outcome.done.total()} of {len(asked)} done, {len(outcome.failures)} failed")

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, asked))
    outcome.seconds = time.monotonic() - started
    return outcome


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
        state = requests.get(f"{url}/server_info", timeout=60).json()["internal_states"][0]
        numbers = {name: state.get(name) for name in ("kv_tokens_free", "kv_tokens_total")}
        empty = numbers["kv_tokens_free"] == numbers["kv_tokens_total"]
        if (flushed and empty) or time.monotonic() > deadline:
            names = ("accept_length", "plain_rounds", "accept_histogram")
            return {
                "flushed": flushed,
                "pool_empty": empty,
                **numbers,
                **{name: state.get(f"sparsespec_{name}") for name in names},
            }
        time.sleep(0.5)


def as_baseline(request: Request) -> Request:
    """The request as plain SGLang is asked it: not streamed, with the log-probabilities that show ties."""
    body = {**request.body, "stream": False, "return_logprob": True, "top_logprobs_num": SHOWN_TOKENS}
    return Request(request.kind, request.route, {name: value for name, value in body.items() if name != "token_ids_logprob"})


def ask_unchecked(url: str, request: Request) -> list[dict[str, Any]]:
    """The answer of plain SGLang."""
    response = requests.post(f"{url}/{request.route}", json=request.body, timeout=240)
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
    logs = Path(tempfile.mkdtemp(prefix="soak-"))
    record: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        # What plain SGLang's start and answers may take is kept free.
        reserve = args.plain_seconds
        say(f"{spec.label}: starting; its log is {logs / 'sparsespec.log'}")
        url = stack.enter_context(server(server_flags(spec, args), logs / "sparsespec.log", args.device, args.start_seconds))
        record["start_s"] = round(time.monotonic() - started, 1)
        penalties = serves_penalties(url)
        asked = dict(enumerate(make_requests(args.requests, prompts, args.max_new_tokens, penalties)))
        say(f"ready after {record['start_s']} s; {len(asked)} requests, {args.concurrency} at once; penalties: {penalties}")
        # What compiles at its first use, grammars and samples of prompts, would have all others wait.
        first = {request.kind: index for index, request in reversed(asked.items())}
        warm = run_requests(url, {index: asked[index] for index in first.values()}, len(first), deadline - reserve)
        say(f"one of each kind took {warm.seconds:.0f} s")
        sampler = MemorySampler()
        sampler.start()
        outcome = run_requests(url, asked, args.concurrency, deadline - reserve)
        sampler.stop()
        say(f"{outcome.done.total()} done in {outcome.seconds:.0f} s; {len(outcome.failures)} failed")
        after = is_empty(url, 30)
        compared = dict(list({index: asked[index] for index in outcome.answers}.items())[: args.compare])
        questions = {index: as_baseline(request) for index, request in compared.items()}
        if args.plain == "same":
            set_speculate(url, "never")
            plain = run_requests(url, questions, args.concurrency, deadline, ask_unchecked)
        else:
            stack.close()
            say(f"plain: starting; its log is {logs / 'plain.log'}")
            left = max(1.0, deadline - time.monotonic())
            url = stack.enter_context(server(server_flags(plain_spec, args), logs / "plain.log", args.device, left))
            plain = run_requests(url, questions, args.concurrency, deadline, ask_unchecked)
    memory = sampler.growth()
    grown = {name: item["growth_mb"] for name, item in memory.items() if item["growth_mb"] > args.max_growth_mb}
    ours = {index: outcome.answers[index] for index in compared}
    tie_margin = 0.0 if args.device == "cpu" else args.tie_margin
    found = compare(asked, ours, plain, tie_margin)
    finished = outcome.done.total() == len(asked) and found["compared"] == len(compared)
    return {
        **record,
        **describe(spec, args),
        "device": args.device,
        "requests": len(asked),
        "concurrency": args.concurrency,
        "penalties": penalties,
        "seconds": round(outcome.seconds, 1),
        "done": dict(outcome.done),
        "failed": len(outcome.failures),
        "failures": outcome.failures[:SHOWN],
        **after,
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
        and found["ties_only"]
        and not grown,
    }


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser, ["sparsespec"])
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--concurrency", type=int, default=50)
    parser.add_argument(
        "--max-new-tokens", type=int, default=96, help="most tokens of an answer; aborted ones ask for four times as many"
    )
    parser.add_argument("--prompt-tokens", type=int, default=1500, help="tokens of the longer half of the prompts")
    parser.add_argument("--max-running-requests", type=int, default=64)
    parser.add_argument("--compare", type=int, default=1200, help="at most so many answers are compared")
    parser.add_argument("--plain", choices=("server", "same"), default="server", help="who gives plain SGLang's answers")
    parser.add_argument(
        "--tie-margin", type=float, default=0.25, help="largest log-probability margin of a tie (0 on a CPU)"
    )
    parser.add_argument("--max-growth-mb", type=float, default=64, help="most that a process may grow over the last half")
    parser.add_argument("--time-limit", type=float, default=285, help="seconds for everything")
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
    for name in ("done", "failed", "flushed", "pool_empty", "compared", "equal", "ties_only", "grown", "total_s", "passed"):
        say(f"{name}: {record[name]}")
    return int(not record["passed"])


if __name__ == "__main__":
    sys.exit(main())
