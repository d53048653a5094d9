"""No request ends a server: random bodies for every route in its OpenAPI schema (tests/openapi_fuzz.py).

``SPARSESPEC_TEST_CALLS=10000`` sends so many; ``SPARSESPEC_TEST_FIRST_CALL`` begins with another seed.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from openapi_fuzz import Call, Fuzz, server_errors
from server_client import assert_healthy, serving
from tiny_chat_model import write_tiny_chat_model

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

FIRST = int(os.environ.get("SPARSESPEC_TEST_FIRST_CALL", "0"))
CALLS = int(os.environ.get("SPARSESPEC_TEST_CALLS", "3000"))
#: Several at once, so that odd requests meet each other in batches.
AT_ONCE = 4
SECONDS = 60  # for one answer
#: Routes whose handlers in SGLang's HTTP process answer some bodies with HTTP 500, or break off a stream. They know nothing
#: of speculation, and the server lives on. Plain SGLang gives the same answers (docs/operations.md).
SGLANGS_OWN = (
    "/add_external_corpus",
    "/remove_external_corpus",
    "/stop_profile",
    "/parse_function_call",
    "/separate_reasoning",
    "/api/",
    "/v1/tokenize",
    "/tokenize",
    "/v1/messages",
    "/v1/detokenize",
    "/scale_elastic_ep",
)
#: The same on other routes: what an answer says, and what a body holds.
SGLANGS_OWN_MESSAGE = "must be a string, but got list"
SGLANGS_OWN_VALUES = (b'"image_data"', b'"video_data"', b'"audio_data"', b'"modalities": [', b'"input": []')


def is_sglangs_own(call: Call, text: str) -> bool:
    return (
        call.path.startswith(SGLANGS_OWN)
        or SGLANGS_OWN_MESSAGE in text
        or any(value in call.body for value in SGLANGS_OWN_VALUES)
    )


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
            found = server_errors(client.url, iter([call]), SECONDS)
            return [
                f"{seed}: {item.method} {item.path} {item.body[:300]!r}: {code} {text}"
                for item, code, text in found
                if code == 0 and not item.path.startswith(SGLANGS_OWN) or not is_sglangs_own(item, text)
            ]

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
