"""A server of SGLang that runs already, as an engine of ``throughput.py``."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple

import requests

#: Requests that may be under way at once.
MOST_REQUESTS = 1024
#: Seconds that an answer may take.
TIMEOUT = 3600


def ask(url: str, body: dict[str, Any] | None = None, timeout: float = 600) -> Any:
    """GET ``url``, or POST ``body`` as JSON; the answer's JSON.

    Args:
        timeout: seconds that the answer to a body may take.

    Raises:
        RuntimeError: no answer, or an error.
    """
    try:
        answer = requests.get(url, timeout=60) if body is None else requests.post(url, json=body, timeout=timeout)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise RuntimeError(f"{url}: {error}") from error
    return answer.json()


class Attached(NamedTuple):
    """A server that runs already, as it was given: LABEL=BACKEND@URL."""

    label: str
    backend: str
    url: str

    @classmethod
    def parse(cls, text: str) -> Attached:
        """Its three parts.

        Raises:
            ArgumentTypeError: one of them is missing.
        """
        label, _, rest = text.partition("=")
        backend, _, url = rest.partition("@")
        if not (label and backend and url):
            raise argparse.ArgumentTypeError(f"{text!r}: expected LABEL=BACKEND@URL")
        return cls(label, backend, url)


class AttachedServer:
    """The methods and attributes of ``sglang.Engine`` that ``throughput.py`` uses, over HTTP.

    Args:
        url: without a path.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(ThreadPoolExecutor(MOST_REQUESTS))
        #: ``sglang.Engine`` has what follows in these.
        self.tokenizer_manager = self.load_snapshot_reader = self

    def generate(self, input_ids: Sequence[list[int]], sampling_params: dict[str, Any]) -> list[dict[str, Any]]:
        """Outputs of all prompts, sent in one request."""
        return self._generate(input_ids, sampling_params)

    async def async_generate(self, input_ids: list[int], sampling_params: dict[str, Any]) -> dict[str, Any]:
        """The output of one prompt."""
        return await self.loop.run_in_executor(None, self._generate, input_ids, sampling_params)

    def flush_cache(self) -> SimpleNamespace:
        """Drop cached prefixes; ``success`` as in the answer of ``sglang.Engine``."""
        return SimpleNamespace(success=requests.post(f"{self._url}/flush_cache", timeout=TIMEOUT).ok)

    def get_server_info(self) -> dict[str, Any]:
        """As ``sglang.Engine`` gives it."""
        return ask(f"{self._url}/server_info")

    def read_all(self) -> list[SimpleNamespace]:
        """The newest load snapshot of each data-parallel rank; the server makes one every few rounds."""
        return [SimpleNamespace(**load) for load in ask(f"{self._url}/v1/loads?include=core")["loads"]]

    def abort_request(self, abort_all: bool) -> None:
        """End all requests."""
        body = {"rid": "", "abort_all": abort_all}
        requests.post(f"{self._url}/abort_request", json=body, timeout=TIMEOUT).raise_for_status()

    def shutdown(self) -> None:
        """The server stays."""
        self.loop.close()

    def _generate(self, input_ids: Sequence[Any], sampling_params: dict[str, Any]) -> Any:
        return ask(f"{self._url}/generate", {"input_ids": input_ids, "sampling_params": sampling_params}, TIMEOUT)
