"""The model's attention layers: which of them this backend can serve, their windows, sinks and KV scales."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec import ALGORITHM

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention


def attention_layers(model: torch.nn.Module) -> list[RadixAttention]:
    """The model's attention layers in order, refused if one of them is not grouped-query attention as the kernels have it.

    Raises:
        ValueError: a layer has a cap that is none by tanh, chunked or cross attention, other dims than the rest, or another
            window than theirs; or no layer has full attention.
    """
    from sglang.srt.layers.radix_attention import AttentionType

    layers = [layer for module in model.modules() for layer in _attention_of(module)]
    layers.sort(key=lambda layer: layer.layer_id)

    def refuse(layer: RadixAttention, what: str) -> None:
        raise ValueError(
            f"Layer {layer.layer_id} of this model has {what}, which {ALGORITHM} does not support; serve the "
            "model without --speculative-algorithm."
        )

    reaches = [reach for layer in layers if (reach := window_reach(layer)) is not None]
    for layer in layers:
        if layer.logit_cap and layer.logit_capping_method != "tanh":
            refuse(layer, f"a logit cap by {layer.logit_capping_method}")
        if layer.xai_temperature_len > 0:
            refuse(layer, "a temperature by length")
        if layer.use_irope:
            refuse(layer, "attention within chunks")
        if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
            refuse(layer, f"{layer.attn_type} or cross attention")
        if layer.qk_head_dim != layer.v_head_dim:
            refuse(layer, f"head dims {layer.qk_head_dim} and {layer.v_head_dim}")
        if layer.tp_q_head_num % layer.tp_k_head_num:
            refuse(layer, f"{layer.tp_q_head_num} query heads for {layer.tp_k_head_num} KV heads")
        if _shape(layer) != _shape(layers[0]):
            refuse(layer, f"other heads than layer {layers[0].layer_id} ({_shape(layer)} and {_shape(layers[0])})")
        if window_reach(layer) not in (None, reaches[0] if reaches else None):
            refuse(layer, f"a sliding window of {window_reach(layer)} tokens beside one of {reaches[0]}")
    if not layers:
        raise ValueError(f"{ALGORITHM} found no attention layers in this model; serve it without it.")
    if len(reaches) == len(layers):
        raise ValueError(
            f"All layers of this model have a sliding window, so {ALGORITHM} has nothing to leave out; serve the model "
            "without --speculative-algorithm."
        )
    return layers


def _attention_of(module: torch.nn.Module) -> Iterable[RadixAttention]:
    """The layer that a module is, or those that it has: SGLang's wrapper of transformers' models keeps them in a dict."""
    from sglang.srt.layers.radix_attention import RadixAttention

    if isinstance(module, RadixAttention):
        return (module,)
    return getattr(module, "attention_instances", {}).values()


def window_reach(layer: RadixAttention) -> int | None:
    """Tokens before a query's own that it sees in a layer with a sliding window; None for a layer with full attention."""
    reach = layer.sliding_window_size
    return reach if reach is not None and reach >= 0 else None


def _shape(layer: RadixAttention) -> tuple[int, int, int]:
    """Query heads, KV heads and head dim."""
    return layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim


def attention_sinks(model: torch.nn.Module) -> dict[int, torch.Tensor]:
    """The attention sinks [Hq] of the layers that have them, by layer id: parameters of the modules around them."""
    from sglang.srt.layers.radix_attention import RadixAttention

    found = {}
    for module in model.modules():
        sinks = getattr(module, "sinks", None)
        for child in module.children():
            if isinstance(child, RadixAttention) and isinstance(sinks, torch.Tensor):
                found[child.layer_id] = sinks
    return found


def check_sinks(sinks: torch.Tensor | None, known: torch.Tensor | None, layer_id: int) -> None:
    """Raise ``ValueError`` if a layer's forward has sinks other than those found in the model.

    SGLang's breakable prefill graphs pass other tensors over the same memory.
    """
    if sinks is None or known is None:
        is_known = sinks is known
    else:
        is_known = (sinks.data_ptr(), sinks.shape) == (known.data_ptr(), known.shape)
    if not is_known:
        raise ValueError(
            f"Layer {layer_id} of this model has attention sinks in a place where {ALGORITHM} does not find them; serve the "
            "model without --speculative-algorithm."
        )


def kv_descales(layer: RadixAttention) -> tuple[float, float]:
    """What the entries of the layer's K and V caches are to be multiplied by (FP8 checkpoints have scales)."""
    if layer.k_scale is None or layer.v_scale is None:
        return 1.0, 1.0
    return float(layer.k_scale_float), float(layer.v_scale_float)
