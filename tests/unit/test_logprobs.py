"""Log-probabilities of chosen tokens in a batch with requests that chose none."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

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
