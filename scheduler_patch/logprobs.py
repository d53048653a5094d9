"""Log-probabilities of chosen tokens (``token_ids_logprob``) beside requests that ask for none."""

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


def register_hooks() -> None:
    """Register the hook of this module."""
    add_hook("sglang.srt.layers.logprob_processor.get_token_ids_logprobs", no_tokens_are_an_empty_tensor, "before")
