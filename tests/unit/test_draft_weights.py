"""Weights in FP8, and which forwards use them."""

from __future__ import annotations

import pytest
import torch
from small_backend import SmallServer

from sglang_sparsespec.attention_backend.forward_plan import Draft
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
