"""Weights in FP8, and which forwards use them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from small_backend import SmallServer

from sglang_sparsespec.attention_backend.forward_plan import Draft
from sglang_sparsespec.draft_weights.copies import DraftWeights
from sglang_sparsespec.draft_weights.experts import ExpertCopy
from sglang_sparsespec.draft_weights.fp8 import CHUNK, Quantised, reference_linear


def test_an_entry_is_off_by_at_most_half_a_step_of_its_row() -> None:
    matrix = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50).unsqueeze(1)
    matrix[7] = 0
    error = (Quantised.of(matrix).dequantised() - matrix).abs()
    # E4M3 has 3 bits behind the point; the smallest values of a row have the same absolute step.
    bound = torch.maximum(matrix.abs() / 16, matrix.abs().amax(dim=1, keepdim=True) / 448 / 1024)
    assert (error <= bound * 1.001).all()
    assert (error[7] == 0).all()


def test_a_weight_is_taken_over_into_the_same_memory_however_long() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(CHUNK + 5, 16, generator=generator) for _ in range(2))
    quantised = Quantised.of(first)
    addresses = quantised.values.data_ptr(), quantised.scales.data_ptr()
    quantised.take(second)
    assert (quantised.values.data_ptr(), quantised.scales.data_ptr()) == addresses
    assert torch.equal(quantised.dequantised(), Quantised.of(second).dequantised())


def test_products_quantise_weights_and_activations() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((5, 32), (48, 32), (48,)))
    quantised = Quantised.of(weight)
    expected = torch.nn.functional.linear(Quantised.of(x).dequantised(), quantised.dequantised(), bias)
    torch.testing.assert_close(reference_linear(x, quantised, bias), expected)
    torch.testing.assert_close(reference_linear(x, quantised, None), expected - bias)
    relative = (expected - torch.nn.functional.linear(x, weight, bias)).norm() / expected.norm()
    assert 0 < relative < 0.05


def test_draft_steps_alone_use_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    server = SmallServer()
    copies = object()
    monkeypatch.setattr(server.backend, "_draft_weights", copies)
    rows, lengths = torch.tensor([1, 2]), torch.tensor([9, 12])
    server.prefill([1, 2], [9, 12], [9, 12])
    assert server.backend.weights_in_use is None
    backend = server.backend
    plans = {
        "draft": backend.plan_draft(rows, lengths),
        "verify": backend.plan_verify(rows, lengths, torch.full((2,), backend.window - 1)),
        "plain": backend.plan_plain(rows, lengths),
        "mixed": backend.plan_mixed(rows[:1], lengths[:1], rows[1:], lengths[1:], torch.tensor([backend.window - 1])),
    }
    used = {}
    for name, plan in plans.items():
        backend.begin(plan)
        used[name] = backend.weights_in_use
        backend.end()
        assert backend.weights_in_use is None, "what follows a draft step has no plan yet"
    assert used == {"draft": copies, "verify": None, "plain": None, "mixed": None}
    assert isinstance(plans["draft"], Draft)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


class Experts:
    """What a layer of four experts is to its copy, and to SGLang's experts in torch."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layer = torch.nn.Module()
        self.layer.num_experts = 4
        for name, shape in (("w13_weight", (4, 96, 32)), ("w2_weight", (4, 32, 48))):
            setattr(self.layer, name, torch.nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False))
        config = SimpleNamespace(activation="silu", gemm1_alpha=None, apply_router_weight_on_input=False)
        self.method = SimpleNamespace(moe_runner_config=config)
        x = torch.randn(5, 32, generator=generator)
        chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(5)])
        self.dispatched = SimpleNamespace(hidden_states=x, topk_output=(torch.full((5, 2), 0.5), chosen, None))

    def exact(self) -> torch.Tensor:
        """Token by token, from the definition."""
        rows = []
        for x, weights, chosen in zip(self.dispatched.hidden_states, *self.dispatched.topk_output[:2], strict=True):
            out = torch.zeros(32)
            for weight, expert in zip(weights, chosen, strict=True):
                out += weight * (self.layer.w2_weight[expert] @ silu_and_mul(self.layer.w13_weight[expert] @ x))
            rows.append(out)
        return torch.stack(rows)


def test_copied_experts_are_near_the_models_own_and_follow_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # SGLang's activation asks for the arguments of a server.
    monkeypatch.setattr("sglang.srt.layers.moe.fused_moe_native.SiluAndMul", lambda: silu_and_mul)
    experts = Experts()
    copy = ExpertCopy(experts.layer)
    assert copy.nbytes == 4 * (96 * 32 + 32 * 48) + 4 * 4 * (96 + 32)  # values, and a scale for each row
    for _ in range(2):
        out, exact = copy.run(experts.method, experts.dispatched).hidden_states, experts.exact()
        assert 0 < (out - exact).norm() / exact.norm() < 0.1
        experts.layer.w13_weight.mul_(-1)
        experts.layer.w2_weight.copy_(experts.layer.w2_weight.flip(0))
        assert (copy.run(experts.method, experts.dispatched).hidden_states - experts.exact()).norm() > exact.norm()
        copy.requantise()


def test_experts_without_a_copy_are_the_models_own() -> None:
    weights = DraftWeights(torch.nn.Linear(16, 16))
    assert not weights.has_experts and len(weights) == 0 and str(weights) == "0 linear layers, 0.00 GB"
    assert weights.experts(Experts().layer, None, None) is None
