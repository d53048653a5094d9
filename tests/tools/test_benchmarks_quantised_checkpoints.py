"""Quantised checkpoints hold their weights, as their readers unpack them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import quantised_checkpoints as forms  # noqa: E402
from model_shapes import QUANTISED  # noqa: E402

WEIGHT = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)).bfloat16()


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """``(..., n)`` int32 as ``(..., n, 8)``, the lowest four bits first."""
    return (words[..., None] >> torch.arange(0, 32, 4)) & 15


def unpacked(form: str) -> torch.Tensor:
    """``(outputs, inputs)``: what the checkpoint's weight stands for."""
    parts = forms.FORMS[form](WEIGHT)
    if form == "fp8-block":
        scale = parts["weight_scale_inv"].repeat_interleave(forms.BLOCK, 0).repeat_interleave(forms.BLOCK, 1)
        return parts["weight"].float() * scale
    if form == "compressed-fp8":
        return parts["weight"].float() * parts["weight_scale"]
    if form == "compressed-w4a16":
        values, scale = nibbles(parts["weight_packed"]).flatten(1), parts["weight_scale"].float()
        assert parts["weight_shape"].tolist() == list(WEIGHT.shape)
        return (values - 8) * scale.repeat_interleave(forms.GROUP, 1)
    if form == "gptq":
        values, zeros = nibbles(parts["qweight"].T).flatten(1), nibbles(parts["qzeros"]).flatten(1).T + 1
    else:
        order = [0, 4, 1, 5, 2, 6, 3, 7]  # where SGLang's kernel looks for eight columns
        values = nibbles(parts["qweight"])[..., order].flatten(1).T
        zeros = nibbles(parts["qzeros"])[..., order].flatten(1).T
    groups = torch.arange(WEIGHT.shape[1]) // forms.GROUP
    return (values - zeros[:, groups]) * parts["scales"].float().T[:, groups]


@pytest.mark.parametrize("form", forms.FORMS)
def test_a_weight_is_what_was_rounded(form: str) -> None:
    error = (unpacked(form) - WEIGHT.float()).norm() / WEIGHT.float().norm()
    assert error < (0.03 if "fp8" in form else 0.13)


def test_every_form_has_a_configuration() -> None:
    assert set(forms.FORMS) == set(QUANTISED)
