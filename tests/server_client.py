"""Requests that tests send to a server, and whether its KV pools are empty afterwards."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

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
        loads = requests.get(f"{self.url}/get_load", timeout=60).json()
        return sum(load["num_reqs"] for load in loads)

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
