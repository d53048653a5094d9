"""Random requests for every route of a server that takes a body, made from its OpenAPI schema.

A body begins with what the schema asks for. Then some of its values are replaced by extremes: other types, huge and tiny
numbers, NaN, deep lists, odd texts, nothing at all.
"""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from typing import Any

import requests

HUGE = 2**70
EXTREMES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 1.5, -0.0, 2**31, -(2**31), 2**63, -(2**63) - 1, HUGE, 10**400, 1e308, 5e-324),
    *(float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "x",
        "5",
        "\x00",
        "😀" * 20,
        "\ud800",
        "a" * 5000,
        "(a+)+b",
        "../../x",
        "null",
        "{",
        "\u202e",
        "%s%n",
        "data:x;base64,%%",
    ),
    *([], [[]], [None], [1, "x"], [[[1]]], [HUGE], [-1], ["\ud800"], [{}], {}, {"": 1}, {"a": {"b": [None]}}, {"x": HUGE}),
]
#: Left out: a rendezvous that waits for other servers, what pauses the server or slows it down on purpose, and what writes
#: profiles for minutes.
EXCLUDED = {
    "/init_weights_update_group",
    "/init_weights_send_group_for_remote_instance",
    "/send_weights_to_remote_instance",
    "/pause_generation",
    "/slow_down",
    "/start_profile",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/configure_logging",
}
#: Values that make a request one that is served, at the places of a body where the schema allows anything.
SERVED: dict[str, list[Any]] = {
    "text": ["Hi", ["a", "b"]],
    "prompt": ["Hi", [5, 6], ["a", "b"]],
    "input": ["Hi", ["a", "b"]],
    "input_ids": [[5, 6], [[5], [6]]],
    "messages": [[{"role": "user", "content": "Hi"}]],
    "model": ["default"],
    "max_tokens": [3],
    "max_completion_tokens": [3],
    "max_output_tokens": [3],
    "n": [1, 2],
    "stream": [True, False],
    "role": ["user", "assistant", "system", "tool"],
    "type": ["text", "function", "json_schema", "json_object", "structural_tag", "image_url"],
    "tokens": [[5, 6], [[5], [6]]],
    "session_id": ["a"],
}
PARAMS = {
    "max_new_tokens": [3, 0],
    "stop": ["a", ["a"]],
    "stop_regex": ["a+"],
    "regex": ["a+"],
    "json_schema": ["{}"],
    "ebnf": ['root ::= "a"'],
    "structural_tag": ["{}"],
    "temperature": [0, 0.7],
    "top_k": [1],
    "top_p": [0.5],
    "n": [2],
    "logit_bias": [{"5": 1}],
    "custom_params": [{"a": 1}],
    "stop_token_ids": [[5]],
    "sampling_seed": [1],
}

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


@dataclass(frozen=True)
class Call:
    """A request: method, path with query, and body as it is sent."""

    method: str
    path: str
    body: bytes

    def send(self, url: str, timeout: float) -> tuple[int, str]:
        """Status and text of the answer; 0 and the reason if there is none after ``timeout`` seconds.

        A stream that was begun with a status of 200 and holds an error of code 500 counts as 500.
        """
        headers = {"Content-Type": "application/json"}
        try:
            answer = requests.request(self.method, url + self.path, data=self.body, headers=headers, timeout=timeout)
        except requests.RequestException as error:
            return 0, str(error)
        holds_error = '"code": 500' in answer.text or '"code":500' in answer.text
        return (500 if holds_error else answer.status_code), answer.text

    def is_sglangs_own(self, status: int, text: str) -> bool:
        """Whether plain SGLang answers such a request with this status, of 500 and more, or with none (0)."""
        if self.path.startswith(SGLANGS_OWN):
            return True
        return status > 0 and (SGLANGS_OWN_MESSAGE in text or any(value in self.body for value in SGLANGS_OWN_VALUES))


class Fuzz:
    """Calls of the routes in ``schema``, a server's ``/openapi.json``."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._parts = schema.get("components", {}).get("schemas", {})
        self.routes: list[tuple[str, str, dict[str, Any], list[dict[str, Any]]]] = []
        for path, methods in schema["paths"].items():
            for method, about in methods.items():
                content = about.get("requestBody", {}).get("content", {})
                if path not in EXCLUDED and (content or method != "get"):
                    body = content.get("application/json", {}).get("schema", {})
                    self.routes.append((method.upper(), path, body, about.get("parameters", [])))

    def call(self, seed: int) -> Call:
        """The call of a seed: routes in turn, so that each has its share."""
        dice = random.Random(seed)
        method, path, schema, parameters = self.routes[seed % len(self.routes)]
        query = []
        for parameter in parameters:
            value = str(dice.choice([1, "x", -1, "", 1e308]))
            if parameter["in"] == "path":
                path = path.replace("{" + parameter["name"] + "}", value or "x")
            elif parameter["in"] == "query" and dice.random() < 0.5:
                query.append(f"{parameter['name']}={value}")
        body = self._value(schema, dice, 0)
        if dice.random() < 0.75 and isinstance(body, dict):
            for _ in range(dice.randint(1, 3)):
                self._damage(body, dice)
        if dice.random() < 0.02:
            body = dice.choice(EXTREMES)
        text = json.dumps(body)
        if dice.random() < 0.03:
            text = text.replace('"', '["', 1) if dice.random() < 0.5 else "[" * dice.choice([500, 50_000])
        return Call(method, path + ("?" + "&".join(query) if query else ""), text.encode())

    def _value(self, schema: dict[str, Any], dice: random.Random, depth: int, name: str = "") -> Any:
        if name in SERVED and dice.random() < 0.8:
            return copy.deepcopy(dice.choice(SERVED[name]))
        if "$ref" in schema:
            return self._value(self._parts.get(schema["$ref"].rpartition("/")[2], {}), dice, depth, name)
        for key in ("anyOf", "oneOf", "allOf"):
            if key in schema:
                return self._value(dice.choice(schema[key]), dice, depth, name)
        if "enum" in schema or "const" in schema:
            return dice.choice(schema.get("enum") or [schema.get("const")])
        kind = schema.get("type")
        if name == "sampling_params":
            return {
                key: copy.deepcopy(dice.choice(PARAMS[key])) for key in dice.sample(sorted(PARAMS), dice.randint(0, 3))
            } | {"max_new_tokens": 3}
        if kind == "object" or "properties" in schema:
            required = set(schema.get("required", ()))
            wanted = dice.random() * 0.4
            found = {}
            for key, part in schema.get("properties", {}).items():
                if (
                    key in required
                    or key in ("max_tokens", "prompt", "messages", "text")
                    or dice.random() < wanted / (depth + 1)
                ):
                    found[key] = self._value(part, dice, depth + 1, key) if depth < 5 else None
            return found
        if kind == "array":
            return (
                [self._value(schema.get("items", {}), dice, depth + 1) for _ in range(dice.randint(0, 2))]
                if depth < 5
                else []
            )
        plain = {"string": ["Hi", "a"], "integer": [1, 3], "number": [0.5, 1], "boolean": [True, False], "null": [None]}
        return copy.deepcopy(dice.choice(plain.get(str(kind), EXTREMES)))

    def _damage(self, body: Any, dice: random.Random) -> None:
        """Replace, remove or add a value somewhere in ``body``."""
        places: list[tuple[Any, Any]] = []
        open_ = [body]
        while open_:
            part = open_.pop()
            keys = list(part) if isinstance(part, dict) else range(len(part))
            places += [(part, key) for key in keys]
            open_ += [part[key] for key in keys if isinstance(part[key], dict | list)]
        if not places:
            return
        part, key = dice.choice(places)
        if dice.random() < 0.1 and isinstance(part, dict):
            del part[key]
        elif dice.random() < 0.05:
            part[key] = json.loads("[" * 200 + "]" * 200)
        else:
            part[key] = copy.deepcopy(dice.choice(EXTREMES))
