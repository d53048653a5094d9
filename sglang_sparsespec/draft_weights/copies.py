"""The copies of a model's linear layers, and which of them a product uses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch

from sglang_sparsespec.draft_weights.fp8 import QuantisedWeight
from sglang_sparsespec.draft_weights.products import ProductChooser

logger = logging.getLogger(__name__)

#: Layers with fewer output channels keep the model's weights: they are small, and a router's choice of experts is delicate.
LEAST_CHANNELS = 512
_ATTRIBUTE = "_sparsespec_draft_weights"


class DraftWeights:
    """FP8 copies of the linear layers of one model, made from the very tensors that the target uses.

    Args:
        model: SGLang's model, loaded.

    Attributes:
        chooser: which kernel each product runs.
        nbytes: memory of the copies.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._copies: dict[torch.nn.Module, QuantisedWeight] = {
            layer: QuantisedWeight.of(layer.weight.data) for layer in copied_layers(model)
        }
        self.nbytes = sum(copy.nbytes for copy in self._copies.values())
        self.chooser = ProductChooser(list(self._copies.values()))

    def __len__(self) -> int:
        return len(self._copies)

    def requantise(self) -> None:
        """Take over the model's weights, which were updated in place."""
        for layer, copy in self._copies.items():
            copy.take(layer.weight.data)

    def linear(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The product of ``layer``'s copy with ``x`` [..., K]: [..., N]; None if the model's own weights are to be used."""
        copy = self._copies.get(layer)
        if copy is None:
            return None
        return self.chooser.linear(x, copy, bias)


def copied_layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The layers that are copied: plain linear layers of 16 or 32 bits, and the head."""
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from sglang.srt.utils import use_intel_amx_backend

    head = getattr(model, "lm_head", None)
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        plain = (isinstance(layer, LinearBase) and type(method) is UnquantizedLinearMethod) or (
            layer is head and isinstance(layer, VocabParallelEmbedding) and type(method) is UnquantizedEmbeddingMethod
        )
        if not plain or use_intel_amx_backend(layer):
            continue
        weight = layer.weight
        if weight.dim() == 2 and weight.is_floating_point() and weight.element_size() > 1 and len(weight) >= LEAST_CHANNELS:
            yield layer


def attach_draft_weights(model_runner: Any, weights: DraftWeights) -> None:
    """Let SGLang's ``model_runner`` carry the copies of its model."""
    setattr(model_runner, _ATTRIBUTE, weights)


def draft_weights_of(model_runner: Any) -> DraftWeights | None:
    """The copies of ``model_runner``'s model; None if drafts use the model's own weights."""
    return getattr(model_runner, _ATTRIBUTE, None)
