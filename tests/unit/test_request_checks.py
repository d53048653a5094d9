"""What a request may hold: each value that ends a process of SGLang, or is answered with HTTP 500 there, is refused."""

from __future__ import annotations

import asyncio
import copy
import json
from types import SimpleNamespace
from typing import Annotated, Any

import msgspec
import pytest
from bad_requests import BAD_PARAMS, BAD_REQUESTS, GOOD_PARAMS, GOOD_REQUESTS, labels
from fastapi import HTTPException
from pydantic import TypeAdapter, ValidationError
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_sparsespec import ALGORITHM
from sglang_sparsespec.scheduler_patch import request_checks
from sglang_sparsespec.scheduler_patch.request_checks import (
    PROMPT_RULES,
    REQUEST_RULES,
    SAMPLING_RULES,
    check_seeded_request,
)

pytestmark = pytest.mark.usefixtures("serving_plain")

VOCAB, HIDDEN = 32, 4


def manager(
    algorithm: str | None = ALGORITHM,
    preferred: dict[str, Any] | None = None,
    processors: bool = False,
    seeded: bool = False,
) -> TokenizerManager:
    """A tokenizer process as far as requests are checked in it; its model has no context to spare."""
    made = object.__new__(TokenizerManager)
    made.__dict__.update(
        server_args=SimpleNamespace(
            speculative_algorithm=algorithm,
            enable_mis=False,
            enable_custom_logit_processor=processors,
            enable_deterministic_inference=seeded,
        ),
        preferred_sampling_params=preferred,
        model_config=SimpleNamespace(vocab_size=VOCAB, hidden_size=HIDDEN, joint_head_config=None, pointer_head=None),
        context_len=0,
        num_reserved_tokens=0,
        allow_auto_truncate=False,
    )
    return made


class PassedOnError(Exception):
    """SGLang was given the request."""


def send(request: dict[str, Any], **of_manager: Any) -> None:
    """Give a request to the tokenizer process.

    Raises:
        ValueError: it was refused.
    """
    made = manager(**of_manager)

    def begin() -> None:
        raise PassedOnError

    made.auto_create_handle_loop = begin  # type: ignore[method-assign]
    obj = GenerateReqInput(**request)

    async def first() -> None:
        await made.generate_request(obj).__anext__()

    with pytest.raises(PassedOnError):
        asyncio.run(first())


def test_every_parameter_that_a_request_may_set_has_a_rule() -> None:
    internal = {"stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized"}
    assert set(SAMPLING_RULES) == {field.name for field in msgspec.structs.fields(SamplingParams)} - internal


def test_rules_are_of_fields_that_requests_have() -> None:
    assert set(PROMPT_RULES) | set(REQUEST_RULES) <= set(GenerateReqInput.__dataclass_fields__)


@pytest.mark.parametrize(("name", "value"), BAD_PARAMS, ids=labels(BAD_PARAMS))
def test_a_bad_parameter_is_refused_by_its_name(name: str, value: Any) -> None:
    request = {"text": "Hi", "sampling_params": {name: value}}
    with pytest.raises(ValueError, match=rf"^Sampling parameter {name} (must|is unknown)"):
        send(request)
    send(request, algorithm=None)


@pytest.mark.parametrize(("name", "value"), [case for case in BAD_PARAMS if case[0] != "n"][:5])
def test_a_bad_parameter_of_one_prompt_of_several_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        send({"text": ["a", "b"], "sampling_params": [{}, {name: value}]})


def test_a_bad_preferred_parameter_is_refused_unless_the_request_sets_it() -> None:
    with pytest.raises(ValueError, match="top_k"):
        send({"text": "Hi"}, preferred={"top_k": 0})
    send({"text": "Hi", "sampling_params": {"top_k": 3}}, preferred={"top_k": 0})


@pytest.mark.parametrize(("name", "value"), GOOD_PARAMS, ids=labels(GOOD_PARAMS))
def test_a_good_parameter_is_accepted(name: str, value: Any) -> None:
    send({"text": "Hi", "sampling_params": {name: value}})


@pytest.mark.parametrize("name", [name for name in SAMPLING_RULES if name != "n"])
def test_a_parameter_may_be_null(name: str) -> None:
    send({"text": "Hi", "sampling_params": {name: None}})


@pytest.mark.parametrize(("name", "request_"), BAD_REQUESTS, ids=labels(BAD_REQUESTS))
def test_a_bad_field_is_refused_by_its_name(name: str, request_: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=name):
        send({**({} if {"text", "input_ids"} & set(request_) else {"text": "Hi"}), **request_})


@pytest.mark.parametrize("request_", GOOD_REQUESTS)
def test_a_good_request_is_accepted(request_: dict[str, Any]) -> None:
    send(request_)


def test_a_message_quotes_no_more_than_the_beginning_of_a_value() -> None:
    with pytest.raises(ValueError) as refused:
        send({"text": "Hi", "sampling_params": {"stop": ["x" * 1000, 5]}})
    assert len(str(refused.value)) < 200


def test_schemas_are_refused_by_levels_and_references() -> None:
    """The limits lie far below those at which XGrammar overflows its stack."""
    nested = "[" * 99 + "]" * 99
    send({"text": "Hi", "sampling_params": {"json_schema": f'{{"const":{nested}}}'}})
    for bad in (
        f'{{"const":[[{nested}]]}}',
        # Brackets in a string close nothing.
        '{"a":"' + "}" * 99 + f'","const":[[{nested}]]}}',
        "[" * 100_000 + "]" * 100_000,
        json.dumps({"anyOf": [{"$ref": "#"}] * 1001}),
        json.dumps({"anyOf": [{"$ref": "#"}] * 1001}).replace("$", "\\u0024"),
    ):
        with pytest.raises(ValueError, match="json_schema must be a string of JSON with at most"):
            send({"text": "Hi", "sampling_params": {"json_schema": bad}})


# --------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("ids", [[-1], [VOCAB], [0, VOCAB], [1.5], ["a"], [[1]], [2**64], [], None])
def test_token_ids_outside_the_vocabulary_are_refused(ids: Any) -> None:
    obj = GenerateReqInput(text="Hi")
    with pytest.raises(ValueError, match="A prompt('s token ids)? must"):
        manager()._validate_one_request(obj, ids)


def test_other_token_ids_go_to_sglangs_check() -> None:
    for made, ids in ((manager(), [0, VOCAB - 1]), (manager(algorithm=None), [-1])):
        with pytest.raises(ValueError, match="longer than the model's context length"):
            made._validate_one_request(GenerateReqInput(text="Hi"), ids)


@pytest.mark.parametrize("embeds", [[[1.0]], [[1.0] * HIDDEN, [1.0]], [["a"] * HIDDEN], [1.0], [[]]])
def test_embeddings_of_other_shapes_are_refused(embeds: Any) -> None:
    with pytest.raises(ValueError, match=f"input_embeds must be lists of {HIDDEN} numbers"):
        manager()._validate_one_request(GenerateReqInput(input_embeds=embeds), None)  # type: ignore[arg-type]


def test_embeddings_of_the_models_shape_go_to_sglangs_check() -> None:
    with pytest.raises(ValueError, match="context length"):
        manager()._validate_one_request(GenerateReqInput(input_embeds=[[1.0] * HIDDEN]), None)  # type: ignore[arg-type]


def test_embedding_requests_are_left_to_sglang() -> None:
    made = manager()
    made.context_len, made.validate_total_tokens, made.is_generation = 100, True, True
    with pytest.raises(ValueError, match="does not appear to be an embedding model"):
        made._validate_one_request(EmbeddingReqInput(text="Hi", sampling_params={}), [VOCAB])


@pytest.mark.parametrize("processor", ["x", "{}", '{"callable": "00"}', '{"callable": 5}'])
def test_a_processor_that_cannot_be_loaded_is_refused(processor: str) -> None:
    with pytest.raises(ValueError, match="custom_logit_processor must be what CustomLogitProcessor.to_str gives"):
        send({"text": "Hi", "custom_logit_processor": processor}, processors=True)
    send({"text": ["a", "b"], "custom_logit_processor": [DisallowedTokensLogitsProcessor.to_str(), None]}, processors=True)


@pytest.mark.parametrize("fields", [{"text": "Hi"}, {"text": "Hi", "rid": ["a"]}, {"text": ["a"], "sampling_params": 5}])
def test_a_request_for_embeddings_is_refused_whatever_it_holds(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="served for generation"):
        asyncio.run(manager().generate_request(EmbeddingReqInput(**fields)).__anext__())


# ---------------------------------------------------------------------- bodies of chats

HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def validate_chat(body: Any) -> Any:
    """Validate a body as the HTTP server's framework does."""
    from fastapi import Body
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    return TypeAdapter(Annotated[ChatCompletionRequest, Body()]).validate_python(copy.deepcopy(body))


@pytest.mark.parametrize(
    "body",
    [5, [1], "x", *({**HELLO, "response_format": value} for value in (5, "x", [1], {"type": "json_schema", "schema": 5}))],
)
def test_a_chat_of_a_wrong_type_is_refused(body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    args = SimpleNamespace(speculative_algorithm=ALGORITHM)
    monkeypatch.setattr(request_checks, "get_server_args", lambda: args)
    with pytest.raises(ValidationError, match="A part of the request has a wrong type"):
        validate_chat(body)
    args.speculative_algorithm = "NGRAM"
    with pytest.raises(AttributeError):
        validate_chat(body)


def test_a_chat_is_validated_as_by_sglang() -> None:
    assert validate_chat({**HELLO, "max_tokens": 3}).max_tokens == 3
    with pytest.raises(ValidationError, match="messages"):
        validate_chat({"model": "m"})


# ---------------------------------------------------------------------------- recorders


@pytest.mark.parametrize("name", ["start", "stop", "dump"])
def test_a_recorder_that_does_not_exist_is_not_asked(name: str) -> None:
    """SGLang's scheduler would end."""
    made = manager()
    made.server_args.expert_distribution_recorder_mode = None
    with pytest.raises(HTTPException, match="--expert-distribution-recorder-mode"):
        asyncio.run(getattr(made, f"{name}_expert_distribution_record")())
    for server_args in ({"speculative_algorithm": None}, {"expert_distribution_recorder_mode": "stat"}):
        vars(made.server_args).update(server_args)
        with pytest.raises(PassedOnError):
            made.auto_create_handle_loop = passed_on  # type: ignore[method-assign]
            asyncio.run(getattr(made, f"{name}_expert_distribution_record")())


def passed_on() -> None:
    raise PassedOnError


@pytest.mark.parametrize(("of_request", "preferred"), [({"min_p": 0.1}, None), ({}, {"min_p": 0.1})])
def test_min_p_is_refused_where_sampling_is_seeded(of_request: dict[str, Any], preferred: dict[str, Any] | None) -> None:
    obj = GenerateReqInput(input_ids=[1], sampling_params=of_request)
    with pytest.raises(ValueError, match="min_p must be 0 with --enable-deterministic-inference"):
        check_seeded_request(manager(preferred=preferred, seeded=True), obj)
    check_seeded_request(manager(preferred=preferred), obj)
    check_seeded_request(manager(None, preferred, seeded=True), obj)


@pytest.mark.parametrize("of_request", [None, {}, {"min_p": 0.0}, {"min_p": None}])
def test_other_seeded_requests_go_to_sglangs_check(of_request: dict[str, Any] | None) -> None:
    check_seeded_request(manager(seeded=True), GenerateReqInput(input_ids=[1], sampling_params=of_request))
