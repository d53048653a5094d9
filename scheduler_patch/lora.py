"""Hooks that let LoRA adapters be served: the model drafts for itself, so drafts and verifications have the same adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.runtime_context import get_server_args

from sglang_sparsespec import ALGORITHM
from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import is_sparsespec
from sglang_sparsespec.sglang_compat import DECLARES_RESOLUTION


def allow_lora(original: Callable[..., None], server_args: Any) -> None:
    """``check_lora_speculative_compatibility``: SGLang refuses LoRA with every algorithm that is not on its list.

    Algorithms are on it if all windows of a verification have one width. SPARSESPEC's have.
    """
    if not is_sparsespec(server_args):
        original(server_args)


def allow_lora_in_all_checks(original: Callable[..., None], server_args: Any) -> None:
    """``ServerArgs.check_lora_server_args``: SGLang refuses LoRA with every algorithm that may have a draft model.

    A draft model has no adapter. SPARSESPEC has no draft model.
    """
    if not is_sparsespec(server_args):
        return original(server_args)
    algorithm = server_args.speculative_algorithm
    # Resolved arguments cannot be set, and this one is only hidden for a while.
    object.__setattr__(server_args, "speculative_algorithm", None)
    try:
        return original(server_args)
    finally:
        object.__setattr__(server_args, "speculative_algorithm", algorithm)


def refuse_expert_adapters(result: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    """``ModelRunner.init_lora_manager``: SGLang knows only there whether adapters change experts.

    What it tells its kernels of such a batch has no form for verifications (``BaseLoRABackend._add_moe_lora_info``).

    Raises:
        ValueError: they do.
    """
    if is_sparsespec(model_runner.server_args) and model_runner.lora_manager.lora_backend.is_moe_lora:
        raise ValueError(
            f"LoRA adapters of experts are not supported with --speculative-algorithm {ALGORITHM}: SGLang has no kernels "
            "for them in verifications; use --lora-target-modules with those of attention, or merge the adapter."
        )


def chunk_size_of_verification(original: Callable[..., int], backend: Any, forward_batch: Any) -> int:
    """``ChunkedSgmvLoRABackend._determine_chunk_size``: SGLang takes a verification for a prefill, whose tokens it counts.

    A verification has no such count, and with ``--max-lora-chunk-size`` above 16 the scheduler would end.
    """
    if not forward_batch.forward_mode.is_target_verify() or not is_sparsespec(get_server_args()):
        return original(backend, forward_batch)
    tokens = forward_batch.batch_size * forward_batch.spec_info.draft_token_num
    return backend._determine_chunk_size_for_tokens(tokens)


def register_hooks() -> None:
    """Register the hooks of this module."""
    if DECLARES_RESOLUTION:
        add_hook("sglang.srt.arg_groups.lora_hook.check_lora_speculative_compatibility", allow_lora, "around")
    else:
        add_hook("sglang.srt.server_args.ServerArgs.check_lora_server_args", allow_lora_in_all_checks, "around")
    add_hook("sglang.srt.model_executor.model_runner.ModelRunner.init_lora_manager", refuse_expert_adapters, "after")
    add_hook(
        "sglang.srt.lora.backend.chunked_backend.ChunkedSgmvLoRABackend._determine_chunk_size",
        chunk_size_of_verification,
        "around",
    )
