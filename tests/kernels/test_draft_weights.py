"""Kernels of quantised drafts: norms and activations that quantise what they make, and FP8 products.

Without a GPU a child process runs the Triton kernels in Triton's interpreter.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter_child import assert_passes_in_the_interpreter

from sglang_sparsespec.attention_backend.kernels.triton_common import has_early_start
from sglang_sparsespec.draft_weights import triton_fused, triton_product
from sglang_sparsespec.draft_weights.copies import DraftWeights, sglangs_product
from sglang_sparsespec.draft_weights.fp8 import Quantised, reference_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # the interpreter truncates to bfloat16
kernels_run_here = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no CUDA GPU: test_every_case_in_the_interpreter runs it in a child process"
)
gpu_only = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: FP8 products need one")]
EPS = 1e-6
PDL = has_early_start(torch.device(DEVICE))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def assert_quantised(quantised: Quantised, expected: torch.Tensor) -> None:
    """Each entry is off by at most half a step of E4M3, which has 3 bits behind the point."""
    largest = expected.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(quantised.scales, largest / 448, rtol=0.01, atol=1e-20)
    bound = torch.maximum(expected.abs() / 16, largest / 448 / 1024)
    is_close = (quantised.dequantised() - expected).abs() <= 1.02 * bound
    if INTERPRETED:
        # Triton's interpreter loses the carry where a value is rounded up to a power of two, and truncates subnormal ones.
        values = Quantised.of(expected).values.float().abs()
        is_close |= (torch.frexp(values).mantissa == 0.5) | (values <= 2**-6)
    assert is_close.all()


@kernels_run_here
@pytest.mark.parametrize("rows,width", [(1, 64), (5, 96), (3, 1536)])
@pytest.mark.parametrize("has_residual", [True, False])
def test_norms_are_sglangs_and_quantised(rows: int, width: int, has_residual: bool) -> None:
    x, residual, weight = random(rows, width), random(rows, width, seed=1), 1 + random(width, seed=2) / 4
    x[-1] = 0
    residual[-1] = 0
    total = x.float() + (residual.float() if has_residual else 0)
    expected = total * torch.rsqrt(total.pow(2).mean(dim=1, keepdim=True) + EPS) * weight.float()
    given = x.clone()
    out, quantised = triton_fused.add_norm(given, residual if has_residual else None, weight, EPS, PDL)
    tolerance = dict(rtol=0.02, atol=0.02) if DTYPE == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.float(), expected, **tolerance)
    assert_quantised(quantised, expected)
    if has_residual:
        torch.testing.assert_close(residual.float(), total, **tolerance)
        assert out is given, "as SGLang's, in place"
    else:
        assert torch.equal(given, x)


@kernels_run_here
@pytest.mark.parametrize("rows,width", [(1, 64), (4, 96), (3, 8960)])
def test_activations_are_sglangs_and_quantised(rows: int, width: int) -> None:
    x = random(rows, 2 * width)
    expected = torch.nn.functional.silu(x[:, :width].float()) * x[:, width:].float()
    out, quantised = triton_fused.silu_and_mul(x, PDL)
    tolerance = dict(rtol=0.02, atol=0.02) if DTYPE == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.float(), expected, **tolerance)
    assert_quantised(quantised, expected)


@kernels_run_here
@pytest.mark.parametrize("rows,width", [(1, 64), (5, 96)])
def test_activations_of_other_layers_are_quantised(rows: int, width: int) -> None:
    x = random(rows, width)
    assert_quantised(triton_fused.quantise(x, PDL), x.float())


@kernels_run_here
@pytest.mark.parametrize("config", triton_product.CONFIGS, ids=str)
@pytest.mark.parametrize("tokens,has_bias", [(1, True), (21, False)])
def test_products_in_triton_are_the_references(
    config: triton_product.ProductConfig, tokens: int, has_bias: bool
) -> None:
    x, weight = (Quantised.of(random(rows, 1024, seed=seed)) for seed, rows in enumerate((tokens, 128)))
    bias = random(128, seed=2) if has_bias else None
    assert config in triton_product.configs_for(weight, tokens)
    out = triton_product.product(x, weight, DTYPE, bias, config, PDL)
    expected = x.dequantised() @ weight.dequantised().T + (bias.float() if bias is not None else 0)
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)


def test_only_products_that_fit_run_in_triton() -> None:
    def configs(channels: int, inputs: int, tokens: int) -> list[triton_product.ProductConfig]:
        return list(triton_product.configs_for(Quantised.empty(channels, inputs, torch.device("cpu")), tokens))

    assert configs(128, 1024, 64) == list(triton_product.CONFIGS)
    assert configs(128, 1024, 65) == []
    assert configs(128, 896, 1) == [triton_product.CONFIGS[2]], "896 is no multiple of 256"
    assert configs(48, 1024, 1) == list(triton_product.CONFIGS[:2]), "48 is no multiple of 64"


# ----------------------------------------------------------------------- on a GPU only


class Layer(torch.nn.Module):
    def __init__(self, channels: int, inputs: int, seed: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(random(channels, inputs, seed=seed), requires_grad=False)


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> tuple[DraftWeights, list[Layer]]:
    layers = [Layer(256, 128, seed) for seed in range(3)]
    monkeypatch.setattr("sglang_sparsespec.draft_weights.copies.copied_layers", lambda model: iter(layers))
    return DraftWeights(torch.nn.Module()), layers


@pytest.mark.parametrize("rows", [1, 7, 64, 300])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("source", [pytest.param(name, marks=gpu_only) for name in ("norm", "other")])
def test_products_are_the_references(
    weights: tuple[DraftWeights, list[Layer]], rows: int, has_bias: bool, source: str
) -> None:
    copies, layers = weights
    x, bias = random(rows, 128), random(256, seed=9) if has_bias else None
    if source == "norm":
        norm: Any = SimpleNamespace(
            weight=torch.ones(128, device=DEVICE, dtype=DTYPE), variance_epsilon=EPS, variance_size_override=None,
            cast_x_before_out_mul=False,
        )  # fmt: skip
        x = copies.norm(norm, x, None)
        # The norm quantises its result before that is rounded to 16 bits.
        activations = copies._made[1].dequantised()
    else:
        activations = x.float()
    out = copies.linear(layers[1], x, bias)
    expected = reference_linear(activations, Quantised.of(layers[1].weight.float()), bias.float() if has_bias else None)
    torch.testing.assert_close(out.float(), expected, rtol=0.03, atol=0.25)
    assert copies.linear(torch.nn.Linear(2, 2), x, None) is None, "a layer without a copy"


def test_products_are_the_fastest_ones(
    weights: tuple[DraftWeights, list[Layer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, layers = weights
    copy = Quantised.of(layers[0].weight.data)
    assert len(list(triton_product.configs_for(copy, 24))) == 1
    # The model's own weights, SGLang's product and Triton's, for 1, 16 and 24 tokens.
    times = iter([0.9, 1.0, 1.0, 2.0, 1.0, 1.5, 2.0, 1.5, 1.0])
    monkeypatch.setattr("sglang_sparsespec.draft_weights.copies._seconds", lambda product, layers: next(times))
    assert copies.choose(24) == "faster than the model's in 2 of 3 shapes of products, 1 of them by this project's kernel"
    found = {rows: copies._product_for(copies._copies[layers[0]], rows) for rows in (1, 2, 16, 24, 25)}
    assert found[1] is None and found[25] is None
    assert found[2] is found[16] is sglangs_product
    assert isinstance(found[24], partial) and found[24].func is triton_product.product


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run in this process")
def test_every_case_in_the_interpreter() -> None:
    others = [Path(__file__).with_name("test_attention_inputs.py")]
    assert_passes_in_the_interpreter(__file__, at_least=15, together_with=others)
