"""Hooks by which penalties and custom logit processors give what plain decoding gives, token by token."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.runtime_context import get_server_args

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import is_sparsespec
from sglang_sparsespec.sglang_compat import processor_and_rows

logger = logging.getLogger(__name__)


def no_penalizers(
    original: Callable[..., None], orchestrator: Any, vocab_size: int, batch: Any, penalizers: set[type]
) -> None:
    """``BatchedPenalizerOrchestrator.__init__``: SGLang counts one token of each request in each scheduler iteration.

    It counts on the host: the last of a round's tokens, under overlap scheduling one round late. It adds what it counted to
    all rows of a verification alike, and forgets a retracted request's output. SPARSESPEC counts on the device
    (``sampling.penalties``); an orchestrator without penalizers does nothing.
    """
    original(orchestrator, vocab_size, batch, set() if is_sparsespec(get_server_args()) else penalizers)


def wait_for_the_output(result: bool, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> bool | None:
    """``Scheduler.is_disable_overlap_for_batch``: SGLang launches a batch before it knows the output of the one before.

    A custom logit processor may look at its request's ``output_ids``, which would lack a token. SGLang waits for
    grammars, too.
    """
    if batch is None or not is_sparsespec(scheduler.server_args) or not batch.forward_mode.is_decode():
        return None  # None keeps the original result
    return result or (batch.sampling_info.has_custom_logit_processor and len(scheduler.result_queue) > 0)


def end_requests_of_failing_processors(
    original: Callable[..., None], logits: Any, info: Any, num_tokens_in_batch: int = 1
) -> None:
    """``sampler.apply_custom_logit_processor``: an error in a request's processor ends SGLang's scheduler.

    Here it ends the requests of that processor, with HTTP 400. Their logits are those before the call.
    """
    if not is_sparsespec(get_server_args()):
        original(logits, info, num_tokens_in_batch)
        return
    for key, entry in info.custom_logit_processor.items():
        processor, rows = processor_and_rows(entry)
        before = logits[rows]
        try:
            own = dataclasses.replace(info, custom_logit_processor={key: entry})
            original(logits, own, num_tokens_in_batch)
        except Exception as error:
            logger.warning("A custom logit processor failed.", exc_info=True)
            logits[rows] = before
            message = f"The custom logit processor {type(processor).__name__} failed ({type(error).__name__}: {error})."
            for index in torch.arange(len(info.reqs), device=rows.device)[rows].tolist():
                req = info.reqs[index]
                req.to_finish = FINISH_ABORT(message, HTTPStatus.BAD_REQUEST, "BadRequestError")


def leave_a_possible_token(result: None, runner: Any, logits_output: Any, *args: Any, **kwargs: Any) -> None:
    """``ModelRunner._preprocess_logits``: SGLang masks all tokens where a grammar allows end tokens alone and it is early.

    That leaves no distribution to sample from, which ends the scheduler. Instead any token may come, as for grammars alone
    (``grammars``).
    """
    logits = logits_output.next_token_logits
    if is_sparsespec(runner.server_args) and logits is not None:
        logits.masked_fill_(logits.amax(dim=-1, keepdim=True) == float("-inf"), 0.0)


def register_hooks() -> None:
    """Register the hooks of this module."""
    add_hook("sglang.srt.model_executor.model_runner.ModelRunner._preprocess_logits", leave_a_possible_token, "after")
    add_hook("sglang.srt.sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator.__init__", no_penalizers, "around")
    add_hook("sglang.srt.managers.scheduler.Scheduler.is_disable_overlap_for_batch", wait_for_the_output, "after")
    add_hook("sglang.srt.layers.sampler.apply_custom_logit_processor", end_requests_of_failing_processors, "around")
