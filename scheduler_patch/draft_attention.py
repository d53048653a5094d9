"""Hooks on the attention of models: a draft step has one kernel between the QKV product and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_sparsespec.attention_backend.backend import backend_in_use
from sglang_sparsespec.hook_registry import add_hook


def attend_to_product(
    original: Callable[..., torch.Tensor],
    attention: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    forward_batch: Any,
) -> torch.Tensor:
    """``forward`` of models' attention: SGLang launches a kernel each for norms of heads, rotation, and the KV cache.

    A draft step of few tokens takes longer to launch them than to run them. All other forwards are SGLang's.
    """
    backend = backend_in_use()
    if backend is None or not backend.takes_products(attention.rotary_emb, attention.attn):
        return original(attention, positions, hidden_states, forward_batch)
    qkv, _ = attention.qkv_proj(hidden_states)
    norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
    out = backend.attend_to_product(qkv, positions, attention.rotary_emb, norms, attention.attn, forward_batch)
    out, _ = attention.o_proj(out)
    return out


def register_hooks() -> None:
    """Register the hooks of this module: attention classes that are a QKV product, head norms, rotation and attention."""
    for attention in ("llama.LlamaAttention", "qwen2.Qwen2Attention", "qwen3.Qwen3Attention"):
        add_hook(f"sglang.srt.models.{attention}.forward", attend_to_product, "around")
