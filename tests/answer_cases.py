"""Random requests of two turns for the tiny chat model, and all that a server's answers say."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from typing import Any

import requests
from tiny_chat_model import SPECIAL

#: Tokens that answers are likely to hold, and texts of them.
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = [
    *"thqnvrjkf3512",
    "th",
    "an",
    ") ",
    ". ",
    "\n",
    "\n\n",
    "ab",
    "é",
    "→",
    "😀",
    '":',
    "�",
    "{",
    "th\n",
    "1 2",
    *SPECIAL[3:],
]
PATTERNS = [
    *("[a-e]", "th|an", r"\d\d", r"\n", "q$", r"\s\S", "[^a-z]{3}", r"(\w+\W+){3,}", r"(a|b|ab)+\n", r"t.*?h", "^.{20}"),
    *(r"\bf", "(?i)N", r"(?s).{15,}q", "[😀→]"),
]
#: What differs between any two answers; so do names of times, and what is told of speculation.
UNCOMPARED = {"id", "created", "num_retractions"}
TIMES = ("_ts", "_time", "_latency", "_throughput", "_duration", "_wait")
#: What the cache held before: told of first turns, it depends on what other requests came before.
CACHED = {"cached_tokens", "cached_tokens_details", "prompt_tokens_details"}
TOLERANCE = 2e-4  # of a log-probability


def _some(dice: random.Random, values: list[Any], most: int) -> list[Any]:
    return dice.sample(values, dice.randint(1, most))


def sampling_of(dice: random.Random, vocab_size: int) -> dict[str, Any]:
    """Parameters that end an answer, under the names of ``/generate``."""
    found: dict[str, Any] = {
        "temperature": 0,
        "max_new_tokens": dice.choice([1, 2, 5, 8, 9, 10, 17, 18, 19, 24, 30, 36, 40]),
    }
    if dice.random() < 0.4:
        stop = _some(dice, TEXTS, 3)
        found["stop"] = stop if dice.random() < 0.8 else stop[0]
    if dice.random() < 0.3:
        found["stop_token_ids"] = _some(dice, list(range(vocab_size)), 12)
    if dice.random() < 0.3:
        patterns = _some(dice, PATTERNS, 2)
        found["stop_regex"] = patterns if dice.random() < 0.8 else patterns[0]
    for name, share in (("ignore_eos", 0.4), ("no_stop_trim", 0.2)):
        if dice.random() < share:
            found[name] = True
    for name, share in (("skip_special_tokens", 0.3), ("spaces_between_special_tokens", 0.1)):
        if dice.random() < share:
            found[name] = False
    if dice.random() < 0.1:
        found["logit_bias"] = {str(dice.randrange(vocab_size)): dice.choice([-100, 2, 5]) for _ in range(4)}
    if dice.random() < 0.2:
        found["n"] = dice.randint(1, 3)
    return found


def prompt_of(dice: random.Random, vocab_size: int) -> list[int]:
    length = dice.choice([8, 12, 20, 40, 70, 130])  # long enough to be no other's beginning
    return [dice.randrange(len(SPECIAL), vocab_size) for _ in range(length)]


def case_of(seed: int, vocab_size: int) -> tuple[str, dict[str, Any]]:
    """Route and body of the first turn."""
    dice = random.Random(seed)
    sampling = sampling_of(dice, vocab_size)
    stream = dice.random() < 0.5
    logprobs = dice.random() < 0.35
    kind = dice.choice(["generate", "generate", "completions", "chat"])
    if kind == "generate":
        body: dict[str, Any] = {"input_ids": prompt_of(dice, vocab_size), "sampling_params": sampling, "stream": stream}
        if logprobs:
            body.update(
                return_logprob=True, top_logprobs_num=dice.choice([0, 1, 3]), return_text_in_logprobs=dice.random() < 0.5
            )
            if dice.random() < 0.3:
                body["token_ids_logprob"] = dice.sample(range(vocab_size), 2)
            if dice.random() < 0.2:
                body["logprob_start_len"] = dice.randint(0, len(body["input_ids"]) - 1)
        if dice.random() < 0.1:
            body["return_prompt_token_ids"] = True
        if stream and dice.random() < 0.3:
            sampling["stream_interval"] = dice.randint(1, 20)
        return "generate", body
    body = {"model": "default", "stream": stream}
    body["max_tokens"] = sampling.pop("max_new_tokens")
    sampling.pop("spaces_between_special_tokens", None)
    body.update(sampling)
    if stream and dice.random() < 0.7:
        body["stream_options"] = {"include_usage": True, **({"continuous_usage_stats": True} if dice.random() < 0.3 else {})}
    if kind == "completions":
        body["prompt"] = prompt_of(dice, vocab_size)
        body.update({"logprobs": dice.choice([0, 1, 3])} if logprobs else {})
        # SGLang answers with HTTP 500 where a prompt is asked for with log-probabilities of no alternatives.
        body.update({"echo": True} if dice.random() < 0.1 and body.get("logprobs") != 0 else {})
        return "v1/completions", body
    body["messages"] = [{"role": "user", "content": "".join(dice.choices(LETTERS + " \n.é", k=dice.randint(10, 60)))}]
    body.update({"logprobs": True, "top_logprobs": dice.choice([0, 1, 3])} if logprobs else {})
    if dice.random() < 0.3:
        body["separate_reasoning"] = False
    if dice.random() < 0.2:
        body["chat_template_kwargs"] = {"enable_thinking": dice.random() < 0.5}
    return "v1/chat/completions", body


def next_turn(route: str, body: dict[str, Any], answer: Any) -> tuple[str, dict[str, Any]]:
    """A short request that continues the first answer: what it finds in the radix cache is what that one left there."""
    sampling = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}
    if route == "generate":
        return route, {"input_ids": [*body["input_ids"], *answer[0]["output_ids"], 70, 71], "sampling_params": sampling}
    if route == "v1/completions":
        return "generate", {"input_ids": [*body["prompt"], 70, 71], "sampling_params": sampling}
    message = answer["choices"][0]["message"]
    text = "".join(message.get(name) or "" for name in ("reasoning_content", "content"))
    messages = [*body["messages"], {"role": "assistant", "content": text}, {"role": "user", "content": "on"}]
    return route, {"model": "default", "messages": messages, "max_tokens": 3, "temperature": 0}


# -------------------------------------------------------------------------------- answers


def _events(response: requests.Response) -> Iterator[dict[str, Any]]:
    """The events of a stream, which must end as it should."""
    lines = [line[len(b"data: ") :] for line in response.iter_lines() if line.startswith(b"data: ")]
    assert lines and lines[-1] == b"[DONE]", lines[-1:]
    yield from map(json.loads, lines[:-1])


def _append(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Add a chunk of a choice to what came before: texts and lists grow, all else is what came last."""
    for name, value in part.items():
        before = whole.get(name)
        if isinstance(value, dict):
            _append(whole.setdefault(name, {}) if before is not None else whole.update({name: {}}) or whole[name], value)
        elif isinstance(before, str | list) and value is not None and name not in ("finish_reason", "matched_stop", "role"):
            whole[name] = before + value
        elif value is not None or name not in whole:
            whole[name] = value


def _whole_answer(events: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """A stream of the OpenAI routes as the answer that is not streamed."""
    found: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event.pop("choices", []):
            if "delta" in choice:
                choice["message"] = choice.pop("delta")
            _append(choices.setdefault(choice["index"], {}), choice)
        found.update({name: value for name, value in event.items() if value is not None})
    return {**found, "choices": [choices[index] for index in sorted(choices)]}


def ask(url: str, route: str, body: dict[str, Any]) -> Any:
    """What a server answers: for ``/generate`` a list of answers, else the OpenAI object; a stream as one whole.

    A refused request gives its status and message.
    """
    response = requests.post(f"{url}/{route}", json=body, timeout=300, stream=bool(body.get("stream")))
    if response.status_code != 200:
        return {"status": response.status_code, "text": response.text}
    if not body.get("stream"):
        answer = response.json()
        return answer if isinstance(answer, list) or route != "generate" else [answer]
    if route != "generate":
        return _whole_answer(_events(response))
    chunks: dict[int, dict[str, Any]] = {}
    for event in _events(response):
        assert "error" not in event, event
        before = chunks.get(event.get("index", 0), {"output_ids": []})
        # Each chunk holds the answer so far.
        assert event["output_ids"][: len(before["output_ids"])] == before["output_ids"], (before, event)
        chunks[event.get("index", 0)] = event
    return [chunks[index] for index in sorted(chunks)]


def difference(plain: Any, ours: Any, uncompared: set[str], path: str = "") -> str | None:
    """Where two answers differ first, and how; None if they do not."""
    if isinstance(plain, dict) and isinstance(ours, dict):
        names = (plain.keys() | ours.keys()) - uncompared
        for name in sorted(name for name in names if not name.startswith("spec_") and not name.endswith(TIMES)):
            found = difference(plain.get(name, "(absent)"), ours.get(name, "(absent)"), uncompared, f"{path}.{name}")
            if found:
                return found
        return None
    if isinstance(plain, list) and isinstance(ours, list) and len(plain) == len(ours):
        pairs = enumerate(zip(plain, ours, strict=True))
        return next(filter(None, (difference(*pair, uncompared, f"{path}[{index}]") for index, pair in pairs)), None)
    if isinstance(plain, float) and isinstance(ours, float) and math.isclose(plain, ours, rel_tol=1e-3, abs_tol=TOLERANCE):
        return None
    return None if plain == ours else f"{path}: plain SGLang {plain!r}, here {ours!r}"


def play(url: str, seed: int, vocab_size: int) -> tuple[Any, Any]:
    """The answers of both turns of a case."""
    route, body = case_of(seed, vocab_size)
    first = ask(url, route, body)
    assert isinstance(first, list) or "choices" in first, (seed, route, body, first)
    return first, ask(url, *next_turn(route, body, first))


def _without_copied_lists(plain: Any, ours: Any) -> None:
    """Leave out top log-probabilities that plain SGLang has copied from the token before.

    Where its stream puts several tokens into one chunk, each gets the list of the chunk's first. Such a list does not begin
    with the log-probability of its own token; ours must.
    """
    for left, right in zip(plain.get("choices", ()), ours.get("choices", ()), strict=False):
        pairs = [(choice.get("logprobs") or {}).get("content") or () for choice in (left, right)]
        for theirs, found in zip(*pairs, strict=False):
            if not theirs.get("top_logprobs") or not found.get("top_logprobs"):
                continue
            own = [abs(entry["top_logprobs"][0]["logprob"] - entry["logprob"]) < 1e-3 for entry in (theirs, found)]
            # Tokens of one text, as bytes of characters are, share an entry: the last one's.
            first = found["top_logprobs"][0]
            shares = len(found["top_logprobs"]) < len(theirs["top_logprobs"]) and first["logprob"] < found["logprob"]
            own[1] |= shares and first["token"] == found["token"]
            if own == [False, True]:
                theirs["top_logprobs"] = found["top_logprobs"]


def difference_of_turns(plain: tuple[Any, Any], ours: tuple[Any, Any], compare_cached: bool = True) -> str | None:
    """As :func:`difference`, of both turns; what the cache held is told of the second."""
    if isinstance(plain[0], dict) and isinstance(ours[0], dict):
        _without_copied_lists(plain[0], ours[0])
    return difference(plain[0], ours[0], UNCOMPARED | CACHED, "first turn") or difference(
        plain[1], ours[1], UNCOMPARED | (set() if compare_cached else CACHED), "second turn"
    )
