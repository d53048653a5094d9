"""Greedy requests with penalties of every kind, and with none, for one batch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tiny_model import write_tiny_llama, write_tokenizer

VOCAB, END, CONTEXT = 97, 5, 256


def write_model(folder: Path) -> str:
    """A tiny random Llama with a tokenizer; its text loops, unless penalties keep it from that."""
    write_tiny_llama(folder, seed=2, context=CONTEXT, vocab=VOCAB)
    write_tokenizer(folder, VOCAB, END)
    return str(folder)


def penalties(kind: int, rng: random.Random) -> dict[str, Any]:
    """Parameters of a kind of request; kind 0 has none."""
    sign = rng.choice([1, 1, 1, -1])
    single: list[dict[str, Any]] = [
        {},
        {"frequency_penalty": sign * rng.uniform(0.05, 0.6)},
        {"presence_penalty": sign * rng.uniform(0.1, 2)},
        {"repetition_penalty": rng.choice([0.8, 1.02, 1.1, 1.3, 2])},
        # Tokens that end most texts of this model early.
        {"min_new_tokens": rng.randrange(1, 40), "stop_token_ids": rng.sample(range(VOCAB), 30), "ignore_eos": False},
    ]
    if kind < len(single):
        return single[kind]
    every = {name: value for parameters in single for name, value in parameters.items()}
    if kind == len(single):
        return every
    return {**every, "logit_bias": {str(token): rng.uniform(-2, 2) for token in rng.sample(range(VOCAB), 5)}}


def make_calls(count: int, bias: bool = True, seed: int = 0) -> dict[str, Any]:
    """Arguments of ``Engine.generate``: requests of all kinds, shuffled; ``bias``: of some with a logit bias, too."""
    rng = random.Random(seed)
    prompts, parameters = [], []
    for index in range(count):
        prompts.append([rng.randrange(VOCAB) for _ in range(rng.randrange(3, 90))])
        length = rng.randrange(40, 120)
        parameters.append(
            {"temperature": 0.0, "max_new_tokens": length, "ignore_eos": True, **penalties(index % (7 if bias else 6), rng)}
        )
    order = rng.sample(range(count), count)
    return {"input_ids": [prompts[i] for i in order], "sampling_params": [parameters[i] for i in order]}
