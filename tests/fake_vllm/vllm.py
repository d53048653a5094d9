"""Stands in for vLLM where the benchmarks' tests have none: the names, arguments and metrics that ``_vllm.py`` uses.

A request's tokens are 0, 1, 2 and so on. A step makes one for each running request, and with speculation three (two drafts
are accepted). Every third request is answered twice as fast, so that requests do not end in their order.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass
class SamplingParams:
    """As vLLM's."""

    temperature: float
    max_tokens: int
    ignore_eos: bool


@dataclass
class Request:
    """A request under way."""

    number: int
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)


class LLM:
    """As vLLM's, with ``llm_engine`` being itself."""

    def __init__(
        self,
        *,
        model: str,
        load_format: str,
        dtype: str,
        seed: int,
        max_num_seqs: int,
        enable_prefix_caching: bool,
        disable_log_stats: bool,
        tensor_parallel_size: int,
        skip_tokenizer_init: bool,
        speculative_config: dict[str, Any] | None = None,
    ) -> None:
        assert not disable_log_stats and enable_prefix_caching
        self.most, self.speculates = max_num_seqs, speculative_config is not None
        self.numbers = itertools.count()
        self.requests: dict[str, Request] = {}
        self.generated = self.accepted = 0
        self.llm_engine = self.engine_core = self

    def enqueue(self, prompts: list[dict[str, list[int]]], params: SamplingParams, use_tqdm: bool) -> list[str]:
        """As vLLM's: the internal names of the requests."""
        (prompt,) = prompts
        assert prompt["prompt_token_ids"] and not use_tqdm
        number = next(self.numbers)
        self.requests[f"{number}-0a1b2c3d"] = Request(number, params)
        return [f"{number}-0a1b2c3d"]

    def step(self) -> list[Any]:
        """As vLLM's: what ended, in no order of the requests."""
        running = list(self.requests.items())[: self.most]
        ended = []
        for name, request in reversed(running):
            tokens = (3 if self.speculates else 1) * (2 if request.number % 3 == 2 else 1)
            tokens = min(tokens, request.params.max_tokens - len(request.tokens))
            request.tokens += range(len(request.tokens), len(request.tokens) + tokens)
            self.generated += tokens
            self.accepted += tokens - 1 if self.speculates else 0
            if len(request.tokens) == request.params.max_tokens:
                del self.requests[name]
                output = SimpleNamespace(token_ids=tuple(request.tokens), finish_reason="length")
                ended.append(SimpleNamespace(request_id=str(request.number), finished=True, outputs=[output]))
        return ended

    def abort_request(self, names: list[str], internal: bool) -> None:
        """As vLLM's."""
        assert internal
        for name in names:
            self.requests.pop(name, None)

    def get_metrics(self) -> list[Any]:
        """As vLLM's; without speculation it has no counter of accepted drafts."""
        values = {"vllm:generation_tokens": self.generated, "vllm:num_preemptions": 0}
        values["vllm:num_requests_running"] = min(self.most, len(self.requests))
        values.update({"vllm:spec_decode_num_accepted_tokens": self.accepted} if self.speculates else {})
        histogram = SimpleNamespace(name="vllm:request_generation_tokens", count=0)
        return [histogram, *(SimpleNamespace(name=name, value=value) for name, value in values.items())]

    def reset_prefix_cache(self) -> bool:
        """As vLLM's."""
        return True

    def shutdown(self) -> None:
        """As vLLM's."""
        assert not self.requests
