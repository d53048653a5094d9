"""Log-probabilities of chosen tokens in a batch with requests that chose none, and those of retracted requests."""

from __future__ import annotations

import inspect
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_parts import needs_hook

from sglang_sparsespec.scheduler_patch import logprobs as hooked


@needs_hook("no_tokens_are_an_empty_tensor")
@pytest.mark.parametrize("algorithm", ["SPARSESPEC", "NGRAM"])
def test_requests_that_chose_no_tokens_get_an_empty_tensor(
    algorithm: str, plugin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's scheduler asks every entry for ``tolist``."""
    from sglang.srt.layers import logprob_processor

    args = SimpleNamespace(speculative_algorithm=algorithm)
    monkeypatch.setattr(hooked, "get_server_args", lambda: args)
    rows = torch.arange(8.0).view(2, 4)
    values, indices = logprob_processor.get_token_ids_logprobs(rows, [None, [1, 3]], no_copy_to_cpu=True)
    assert indices == [[], [1, 3]] and values[1].tolist() == [5, 7]
    if algorithm == "SPARSESPEC":
        assert values[0].tolist() == []
    else:
        assert values[0] == []
    assert inspect.unwrap(logprob_processor.get_token_ids_logprobs) is not logprob_processor.get_token_ids_logprobs


@needs_hook("no_logprob_is_sent_of_no_token")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("algorithm", ["SPARSESPEC", "NGRAM"])
def test_a_request_retracted_in_its_prefill_keeps_its_first_logprob(
    algorithm: str, stream: bool, plugin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang drops the token of that prefill and sends an empty chunk; the next prefill samples the token anew."""
    from sglang.srt.disaggregation.utils import DisaggregationMode
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler_components.output_streamer import _GenerationStreamAccumulator
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    args = SimpleNamespace(speculative_algorithm=algorithm)
    monkeypatch.setattr(hooked, "get_server_args", lambda: args)
    params = SamplingParams(max_new_tokens=2)
    params.normalize(None)
    req: Any = Req("request", "", array("q", [1, 2, 3]), params, return_logprob=True, stream=stream, vocab_size=9)

    def sent() -> list[int]:
        chunk = _GenerationStreamAccumulator(
            return_logprob=True,
            return_hidden_states=False,
            return_routed_experts=False,
            return_indexer_topk=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            disaggregation_mode=DisaggregationMode.NULL,
            default_stream_interval=1,
            default_force_stream_interval=50,
            get_cached_tokens_details=lambda req: None,
        )
        chunk.accept(req=req)
        return [token for tokens in chunk.output_token_logprobs_idx for token in tokens]

    req.is_retracted = True
    found = sent()
    req.is_retracted = False
    for token in (7, 8):
        req.output_ids.append(token)
        req.logprob.output_token_logprobs_val.append(-0.5)
        req.logprob.output_token_logprobs_idx.append(token)
        req.update_finish_state()
        found += sent()
    assert found == ([7, 8] if algorithm == "SPARSESPEC" else [8])
