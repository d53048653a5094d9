"""Servers with ``--enable-mixed-chunk``: requests decode between the chunks of long prompts; outputs stay plain SGLang's.

Which batches ran is read from the server's log, which has a line for each (``--decode-log-interval 1``).
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from engine_process import PLAIN, PLAIN_ENV, EngineProcess
from quickstart import Server
from server_client import GREEDY, Client, assert_healthy, serving
from tiny_model import VOCAB, write_tiny_llama

pytestmark = pytest.mark.slow

CONTEXT = 1024
CHUNK = 32
PORT = 31460
#: Tokens of the prompts that are prefilled in many chunks, after eight short ones.
LONG = (450, 350, 40, 250)
COMMON: dict[str, Any] = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "context_length": CONTEXT}
#: Flags, and variables of the environment. The KV pools of some are too small for all requests at once.
SERVERS: dict[str, tuple[list[str], dict[str, str]]] = {
    "lockstep": (["--schedule-conservativeness", "0.01", "--max-total-tokens", "1500"], {}),
    "unified, radix cache": (["--sparsespec-schedule", "unified", "--max-total-tokens", "20000"], {}),
    "unified, no overlap, no radix cache": (
        ["--sparsespec-schedule", "unified", "--disable-overlap-schedule", "--disable-radix-cache"]
        + ["--max-total-tokens", "2000", "--schedule-conservativeness", "0.01"],
        {},
    ),
    "KV manager": (
        ["--sparsespec-host-kv-gb", "0.01", "--max-total-tokens", "1500"],
        {"SPARSESPEC_TEST_OFFLOAD_INTERVAL": "3"},
    ),
}


def make_calls() -> list[dict[str, Any]]:
    """Short prompts with long outputs, then long prompts."""
    rng = random.Random(0)
    lengths = [rng.randrange(5, 20) for _ in range(8)] + list(LONG)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]
    return [{"prompt": prompt, "max_new_tokens": 350 if len(prompt) < 20 else 60} for prompt in prompts]


CALLS = make_calls()


def batch_of(calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "input_ids": [call["prompt"] for call in calls],
        "sampling_params": [{**GREEDY, "max_new_tokens": call["max_new_tokens"]} for call in calls],
    }


def ask(client: Client, calls: list[dict[str, Any]]) -> list[list[int]]:
    """One HTTP request, so that they reach the scheduler in order."""
    response = requests.post(f"{client.url}/generate", json=batch_of(calls), timeout=300)
    assert response.status_code == 200, response.text
    return [answer["output_ids"] for answer in response.json()]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama", seed=1, context=CONTEXT))


@pytest.fixture(scope="module")
def plain_engine(tiny_model: str) -> EngineProcess:
    """Plain SGLang; it starts while the first server does, and is ended by ``expected``."""
    return EngineProcess(
        PLAIN_ENV, model_path=tiny_model, max_total_tokens=20000, log_level="error", **COMMON, **PLAIN
    )


@pytest.fixture(scope="module")
def expected(plain_engine: EngineProcess) -> list[list[int]]:
    """Outputs of plain SGLang."""
    with plain_engine as engine:
        return [output["output_ids"] for output in engine.generate(**batch_of(CALLS))]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.nightly if "unified" in name else ())
        for name in SERVERS
    ],
)
def server(
    request: pytest.FixtureRequest, tiny_model: str, plain_engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    own_flags, environment = SERVERS[request.param]
    # Below the ports that the system hands out: a free one of those may be taken by the engine that starts meanwhile.
    port, log = PORT + list(SERVERS).index(request.param), tmp_path_factory.mktemp("server") / "server.log"
    # SGLang's warm-up sends token ids that this model does not have.
    flags = ["--skip-tokenizer-init", "--skip-server-warmup", "--context-length", str(CONTEXT)]
    flags += ["--sparsespec-min-budget", "32"]
    flags += ["--enable-mixed-chunk", "--chunked-prefill-size", str(CHUNK), "--max-running-requests", "12"]
    flags += ["--decode-log-interval", "1", "--enable-metrics", *own_flags]
    with serving(tiny_model, log, *flags, port=port, environment=environment) as (started, _):
        yield started
        assert_healthy(started)


def batches(log: str) -> list[tuple[str, int]]:
    """("Prefill" or "Decode", requests decoding) of each batch in the log."""
    return [(kind, int(running)) for kind, running in re.findall(r"(Prefill|Decode) batch.*?#running-req: (\d+)", log)]


def test_requests_decode_between_chunks_and_outputs_are_plain_sglangs(server: Server, expected: list[list[int]]) -> None:
    client = Client(server.port)
    before = len(server.log.read_text(errors="replace"))
    rounds = client.state()["sparsespec_interleaved_rounds"]
    assert ask(client, CALLS) == expected
    counted = client.state()["sparsespec_interleaved_rounds"] - rounds
    assert counted > 0
    ran = batches(server.log.read_text(errors="replace")[before:])
    # Each chunk that met decoding requests, and what ran before it.
    beside = [ran[i - 1][0] for i in range(1, len(ran)) if ran[i][0] == "Prefill" and ran[i][1] > 0]
    assert len(beside) > 5
    if "--max-total-tokens 20000" in " ".join(server.process.args):  # type: ignore[arg-type]
        assert set(beside) == {"Decode"}  # ample memory: always
    else:
        assert beside.count("Decode") > len(beside) / 4
    assert ask(client, CALLS) == expected  # with what the radix cache has
    client.assert_pool_empties()


def test_aborting_a_prompt_between_its_chunks_leaves_the_others_alone(server: Server, expected: list[list[int]]) -> None:
    client = Client(server.port)
    rng = random.Random(2)
    others: list[list[list[int]]] = []
    thread = threading.Thread(target=lambda: others.append(ask(client, CALLS[:8])))
    thread.start()
    for index in range(6):
        rid = f"doomed-{index}"
        prompt = [rng.randrange(VOCAB) for _ in range(600)]
        body = {"input_ids": prompt, "rid": rid, "sampling_params": {**GREEDY, "max_new_tokens": 4}}
        answers: list[Any] = []
        asking = threading.Thread(
            target=lambda body=body, answers=answers: answers.append(
                requests.post(f"{client.url}/generate", json=body, timeout=300).json()
            )
        )
        asking.start()
        time.sleep(rng.uniform(0.02, 0.3))
        requests.post(f"{client.url}/abort_request", json={"rid": rid}, timeout=60)
        asking.join(timeout=120)
        assert answers
    thread.join(timeout=300)
    assert others == [expected[:8]]
    client.assert_pool_empties()


@pytest.mark.parametrize("server", ["lockstep"], indirect=True)  # as for any other
def test_rounds_between_chunks_are_counted_for_prometheus(server: Server) -> None:
    client = Client(server.port)
    ask(client, CALLS[6:])
    metrics = requests.get(f"{client.url}/metrics", timeout=60).text
    assert re.search(r"^sparsespec:interleaved_rounds_total\{.*\} [1-9]", metrics, re.MULTILINE)
