"""The model's attention layers: which of them this backend can serve, and their KV scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sglang_sparsespec import ALGORITHM

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention


def attention_layers(model: torch.nn.Module) -> list[RadixAttention]:
    """The model's attention layers in order, refused if one of them is not plain grouped-query attention.

    Raises:
        ValueError: a layer has a window, a soft cap, cross attention, or different key and value
            dims. (Models with attention sinks are found at their first forward: :func:`refuse_sinks`.)
    """
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
    layers.sort(key=lambda layer: layer.layer_id)

    def refuse(layer: RadixAttention, what: str) -> None:
        raise ValueError(
            f"Layer {layer.layer_id} of this model has {what}, which {ALGORITHM} does not support; serve the "
            "model without --speculative-algorithm."
        )

    for layer in layers:
        if (layer.sliding_window_size or -1) > 0:
            refuse(layer, f"a sliding window of {layer.sliding_window_size} tokens")
        if layer.logit_cap:
            refuse(layer, f"a logit soft cap of {layer.logit_cap}")
        if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
            refuse(layer, f"{layer.attn_type} or cross attention")
        if layer.qk_head_dim != layer.v_head_dim:
            refuse(layer, f"head dims {layer.qk_head_dim} and {layer.v_head_dim}")
        if layer.tp_q_head_num % layer.tp_k_head_num:
            refuse(layer, f"{layer.tp_q_head_num} query heads for {layer.tp_k_head_num} KV heads")
    if not layers:
        raise ValueError(f"{ALGORITHM} found no attention layers in this model; serve it without it.")
    return layers


def refuse_sinks(kwargs: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a model that passes attention sinks to its layers' forward."""
    if kwargs.get("sinks") is not None:
        raise ValueError(
            f"This model has attention sinks, which {ALGORITHM} does not support; serve the model without "
            "--speculative-algorithm."
        )


def kv_descales(layer: RadixAttention) -> tuple[float, float]:
    """What the entries of the layer's K and V caches are to be multiplied by (FP8 checkpoints have scales)."""
    if layer.k_scale is None or layer.v_scale is None:
        return 1.0, 1.0
    return float(layer.k_scale_float), float(layer.v_scale_float)
