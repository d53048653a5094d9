"""Every change of SGLang's scheduler and cache, one hook per behaviour.

Each hook's docstring names the SGLang function that it changes, what SGLang does there, and why that does not fit. In a
server without SPARSESPEC every hook leaves SGLang as it is.
"""

from __future__ import annotations

from sglang_sparsespec.scheduler_patch import (
    accepted_run,
    arrivals,
    attention_checks,
    control_requests,
    cpu,
    detokenizer,
    draft_attention,
    draft_weights,
    grammars,
    hooks,
    internal_state,
    logprobs,
    lora,
    metrics_hooks,
    penalties,
    prefill_interleave,
    request_checks,
    slots,
    stop_patterns,
    tokenizer_workers,
)
from sglang_sparsespec.scheduler_patch.kv_manager import hooks as kv_manager_hooks


def register_all_hooks() -> None:
    """Register the hooks of all modules; SGLang applies them when its plugins are loaded."""
    hooks.register_hooks()
    accepted_run.register_hooks()
    detokenizer.register_hooks()
    stop_patterns.register_hooks()
    slots.register_hooks()
    cpu.register_hooks()
    attention_checks.register_hooks()
    draft_attention.register_hooks()
    draft_weights.register_hooks()
    kv_manager_hooks.register_hooks()
    prefill_interleave.register_hooks()
    arrivals.register_hooks()
    metrics_hooks.register_hooks()
    internal_state.register_hooks()
    request_checks.register_hooks()
    grammars.register_hooks()
    penalties.register_hooks()
    control_requests.register_hooks()
    logprobs.register_hooks()
    lora.register_hooks()
    tokenizer_workers.register_hooks()
