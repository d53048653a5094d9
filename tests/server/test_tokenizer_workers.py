"""A server with several tokenizer workers: each of them checks requests and answers as the only one of another server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from engine_process import install_plugin
from quickstart import ServerError
from server_client import GREEDY, Client, assert_healthy, serving
from tiny_model import VOCAB, write_tiny_llama

from sglang_sparsespec import ALGORITHM

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

FLAGS = ("--max-total-tokens", "4000", "--skip-tokenizer-init", "--skip-server-warmup")
PROMPTS = [[(3 * i + j) % VOCAB for j in range(3 + i)] for i in range(24)]
#: Workers import SGLang's application as it is.
WITHOUT_PLUGINS = """
def register():
    from sglang_sparsespec.scheduler_patch import tokenizer_workers
    tokenizer_workers.APP_WITH_PLUGINS = tokenizer_workers.SGLANG_APP
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


def post(client: Client, body: dict[str, Any]) -> requests.Response:
    """A request over a connection of its own, which any worker may take."""
    return requests.post(f"{client.url}/generate", json=body, timeout=300)


def answers(client: Client) -> list[Any]:
    params = {**GREEDY, "max_new_tokens": 20}
    bodies = [{"input_ids": prompt, "sampling_params": params} for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        return [answer.json()["output_ids"] for answer in pool.map(lambda body: post(client, body), bodies)]


def refusals(client: Client) -> set[bool]:
    """Whether a request that only the plugin refuses was refused, by any of the workers."""
    body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 2, "stop_regex": "("}}
    found = [post(client, body) for _ in range(24)]
    return {answer.status_code == 400 and "stop_regex must be" in answer.text for answer in found}


def test_every_worker_is_a_whole_server(checkpoint: Path, tmp_path: Path) -> None:
    with serving(str(checkpoint), tmp_path / "one.log", *FLAGS) as (_, client):
        expected = answers(client)
    with serving(str(checkpoint), tmp_path / "two.log", *FLAGS, "--tokenizer-worker-num", "2") as (server, client):
        assert answers(client) == expected
        assert refusals(client) == {True}
        for value in ("never", "always"):
            body = {"server_args": {"sparsespec_speculate": value}}
            assert requests.post(f"{client.url}/set_internal_state", json=body, timeout=60).json() == [True]
            assert client.state()["sparsespec_speculate"] == value
            assert answers(client) == expected
        assert client.state()["sparsespec_plain_rounds"] > 0
        client.assert_pool_empties()
        assert_healthy(server)


def test_workers_without_plugins_do_not_start(checkpoint: Path, tmp_path: Path) -> None:
    environment = install_plugin(tmp_path, "zz_without_plugins", WITHOUT_PLUGINS)
    flags = (*FLAGS, "--tokenizer-worker-num", "2")
    with pytest.raises(ServerError, match="the server ended"):
        with serving(str(checkpoint), tmp_path / "server.log", *flags, environment=environment):
            pass
    assert f"Unknown speculative algorithm name: {ALGORITHM}" in (tmp_path / "server.log").read_text()
