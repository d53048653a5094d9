"""Drafts replayed on a fixed text: accepted as often as their attention is full."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import replay  # noqa: E402

CONTEXT, NEW_TOKENS, K = 100, 50, 4
VOCAB = 6


def args(**given: Any) -> Namespace:
    settings = {
        "k": K, "new_tokens": NEW_TOKENS, "temperature": 1.0, "budget_ratio": 0.05, "min_budget": 16, "accepted": [K, 1],
        "lookaheads": [4], "weights": [0.5],
    }  # fmt: skip
    return Namespace(**{**settings, **given})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tiny_model import write_tiny_llama
    from transformers import AutoModelForCausalLM

    torch.set_grad_enabled(False)
    yield AutoModelForCausalLM.from_pretrained(write_tiny_llama(tmp_path_factory.mktemp("tiny"))).eval()
    torch.set_grad_enabled(True)


@pytest.fixture(scope="module")
def text(model: Any) -> torch.Tensor:
    prompt = torch.randint(VOCAB, (CONTEXT,), generator=torch.Generator().manual_seed(0)).tolist()
    text = replay.write_text(model, prompt, args(), seed=0)
    assert text[:CONTEXT].tolist() == prompt and len(text) == CONTEXT + NEW_TOKENS
    return text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_draft_is_accepted_where_the_budget_covers_all(temperature: float, model: Any, text: torch.Tensor) -> None:
    found = replay.replay_text(model, text, CONTEXT, args(min_budget=200, temperature=temperature))
    assert set(found) == {(accepted, n, weight) for accepted in (K, 1) for n, weight in ((0, 0.0), (4, 0.5))}
    for lengths in found.values():
        assert lengths == pytest.approx([K + 1] * len(lengths), abs=1e-3)


def test_sparse_drafts_are_accepted_less_often_and_by_what_they_select(model: Any, text: torch.Tensor) -> None:
    found = replay.replay_text(model, text, CONTEXT, args())
    for lengths in found.values():
        assert 1 < sum(lengths) / len(lengths) < K + 0.9
    assert found[K, 0, 0.0] != found[K, 4, 0.5]


def test_the_full_pass_is_the_model_and_its_attention(model: Any, text: torch.Tensor) -> None:
    found = replay.Replay(model, text, first=90)
    model.set_attn_implementation("eager")
    expected = model(text.unsqueeze(0), output_attentions=True)
    torch.testing.assert_close(found.logits, expected.logits[0])
    for layer, attention in enumerate(expected.attentions):
        grouped = attention[0].view(found.attention.shape[1], -1, len(text), len(text)).mean(1)
        torch.testing.assert_close(found.attention[layer], grouped[:, 90:])
