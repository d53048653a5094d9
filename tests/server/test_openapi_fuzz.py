"""No request ends a server: random bodies for every route in its OpenAPI schema (benchmarks/_openapi_fuzz.py).

``SPARSESPEC_TEST_CALLS=10000`` sends so many; ``SPARSESPEC_TEST_FIRST_CALL`` begins with another seed.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from server_client import assert_healthy, serving
from tiny_chat_model import write_tiny_chat_model

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from _openapi_fuzz import Call, Fuzz  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

FIRST = int(os.environ.get("SPARSESPEC_TEST_FIRST_CALL", "0"))
CALLS = int(os.environ.get("SPARSESPEC_TEST_CALLS", "3000"))
#: Several at once, so that odd requests meet each other in batches.
AT_ONCE = 4
SECONDS = 60  # for one answer


def test_no_request_ends_a_server(tmp_path: Path) -> None:
    flags = ["--max-total-tokens", "6000", "--max-running-requests", "8", "--context-length", "256"]
    flags += ["--reasoning-parser", "qwen3", "--skip-server-warmup"]
    log = tmp_path / "server.log"
    with serving(str(write_tiny_chat_model(tmp_path / "model")), log, *flags) as (server, client):
        fuzz = Fuzz(requests.get(f"{client.url}/openapi.json", timeout=60).json())
        assert len(fuzz.routes) > 40
        sent: list[tuple[int, Call]] = []

        def send(seed: int) -> list[str]:
            call = fuzz.call(seed)
            sent.append((seed, call))
            server.check_alive()
            status, text = call.send(client.url, SECONDS)
            if 0 < status < 500 or call.is_sglangs_own(status, text):
                return []
            return [f"{seed}: {call.method} {call.path} {call.body[:300]!r}: {status} {text[:300]}"]

        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                wrong = [line for lines in pool.map(send, range(FIRST, FIRST + CALLS)) for line in lines]
            except Exception as error:
                recent = "\n".join(f"{seed}: {call}" for seed, call in sent[-3 * AT_ONCE :])
                raise AssertionError(f"the server ended; the last calls:\n{recent[:6000]}") from error
        assert not wrong, f"{len(wrong)} of {CALLS}:\n" + "\n".join(wrong[:20])
        assert client.generate("Hi", max_new_tokens=4)["meta_info"]["completion_tokens"] == 4
        client.assert_pool_empties()
        assert_healthy(server)
