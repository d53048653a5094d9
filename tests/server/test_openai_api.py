"""A server with SPARSESPEC answers through the OpenAI API and SGLang frontend programs.

On CPU with SmolLM2-135M; with SPARSESPEC_TEST_DEVICE=cuda and SPARSESPEC_TEST_MODEL=FOLDER on a GPU
with that model.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import sglang
from quickstart import Server, server_environment
from server_client import free_port

pytestmark = pytest.mark.slow

DEVICE = os.environ.get("SPARSESPEC_TEST_DEVICE", "cpu")


@pytest.fixture(scope="module")
def port(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
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


def test_chat_completion_answers_and_its_stream_is_the_same_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="model", messages=QUESTION, temperature=0, max_tokens=32)
    assert answer.choices[0].message.content
    assert answer.usage is not None and 0 < answer.usage.completion_tokens <= 32
    chunks = client.chat.completions.create(
        model="model", messages=QUESTION, temperature=0, max_tokens=32, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content


def test_several_sampled_choices_differ(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="model", prompt="Once upon a time", temperature=1.0, max_tokens=12, n=4)
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


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def assert_person(value: Any) -> None:
    assert set(value) == {"name", "age"}
    assert isinstance(value["name"], str) and 1 <= value["age"] <= 99


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_json_schema_shapes_the_answer(client: openai.OpenAI, temperature: float) -> None:
    answer = client.chat.completions.create(
        model="model",
        messages=QUESTION,
        temperature=temperature,
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert_person(json.loads(answer.choices[0].message.content or ""))


def test_a_required_tool_is_called(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "greet", "parameters": PERSON}}
    answer = client.chat.completions.create(
        model="model", messages=QUESTION, temperature=0, max_tokens=200, tools=[tool], tool_choice="required"
    )
    # A server without a parser of tool calls gives them as text.
    calls = json.loads(answer.choices[0].message.content or "")
    assert calls and all(call["name"] == "greet" for call in calls)
    for call in calls:
        assert_person(call["parameters"])


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [({"regex": r"\d{4}-\d\d-\d\d"}, r"\d{4}-\d\d-\d\d"), ({"ebnf": 'root ::= "yes" | "no"'}, "yes|no")],
    ids=["regex", "ebnf"],
)
def test_a_grammar_shapes_the_answer(client: openai.OpenAI, grammar: dict[str, str], pattern: str) -> None:
    answer = client.completions.create(model="model", prompt="A date:", temperature=0.8, max_tokens=32, extra_body=grammar)
    assert re.fullmatch(pattern, answer.choices[0].text)


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
