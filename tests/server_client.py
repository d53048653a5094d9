"""Servers that tests start, requests that they send, and whether KV pools are empty afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import requests
from environment import SetupError
from preloaded import forks_programs, start_program
from quickstart import Server, choose_port, server_environment, session_members

GREEDY = {"temperature": 0.0, "ignore_eos": True}


class Client:
    """Requests to one server."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def generate(self, prompt: str | list[int], **sampling: Any) -> dict[str, Any]:
        key = "text" if isinstance(prompt, str) else "input_ids"
        body = {key: prompt, "sampling_params": {**GREEDY, **sampling}}
        response = requests.post(f"{self.url}/generate", json=body, timeout=300)
        assert response.status_code == 200, response.text
        return response.json()

    def generate_all(self, requests_: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Several requests at once; each is the keyword arguments of :meth:`generate`."""
        with ThreadPoolExecutor(len(requests_)) as pool:
            return list(pool.map(lambda arguments: self.generate(**arguments), requests_))

    def state(self) -> dict[str, Any]:
        return requests.get(f"{self.url}/server_info", timeout=60).json()["internal_states"][0]

    def running(self) -> int:
        loads = requests.get(f"{self.url}/v1/loads", timeout=60).json()["loads"]
        return sum(load["num_running_reqs"] for load in loads)

    def wait_until_running(self, count: int, timeout: float = 60) -> None:
        """Wait until so many requests run; what SGLang says of its load may be that of some iterations ago."""
        deadline = time.monotonic() + timeout
        while (running := self.running()) != count:
            assert time.monotonic() < deadline, f"{running} requests run"
            time.sleep(0.05)

    def assert_pool_empties(self, timeout: float = 60) -> None:
        """Wait until idle, flush the radix cache, and compare free tokens with the pool's size."""
        deadline = time.monotonic() + timeout
        while True:
            flushed = requests.post(f"{self.url}/flush_cache", timeout=60).status_code == 200
            state = self.state()
            if flushed and state["kv_tokens_free"] == state["kv_tokens_total"]:
                return
            assert time.monotonic() < deadline, f"flushed: {flushed}, {state['kv_tokens_free']} tokens free"
            time.sleep(0.3)


def free_port() -> int:
    """A free port that the system does not hand out by itself: it could give one of those away before a server listens."""
    while True:
        with contextlib.suppress(SetupError):
            return choose_port(random.randrange(20_000, 30_000))


class ForkedServer(Server):
    """A server that is forked from a process that has imported SGLang (preloaded.py), and killed at the end."""

    def _start(self, command: Sequence[str], **popen: Any) -> Popen[Any]:
        return start_program(command, **popen) if forks_programs() else super()._start(command, **popen)

    def stop(self) -> None:
        """SGLang looks for a gentler signal every five seconds only; how servers end is what quickstart's tests look at."""
        for member in session_members(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        super().stop()


def server_command(model_path: str, port: int, *flags: str) -> list[str]:
    """The command of a SPARSESPEC server in float32 on CPU; ``flags`` come last."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model_path, "--port", str(port)]
    # An idle server would keep a core from the tests beside it.
    command += ["--device", "cpu", "--dtype", "float32", "--sleep-on-idle"]
    return [*command, "--speculative-algorithm", "SPARSESPEC", *flags]


@contextmanager
def serving(
    model_path: str, log: Path, *flags: str, port: int = 0, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[Server, Client]]:
    """A ready server that speculates in each round, with its output in ``log``; stopped on leaving ``with``."""
    port = choose_port(port) if port else free_port()
    command = server_command(model_path, port, "--sparsespec-speculate", "always", *flags)
    with ForkedServer(command, port, log, {**server_environment(True), **(environment or {})}) as server:
        server.wait_until_ready(300)
        yield server, Client(port)


def assert_healthy(server: Server) -> None:
    """The server runs, and its log has no memory leak."""
    server.check_alive()
    assert "leak" not in server.log.read_text(errors="replace")
