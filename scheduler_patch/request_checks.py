"""What a request may hold, as tables: a value that is not allowed is answered with HTTP 400.

SGLang uses most values of a request as they come. One that its tokenizer process cannot use is answered with HTTP 500; one
that its scheduler or its detokenizer cannot use ends that process, and the server with it. Here every value has a rule, and
all rules are applied before SGLang looks at the request. Rules are about what can be computed with; what SGLang itself
refuses with HTTP 400 is left to it.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from fastapi import HTTPException
from pydantic_core import CoreSchema, core_schema
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.runtime_context import get_server_args
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.scheduler_patch.stop_patterns import MAX_SIZE, are_searchable
from sglang_sparsespec.settings import is_sparsespec

INT32_MAX, INT64_MIN, INT64_MAX = 2**31 - 1, -(2**63), 2**63 - 1
#: Temperatures go into float32 tensors; beyond this they are infinite there, and a masked logit over infinity is no number.
FLOAT32_MAX = float(np.finfo(np.float32).max)
#: Smallest top-p and largest bias: far beyond any use, and finite in float32 after division by SGLang's least temperature
#: (1e-6; below it decoding is greedy).
MIN_TOP_P, MAX_BIAS = 1e-30, 1e30
#: Answers that one request may ask for, by ``n`` times its prompts. SGLang makes a task and a copy of the request for each.
MAX_ANSWERS = 65536
#: Levels and references of a JSON schema. XGrammar follows both by recursion, which ends the scheduler where the stack is
#: full (at some 100,000 and 4,000), and takes time and memory by a high power of the levels (seconds at 500).
MAX_SCHEMA_LEVELS, MAX_SCHEMA_REFERENCES = 100, 1000
#: Characters of stop strings. After each token SGLang decodes as much text again, and compares each of its ends with each
#: string's beginning.
MAX_STOP_CHARACTERS = 16384
#: SGLang's name for the grammar of any JSON value.
ANY_JSON = "$$ANY$$"
#: Characters of a message that quote a value.
QUOTED = 60


@dataclass(frozen=True)
class Rule:
    """What a field may hold, besides None for "not given".

    Attributes:
        allows: whether a value is allowed, given the model's vocabulary size.
        expected: completes "... must be".
    """

    allows: Callable[[Any, int], bool]
    expected: str

    def check(self, field: str, value: Any, vocab_size: int) -> None:
        """Raise unless ``value`` is allowed.

        Raises:
            ValueError: names the field, what it must be, and the beginning of the value.
        """
        if value is None or self.allows(value, vocab_size):
            return
        shown = ascii(value)
        shown = shown if len(shown) <= QUOTED else f"{shown[:QUOTED]}..."
        raise ValueError(f"{field} must be {self.expected}; got {shown}.")


# ------------------------------------------------------------------------------- values


def _is_integer(value: Any, low: int = INT64_MIN, high: int = INT64_MAX) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    number: Any = value
    return bool(low <= number <= high)  # right for integers of any size, and for NaN


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list | tuple) and all(map(_is_text, value)))


def _are_patterns(value: Any) -> bool:
    return _are_texts(value) and are_searchable([value] if isinstance(value, str) else value)


def _is_schema(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        level = [json.loads(value)] if value not in ("", ANY_JSON) else []
    except (ValueError, RecursionError):
        return False
    references = 0
    for _ in range(MAX_SCHEMA_LEVELS + 1):
        references += sum(isinstance(item, dict) and "$ref" in item for item in level)
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = list(itertools.chain.from_iterable(inner))
    return not level and references <= MAX_SCHEMA_REFERENCES


def _is_token(value: Any, vocab_size: int) -> bool:
    try:
        return isinstance(value, str | Integral) and not isinstance(value, bool) and 0 <= int(value) < vocab_size
    except ValueError:
        return False


def _is_bias(value: Any, vocab_size: int) -> bool:
    return isinstance(value, Mapping) and all(
        _is_token(token, vocab_size) and _is_number(bias, -MAX_BIAS, MAX_BIAS) for token, bias in value.items()
    )


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | Real)


def _are_custom(value: Any) -> bool:
    def is_custom(item: Any) -> bool:
        if isinstance(item, dict):
            return all(_is_text(key) and _is_scalar(part) for key, part in item.items())
        return all(map(_is_scalar, item)) if isinstance(item, list) else _is_scalar(item)

    return isinstance(value, dict) and all(_is_text(key) and is_custom(item) for key, item in value.items())


def _integers(low: int, high: int = INT64_MAX) -> Callable[[Any, int], bool]:
    return lambda value, _: _is_integer(value, low, high)


def _numbers(low: float, high: float) -> Callable[[Any, int], bool]:
    return lambda value, _: _is_number(value, low, high)


FLAG = Rule(lambda value, _: isinstance(value, bool), "true or false")
TEXT = Rule(lambda value, _: _is_text(value), "a string")
INTEGER = Rule(_integers(INT64_MIN), "an integer of 64 bits")
COUNT = Rule(_integers(0), "an integer of at least 0")
PENALTY = Rule(_numbers(-2, 2), "a number from -2 to 2")
SCHEMA = Rule(
    lambda value, _: _is_schema(value),
    f"a string of JSON with at most {MAX_SCHEMA_LEVELS} levels and {MAX_SCHEMA_REFERENCES} references",
)

# ------------------------------------------------------------------- sampling parameters

#: Every parameter of SGLang's ``SamplingParams`` that a request may set.
SAMPLING_RULES: dict[str, Rule] = {
    "max_new_tokens": COUNT,
    "min_new_tokens": COUNT,
    "stop": Rule(
        lambda value, _: _are_texts(value) and sum(map(len, value)) <= MAX_STOP_CHARACTERS,
        f"a string or a list of strings, of at most {MAX_STOP_CHARACTERS} characters in all",
    ),
    "stop_token_ids": Rule(
        lambda value, _: isinstance(value, list | tuple | set | frozenset)
        and all(item is None or _is_integer(item) for item in value),
        "a list of token ids",
    ),
    "stop_regex": Rule(
        lambda value, _: _are_patterns(value),
        f"a regular expression of Python, or a list of them, of at most {MAX_SIZE} characters together (what is repeated "
        "counts as often as it may come)",
    ),
    "temperature": Rule(_numbers(0, FLOAT32_MAX), "a finite number of at least 0"),
    "top_p": Rule(_numbers(MIN_TOP_P, 1), "a number above 0, and at most 1"),
    "top_k": Rule(
        lambda value, _: _is_integer(value, -1, INT32_MAX) and value != 0, f"-1 or an integer from 1 to {INT32_MAX}"
    ),
    "min_p": Rule(_numbers(0, 1), "a number from 0 to 1"),
    "frequency_penalty": PENALTY,
    "presence_penalty": PENALTY,
    "repetition_penalty": Rule(_numbers(0, 2), "a number above 0, and at most 2"),
    "n": Rule(_integers(1, MAX_ANSWERS), f"an integer from 1 to {MAX_ANSWERS}"),
    "json_schema": SCHEMA,
    "regex": TEXT,
    "ebnf": TEXT,
    "structural_tag": SCHEMA,
    "ignore_eos": FLAG,
    "skip_special_tokens": FLAG,
    "spaces_between_special_tokens": FLAG,
    "no_stop_trim": FLAG,
    "stream_interval": Rule(_integers(1), "an integer of at least 1"),
    "logit_bias": Rule(
        _is_bias, f"an object with ids of the vocabulary as keys and numbers from -{MAX_BIAS:g} to {MAX_BIAS:g} as values"
    ),
    "sampling_seed": INTEGER,
    "custom_params": Rule(
        lambda value, _: _are_custom(value), "an object with scalars, or lists or objects of scalars, as values"
    ),
}
#: Parameters that not every supported SGLang has.
NEWER_SAMPLING_RULES: dict[str, Rule] = {
    "beam_width": Rule(lambda value, _: _is_integer(value, 1, 1), "1: speculation has no beam search"),
    "watermark": Rule(lambda value, _: False, "absent: accepted tokens would not carry it"),
    "ebnf_full_assistant": FLAG,
}
SAMPLING_RULES |= {name: rule for name, rule in NEWER_SAMPLING_RULES.items() if name in SamplingParams.__struct_fields__}


def check_sampling_params(params: Any, preferred: Mapping[str, Any] | None, vocab_size: int) -> None:
    """Check the sampling parameters of one prompt.

    Args:
        params: the request's, a dictionary or None.
        preferred: the server's, for what the request does not set.
        vocab_size: of the model.

    Raises:
        ValueError: a parameter is unknown, or its value is not allowed.
    """
    if params is not None and not isinstance(params, Mapping):
        raise ValueError(f"sampling_params must be an object for each prompt; got {type(params).__name__}.")
    merged = {**(preferred or {}), **(params or {})}
    for name, value in merged.items():
        rule = SAMPLING_RULES.get(name)
        if rule is None:
            raise ValueError(f"Sampling parameter {name} is unknown; there are {', '.join(SAMPLING_RULES)}.")
        rule.check(f"Sampling parameter {name}", value, vocab_size)
    if "n" in merged and merged["n"] is None:
        raise ValueError("Sampling parameter n must not be null; leave it out for one answer.")


# ------------------------------------------------------------------------ other fields


def _is_session(value: Any) -> bool:
    rules = {"id": TEXT, "rid": TEXT, "offset": INTEGER, "replace": FLAG, "drop_previous_output": FLAG}
    return isinstance(value, dict) and all(
        name in rules and (item is None or rules[name].allows(item, 0)) for name, item in value.items()
    )


#: Fields with one value for each prompt of a request, or one value for all.
PROMPT_RULES: dict[str, Rule] = {
    "text": TEXT,
    "rid": TEXT,
    "extra_key": TEXT,
    "lora_path": TEXT,
    "custom_logit_processor": TEXT,
    "bootstrap_host": TEXT,
    "bootstrap_port": INTEGER,
    "bootstrap_room": INTEGER,
    "bootstrap_pair_key": TEXT,
    "decode_tp_size": INTEGER,
    "return_logprob": FLAG,
    "logprob_start_len": Rule(_integers(-1), "an integer of at least -1"),
    "top_logprobs_num": Rule(
        lambda value, vocab_size: _is_integer(value, 0, vocab_size), "an integer from 0 to the vocabulary's size"
    ),
    "return_sampling_mask": FLAG,
    "return_hidden_states": Rule(lambda value, _: isinstance(value, bool) or value == "last", 'true, false or "last"'),
    # SGLang passes these on as they are, since its own score requests make them.
    "positional_embed_overrides": Rule(
        lambda value, _: isinstance(value, PositionalEmbeds), "absent: SGLang sets it for its own requests"
    ),
}
#: Fields with one value for all prompts.
REQUEST_RULES: dict[str, Rule] = {
    "session_id": TEXT,
    "session_params": Rule(
        lambda value, _: _is_session(value),
        "an object with id and rid (strings), offset (an integer), replace and drop_previous_output (true or false)",
    ),
    "stream": FLAG,
    "return_text_in_logprobs": FLAG,
    "return_flat_raw_top_logprobs": FLAG,
    "return_flat_raw_top_logprobs_b64": FLAG,
    "return_routed_experts": FLAG,
    "routed_experts_start_len": INTEGER,
    "return_indexer_topk": FLAG,
    "require_reasoning": FLAG,
    "return_prompt_token_ids": FLAG,
    "max_thinking_tokens": INTEGER,
    "priority": INTEGER,
    "routed_dp_rank": INTEGER,
    "disagg_prefill_dp_rank": INTEGER,
    "routing_key": TEXT,
    "lora_id": Rule(lambda value, _: False, "absent: SGLang sets it, by lora_path"),
    "http_worker_ipc": Rule(lambda value, _: False, "absent: SGLang sets it between its own processes"),
}
#: Fields that not every supported SGLang has.
NEWER_REQUEST_RULES: dict[str, Rule] = {
    "watermark": NEWER_SAMPLING_RULES["watermark"],
    "return_flat_raw_output_top_logprobs": FLAG,
    "data_parallel_rank": INTEGER,
}
REQUEST_RULES |= {name: rule for name, rule in NEWER_REQUEST_RULES.items() if name in GenerateReqInput.__dataclass_fields__}


def _num_prompts(obj: Any) -> int | None:
    """Prompts of a batch; None for a request of one prompt, or of what SGLang refuses."""
    if obj.text is not None:
        return None if isinstance(obj.text, str) else len(obj.text)
    if obj.input_ids is not None:
        return None if len(obj.input_ids) == 0 or isinstance(obj.input_ids[0], Integral) else len(obj.input_ids)
    embeds = obj.input_embeds
    if embeds is None:
        return None
    if not embeds or not embeds[0]:
        raise ValueError("input_embeds must not be empty.")
    return None if isinstance(embeds[0][0], Real) else len(embeds)


def _values_of(obj: Any, name: str, prompts: int | None) -> Iterator[Any]:
    """The values of a field: one, or one for each prompt of a batch.

    Raises:
        ValueError: their number is not that of the prompts.
    """
    value = getattr(obj, name)
    if not isinstance(value, list):
        yield value
        return
    if prompts is None:
        raise ValueError(f"{name} must not be a list: the request has one prompt.")
    if len(value) != prompts:
        raise ValueError(f"{name} must have one value for each of {prompts} prompts; got {len(value)}.")
    yield from value


def check_request(tokenizer_manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """``TokenizerManager.generate_request``: SGLang sends a request on with values of any type and size.

    It expands the request by ``n`` and by its lists first, so this has to come before. A request for embeddings is refused
    in any case, as SGLang does after that: no model is served for them.
    """
    if not is_sparsespec(tokenizer_manager.server_args):
        return
    if not isinstance(obj, GenerateReqInput):
        raise ValueError("This model is served for generation, not for embeddings, classes or scores of its own.")
    prompts = _num_prompts(obj)
    if prompts == 0:
        raise ValueError("A request must have at least one prompt.")
    vocab_size = tokenizer_manager.model_config.vocab_size
    answers = 1
    for params in _values_of(obj, "sampling_params", prompts):
        check_sampling_params(params, tokenizer_manager.preferred_sampling_params, vocab_size)
        answers = (params or {}).get("n", 1)
    if answers > 1:
        # SGLang makes a batch of the prompt.
        prompts = prompts or 1
        if answers * prompts > MAX_ANSWERS:
            raise ValueError(f"n times the number of prompts must be at most {MAX_ANSWERS}; got {answers * prompts}.")
    for name, rule in REQUEST_RULES.items():
        rule.check(name, getattr(obj, name), vocab_size)
    for name, rule in PROMPT_RULES.items():
        for value in _values_of(obj, name, prompts):
            rule.check(name, value, vocab_size)
    if tokenizer_manager.server_args.enable_custom_logit_processor:
        for value in _values_of(obj, "custom_logit_processor", prompts):
            _check_processor(value)
    token_ids = obj.token_ids_logprob
    if isinstance(token_ids, list) and token_ids and isinstance(token_ids[0], list) and len(token_ids) != prompts:
        raise ValueError(f"token_ids_logprob must have one list for each prompt; got {len(token_ids)}.")
    if obj.multi_item_delimiter_indices is not None and not tokenizer_manager.server_args.enable_mis:
        raise ValueError("multi_item_delimiter_indices must be absent without --enable-mis.")


def _check_processor(processor: str | None) -> None:
    if processor:
        try:
            CustomLogitProcessor.from_str(processor)
        except Exception as error:
            raise ValueError(
                "custom_logit_processor must be what CustomLogitProcessor.to_str gives; "
                f"it cannot be loaded ({type(error).__name__}: {error})."
            ) from error


def check_tokens(tokenizer_manager: Any, obj: Any, input_ids: Any, *args: Any, **kwargs: Any) -> None:
    """``TokenizerManager._validate_one_request``: SGLang looks up the embedding of any id that it is given.

    One that is not in the vocabulary ends the scheduler on a CPU, and breaks the CUDA context on a GPU. A prompt without
    any token has nothing to predict from.
    """
    if not is_sparsespec(tokenizer_manager.server_args) or not isinstance(obj, GenerateReqInput):
        return
    if obj.input_embeds is not None:
        _check_embeds(obj.input_embeds, tokenizer_manager.model_config.hidden_size)
        return
    try:
        tokens = array("q", input_ids)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"A prompt's token ids must be integers ({error}).") from error
    if not tokens:
        raise ValueError("A prompt must have at least one token.")
    vocab_size = tokenizer_manager.model_config.vocab_size
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"A prompt's token ids must be from 0 to {vocab_size - 1}, the model's vocabulary; got {wrong}.")


def _check_embeds(embeds: Any, hidden_size: int) -> None:
    try:
        shape = np.asarray(embeds, dtype=np.float32).shape
    except (TypeError, ValueError, OverflowError):
        shape = ()
    if len(shape) != 2 or shape[1] != hidden_size:
        raise ValueError(f"input_embeds must be lists of {hidden_size} numbers, one for each token.")


def schema_of_any_body(original: Callable[..., Any], source: Any, handler: Any) -> CoreSchema:
    """``ChatCompletionRequest.__get_pydantic_core_schema__``: SGLang's own validators ask a body's parts for what only
    objects have, as in ``response_format: 5``, before their types are checked.
    """

    def validate(body: Any, as_sglang: Callable[[Any], Any]) -> Any:
        try:
            return as_sglang(body)
        except (AttributeError, TypeError, KeyError) as error:
            if not is_sparsespec(get_server_args()):
                raise
            raise ValueError(f"A part of the request has a wrong type: {error}.") from error

    # Not what ``original`` returns: with that, the types of a body's parts are not defined.
    return core_schema.no_info_wrap_validator_function(validate, handler(source))


def check_recorder(tokenizer_manager: Any, *args: Any, **kwargs: Any) -> None:
    """``TokenizerManager.start_expert_distribution_record`` and its like: without a recorder they end the scheduler."""
    args_of_server = tokenizer_manager.server_args
    if is_sparsespec(args_of_server) and args_of_server.expert_distribution_recorder_mode is None:
        raise HTTPException(400, "Start the server with --expert-distribution-recorder-mode to record expert distributions.")


def check_seeded_request(tokenizer_manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """``TokenizerManager._validate_one_request``: SGLang asserts in its scheduler that no seeded request has a min-p.

    That ends the server.
    """
    server_args = tokenizer_manager.server_args
    if not is_sparsespec(server_args) or not server_args.enable_deterministic_inference:
        return
    params = {**(tokenizer_manager.preferred_sampling_params or {}), **(getattr(obj, "sampling_params", None) or {})}
    if (params.get("min_p") or 0) > 0:
        raise ValueError("min_p must be 0 with --enable-deterministic-inference: SGLang has no seeded sampling with it.")


def register_hooks() -> None:
    """Register the hooks of this module."""
    chat = "sglang.srt.entrypoints.openai.protocol.ChatCompletionRequest."
    add_hook(chat + "__get_pydantic_core_schema__", schema_of_any_body, "around")
    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager."
    add_hook(manager + "generate_request", check_request, "before")
    add_hook(manager + "_validate_one_request", check_tokens, "before")
    for name in ("start", "stop", "dump"):
        add_hook(manager + f"{name}_expert_distribution_record", check_recorder, "before")
    add_hook(manager + "_validate_one_request", check_seeded_request, "before")
