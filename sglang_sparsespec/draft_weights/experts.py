"""FP8 copies of a layer's experts, and what a draft step does with them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from sglang_sparsespec.draft_weights.fp8 import Quantised


class ExpertCopy:
    """The two matrices of each expert of a layer, a scale for each row.

    Args:
        layer: SGLang's ``FusedMoE``, with ``w13_weight`` [E, 2 I, H] (gate and up) and ``w2_weight`` [E, H, I].
    """

    def __init__(self, layer: torch.nn.Module) -> None:
        self._layer = layer
        self._shapes = tuple(weight.shape for weight in _weights(layer))
        self.w13, self.w2 = (Quantised.of(weight.flatten(0, 1)) for weight in _weights(layer))

    def requantise(self) -> None:
        """Take over the layer's weights, which were updated in place."""
        for copy, weight in zip((self.w13, self.w2), _weights(self._layer), strict=True):
            copy.take(weight.flatten(0, 1))

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return self.w13.nbytes + self.w2.nbytes

    def run(self, method: Any, dispatch_output: Any) -> Any:
        """What SGLang's ``UnquantizedFusedMoEMethod.apply`` returns, with the copy's weights.

        Args:
            method: the layer's, whose runner is Triton's on CUDA.
            dispatch_output: hidden states [tokens, H] and the choice of experts.
        """
        (experts, rows13, _), (_, rows2, _) = self._shapes
        biases = [getattr(self._layer, name, None) for name in ("w13_weight_bias", "w2_weight_bias")]
        if not dispatch_output.hidden_states.is_cuda:
            return self._run_in_torch(method, dispatch_output, *biases)
        from sglang.srt.layers.moe.moe_runner.triton import TritonMoeQuantInfo

        weights = TritonMoeQuantInfo(
            w13_weight=self.w13.values.view(self._shapes[0]),
            w2_weight=self.w2.values.view(self._shapes[1]),
            b13=biases[0],
            b2=biases[1],
            use_fp8_w8a8=True,
            per_channel_quant=True,
            w13_scale=self.w13.scales.view(experts, rows13, 1),
            w2_scale=self.w2.scales.view(experts, rows2, 1),
        )
        return method.runner.run(dispatch_output, weights)

    def _run_in_torch(
        self, method: Any, dispatch_output: Any, w13_bias: torch.Tensor | None, w2_bias: torch.Tensor | None
    ) -> Any:
        """The reference, for tests: SGLang's experts in torch with what the copies stand for."""
        from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

        x = dispatch_output.hidden_states
        stand_in: Any = SimpleNamespace(
            num_experts=self._shapes[0][0],
            w13_weight=self.w13.dequantised().view(self._shapes[0]).to(x.dtype),
            w2_weight=self.w2.dequantised().view(self._shapes[1]).to(x.dtype),
            w13_weight_bias=w13_bias,
            w2_weight_bias=w2_bias,
        )
        quantised = Quantised.of(x).dequantised().to(x.dtype)
        output = moe_forward_native(stand_in, quantised, dispatch_output.topk_output, method.moe_runner_config)
        return StandardCombineInput(hidden_states=output)


def _weights(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.w13_weight.data, layer.w2_weight.data


def copied_experts(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The layers whose experts are copied: of 16 bits (on CPU of 32 too), which SGLang runs in Triton (on CPU in torch)."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
    from sglang.srt.utils import use_intel_amx_backend

    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if not isinstance(layer, FusedMoE) or type(method) is not UnquantizedFusedMoEMethod or use_intel_amx_backend(layer):
            continue
        weights = _weights(layer)
        types = [torch.bfloat16, torch.float16]
        if not weights[0].is_cuda:
            types.append(torch.float32)
        # Other runners read weights in other layouts.
        if weights[0].is_cuda and not method.runner.runner_backend.is_triton() or method.use_triton_kernels:
            continue
        if all(weight.dtype in types and all(size % 16 == 0 for size in weight.shape[1:]) for weight in weights):
            yield layer
