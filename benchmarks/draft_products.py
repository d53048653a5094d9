"""What lies between two attentions of a draft step, kernel by kernel: products, norms and activations, beside SGLang's.

    python benchmarks/draft_products.py --results draft-products.jsonl          # about a minute on an H200

A product's weights take turns, so that none is found in the L2 cache; activations are found there, as in a draft step.
"quantised" rows end with the next product's input in FP8: SGLang's kernel and its quantisation, or one fused kernel.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from _common import device_name, markdown, say, significant, stamp, write_record
from kernel_table import time_calls

from sglang_sparsespec.draft_weights import triton_fused, triton_product
from sglang_sparsespec.draft_weights.fp8 import Quantised

#: A walk through weights covers this much memory.
LEAST_TRAFFIC = 256 << 20
EPS = 1e-6
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    hidden: int
    intermediate: int
    qkv: int
    attention: int
    vocabulary: int = 151936

    def products(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer and of the head."""
        return {
            "qkv": (self.qkv, self.hidden),
            "o": (self.hidden, self.attention),
            "gate and up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "head": (self.vocabulary, self.hidden),
        }


SHAPES = {
    "qwen2.5-coder-1.5b": Shape(1536, 8960, 2048, 1536),
    "qwen3-8b": Shape(4096, 12288, 6144, 4096),
    "qwen3-14b": Shape(5120, 17408, 7168, 5120),
}


@dataclass(frozen=True)
class Job:
    """One kernel, or a chain of them: what it is for, its name, and calls that walk through distinct weights."""

    what: str
    name: str
    calls: list[Callable[[], Any]]
    bytes: int


def quantise(x: torch.Tensor) -> Quantised:
    """SGLang's quantisation of activations."""
    from sgl_kernel import sgl_per_token_quant_fp8

    quantised = Quantised.empty(x.shape[0], x.shape[1], x.device)
    sgl_per_token_quant_fp8(x, quantised.values, quantised.scales)
    return quantised


def products(shape: Shape, rows: int) -> Iterator[Job]:
    """Products of one layer by each kernel."""
    from sgl_kernel import fp8_scaled_mm

    for what, (outputs, inputs) in shape.products().items():
        count = min(36, max(2, -(-LEAST_TRAFFIC // (outputs * inputs))))
        weights = [torch.randn((outputs, inputs), dtype=DTYPE, device="cuda") for _ in range(count)]
        copies = [Quantised.of(weight) for weight in weights]
        x = torch.randn((rows, inputs), dtype=DTYPE, device="cuda")
        q = quantise(x)

        def own(weight: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
            return torch.nn.functional.linear(x, weight)

        def sgl(copy: Quantised, q: Quantised = q) -> torch.Tensor:
            return fp8_scaled_mm(q.values, copy.values.t(), q.scales, copy.scales, DTYPE)

        def by_torch(copy: Quantised, q: Quantised = q) -> torch.Tensor:
            scales = copy.scales.view(1, -1)
            return torch._scaled_mm(q.values, copy.values.t(), q.scales, scales, out_dtype=DTYPE, use_fast_accum=True)

        moved = outputs * inputs
        yield Job(f"product {what}", "model's", [lambda w=w, f=own: f(w) for w in weights], 2 * moved)
        yield Job(f"product {what}", "fp8_scaled_mm", [lambda c=c, f=sgl: f(c) for c in copies], moved)
        yield Job(f"product {what}", "torch._scaled_mm", [lambda c=c, f=by_torch: f(c) for c in copies], moved)
        for config in triton_product.configs_for(copies[0], rows):

            def in_triton(copy: Quantised, q: Quantised = q, config: Any = config) -> torch.Tensor:
                return triton_product.product(q, copy, DTYPE, None, config, pdl=True)

            name = f"triton_product {config.block_n} x {config.block_k}"
            yield Job(f"product {what}", name, [lambda c=c, f=in_triton: f(c) for c in copies], moved)
        yield marlin_product(what, x, outputs, count)


def marlin_product(what: str, x: torch.Tensor, outputs: int, count: int) -> Job:
    """A product with 4-bit weights in groups of 128, and activations in 16 bits; the weights mean nothing."""
    from sgl_kernel.scalar_type import scalar_types
    from sglang.kernels.ops.quantization.gptq_marlin import gptq_marlin_gemm
    from sglang.srt.layers.quantization.marlin_utils import marlin_make_workspace

    rows, inputs = x.shape
    workspace, none = marlin_make_workspace(x.device), torch.empty(0, dtype=torch.int32, device="cuda")
    scales = torch.full((inputs // 128, outputs), 0.01, dtype=DTYPE, device="cuda")
    packed = [torch.randint(2**31, (inputs // 16, 2 * outputs), dtype=torch.int32, device="cuda") for _ in range(count)]

    def product(weight: torch.Tensor) -> torch.Tensor:
        return gptq_marlin_gemm(
            x, None, weight, scales, None, none, none, none, workspace, scalar_types.uint4b8, rows, outputs, inputs,
            use_fp32_reduce=True,
        )  # fmt: skip

    moved = outputs * inputs // 2 + scales.nbytes
    return Job(f"product {what}", "gptq_marlin_gemm, 4 bits", [lambda w=w: product(w) for w in packed], moved)


def between(shape: Shape, rows: int) -> Iterator[Job]:
    """Norms and activations, with and without the quantisation of what follows."""
    from sgl_kernel import fused_add_rmsnorm, silu_and_mul

    x = torch.randn((rows, shape.hidden), dtype=DTYPE, device="cuda")
    residual, weight = torch.randn_like(x), torch.randn(shape.hidden, dtype=DTYPE, device="cuda")
    wide = torch.randn((rows, 2 * shape.intermediate), dtype=DTYPE, device="cuda")
    out = torch.empty((rows, shape.intermediate), dtype=DTYPE, device="cuda")

    def norm() -> None:
        fused_add_rmsnorm(x, residual, weight, EPS)

    def norm_then_quantise() -> None:
        norm()
        quantise(x)

    def activation() -> None:
        silu_and_mul(wide, out)

    def activation_then_quantise() -> None:
        activation()
        quantise(out)

    moved, moved_wide = 8 * x.numel(), 6 * out.numel()
    yield Job("norm", "SGLang", [norm] * 8, moved)
    yield Job("norm, quantised", "SGLang, two kernels", [norm_then_quantise] * 8, moved)
    yield Job("norm, quantised", "fused", [lambda: triton_fused.add_norm(x, residual, weight, EPS, pdl=True)] * 8, moved)
    yield Job("quantisation", "SGLang", [lambda: quantise(x)] * 8, 3 * x.numel())
    yield Job("quantisation", "own", [lambda: triton_fused.quantise(x, pdl=True)] * 8, 3 * x.numel())
    yield Job("activation", "SGLang", [activation] * 8, moved_wide)
    yield Job("activation, quantised", "SGLang, two kernels", [activation_then_quantise] * 8, moved_wide)
    yield Job("activation, quantised", "fused", [lambda: triton_fused.silu_and_mul(wide, pdl=True)] * 8, moved_wide)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", help="JSON-lines file to append to")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[:2])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 128], help="tokens of a step")
    parser.add_argument("--kernels", type=re.compile, default=re.compile(""), help="names of kernels, a pattern")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    origin = stamp()
    rows = []
    for name in args.shapes:
        for tokens in args.rows:
            for make in (products, between):
                for job in make(SHAPES[name], tokens):
                    if not args.kernels.search(job.name):
                        continue
                    about = {"shape": name, "rows": tokens, "what": job.what, "kernel": job.name}
                    try:
                        found = {**time_calls(job.calls), "bytes": job.bytes}
                    except Exception as error:  # noqa: BLE001 - a kernel that cannot run costs its own row
                        say(f"{about}: {error}")
                        continue
                    write_record(args.results, {**origin, **about, **found})
                    speed = significant(job.bytes / found["ms"] / 1e9)
                    rows.append({**about, "us": significant(found["ms"] * 1e3), "TB/s": speed})
                    say(str(rows[-1]))
    print(f"{device_name(origin)}\n\n{markdown(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
