"""Requests with penalties, and what SGLang's penalizers make of a row of logits, for the CPU's path and the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.sampling import penaltylib
from sglang.srt.sampling.penaltylib import repetition_penalty
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang_parts import request_in

from sglang_sparsespec.sampling.penalties import Penalties

VOCAB = 13
WINDOW = 4
ROWS = 8
#: Requests of a batch, from row 1 on, with a prompt of 5 + row tokens and the output that they have.
REQUESTS: list[tuple[dict[str, Any], list[int]]] = [
    ({"frequency_penalty": 0.7}, [3, 3, 4, 3]),
    ({}, [1, 2, 3]),
    ({"presence_penalty": -1.5, "repetition_penalty": 1.3}, [0, 12]),
    ({"repetition_penalty": 0.5, "min_new_tokens": 4, "stop_token_ids": [7, 500]}, [9, 9]),
    ({"min_new_tokens": 2}, [5]),
    ({"frequency_penalty": -0.3, "presence_penalty": 2.0, "repetition_penalty": 2.0, "min_new_tokens": 3}, [6] * 5),
]
#: The tokenizer's end tokens, and one that the model's configuration has besides.
ENDS = (10, 11)
MODEL_END = 8
#: SGLang's penalizers.
KINDS = (
    penaltylib.BatchedFrequencyPenalizer,
    penaltylib.BatchedMinNewTokensPenalizer,
    penaltylib.BatchedPresencePenalizer,
    penaltylib.BatchedRepetitionPenalizer,
)


class Namespace(SimpleNamespace):
    """One that can be referred to weakly."""


def request(row: int, params: dict[str, Any], output: Sequence[int] = ()) -> Any:
    """A request of SGLang's as far as penalties look at it."""
    tokenizer = SimpleNamespace(additional_stop_token_ids={ENDS[0]}, eos_token_id=ENDS[1])
    return request_in(
        row,
        origin_input_ids=[0] * (5 + row),
        output_ids=list(output),
        sampling_params=SamplingParams(**params),
        tokenizer=tokenizer,
        eos_token_ids={MODEL_END, *ENDS},
    )


def batch_of_all() -> list[Any]:
    return [request(row, params, output) for row, (params, output) in enumerate(REQUESTS, start=1)]


def penalties_of(reqs: Sequence[Any], device: str = "cpu", use_triton: bool = False) -> Penalties:
    """Penalties of ``reqs``, which have been prefilled with the output that they have."""
    penalties = Penalties(ROWS, VOCAB, device, use_triton)
    penalties.begin_prefill(reqs)
    return penalties


def by_sglang(monkeypatch: pytest.MonkeyPatch, req: Any, drafts: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
    """``logits`` [vocab] after the output of ``req`` and ``drafts``, penalised by SGLang's penalizers."""
    compiled = repetition_penalty.apply_scaling_penalties
    plain = getattr(compiled, "_torchdynamo_orig_callable", compiled)
    monkeypatch.setattr(repetition_penalty, "apply_scaling_penalties", plain)
    params = SamplingParams(**vars_of(req))
    params.stop_token_ids = {token for token in params.stop_token_ids or () if token < VOCAB}
    own = SimpleNamespace(sampling_params=params, tokenizer=req.tokenizer, eos_token_ids=req.eos_token_ids)
    batch: Any = Namespace(reqs=[own], device="cpu")
    orchestrator = object.__new__(penaltylib.BatchedPenalizerOrchestrator)
    init = penaltylib.BatchedPenalizerOrchestrator.__init__
    getattr(init, "__wrapped__", init)(orchestrator, VOCAB, batch, set(KINDS))
    for token in [*req.output_ids, *drafts]:
        orchestrator.cumulate_output_tokens(torch.tensor([token]))
    additive = torch.zeros(1, VOCAB)
    orchestrator.accumulate_additive_penalties(additive)
    result = logits.unsqueeze(0).clone().cpu() + additive
    scaling = orchestrator.accumulate_scaling_penalties()
    if scaling is not None:
        plain(result, scaling)
    return result.squeeze(0)


def vars_of(req: Any) -> dict[str, Any]:
    """The parameters that ``req`` was made with."""
    return REQUESTS[req.req_pool_idx - 1][0]


def random_windows(count: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates [count, W], among them drafts that repeat, and logits [count * W, vocab]."""
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randint(0, VOCAB, (count, WINDOW), generator=generator)
    candidates[0, 1:] = 3
    return candidates.to(device), (3 * torch.randn(count * WINDOW, VOCAB, generator=generator)).to(device)


def positions_of(reqs: Sequence[Any], device: str = "cpu") -> torch.Tensor:
    """int64 [requests * W], of the windows that begin with the requests' last tokens."""
    first = torch.tensor([len(req.origin_input_ids) + len(req.output_ids) - 1 for req in reqs], device=device)
    return (first.unsqueeze(1) + torch.arange(WINDOW, device=device)).flatten()


def rows_of(reqs: Sequence[Any], device: str = "cpu") -> torch.Tensor:
    return torch.tensor([req.req_pool_idx for req in reqs], device=device)
