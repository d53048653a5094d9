"""Values of requests that no server may use, and such that it must."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FLAGS = ("ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim")
GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")
HUGE = 2**70

#: Sampling parameters and their values.
BAD_PARAMS: list[tuple[str, Any]] = [
    *(("max_new_tokens", value) for value in ("x", -1, 1.5, True, [1], {}, HUGE)),
    *(("min_new_tokens", value) for value in ("x", -1, 1.5, [1], HUGE)),
    *(("stop", value) for value in (5, [5], [["a"]], {"a": 1}, "a" * 16385, ["a" * 99] * 166)),
    *(("stop_regex", value) for value in (5, [5], "(", ["a", "a{99999999999}"], "((a{50}){50}){50}", "a{0,99999}b")),
    *(("stop_token_ids", value) for value in (5, "ab", ["x"], [[1]], [1.5], [HUGE], [True])),
    *(("temperature", value) for value in ("x", -1, 1e300, HUGE**9, True, [1])),
    *(("top_p", value) for value in ("x", 0, 1.1, 1e-300, [1])),
    *(("top_k", value) for value in ("x", 0, -2, 1.5, 2**31, [1])),
    *(("min_p", value) for value in ("x", -0.1, 2, [1])),
    *((f"{name}_penalty", value) for name in ("frequency", "presence", "repetition") for value in ("x", -3, [1])),
    *(("n", value) for value in ("x", 0, -1, 1.5, 10**9, None, [1])),
    *((name, value) for name in GRAMMARS for value in (5, True, {"type": "object"}, ["a"])),
    *((name, "{") for name in ("json_schema", "structural_tag")),
    *((name, value) for name in FLAGS for value in ("maybe", 1, [True])),
    *(("stream_interval", value) for value in (0, -1, "x", 1.5)),
    *(("logit_bias", value) for value in (5, "x", [1], {"5": 1e300}, {"5": "x"}, {"5": None}, {"5": [1]}, {"5": True})),
    *(("logit_bias", {key: 1.0}) for key in ("x", "-1", "99999999", "1.5", "")),
    *(("sampling_seed", value) for value in ("x", 1.5, HUGE, [1])),
    *(("custom_params", value) for value in ("x", [1], {"a": {"b": {"c": 1}}}, {"a": [[1]]})),
    ("nonsense", 1),
    ("is_normalized", True),
    ("stop_strs", ["a"]),
]
GOOD_PARAMS: list[tuple[str, Any]] = [
    *(("max_new_tokens", value) for value in (0, 1, 10**6)),
    *(("stop", value) for value in ("", "a", [], ["a", "b"], ("a",), "a" * 16384)),
    *(("stop_regex", value) for value in ("a+", [], ["a|b", "c"], "(a+)+b", r"\n(?=x)")),
    *(("stop_token_ids", value) for value in ([], [5], [None, 5], {5})),
    *(("temperature", value) for value in (0, 0.7, 3e38)),
    *(("top_p", value) for value in (1, 1.0, 0.1)),
    *(("top_k", value) for value in (-1, 1, 2**31 - 1)),
    *(("min_p", value) for value in (0, 1)),
    *((f"{name}_penalty", value) for name in ("frequency", "presence", "repetition") for value in (1, 2.0)),
    *(("n", value) for value in (1, 64)),
    *((name, value) for name in ("json_schema", "structural_tag") for value in ("", "{}", '{"items": {"$ref": "#"}}')),
    ("json_schema", "$$ANY$$"),
    ("regex", "(a"),  # SGLang answers with HTTP 400
    ("ebnf", 'root ::= "a"'),
    *((name, value) for name in FLAGS for value in (True, False)),
    ("stream_interval", 1),
    *(("logit_bias", value) for value in ({}, {"5": 1}, {"0": -1e30, "31": 1e30}, {5: 1.0})),
    *(("sampling_seed", value) for value in (0, -5, 2**63 - 1)),
    *(("custom_params", value) for value in ({}, {"a": 1, "b": [1, "x", None], "c": {"d": True}})),
]

#: What the message names, and the fields of a request; a text is added where there is no prompt.
BAD_REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("sampling_params", {"sampling_params": [{}]}),
    ("sampling_params", {"text": ["a", "b"], "sampling_params": [{}]}),
    ("n times", {"text": ["a"] * 10, "sampling_params": {"n": 10_000}}),
    ("at least one prompt", {"text": []}),
    ("return_logprob", {"return_logprob": [True]}),
    *(("logprob_start_len", {"logprob_start_len": value}) for value in (-2, [0, 1])),
    *(("top_logprobs_num", {"top_logprobs_num": value}) for value in (-1, 10**6, [1])),
    ("token_ids_logprob", {"token_ids_logprob": [[1], [2]]}),
    *(("session_params", {"session_params": value}) for value in ({"id": []}, {"id": "a", "offset": "x"}, {"x": 1})),
    ("positional_embed_overrides", {"positional_embed_overrides": {"embeds": [[1.0]], "positions": [0]}}),
    ("http_worker_ipc", {"http_worker_ipc": "ipc://x"}),
    *(("lora_id", {"lora_id": value}) for value in ("x", [], ["x"])),
    ("multi_item_delimiter_indices", {"multi_item_delimiter_indices": [1]}),
    ("rid", {"rid": ["a"]}),
    ("decode_tp_size", {"text": ["a", "b"], "decode_tp_size": [1]}),
    ("bootstrap_pair_key", {"text": ["a", "b"], "bootstrap_pair_key": ["a"]}),
    ("extra_key", {"extra_key": ["a"]}),
    ("priority", {"priority": HUGE}),
    ("return_hidden_states", {"return_hidden_states": [True]}),
]
GOOD_REQUESTS: list[dict[str, Any]] = [
    {"text": "Hi"},
    {"text": "Hi", "sampling_params": {"n": 2}, "rid": ["a"]},
    {"text": ["a", "b"], "sampling_params": [{}, {"temperature": 0}], "rid": ["a", "b"], "top_logprobs_num": [1, 2]},
    {"text": ["a", "b"], "sampling_params": {}, "token_ids_logprob": [[1], [2]], "return_logprob": True},
    {"input_ids": [1, 2], "token_ids_logprob": [1, 2], "logprob_start_len": 0},
    {"input_ids": [[1], [2]], "session_params": {"id": "a", "rid": None, "offset": 3, "replace": False}},
    {"input_embeds": [[1.0]]},
    {"input_embeds": [[[1.0]], [[2.0]]], "return_hidden_states": ["last", False]},
]


def labels(cases: Sequence[tuple[str, Any]]) -> list[str]:
    """An identifier for each case, short enough to be read."""
    return [f"{name}={value!r}"[:50] for name, value in cases]
