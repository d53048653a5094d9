"""The KV manager in a server: outputs are those of an ample pool, whatever was moved, and pools end empty.

``SPARSESPEC_TEST_OFFLOAD_INTERVAL`` has a request offloaded, and evicted from the device, every
second iteration, in a KV pool that the requests overflow besides. Some rounds are plain.
"""

from __future__ import annotations

import contextlib
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from engine_process import EngineProcess, plain_rounds_plugin
from quickstart import Server
from server_client import Client, assert_healthy, serving
from tiny_model import VOCAB, write_tiny_llama

pytestmark = pytest.mark.slow

CONTEXT = 1024
KV_TOKENS = 1600
ENGINE = {
    "device": "cpu",
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "speculative_algorithm": "SPARSESPEC",
    "sparsespec_speculate": "always",
    "sparsespec_min_budget": 32,
    "context_length": CONTEXT,
    "max_running_requests": 12,
}


def make_calls() -> list[dict[str, Any]]:
    """Greedy requests of varied lengths; the second half shares a long prefix."""
    rng = random.Random(0)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.randrange(low, high))]

    shared = tokens(300, 301)
    prompts = [tokens(5, 60) for _ in range(12)] + [shared + tokens(1, 30) for _ in range(6)]
    return [{"prompt": prompt, "max_new_tokens": rng.randrange(60, 300)} for prompt in prompts]


CALLS = make_calls()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama", seed=1, context=CONTEXT))


@pytest.fixture(scope="module")
def ample_engine(tiny_model: str) -> EngineProcess:
    """An ample pool, no host tier; it starts while the first server does, and is ended by ``expected``."""
    return EngineProcess(model_path=tiny_model, max_total_tokens=30000, log_level="error", **ENGINE)


@pytest.fixture(scope="module")
def expected(ample_engine: EngineProcess) -> list[list[int]]:
    """Output ids of ``CALLS``."""
    with ample_engine as engine:
        outputs = engine.generate(
            input_ids=[call["prompt"] for call in CALLS],
            sampling_params=[
                {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": call["max_new_tokens"]} for call in CALLS
            ],
        )
    return [output["output_ids"] for output in outputs]


@contextmanager
def start(
    model: str, log: Path, host_kv_gb: str, *flags: str, **environment: str
) -> Iterator[tuple[Server, Client]]:
    # SGLang's warm-up sends token ids that this model does not have.
    own = ("--skip-tokenizer-init", "--skip-server-warmup", "--sparsespec-min-budget", "32")
    flags = (*own, "--context-length", str(CONTEXT), *flags)
    flags += ("--max-running-requests", "12", "--max-total-tokens", str(KV_TOKENS), "--sparsespec-host-kv-gb", host_kv_gb)
    flags += ("--enable-metrics", "--decode-log-interval", "5")
    with serving(model, log, *flags, environment=environment) as started:
        yield started


@pytest.fixture(scope="module")
def moving_server(
    tiny_model: str, ample_engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Client]]:
    """A server that moves every request again and again; the last test's to kill."""
    log = tmp_path_factory.mktemp("moving") / "server.log"
    # Not many: they are longer, and a request is moved every so many rounds.
    plain_rounds = plain_rounds_plugin(tmp_path_factory.mktemp("site"), every=8)
    with start(tiny_model, log, "0.01", SPARSESPEC_TEST_OFFLOAD_INTERVAL="2", **plain_rounds) as (server, client):
        yield server, client


@pytest.fixture
def moving(moving_server: tuple[Server, Client]) -> Iterator[Client]:
    server, client = moving_server
    yield client
    assert_healthy(server)


def test_requests_that_are_moved_several_times_keep_their_outputs(
    moving: Client, expected: list[list[int]]
) -> None:
    answers = moving.generate_all(CALLS)
    assert [answer["output_ids"] for answer in answers] == expected
    state = moving.state()
    assert state["sparsespec_kv_requests_offloaded"] >= 3 * len(CALLS)
    assert state["sparsespec_kv_requests_restored"] > 0
    assert state["sparsespec_plain_rounds"] > 0 and state["sparsespec_accept_length"] > 1
    assert state["sparsespec_kv_bytes_to_host"] > 0 and state["sparsespec_kv_bytes_from_host"] > 0
    assert state["sparsespec_kv_tokens_recomputed"] == 0
    moving.assert_pool_empties()
    assert state_of_host(moving) == "empty"


def test_aborts_while_requests_are_moved_leave_the_others_alone(moving: Client, expected: list[list[int]]) -> None:
    rng = random.Random(1)

    def ask_and_abort(index: int) -> None:
        rid = f"doomed-{index}"
        body = {"input_ids": CALLS[index]["prompt"], "rid": rid}
        body["sampling_params"] = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 600}
        timer = threading.Timer(
            rng.uniform(0.1, 1.5),
            lambda: requests.post(f"{moving.url}/abort_request", json={"rid": rid}, timeout=60),
        )
        timer.start()
        answer = requests.post(f"{moving.url}/generate", json=body, timeout=300).json()
        assert answer["meta_info"]["finish_reason"]["type"] in ("abort", "length")

    threads = [threading.Thread(target=ask_and_abort, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    answers = moving.generate_all(CALLS[8:])
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert [answer["output_ids"] for answer in answers] == expected[8:]
    moving.assert_pool_empties()
    assert state_of_host(moving) == "empty"


def test_a_flush_is_refused_while_requests_are_offloaded(moving: Client, expected: list[list[int]]) -> None:
    statuses: list[int] = []
    done = threading.Event()

    def flush() -> None:
        while not done.is_set():
            statuses.append(requests.post(f"{moving.url}/flush_cache", timeout=60).status_code)
            time.sleep(0.05)

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        answers = moving.generate_all(CALLS)
    finally:
        done.set()
        thread.join(timeout=60)
    assert [answer["output_ids"] for answer in answers] == expected
    assert any(status != 200 for status in statuses)
    moving.assert_pool_empties()


def test_moves_are_counted_for_prometheus(moving: Client) -> None:
    moving.generate_all(CALLS[:6])
    metrics = requests.get(f"{moving.url}/metrics", timeout=60).text
    for name in ("requests_offloaded_total", "requests_restored_total", "bytes_to_host_total", "utilisation"):
        assert re.search(rf"^sparsespec:kv_{name}{{", metrics, re.MULTILINE), name


def test_a_new_server_works_after_a_kill_in_mid_transfer(
    moving_server: tuple[Server, Client], tiny_model: str, tmp_path: Path, expected: list[list[int]]
) -> None:
    kill_scheduler_while_requests_are_offloaded(*moving_server)
    with start(tiny_model, tmp_path / "server.log", "0.01") as (server, client):
        answers = client.generate_all(CALLS)
        assert [answer["output_ids"] for answer in answers] == expected
        client.assert_pool_empties()
        assert state_of_host(client) == "empty"
        assert_healthy(server)


def test_a_full_host_tier_retracts(tiny_model: str, tmp_path: Path, expected: list[list[int]]) -> None:
    """With the unified schedule, where a request that was moved has lost its drafts."""
    log = tmp_path / "server.log"
    unified = ("--sparsespec-schedule", "unified")
    # About 400 tokens of 256 bytes.
    with start(tiny_model, log, "0.0001", *unified, SPARSESPEC_TEST_OFFLOAD_INTERVAL="3") as (server, client):
        answers = client.generate_all(CALLS)
        assert [answer["output_ids"] for answer in answers] == expected
        state = client.state()
        assert state["sparsespec_kv_requests_restored"] > 0 and state["sparsespec_kv_bytes_from_host"] > 0
        assert state["sparsespec_kv_host_full"] > 0
        assert state["sparsespec_kv_requests_retracted"] >= state["sparsespec_kv_host_full"]
        assert state["sparsespec_kv_tokens_recomputed"] > 0
        client.assert_pool_empties()
        assert state_of_host(client) == "empty"
        assert_healthy(server)
    assert "The host KV tier is full" in log.read_text(errors="replace")


def kill_scheduler_while_requests_are_offloaded(server: Server, client: Client) -> None:
    def ask() -> None:
        with contextlib.suppress(requests.RequestException, AssertionError):
            client.generate_all(CALLS)

    before = client.state()
    thread = threading.Thread(target=ask)
    thread.start()
    deadline = time.monotonic() + 60
    while True:
        state = client.state()
        offloaded = state["sparsespec_kv_requests_offloaded"]
        stored = state["host_kv_tokens_total"] - state["host_kv_tokens_free"]
        if offloaded > before["sparsespec_kv_requests_offloaded"] and stored > 0:
            break
        assert time.monotonic() < deadline
    children = psutil.Process(server.process.pid).children(recursive=True)
    (scheduler,) = [child for child in children if "scheduler" in "".join(child.cmdline())]
    scheduler.kill()
    server.stop()
    thread.join(timeout=60)
    assert not thread.is_alive()


def state_of_host(client: Client) -> str:
    state = client.state()
    free, total = state["host_kv_tokens_free"], state["host_kv_tokens_total"]
    return "empty" if free == total else f"{total - free} of {total} tokens in use"
