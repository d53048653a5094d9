"""Prefill by SGLang's breakable graphs on a GPU gives what prefill without graphs gives.

Selections are made while such a graph is half-way. They need scratch memory only for requests of more than 8,192 tokens, and
the graphs hold few new tokens: a long prompt with a cached prefix has both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_process import EngineProcess
from tiny_architectures import VOCAB, for_gpus, write_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: SGLang has no prefill graphs on a CPU"),
]

CONTEXT, CACHED, NEW_TOKENS = 16384, 12_000, 24
#: Tokens after the cached ones, in a forward of one prompt and in one of several.
TAILS = ([40], [7, 300, 64, 129])


def answers(checkpoint: Path, graphs: str) -> tuple[list[dict[str, Any]], str]:
    """Of each tail the log-probabilities of its tokens, and the output; and the engine's log."""
    generator = torch.Generator().manual_seed(0)
    prefixes = [torch.randint(0, VOCAB, (CACHED,), generator=generator).tolist() for _ in range(len(TAILS[1]))]
    found = []
    args: dict[str, Any] = {
        "model_path": str(checkpoint),
        "skip_tokenizer_init": True,
        "device": "cuda",
        "dtype": "bfloat16",
        "context_length": CONTEXT,
        "max_total_tokens": 80_000,
        "max_running_requests": 8,
        "cuda_graph_bs_decode": [1, 4, 8],
        "cuda_graph_backend_prefill": graphs,
        "speculative_algorithm": "SPARSESPEC",
        "sparsespec_speculate": "always",
        "log_level": "info",
    }
    with EngineProcess(**args) as engine:
        for lengths in TAILS:
            tails = [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]
            prompts = [prefix + tail for prefix, tail in zip(prefixes, tails, strict=False)]
            engine.generate(input_ids=prefixes[: len(tails)], sampling_params={"temperature": 0.0, "max_new_tokens": 1})
            outputs = engine.generate(
                input_ids=prompts,
                sampling_params={"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
                return_logprob=True,
                logprob_start_len=CACHED,
            )
            assert all(output["meta_info"]["cached_tokens"] >= CACHED - 1 for output in outputs)
            found += outputs
        return found, engine.log()


def logprobs(output: dict[str, Any]) -> torch.Tensor:
    """Of a tail's tokens and of the first token after it; those after that may part at ties."""
    meta = output["meta_info"]
    known = [entry[0] for entry in meta["input_token_logprobs"] if entry[0] is not None]
    return torch.tensor([*known, meta["output_token_logprobs"][0][0]])


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GptOssForCausalLM"])
def test_prefill_by_breakable_graphs_gives_the_same_log_probabilities(architecture: str, tmp_path: Path) -> None:
    sizes = for_gpus(architecture, dtype="bfloat16", max_position_embeddings=CONTEXT)
    checkpoint = write_tiny(architecture, tmp_path / "checkpoint", **sizes)
    with_graphs, log = answers(checkpoint, "breakable")
    without, _ = answers(checkpoint, "disabled")
    assert "prefill CUDA graph begin" in log, "no graph was captured"
    for one, other in zip(with_graphs, without, strict=True):
        torch.testing.assert_close(logprobs(one), logprobs(other), atol=0.05, rtol=0)
        # A selection that is wrong draws drafts that are not accepted.
        accepted = [output["meta_info"]["spec_accept_length"] for output in (one, other)]
        assert accepted[0] > 0.8 * accepted[1]
