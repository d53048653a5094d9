"""Log-probabilities of chosen tokens (``token_ids_logprob``), and of the first token of a retracted request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.runtime_context import get_server_args

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import is_sparsespec


def no_tokens_are_an_empty_tensor(
    logprobs: torch.Tensor, token_ids_logprobs: Sequence[Sequence[int] | None], *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """``get_token_ids_logprobs``: SGLang returns tensors, and lists for requests that chose no tokens.

    Its scheduler expects tensors only, and ends when a batch holds both sorts of requests with log-probabilities.
    """
    if not is_sparsespec(get_server_args()):
        return None
    return (logprobs, [ids or [] for ids in token_ids_logprobs], *args), kwargs


def no_logprob_is_sent_of_no_token(result: None, chunk: Any, *, req: Any) -> None:
    """``_GenerationStreamAccumulator.accept``: SGLang takes a first log-probability for sent, whatever output there is.

    A request that is retracted while its prefill runs has no output: SGLang drops the token, and samples it again later.
    Its log-probability would be left out then.
    """
    if req.is_retracted and is_sparsespec(get_server_args()):
        req.send_output_token_logprobs_offset = min(req.send_output_token_logprobs_offset, len(req.output_ids))


def register_hooks() -> None:
    """Register the hooks of this module."""
    add_hook("sglang.srt.layers.logprob_processor.get_token_ids_logprobs", no_tokens_are_an_empty_tensor, "before")
    add_hook(
        "sglang.srt.managers.scheduler_components.output_streamer._GenerationStreamAccumulator.accept",
        no_logprob_is_sent_of_no_token,
        "after",
    )
