"""A server with SPARSESPEC answers through the OpenAI API and SGLang frontend programs.

On CPU with SmolLM2-135M; with SPARSESPEC_TEST_DEVICE=cuda and SPARSESPEC_TEST_MODEL=FOLDER on a GPU
with that model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import openai
import pytest
import sglang
from quickstart import Server, choose_port, server_environment

pytestmark = pytest.mark.slow

DEVICE = os.environ.get("SPARSESPEC_TEST_DEVICE", "cpu")


@pytest.fixture(scope="module")
def port(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = choose_port(0)
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model_path, "--port", str(port)]
    command += ["--sleep-on-idle"]
    command += ["--speculative-algorithm", "SPARSESPEC", "--served-model-name", "model"]
    if DEVICE == "cpu":
        command += ["--device", "cpu", "--dtype", "float32", "--max-total-tokens", "8000"]
    else:
        command += ["--dtype", "bfloat16", "--attention-backend", "triton", "--cuda-graph-max-bs-decode", "8"]
    log = tmp_path_factory.mktemp("server") / "server.log"
    with Server(command, port, log, server_environment(True)) as server:
        server.wait_until_ready(600)
        yield port


@pytest.fixture(scope="module")
def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)


QUESTION = [{"role": "user", "content": "Write a Python function that returns the n-th Fibonacci number."}]


def test_chat_completion_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="model", messages=QUESTION, temperature=0, max_tokens=64)
    assert answer.choices[0].message.content
    assert answer.usage is not None and 0 < answer.usage.completion_tokens <= 64


def test_streamed_chat_completion_is_the_same_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="model", messages=QUESTION, temperature=0, max_tokens=64)
    chunks = client.chat.completions.create(
        model="model", messages=QUESTION, temperature=0, max_tokens=64, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content


def test_several_sampled_choices_differ(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="model", prompt="Once upon a time", temperature=1.0, max_tokens=24, n=4)
    assert len({choice.text for choice in answer.choices}) > 1


def test_log_probabilities_come_for_every_token(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="model", prompt="The capital of France is", temperature=0, max_tokens=20, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert len(logprobs.token_logprobs) == 20
    # Greedy: each token is the best of its alternatives.
    for value, best in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert value == pytest.approx(max(best.values()), abs=1e-3)


def test_a_frontend_program_generates_and_selects(port: int) -> None:
    @sglang.function
    def capital(s: sglang.lang.interpreter.ProgramState, country: str) -> None:
        s += f"The capital of {country} is"
        s += sglang.gen("city", max_tokens=12, temperature=0)
        s += " It lies in"
        s += sglang.select("continent", choices=[" Europe", " Asia"])

    sglang.set_default_backend(sglang.RuntimeEndpoint(f"http://127.0.0.1:{port}"))
    states = capital.run_batch([{"country": country} for country in ("France", "Japan", "Italy")])
    assert all(state["city"] for state in states)
    assert {state["continent"] for state in states} <= {" Europe", " Asia"}
    assert "Paris" in states[0]["city"]
