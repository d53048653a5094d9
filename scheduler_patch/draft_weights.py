"""Hooks that let draft steps use FP8 copies of the linear layers (``sglang_sparsespec.draft_weights``)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS

from sglang_sparsespec.attention_backend.backend import backend_in_use
from sglang_sparsespec.draft_weights.copies import DraftWeights, attach_draft_weights, draft_weights_of
from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import FP8_EXPERTS, is_sparsespec, settings_of
from sglang_sparsespec.sglang_compat import WEIGHT_UPDATES, in_force

logger = logging.getLogger(__name__)


def copy_weights(result: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    """``ModelRunner.load_model``: SGLang sizes the KV pool by the memory that is free after it.

    The copies are made here, so that the pool leaves room for them.
    """
    server_args = model_runner.server_args
    if not is_sparsespec(server_args) or not settings_of(server_args).has_fp8_drafts:
        return
    with_experts = settings_of(server_args).draft_weights == FP8_EXPERTS
    # As the weights themselves, so that they leave the GPU and come back together.
    with model_runner.memory_saver_adapter.region(
        GPU_MEMORY_TYPE_WEIGHTS, enable_cpu_backup=in_force(server_args).enable_weights_cpu_backup
    ):
        weights = DraftWeights(model_runner.model, with_experts)
    if with_experts and not weights.has_experts:
        logger.warning(
            "Drafts use the model's own experts: none are of 16 bits and run in Triton (--moe-runner-backend triton)."
        )
    if not len(weights):
        logger.warning(
            "Drafts use the model's own weights: it has no linear layers of 16 bits or more that could be copied in FP8."
        )
        return
    attach_draft_weights(model_runner, weights)
    logger.info("FP8 draft weights: %s.", weights)


def use_copy(
    original: Callable[..., torch.Tensor],
    method: Any,
    layer: torch.nn.Module,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``UnquantizedLinearMethod.apply``: SGLang multiplies with the model's weights; a draft step may use their copy."""
    out = _product_of_copy(layer, x, bias)
    return original(method, layer, x, bias) if out is None else out


def use_copy_of_experts(original: Callable[..., Any], method: Any, layer: torch.nn.Module, dispatch_output: Any) -> Any:
    """``UnquantizedFusedMoEMethod.apply``: as :func:`use_copy`, for the experts of a layer."""
    weights = weights_in_use()
    out = weights.experts(layer, method, dispatch_output) if weights is not None else None
    return original(method, layer, dispatch_output) if out is None else out


def use_copy_of_head(
    original: Callable[..., torch.Tensor],
    processor: Any,
    hidden_states: torch.Tensor,
    lm_head: torch.nn.Module,
    embedding_bias: torch.Tensor | None = None,
    **buffers: Any,
) -> torch.Tensor:
    """``LogitsProcessor._compute_lm_head``: SGLang multiplies with the head's weight itself, without a linear method."""
    out = _product_of_copy(lm_head, hidden_states, None)
    return original(processor, hidden_states, lm_head, embedding_bias, **buffers) if out is None else out


def _product_of_copy(layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The product with ``layer``'s copy; None if the model's own weight is to be used."""
    weights = weights_in_use()
    return None if weights is None else weights.linear(layer, x, bias)


def quantise_norm(
    original: Callable[..., Any],
    norm: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    **fusion: Any,
) -> Any:
    """``RMSNorm.forward_cuda``: SGLang's norm yields 16 bits; the products of a draft step want FP8."""
    weights = weights_in_use()
    out = weights.norm(norm, x, residual) if weights is not None and post_residual_addition is None else None
    return original(norm, x, residual, post_residual_addition, **fusion) if out is None else out


def quantise_activation(original: Callable[..., torch.Tensor], activation: Any, x: torch.Tensor) -> torch.Tensor:
    """``SiluAndMul.forward_cuda``: as :func:`quantise_norm`."""
    weights = weights_in_use()
    out = weights.silu_and_mul(x) if weights is not None else None
    return original(activation, x) if out is None else out


def weights_in_use() -> DraftWeights | None:
    """The copies that the forward that runs multiplies with, by its plan; None: the model's own weights."""
    backend = backend_in_use()
    return backend.weights_in_use if backend is not None else None


def requantise(result: Any, updater: Any, *args: Any, **kwargs: Any) -> None:
    """``WeightUpdater``'s methods of ``WEIGHT_UPDATES``: SGLang replaces the model's weights, of which the copies are made.

    An update that failed may have replaced some of them.
    """
    weights = draft_weights_of(updater.get_model_runner())
    if weights is None:
        return
    started = time.perf_counter()
    weights.requantise()
    logger.info("FP8 draft weights: made from the new weights in %.2f s.", time.perf_counter() - started)


def register_hooks() -> None:
    """Register the hooks of this module."""
    add_hook("sglang.srt.model_executor.model_runner.ModelRunner.load_model", copy_weights, "after")
    add_hook("sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod.apply", use_copy, "around")
    experts = "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod.apply"
    add_hook(experts, use_copy_of_experts, "around")
    add_hook("sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head", use_copy_of_head, "around")
    add_hook("sglang.srt.layers.layernorm.RMSNorm.forward_cuda", quantise_norm, "around")
    add_hook("sglang.srt.layers.activation.SiluAndMul.forward_cuda", quantise_activation, "around")
    updater = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater."
    for update in WEIGHT_UPDATES:
        add_hook(updater + update, requantise, "after")
