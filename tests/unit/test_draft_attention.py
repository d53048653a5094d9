"""A draft step's attention begins at the QKV product, and gives what SGLang's kernels before it would give."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.server_args import ServerArgs
from small_backend import CONTEXT, HEAD_DIM, NUM_KV_HEADS, NUM_Q_HEADS, SmallServer

from sglang_sparsespec.attention_backend.kernels.interface import LayerKV
from sglang_sparsespec.attention_backend.kernels.reference import attention_inputs
from sglang_sparsespec.scheduler_patch import draft_attention

ROWS_OF_BATCH, LENGTHS = [1, 3], [20, 40]


@pytest.fixture(autouse=True)
def sglangs_layers_can_be_made(serving_args: Callable[[ServerArgs], None], monkeypatch: pytest.MonkeyPatch) -> None:
    serving_args(ServerArgs(model_path="dummy", device="cpu"))
    monkeypatch.setattr("sglang.srt.layers.rotary_embedding.base._is_cpu", True)  # as in a server on a CPU


class Attention:
    """Stands in for SGLang's ``LlamaAttention``: the same parts, and the same forward."""

    def __init__(self, server: SmallServer, is_neox_style: bool = True) -> None:
        heads = NUM_Q_HEADS + 2 * NUM_KV_HEADS
        self.weight = torch.randn(heads * HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(3))
        self.rotary_emb = RotaryEmbedding(HEAD_DIM, HEAD_DIM, CONTEXT, 10000, is_neox_style, torch.float32)
        self.attn, self.server = server.layers[0], server
        self.forwards = 0

    def qkv_proj(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return hidden @ self.weight.T, None

    def o_proj(self, out: torch.Tensor) -> tuple[torch.Tensor, None]:
        return 2 * out, None

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, batch: Any) -> torch.Tensor:
        self.forwards += 1
        q, k, v = self.qkv_proj(hidden)[0].split([n * HEAD_DIM for n in (NUM_Q_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)], 1)
        q, k = self.rotary_emb.forward_native(positions, q, k)
        return self.o_proj(self.server.backend.forward_decode(q, k, v, self.attn, batch))[0]


def run(attention: Attention, plan: str) -> torch.Tensor:
    """One step of the batch through the hook."""
    server = attention.server
    rows, lengths = torch.tensor(ROWS_OF_BATCH), torch.tensor(LENGTHS)
    plans = {
        "draft": lambda: server.backend.plan_draft(rows, lengths),
        "plain": lambda: server.backend.plan_plain(rows, lengths - 1),
    }
    server.backend.begin(plans[plan]())
    batch = SimpleNamespace(forward_mode=ForwardMode.DECODE, out_cache_loc=server.req_to_token[rows, lengths - 1].long())
    hidden = torch.randn(len(rows), HEAD_DIM, generator=torch.Generator().manual_seed(4))
    with mock.patch.object(draft_attention, "backend_in_use", lambda: server.backend):
        return draft_attention.attend_to_product(Attention.forward, attention, lengths - 1, hidden, batch)


def new_server() -> SmallServer:
    server = SmallServer()
    server.prefill(ROWS_OF_BATCH, LENGTHS, LENGTHS)
    return server


def test_a_draft_step_gives_what_sglangs_kernels_give() -> None:
    attention, sglangs = Attention(new_server()), Attention(new_server())
    out = run(attention, "draft")
    assert attention.forwards == 0
    with mock.patch.object(type(sglangs.server.backend), "takes_products", lambda *args: False):
        wanted = run(sglangs, "draft")
    assert sglangs.forwards == 1
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(attention.server.pool.k, sglangs.server.pool.k)
    torch.testing.assert_close(attention.server.pool.v, sglangs.server.pool.v)


@pytest.mark.parametrize("plan,is_neox_style", [("plain", True), ("draft", False)])
def test_other_forwards_and_other_rotations_are_sglangs(plan: str, is_neox_style: bool) -> None:
    attention = Attention(new_server(), is_neox_style)
    run(attention, plan)
    assert attention.forwards == 1


@pytest.mark.parametrize("has_norms", [True, False])
def test_the_reference_is_sglangs_norms_rotation_and_cache(has_norms: bool) -> None:
    tokens, num_slots, eps, generator = 5, 12, 1e-5, torch.Generator().manual_seed(1)
    sizes = [heads * HEAD_DIM for heads in (NUM_Q_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]
    qkv = torch.randn(tokens, sum(sizes), generator=generator)
    positions = torch.randint(CONTEXT, (tokens,), generator=generator)
    slots = torch.randperm(num_slots, generator=generator)[:tokens]
    before = torch.randn(2, num_slots, NUM_KV_HEADS, HEAD_DIM, generator=generator)
    rotary = RotaryEmbedding(HEAD_DIM, HEAD_DIM, CONTEXT, 10000, is_neox_style=True, dtype=torch.float32)
    weights = torch.randn(2, HEAD_DIM, generator=generator)
    q, k, v = (part.contiguous() for part in qkv.split(sizes, dim=1))
    if has_norms:
        for part, weight in zip((q, k), weights, strict=True):
            norm = RMSNorm(HEAD_DIM, eps=eps)
            norm.weight.data.copy_(weight)
            part.copy_(norm.forward_native(part.view(-1, HEAD_DIM)).view(part.shape))
    q, k = rotary.forward_native(positions, q, k)
    kv = LayerKV(*before.clone(), 1.0, 0)
    found = attention_inputs(
        qkv=qkv,
        positions=positions,
        cos_sin=rotary.cos_sin_cache,
        norms=(weights[0], weights[1]) if has_norms else None,
        eps=eps,
        kv=kv,
        slots=slots,
    )
    torch.testing.assert_close(found.flatten(1), q)
    torch.testing.assert_close(kv.k[slots].flatten(1), k)
    torch.testing.assert_close(kv.v[slots].flatten(1), v)
    others = torch.ones(num_slots, dtype=torch.bool).index_fill(0, slots, False)
    assert torch.equal(kv.k[others], before[0][others]) and torch.equal(kv.v[others], before[1][others])
