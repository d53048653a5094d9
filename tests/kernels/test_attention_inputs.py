"""The kernel between the QKV product and the attention of a draft step does what SGLang's norms, rotation and KV pool do."""

from __future__ import annotations

import os

import pytest
import torch

from sglang_sparsespec.attention_backend.kernels import triton_inputs
from sglang_sparsespec.attention_backend.kernels.interface import LayerKV
from sglang_sparsespec.attention_backend.kernels.reference import attention_inputs
from sglang_sparsespec.attention_backend.kernels.triton_common import has_early_start

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
kernels_run_here = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no CUDA GPU: test_draft_weights.py runs it in the interpreter"
)
EPS, CONTEXT, SLOTS = 1e-5, 50, 40


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


class Problem:
    """Products of ``tokens`` tokens at random positions, and a cache."""

    def __init__(self, tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int, has_norms: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        self.qkv = random(tokens, (num_q_heads + 2 * num_kv_heads) * head_dim, seed=2)
        self.positions = torch.randint(CONTEXT, (tokens,), generator=generator).to(DEVICE)
        self.slots = torch.randperm(SLOTS, generator=generator)[:tokens].to(DEVICE)
        angles = torch.arange(CONTEXT).unsqueeze(1) / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(DEVICE)
        self.kv = LayerKV(*(random(SLOTS, num_kv_heads, head_dim, seed=seed) for seed in (3, 4)), 1.0, 0)
        self.norms = (1 + random(head_dim, seed=5) / 4, 1 + random(head_dim, seed=6) / 4) if has_norms else None

    def arguments(self) -> dict:
        """Copies, since queries and the cache are written."""
        kv = LayerKV(self.kv.k.clone(), self.kv.v.clone(), 1.0, 0)
        given = {"positions": self.positions, "cos_sin": self.cos_sin, "norms": self.norms, "eps": EPS}
        return {"qkv": self.qkv.clone(), "kv": kv, "slots": self.slots, **given}


@kernels_run_here
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("tokens,heads,head_dim", [(1, (4, 2), 64), (5, (6, 1), 128), (33, (3, 3), 64)])
def test_the_kernel_is_the_reference(tokens: int, heads: tuple[int, int], head_dim: int, has_norms: bool) -> None:
    problem = Problem(tokens, *heads, head_dim, has_norms)
    wanted, found = problem.arguments(), problem.arguments()
    pdl = has_early_start(torch.device(DEVICE))
    tolerance = dict(rtol=0.02, atol=0.02) if DTYPE == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    q = triton_inputs.attention_inputs(**found, pdl=pdl)
    assert q.shape == (tokens, heads[0], head_dim)
    torch.testing.assert_close(q, attention_inputs(**wanted), **tolerance)
    for cache in ("k", "v"):
        torch.testing.assert_close(getattr(found["kv"], cache), getattr(wanted["kv"], cache), **tolerance)
