"""What clients do to a server: aborts, disconnects, stop strings, limits, a full KV pool.

After every case the KV pool must be empty again: with the radix cache flushed, as many tokens are
free as the pool has. What ends an answer, and answers of retracted requests, are compared with plain
SGLang's in ``test_answers.py``, with a tiny model.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
import requests
from bad_requests import BAD_PARAMS, BAD_REQUESTS
from server_client import GREEDY, Client, assert_healthy, serving

from sglang_sparsespec.sglang_compat import DECLARES_RESOLUTION

pytestmark = pytest.mark.slow

CONTEXT = 512
KV_TOKENS = 1200
PROMPT = "Count up slowly and explain every step:\n1 is the first number.\n2 is"


@pytest.fixture(scope="module", params=["lockstep", pytest.param("unified", marks=pytest.mark.nightly)])
def client(
    request: pytest.FixtureRequest, model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """A server of either schedule with a small context and a KV pool that four requests overflow."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    flags = ["--context-length", str(CONTEXT), "--max-total-tokens", str(KV_TOKENS)]
    flags += ["--max-running-requests", "8", "--enable-metrics", "--sparsespec-min-budget", "32"]
    flags += ["--decode-log-interval", "5"]  # metrics are exported at this interval
    # Admit as if outputs were short, so that a full pool retracts requests.
    flags += ["--schedule-conservativeness", "0.01", "--sparsespec-schedule", request.param]
    with serving(model_path, log, *flags) as (server, client):
        yield client
        assert_healthy(server)


#: Refused before any round, so the same for both schedules; or takes minutes and is in engine/test_unified.py too.
in_lockstep_only = pytest.mark.parametrize("client", ["lockstep"], indirect=True)


@pytest.fixture(autouse=True)
def pool_is_empty_afterwards(client: Client) -> Iterator[None]:
    yield
    client.assert_pool_empties()


@pytest.fixture(scope="module")
def long_answer(client: Client) -> dict[str, Any]:
    """A greedy answer that the cases below cut in different ways."""
    return client.generate(PROMPT, max_new_tokens=96)


def test_aborting_a_running_request_ends_it(client: Client) -> None:
    body = {
        "text": PROMPT,
        "rid": "to-be-aborted",
        "stream": True,
        "sampling_params": {**GREEDY, "max_new_tokens": 400},
    }
    with requests.post(f"{client.url}/generate", json=body, stream=True, timeout=300) as response:
        lines = (line for line in response.iter_lines() if line.startswith(b"data: {"))
        next(lines)
        aborted = requests.post(f"{client.url}/abort_request", json={"rid": "to-be-aborted"}, timeout=60)
        assert aborted.status_code == 200
        last = json.loads(list(lines)[-1][len(b"data: ") :])
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert last["meta_info"]["completion_tokens"] < 400


def test_a_client_that_disconnects_frees_its_request(client: Client) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)) as connection:
        body = {"text": PROMPT, "stream": True, "sampling_params": {**GREEDY, "max_new_tokens": 450}}
        connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
        connection.getresponse().read(200)
        client.wait_until_running(1)
    started = time.monotonic()
    client.assert_pool_empties()
    # 450 tokens take longer than this: it was the disconnect that ended the request.
    assert time.monotonic() - started < 20


@pytest.mark.nightly
def test_a_stop_string_ends_the_text_just_before_it(client: Client, long_answer: dict[str, Any]) -> None:
    text = long_answer["text"]
    # Consecutive places, so that some lie inside an accepted run and some across its end.
    stops = [text[start : start + 7] for start in range(60, 84, 3)]
    answers = client.generate_all([{"prompt": PROMPT, "max_new_tokens": 96, "stop": [stop]} for stop in stops])
    for stop, answer in zip(stops, answers, strict=True):
        assert answer["text"] == text[: text.index(stop)]
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


@pytest.mark.nightly
def test_max_tokens_cuts_an_accepted_run_exactly(client: Client, long_answer: dict[str, Any]) -> None:
    limits = [1, 2, 3, 7, 8, 9, 10, 11, 17, 31]
    answers = client.generate_all([{"prompt": PROMPT, "max_new_tokens": limit} for limit in limits])
    for limit, answer in zip(limits, answers, strict=True):
        assert answer["output_ids"] == long_answer["output_ids"][:limit]
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": limit}


@pytest.mark.nightly
def test_a_stop_token_inside_an_accepted_run_ends_the_output(client: Client, long_answer: dict[str, Any]) -> None:
    ids = long_answer["output_ids"]
    tokens = list(dict.fromkeys(ids[5:20]))
    answers = client.generate_all(
        [{"prompt": PROMPT, "max_new_tokens": 96, "stop_token_ids": [token], "ignore_eos": False} for token in tokens]
    )
    for token, answer in zip(tokens, answers, strict=True):
        assert answer["output_ids"] == ids[: ids.index(token) + 1]


@pytest.mark.nightly
def test_a_streamed_answer_is_the_same_as_a_whole_one(client: Client, long_answer: dict[str, Any]) -> None:
    body = {"text": PROMPT, "stream": True, "sampling_params": {**GREEDY, "max_new_tokens": 96}}
    with requests.post(f"{client.url}/generate", json=body, stream=True, timeout=300) as response:
        chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith(b"data: {")]
    assert chunks[-1]["text"] == long_answer["text"]
    assert len(chunks) > 2


@in_lockstep_only
def test_a_prompt_longer_than_the_context_is_refused(client: Client) -> None:
    body = {"input_ids": [100] * (CONTEXT + 5), "sampling_params": {**GREEDY, "max_new_tokens": 4}}
    response = requests.post(f"{client.url}/generate", json=body, timeout=60)
    assert response.status_code == 400
    assert "context length" in response.text


@in_lockstep_only
def test_an_answer_longer_than_the_context_is_refused(client: Client) -> None:
    body = {"input_ids": [100] * (CONTEXT - 30), "sampling_params": {**GREEDY, "max_new_tokens": 500}}
    response = requests.post(f"{client.url}/generate", json=body, timeout=60)
    assert response.status_code == 400
    assert "maximum context length" in response.text


def test_requests_that_fill_the_context_leave_their_neighbours_alone(client: Client) -> None:
    """Slots reserved past the end of a row of ``req_to_token`` would overwrite the next row."""
    full = [100 + i % 50 for i in range(CONTEXT - 31)]
    calls = [
        {"prompt": full, "max_new_tokens": 30},
        {"prompt": PROMPT, "max_new_tokens": 60},
    ]
    alone = [client.generate(**call)["output_ids"] for call in calls]
    together = client.generate_all(calls)
    assert [answer["output_ids"] for answer in together] == alone
    # SGLang keeps one position of the context free.
    assert len(alone[0]) >= 29


@pytest.mark.nightly
@in_lockstep_only
def test_a_full_kv_pool_retracts_requests_and_keeps_their_outputs(client: Client) -> None:
    # Prompts fill the pool faster than outputs do.
    prompts = [[1000 + (37 * i + 11 * j * j) % 9000 for j in range(180)] for i in range(6)]
    calls = [{"prompt": prompt, "max_new_tokens": 96} for prompt in prompts]
    before = retractions(client)
    apart = client.generate_all(calls[:3]) + client.generate_all(calls[3:])
    assert retractions(client) == before
    client.assert_pool_empties()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.generate_all, calls[:3])
        # SGLang counts the whole output of a request that comes, but little of those that run. All at once, it would
        # let in only as many as fit.
        while client.state()["kv_tokens_free"] > KV_TOKENS - 3 * 180:
            time.sleep(0.1)
        together = client.generate_all(calls[3:])
        together = first.result() + together
    assert [answer["output_ids"] for answer in together] == [answer["output_ids"] for answer in apart]
    # Three requests of 180 + 96 tokens fit in the pool together, six do not. (A newer SGLang lets one wait.)
    assert retractions(client) > before or DECLARES_RESOLUTION


def retractions(client: Client) -> float:
    metrics = requests.get(f"{client.url}/metrics", timeout=60).text
    name = "sglang:num_retracted_requests_total"
    return sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(name))


def test_aborting_everything_under_load_empties_the_pool(client: Client) -> None:
    def ask(index: int) -> None:
        body = {"text": f"{index} {PROMPT}", "sampling_params": {**GREEDY, "max_new_tokens": 450}}
        requests.post(f"{client.url}/generate", json=body, timeout=300)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(10)]
    for thread in threads:
        thread.start()
    time.sleep(4)  # some run, some wait
    requests.post(f"{client.url}/abort_request", json={"rid": "", "abort_all": True}, timeout=60)
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)


@in_lockstep_only
def test_no_value_of_a_request_ends_the_server(client: Client) -> None:
    prompt = {"text": PROMPT}
    bodies = [{**prompt, "sampling_params": {"max_new_tokens": 4, name: value}} for name, value in BAD_PARAMS]
    bodies += [{**prompt, **request} for _, request in BAD_REQUESTS]
    bodies += [{"input_ids": ids} for ids in ([-1], [10**8], [], [[]], [[1], []], [1.5], ["a"], [2**70])]
    bodies += [{"text": text} for text in ("", [], ["a", ""], 5, [["a"]])]
    bodies += [{**prompt, "sampling_params": params} for params in ("x", [], ["x"], 5)]
    for body in bodies:
        assert_refused(client, "generate", body)
    fields: list[dict[str, Any]] = [{"logit_bias": {"5": 1e300}}, {"temperature": 1e300}, {"n": 10**9}, {"top_k": 2**31}]
    fields += [{"seed": 2**70}, {"stop_regex": "("}, {"skip_special_tokens": "maybe"}, {"max_tokens": "x"}]
    for field in [*fields, {"top_logprobs": 10**6, "logprobs": True}]:
        for stream in (False, True):
            messages = [{"role": "user", "content": "Hi"}]
            assert_refused(client, "v1/chat/completions", {"model": "m", "messages": messages, "stream": stream, **field})
    for field in [*fields, {"logprobs": 10**6}, {"prompt": [10**8]}, {"prompt": [-1]}]:
        for stream in (False, True):
            assert_refused(client, "v1/completions", {"model": "m", "prompt": "Hi", "stream": stream, **field})
    # SGLang streams what is wrong with a request of its own route.
    body = {**prompt, "stream": True, "sampling_params": {"logit_bias": {"5": 1e300}}}
    with requests.post(f"{client.url}/generate", json=body, stream=True, timeout=60) as response:
        events = [line[6:] for line in response.iter_lines() if line.startswith(b"data: ")]
    assert json.loads(events[0])["error"]["code"] == 400 and events[1:] == [b"[DONE]"]
    assert client.generate(PROMPT, max_new_tokens=8)["meta_info"]["completion_tokens"] == 8


def assert_refused(client: Client, route: str, body: dict[str, Any]) -> None:
    response = requests.post(f"{client.url}/{route}", json=body, timeout=60)
    assert response.status_code == 400, (route, body, response.status_code, response.text[:500])


@in_lockstep_only
def test_a_grammar_that_allows_no_token_ends_its_request_alone(client: Client) -> None:
    """After the prompt, and in a verification."""
    grammars = ["root ::= root", 'root ::= "ab" end\nend ::= end']
    alone = client.generate(PROMPT, max_new_tokens=12)
    calls = [{"prompt": PROMPT, "max_new_tokens": 12}]
    calls += [{**calls[0], "ebnf": grammar, "temperature": heat} for grammar in grammars for heat in (0, 0.8)]
    with ThreadPoolExecutor(4) as pool:
        dead = [pool.submit(client.generate, **call) for call in calls[1:]]
        assert client.generate(**calls[0])["output_ids"] == alone["output_ids"]
    for answer in dead:
        # A newer SGLang answers such a request with HTTP 500.
        if DECLARES_RESOLUTION:
            with pytest.raises(AssertionError, match="Grammar accept_token failed"):
                answer.result()
        else:
            assert answer.result()["meta_info"]["finish_reason"]["type"] == "abort"


def test_metrics_report_acceptance_and_kv_read(client: Client) -> None:
    client.generate(PROMPT, max_new_tokens=40)  # several decode log intervals
    state = client.state()
    assert sum(state["sparsespec_accept_histogram"]) > 0
    assert 1 <= state["sparsespec_accept_length"] <= 9
    assert 0 < state["sparsespec_kv_read_share"] <= 1
    metrics = requests.get(f"{client.url}/metrics", timeout=60).text
    assert "sparsespec:accepted_drafts_total{" in metrics
    assert "sparsespec:draft_lengths_total{" in metrics
    assert "sparsespec:kv_read_share{" in metrics
    assert "sglang:spec_accept_length" in metrics


@pytest.mark.nightly
@pytest.mark.parametrize("client", ["unified"], indirect=True)
def test_a_grammar_runs_its_rounds_in_lockstep_beside_other_requests(client: Client) -> None:
    calls = [
        {"prompt": prompt, "max_new_tokens": 24}
        for prompt in ("The capital of France is", "A random date:", "Water boils at", "1, 2, 3, 5, 8, 13,")
    ]
    alone = client.generate_all(calls)
    assert client.state()["sparsespec_lockstep_rounds"] == 0
    # The grammar's request ends early: the others go on staggered after it.
    dated = {**calls[1], "regex": r"\d\d\d\d-\d\d-\d\d", "ignore_eos": False}
    mixed = client.generate_all([calls[0], dated, *calls[2:]])
    assert client.state()["sparsespec_lockstep_rounds"] > 0
    assert re.fullmatch(dated["regex"], mixed[1]["text"])
    for index in (0, 2, 3):
        assert mixed[index]["output_ids"] == alone[index]["output_ids"]
