"""The copies of a model's linear layers, and what a draft step does with them."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sglang_sparsespec.draft_weights import triton_fused
from sglang_sparsespec.draft_weights.fp8 import Quantised, reference_linear

#: Largest row that one program of a fused kernel holds.
LARGEST_ROW = 32768
#: A copy must be that much faster than the model's weights.
LEAST_GAIN = 1.02
#: Numbers of tokens that products are timed for; one that lies between is taken as the next larger one.
TIMED_ROWS = (1, 16, 32, 64, 96, 128, 192, 256, 384, 512)
_ATTRIBUTE = "_sparsespec_draft_weights"


class DraftWeights:
    """FP8 copies of the linear layers of one model, made from the very tensors that the target uses.

    On CUDA products run in SGLang's ``fp8_scaled_mm``, and norms and activations quantise what they hand to them. Elsewhere
    products are the reference's.

    Attributes:
        nbytes: memory of the copies.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._copies = {layer: Quantised.of(layer.weight.data) for layer in copied_layers(model)}
        self.nbytes = sum(copy.nbytes for copy in self._copies.values())
        self._input_widths = {copy.values.shape[1] for copy in self._copies.values()}
        # By shape of the weight: the timed numbers of tokens, ascending, and whether the copy is to be used.
        self._choices: dict[torch.Size, tuple[list[int], list[bool]]] = {}
        # The last activations that were quantised as they were made, with the tensor that SGLang hands on.
        self._made: tuple[torch.Tensor, Quantised] | None = None

    def __len__(self) -> int:
        return len(self._copies)

    def requantise(self) -> None:
        """Take over the model's weights, which were updated in place."""
        for layer, copy in self._copies.items():
            copy.take(layer.weight.data)

    # ------------------------------------------------------------- parts of a draft step

    def linear(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The product of ``layer``'s copy with ``x`` [..., K]: [..., N]; None if the model's weights are to be used."""
        copy = self._copies.get(layer)
        rows = x.shape[:-1].numel()
        if copy is None or not self._is_used(copy, rows):
            return None
        flat = x.reshape(rows, x.shape[-1])
        if not x.is_cuda:
            out = reference_linear(flat, copy, bias)
        else:
            out = _product(self._quantised(x, flat), copy, x.dtype, bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    def norm(
        self, norm: Any, x: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
        """SGLang's ``RMSNorm`` before a product: its result, quantised on the way; None if it is not before one."""
        if not self._makes_input(x, x.shape[-1]) or norm.variance_size_override is not None or norm.cast_x_before_out_mul:
            return None
        if residual is not None and not residual.is_contiguous():
            return None
        out, quantised = triton_fused.add_norm(x, residual, norm.weight.data, norm.variance_epsilon)
        self._made = (out, quantised)
        return out if residual is None else (out, residual)

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor | None:
        """SGLang's ``SiluAndMul`` before a product; None if it is not before one."""
        if not self._makes_input(x, x.shape[-1] // 2):
            return None
        out, quantised = triton_fused.silu_and_mul(x)
        self._made = (out, quantised)
        return out

    def _makes_input(self, x: torch.Tensor, width: int) -> bool:
        return x.is_cuda and x.dim() == 2 and x.is_contiguous() and width in self._input_widths and width <= LARGEST_ROW

    def _quantised(self, x: torch.Tensor, flat: torch.Tensor) -> Quantised:
        made, self._made = self._made, None
        if made is not None and made[0] is x:
            return made[1]
        from sgl_kernel import sgl_per_token_quant_fp8

        quantised = Quantised.empty(flat.shape[0], flat.shape[1], flat.device)
        sgl_per_token_quant_fp8(flat.contiguous(), quantised.values, quantised.scales)
        return quantised

    # ------------------------------------------------------------------------ choice

    def choose(self, most_rows: int) -> str:
        """Time products of up to ``most_rows`` tokens with the copies and with the model's weights, on CUDA.

        Returns:
            what was found, for the log.
        """
        by_shape: dict[torch.Size, list[torch.nn.Module]] = {}
        for layer, copy in self._copies.items():
            by_shape.setdefault(copy.values.shape, []).append(layer)
        timed = [rows for rows in TIMED_ROWS if rows < most_rows] + [most_rows]
        used = 0
        for shape, layers in by_shape.items():
            faster = [self._is_faster(layers, rows) for rows in timed]
            self._choices[shape] = (timed, faster)
            used += sum(faster)
        return f"faster than the model's in {used} of {len(timed) * len(by_shape)} shapes of products"

    def _is_used(self, copy: Quantised, rows: int) -> bool:
        if not self._choices:
            return True
        timed, faster = self._choices[copy.values.shape]
        index = bisect.bisect_left(timed, rows)
        return index < len(timed) and faster[index]

    def _is_faster(self, layers: Sequence[torch.nn.Module], rows: int) -> bool:
        weight = layers[0].weight.data
        # Requests' seeds are to be the same with and without the copies, so the global generator is left alone.
        generator = torch.Generator(weight.device).manual_seed(0)
        x = torch.randn((rows, weight.shape[1]), generator=generator, dtype=weight.dtype, device=weight.device)
        quantised = Quantised.of(x)

        def own(layer: torch.nn.Module) -> None:
            torch.nn.functional.linear(x, layer.weight.data)

        def copied(layer: torch.nn.Module) -> None:
            _product(quantised, self._copies[layer], x.dtype, None)

        return _seconds(copied, layers) * LEAST_GAIN < _seconds(own, layers)


def _product(x: Quantised, weight: Quantised, dtype: torch.dtype, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias in ``dtype``: [M, N]."""
    from sgl_kernel import fp8_scaled_mm

    return fp8_scaled_mm(x.values, weight.values.t(), x.scales, weight.scales, dtype, bias)


#: Layers whose weights take turns while a product is timed: together they are larger than the L2 cache, if that can be had.
_TURNS, _REPLAYS = 8, 3


def _seconds(product: Callable[[torch.nn.Module], None], layers: Sequence[torch.nn.Module]) -> float:
    """Seconds of one product on the GPU, in a CUDA graph."""
    turns = [layers[i * len(layers) // _TURNS] for i in range(_TURNS)]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        product(turns[0])
        with torch.cuda.graph(graph, stream=stream):
            for layer in turns:
                product(layer)
        times = []
        for _ in range(_REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000 / _TURNS)
    torch.cuda.current_stream().wait_stream(stream)
    return min(times)


def copied_layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The layers that are copied: plain linear layers of 16 bits (on CPU of 32 too), and the head."""
    from sglang.srt.layers.linear import LinearBase, ReplicatedLinear
    from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from sglang.srt.utils import use_intel_amx_backend

    head = getattr(model, "lm_head", None)
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        # Replicated layers are routers: small, and their choice of experts is delicate.
        is_linear = isinstance(layer, LinearBase) and not isinstance(layer, ReplicatedLinear)
        is_plain = (is_linear and type(method) is UnquantizedLinearMethod) or (
            layer is head and isinstance(layer, VocabParallelEmbedding) and type(method) is UnquantizedEmbeddingMethod
        )
        if not is_plain or use_intel_amx_backend(layer):
            continue
        weight = layer.weight
        types = (torch.bfloat16, torch.float16) if weight.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
        if weight.dtype in types and all(size % 16 == 0 for size in weight.shape):  # as fp8_scaled_mm wants it
            yield layer


def attach_draft_weights(model_runner: Any, weights: DraftWeights) -> None:
    """Let SGLang's ``model_runner`` carry the copies of its model."""
    setattr(model_runner, _ATTRIBUTE, weights)


def draft_weights_of(model_runner: Any) -> DraftWeights | None:
    """The copies of ``model_runner``'s model; None if drafts use the model's own weights."""
    return getattr(model_runner, _ATTRIBUTE, None)
