"""Hooks that settle an accepted run as plain decoding would have: token by token.

SGLang takes the tokens that a round yields for one step. Its checks then see all of them at once, in another order than the
API promises, and numbers that count tokens count some that come after the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.runtime_context import get_server_args

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import is_sparsespec
from sglang_sparsespec.sglang_compat import kv_of


def finish_token_by_token(original: Callable[..., None], req: Any, new_accepted_len: int = 1) -> None:
    """``Req.update_finish_state``: SGLang looks for the end of a request in a run of tokens.

    It asks for the length first, then for a stop string anywhere in the run, then for end tokens. Here the first token
    that ends the request does, as in plain decoding. What SGLang counted for the whole run is cut to that: reasoning tokens,
    and the tokens whose KV the radix cache keeps.
    """
    if new_accepted_len == 1 or req.finished() or req.to_finish or not is_sparsespec(get_server_args()):
        original(req, new_accepted_len)
        return
    # A run in which SGLang finds nothing ends nowhere. The exception are patterns: one that matches the text up to a token
    # need not match the text after it.
    if not req.sampling_params.stop_regex_strs:
        original(req, new_accepted_len)
        if not req.finished():
            return
        req.finished_reason = req.finished_len = None
    _walk(original, req, new_accepted_len)
    if req.finished_len is not None:
        req.reasoning_tokens = min(req.reasoning_tokens, req.finished_len)
        # As in plain decoding, the KV of the last token is never written.
        last = len(req.origin_input_ids) + req.finished_len - 1
        kv = kv_of(req)
        kv.kv_committed_len = min(kv.kv_committed_len, last)


def _walk(original: Callable[..., None], req: Any, new_accepted_len: int) -> None:
    """Take back the last tokens of ``req``, and append them one by one until one of them ends it; then all the others."""
    run = req.output_ids[-new_accepted_len:]
    del req.output_ids[-new_accepted_len:]
    # The grammar has accepted the whole run, and is at its end if the last token ended it.
    grammar, req.grammar = req.grammar, None
    try:
        for index, token in enumerate(run):
            req.output_ids.append(token)
            if index == new_accepted_len - 1:
                req.grammar = grammar
            original(req, 1)
            if req.finished():
                req.finished_len = len(req.output_ids)
                req.output_ids.extend(run[index + 1 :])
                break
    finally:
        req.grammar = grammar


def true_accept_length(result: None, manager: Any, meta_info: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """``TokenizerManager._calculate_spec_decoding_metrics``: SGLang divides all tokens by the number of verifications.

    Among them are the token of the prefill, and none that came after the end, so the quotient can be above k + 1.
    """
    if is_sparsespec(manager.server_args) and "spec_verify_ct" in meta_info:
        meta_info["spec_accept_length"] = 1 + meta_info["spec_num_correct_drafts"] / meta_info["spec_verify_ct"]


def top_logprobs_of_each_token(
    original: Callable[..., Any], serving: Any, logprobs: Any, use_token_index: bool = False
) -> Any:
    """``OpenAIServingChat._process_logprobs_tokens``: SGLang gives each token of a streamed chunk the first one's list.

    Without speculation a chunk is one token. The lists are those of the chunk, one for each token.
    """
    return original(serving, logprobs, use_token_index or is_sparsespec(serving.tokenizer_manager.server_args))


def register_hooks() -> None:
    """Register the hooks of this module."""
    managers = "sglang.srt.managers."
    add_hook(managers + "schedule_batch.Req.update_finish_state", finish_token_by_token, "around")
    add_hook(
        managers + "tokenizer_manager.TokenizerManager._calculate_spec_decoding_metrics", true_accept_length, "after"
    )
    add_hook(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._process_logprobs_tokens",
        top_logprobs_of_each_token,
        "around",
    )
