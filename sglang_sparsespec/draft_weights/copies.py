"""The copies of a model's linear layers, and what a draft step does with them."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from sglang_sparsespec.attention_backend.kernels.triton_common import has_early_start
from sglang_sparsespec.draft_weights import triton_fused, triton_product
from sglang_sparsespec.draft_weights.experts import ExpertCopy, copied_experts
from sglang_sparsespec.draft_weights.fp8 import Quantised, reference_linear

#: Largest row that one program of a fused kernel holds.
LARGEST_ROW = 32768
#: A copy must be that much faster than the model's weights.
LEAST_GAIN = 1.02
#: Numbers of tokens that products are timed for; one that lies between is taken as the next larger one.
TIMED_ROWS = (1, 16, 32, 64, 96, 128, 192, 256, 384, 512)
_ATTRIBUTE = "_sparsespec_draft_weights"
#: x @ weight.T + bias in the given dtype: [M, N] of x [M, K] and weight [N, K].
Product = Callable[[Quantised, Quantised, torch.dtype, torch.Tensor | None], torch.Tensor]


class DraftWeights:
    """FP8 copies of the linear layers of one model, made from the very tensors that the target uses.

    On CUDA products run in SGLang's ``fp8_scaled_mm`` or in this project's ``triton_product``, whichever is faster, and
    norms and activations quantise what they hand to them. Elsewhere products are the reference's.

    Args:
        with_experts: copy experts too, which take by far the most of a mixture's memory.

    Attributes:
        nbytes: memory of the copies.
    """

    def __init__(self, model: torch.nn.Module, with_experts: bool = False) -> None:
        self._copies = {layer: Quantised.of(layer.weight.data) for layer in copied_layers(model)}
        self._experts: dict[torch.nn.Module, ExpertCopy] = {}
        if with_experts:
            self._experts = {layer: ExpertCopy(layer) for layer in copied_experts(model)}
        self.nbytes = sum(copy.nbytes for copies in (self._copies, self._experts) for copy in copies.values())
        self._input_widths = {copy.values.shape[1] for copy in self._copies.values()}
        # By shape of the weight: the timed numbers of tokens, ascending, and what is fastest; None: the model's weights.
        self._choices: dict[torch.Size, tuple[list[int], list[Product | None]]] = {}
        device = next((copy.values.device for copy in self._copies.values()), torch.device("cpu"))
        # Kernels of drafts start while those before them still run.
        self._pdl = has_early_start(device)
        # The last activations that were quantised as they were made, with the tensor that SGLang hands on.
        self._made: tuple[torch.Tensor, Quantised] | None = None

    def __len__(self) -> int:
        return len(self._copies) + len(self._experts)

    @property
    def has_experts(self) -> bool:
        """Whether experts of any layer are copied."""
        return bool(self._experts)

    def __str__(self) -> str:
        experts = f" and the experts of {len(self._experts)}" if self._experts else ""
        return f"{len(self._copies)} linear layers{experts}, {self.nbytes / 1e9:.2f} GB"

    def requantise(self) -> None:
        """Take over the model's weights, which were updated in place."""
        for layer, copy in self._copies.items():
            copy.take(layer.weight.data)
        for experts in self._experts.values():
            experts.requantise()

    # ------------------------------------------------------------- parts of a draft step

    def linear(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The product of ``layer``'s copy with ``x`` [..., K]: [..., N]; None if the model's weights are to be used."""
        copy = self._copies.get(layer)
        rows = x.shape[:-1].numel()
        multiply = self._product_for(copy, rows) if copy is not None else None
        if copy is None or multiply is None:
            return None
        flat = x.reshape(rows, x.shape[-1])
        if not x.is_cuda:
            out = reference_linear(flat, copy, bias)
        else:
            out = multiply(self._quantised(x, flat), copy, x.dtype, bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    def experts(self, layer: torch.nn.Module, method: Any, dispatch_output: Any) -> Any:
        """What ``layer``'s experts make of ``dispatch_output``, by their copies; None if the model's are to be used."""
        copy = self._experts.get(layer)
        return copy.run(method, dispatch_output) if copy is not None else None

    def norm(
        self, norm: Any, x: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
        """SGLang's ``RMSNorm`` before a product: its result, quantised on the way; None if it is not before one."""
        if not self._makes_input(x, x.shape[-1]) or norm.variance_size_override is not None or norm.cast_x_before_out_mul:
            return None
        if residual is not None and not residual.is_contiguous():
            return None
        out, quantised = triton_fused.add_norm(x, residual, norm.weight.data, norm.variance_epsilon, self._pdl)
        self._made = (out, quantised)
        return out if residual is None else (out, residual)

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor | None:
        """SGLang's ``SiluAndMul`` before a product; None if it is not before one."""
        if not self._makes_input(x, x.shape[-1] // 2):
            return None
        out, quantised = triton_fused.silu_and_mul(x, self._pdl)
        self._made = (out, quantised)
        return out

    def _makes_input(self, x: torch.Tensor, width: int) -> bool:
        return x.is_cuda and x.dim() == 2 and x.is_contiguous() and width in self._input_widths and width <= LARGEST_ROW

    def _quantised(self, x: torch.Tensor, flat: torch.Tensor) -> Quantised:
        made, self._made = self._made, None
        if made is not None and made[0] is x:
            return made[1]
        return triton_fused.quantise(flat.contiguous(), self._pdl)

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
        used = own = 0
        for shape, layers in by_shape.items():
            fastest = [self._fastest(layers, rows) for rows in timed]
            self._choices[shape] = (timed, fastest)
            used += sum(product is not None for product in fastest)
            own += sum(product not in (None, sglangs_product) for product in fastest)
        shapes = len(timed) * len(by_shape)
        return f"faster than the model's in {used} of {shapes} shapes of products, {own} of them by this project's kernel"

    def _product_for(self, copy: Quantised, rows: int) -> Product | None:
        if not self._choices:
            return sglangs_product
        timed, fastest = self._choices[copy.values.shape]
        index = bisect.bisect_left(timed, rows)
        return fastest[index] if index < len(timed) else None

    def _fastest(self, layers: Sequence[torch.nn.Module], rows: int) -> Product | None:
        weight, copy = layers[0].weight.data, self._copies[layers[0]]
        # Requests' seeds are to be the same with and without the copies, so the global generator is left alone.
        generator = torch.Generator(weight.device).manual_seed(0)
        x = torch.randn((rows, weight.shape[1]), generator=generator, dtype=weight.dtype, device=weight.device)
        quantised = Quantised.of(x)
        products: list[Product] = [sglangs_product]
        for config in triton_product.configs_for(copy, rows):
            products.append(partial(triton_product.product, config=config, pdl=self._pdl))
        seconds = [_seconds(lambda layer: torch.nn.functional.linear(x, layer.weight.data), layers)]
        for product in products:
            seconds.append(LEAST_GAIN * _seconds(partial(self._run, product, quantised, x.dtype), layers))
        best = min(range(len(seconds)), key=seconds.__getitem__)
        return products[best - 1] if best else None

    def _run(self, product: Product, x: Quantised, dtype: torch.dtype, layer: torch.nn.Module) -> None:
        product(x, self._copies[layer], dtype, None)


def sglangs_product(x: Quantised, weight: Quantised, dtype: torch.dtype, bias: torch.Tensor | None) -> torch.Tensor:
    """SGLang's ``fp8_scaled_mm``; see :data:`Product`."""
    from sgl_kernel import fp8_scaled_mm

    return fp8_scaled_mm(x.values, weight.values.t(), x.scales, weight.scales, dtype, bias)


#: Layers take turns while a product is timed, at least so many, and more while their copies are smaller than this together:
#: the L2 cache is to hold few of them.
_LEAST_TURNS, _LEAST_BYTES, _REPLAYS = 8, 128 << 20, 3


def _seconds(product: Callable[[torch.nn.Module], None], layers: Sequence[torch.nn.Module]) -> float:
    """Seconds of one product on the GPU, in a CUDA graph."""
    count = max(_LEAST_TURNS, min(len(layers), _LEAST_BYTES // layers[0].weight.numel()))
    turns = [layers[i * len(layers) // count] for i in range(count)]
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
            times.append(begin.elapsed_time(end) / 1000 / count)
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
