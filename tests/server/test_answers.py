"""Answers over HTTP equal plain SGLang's in every field, for random requests.

Each case is two requests of a seed (tests/answer_cases.py): its ends, log-probabilities, streaming and route are random, and
the second one shows what the first has left in the radix cache. ``SPARSESPEC_TEST_CASES=2000`` runs that many cases;
``SPARSESPEC_TEST_FIRST_CASE`` begins with another seed.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from answer_cases import case_of, difference_of_turns, play
from engine_process import PLAIN_ENV, install_plugin, plain_rounds_plugin, retract_plugin
from quickstart import server_environment
from server_client import Client, ForkedServer, assert_healthy, free_port, serving
from tiny_chat_model import write_tiny_chat_model
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow

FIRST = int(os.environ.get("SPARSESPEC_TEST_FIRST_CASE", "0"))
CASES = int(os.environ.get("SPARSESPEC_TEST_CASES", "100"))
AT_ONCE = 8
COMMON = ["--max-running-requests", "8", "--reasoning-parser", "qwen3", "--enable-cache-report", "--skip-server-warmup"]
#: Chunks of prompts, so that a prompt is prefilled beside decoding requests.
COMMON += ["--chunked-prefill-size", "64"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat_model(tmp_path_factory.mktemp("model"))


def answers(url: str, model: Path, is_plain: bool = False) -> dict[int, tuple[Any, Any]]:
    """Both turns of each case, several at a time."""
    vocab_size = len(AutoTokenizer.from_pretrained(model))
    seeds = range(FIRST, FIRST + CASES)
    # Plain SGLang ends where such a request meets another one with log-probabilities.
    alone = [seed for seed in seeds if is_plain and "token_ids_logprob" in case_of(seed, vocab_size)[1]]
    # Those with log-probabilities or biases come last: a round of theirs is never plain.
    texts = {seed: str(case_of(seed, vocab_size)) for seed in seeds}
    together = sorted(
        set(seeds) - set(alone), key=lambda seed: ("logprob" in texts[seed] or "logit_bias" in texts[seed], seed)
    )
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip(together, pool.map(lambda seed: play(url, seed, vocab_size), together), strict=True))
    return found | {seed: play(url, seed, vocab_size) for seed in alone}


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Any, Any]]:
    """Plain SGLang's answers."""
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port), *COMMON]
    command += ["--device", "cpu", "--dtype", "float32", "--sleep-on-idle", "--max-total-tokens", "20000"]
    command += ["--disable-cuda-graph", "--attention-backend", "torch_native"]
    # Under overlap scheduling SGLang has run a further step when it finds that a request has stopped, and the cache keeps
    # the KV of that step: one token more.
    command += ["--disable-overlap-schedule"]
    log = tmp_path_factory.mktemp("plain") / "server.log"
    with ForkedServer(command, port, log, {**server_environment(True), **PLAIN_ENV}) as server:
        server.wait_until_ready(300)
        return answers(f"http://127.0.0.1:{port}", model, is_plain=True)


def assert_equal(found: dict[int, tuple[Any, Any]], expected: dict[int, tuple[Any, Any]], **how: Any) -> None:
    wrong = []
    for seed, ours in found.items():
        differing = difference_of_turns(expected[seed], ours, **how)
        if differing:
            wrong.append(f"case {seed}: {differing}; request: {case_of(seed, 280)}")
    shown = "\n".join(wrong[:5])
    assert not wrong, (
        f"{len(wrong)} of {len(found)} answers differ; SPARSESPEC_TEST_FIRST_CASE=SEED begins with one.\n{shown}"
    )


def test_cases_end_in_every_way(expected: dict[int, tuple[Any, Any]]) -> None:
    """The cases can fail: stop strings, patterns, tokens, end tokens and lengths all end some."""
    ends: dict[str, int] = {}
    for seed, (first, _) in expected.items():
        route, body = case_of(seed, 280)
        for answer in first if route == "generate" else first["choices"]:
            reason = answer["meta_info"]["finish_reason"] if route == "generate" else answer
            matched = reason.get("matched", reason.get("matched_stop"))
            kind = "length" if matched is None else "end" if matched == 0 else type(matched).__name__
            if isinstance(matched, str) and matched not in body.get("sampling_params", body).get("stop", []):
                kind = "pattern"
            ends[kind] = ends.get(kind, 0) + 1
    assert set(ends) == {"length", "end", "int", "str", "pattern"} and min(ends.values()) >= 2, ends


def test_answers_are_plain_sglangs(model: Path, expected: dict[int, tuple[Any, Any]], tmp_path: Path) -> None:
    """Rounds of all lengths, plain ones among them; every few rounds a request goes to the host."""
    environment = {"SPARSESPEC_TEST_OFFLOAD_INTERVAL": "2", **plain_rounds_plugin(tmp_path, every=2)}
    flags = [*COMMON, "--max-total-tokens", "20000", "--sparsespec-min-budget", "24", "--sparsespec-host-kv-gb", "0.1"]
    with serving(str(model), tmp_path / "server.log", *flags, environment=environment) as (server, client):
        assert_equal(answers(client.url, model), expected)
        state = client.state()
        assert state["sparsespec_plain_rounds"] > 10
        assert state["sparsespec_kv_requests_restored"] > 10
        assert sum(state["sparsespec_accept_histogram"][2:]) > 10
        client.assert_pool_empties()
        assert_healthy(server)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], marks=pytest.mark.nightly, id="lockstep"),
        pytest.param(["--sparsespec-schedule", "unified"], id="unified"),
    ],
)
def test_answers_of_a_schedule_are_plain_sglangs(
    flags: list[str], model: Path, expected: dict[int, tuple[Any, Any]], tmp_path: Path
) -> None:
    flags = [*COMMON, "--max-total-tokens", "20000", "--sparsespec-min-budget", "24", *flags]
    with serving(str(model), tmp_path / "server.log", *flags) as (server, client):
        assert_equal(answers(client.url, model), expected)
        client.assert_pool_empties()
        assert_healthy(server)


@pytest.mark.parametrize("schedule", ["lockstep", pytest.param("unified", marks=pytest.mark.nightly)])
def test_answers_of_retracted_requests_are_plain_sglangs(
    schedule: str, model: Path, expected: dict[int, tuple[Any, Any]], tmp_path: Path
) -> None:
    """A retracted request is prefilled again, and finds its own tokens in the cache."""
    flags = [*COMMON, "--max-total-tokens", "700", "--sparsespec-min-budget", "24", "--enable-metrics"]
    flags += ["--schedule-conservativeness", "0.01", "--sparsespec-schedule", schedule]
    with serving(str(model), tmp_path / "server.log", *flags, environment=retract_plugin(tmp_path)) as (server, client):
        assert_equal(answers(client.url, model), expected, compare_cached=False)
        assert retractions(client) > 0
        client.assert_pool_empties()
        assert_healthy(server)


OWN_RULE = """
def register():
    from sglang_sparsespec.scheduler_patch import accepted_run

    accepted_run._walk = lambda original, req, count: original(req, count)
"""


@pytest.mark.nightly
def test_ends_by_sglangs_own_rule_are_found(model: Path, expected: dict[int, tuple[Any, Any]], tmp_path: Path) -> None:
    """The cases can fail: here a round's tokens are checked as one step."""
    environment = install_plugin(tmp_path, "zz_own_rule", OWN_RULE)
    flags = [*COMMON, "--max-total-tokens", "20000", "--sparsespec-min-budget", "24", "--sparsespec-host-kv-gb", "0.1"]
    with serving(str(model), tmp_path / "server.log", *flags, environment=environment) as (_, client):
        with pytest.raises(AssertionError, match="answers differ"):
            assert_equal(answers(client.url, model), expected)


def retractions(client: Client) -> float:
    metrics = requests.get(f"{client.url}/metrics", timeout=60).text
    name = "sglang:num_retracted_requests_total"
    return sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(name))
