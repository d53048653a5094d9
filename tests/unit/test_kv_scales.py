"""Scales of the KV cache (FP8 checkpoints): stored divided by them, read multiplied by them."""

from __future__ import annotations

import torch
from small_backend import SmallServer


def run(k_scale: float | None, v_scale: float | None) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Verification, the draft after it, and what that drafts with."""
    server = SmallServer()
    for layer in server.layers:
        layer.k_scale = layer.k_scale_float = k_scale
        layer.v_scale = layer.v_scale_float = v_scale
    if k_scale is not None and v_scale is not None:
        server.pool.k /= k_scale
        server.pool.v /= v_scale
    server.prefill([1, 3], [60, 24], [20, 24])
    verified = server.verify([1, 3], [60, 24])
    drafted = server.draft([1, 3], [62, 25])
    return verified, drafted, server.selected(1)


def test_scaled_caches_give_the_outputs_and_selections_of_unscaled_ones() -> None:
    plain, scaled = run(None, None), run(0.25, 8.0)
    torch.testing.assert_close(scaled[0], plain[0])
    torch.testing.assert_close(scaled[1], plain[1])
    assert scaled[2] == plain[2]


def test_the_scales_matter() -> None:
    server, plain = SmallServer(), SmallServer()
    for layer in server.layers:
        layer.k_scale = layer.k_scale_float = 0.25
        layer.v_scale = layer.v_scale_float = 8.0
    assert not torch.allclose(server.verify([1], [40]), plain.verify([1], [40]))
