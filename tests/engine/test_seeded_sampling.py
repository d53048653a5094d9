"""Seeded sampling on a CPU (``--enable-deterministic-inference``): plain SGLang's tokens for each seed.

A tiny random model in float32. Plain SGLang allows the flag with attention backends of GPUs only; a plugin of this test has
it take PyTorch's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_process import PLAIN, PLAIN_ENV, EngineProcess, install_plugin
from tiny_model import VOCAB, write_tiny_llama

pytestmark = pytest.mark.slow

NEW_TOKENS = 25
PROMPTS = [[(3 * i + j) % VOCAB for j in range(length)] for i, length in enumerate((3, 17, 40, 5, 9, 26, 11, 8))]
PARAMS: list[dict[str, Any]] = [
    {"temperature": 1.0, "sampling_seed": 7},
    {"temperature": 0.7, "sampling_seed": 2**40 + 1, "top_p": 0.8},
    {"temperature": 1.3},
    {"temperature": 1.0, "sampling_seed": 7, "top_k": 3},
    {"temperature": 0.0, "sampling_seed": 3},
    {"temperature": 1.5, "sampling_seed": -5},
    {"temperature": 1.0, "sampling_seed": 8},
    {"temperature": 1.0, "sampling_seed": 9},
]
ALLOW_TORCH = """
def register():
    from sglang.srt import server_args
    server_args.add_deterministic_attention_backend_choices(["torch_native"])
    server_args.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
"""
#: Drafts and verifications with the noise of the next position.
SHIFT_NOISE = """
def register():
    from sglang_sparsespec.sampling import reference
    original = reference.sample_seeded
    reference.sample_seeded = lambda logits, rows, positions: original(logits, rows, positions + 1)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


def engine_args(checkpoint: Path) -> dict[str, Any]:
    return {
        "model_path": str(checkpoint),
        "skip_tokenizer_init": True,
        "device": "cpu",
        "dtype": "float32",
        "enable_deterministic_inference": True,
        "max_running_requests": 8,
        "max_total_tokens": 2048,
        "log_level": "warning",
    }


SPARSESPEC: dict[str, Any] = {"speculative_algorithm": "SPARSESPEC", "sparsespec_speculate": "always"}


def generate(engine: EngineProcess, turns: range = range(len(PROMPTS))) -> list[list[int]]:
    params = [{**PARAMS[i], "max_new_tokens": NEW_TOKENS, "ignore_eos": True} for i in turns]
    return [out["output_ids"] for out in engine.generate(input_ids=[PROMPTS[i] for i in turns], sampling_params=params)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    env = {**PLAIN_ENV, **install_plugin(tmp_path_factory.mktemp("site"), "zz_allow_torch", ALLOW_TORCH)}
    with EngineProcess(env, **engine_args(checkpoint), **PLAIN) as engine:
        return generate(engine)


def test_seeds_give_plain_sglangs_tokens(checkpoint: Path, expected: list[list[int]]) -> None:
    with EngineProcess(**engine_args(checkpoint), **SPARSESPEC) as engine:
        assert generate(engine) == expected
        assert engine.state()["sparsespec_accept_length"] > 2
        # Beside other requests, and in plain rounds.
        assert generate(engine, range(2, 5)) == expected[2:5]
        engine.set_speculate("never")
        assert generate(engine) == expected


@pytest.mark.nightly
def test_seeds_give_plain_sglangs_tokens_in_unified_batches(checkpoint: Path, expected: list[list[int]]) -> None:
    with EngineProcess(**engine_args(checkpoint), **SPARSESPEC, sparsespec_schedule="unified") as engine:
        assert generate(engine) == expected


@pytest.mark.nightly
def test_noise_of_other_positions_would_be_found(
    checkpoint: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    with EngineProcess(install_plugin(tmp_path, "zz_shift", SHIFT_NOISE), **engine_args(checkpoint), **SPARSESPEC) as engine:
        found = generate(engine)
    assert found[4] == expected[4], "a greedy request takes no noise"
    assert found != expected
