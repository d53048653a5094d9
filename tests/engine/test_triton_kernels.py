"""The Triton kernels inside a serving engine, in Triton's interpreter on CPU.

Kernel tests call the kernels with tensors of their own; here the model, SGLang's KV pool and the
scheduler do, which catches what those tests assume (strides of the queries, for one).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_process import EngineProcess, install_plugin, plain_rounds_plugin
from tiny_model import greedy_continuation
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow

VOCAB = 64
PROMPTS = [[5 + (7 * i + j * j) % 50 for j in range(30 + 11 * i)] for i in range(3)]
NEW_TOKENS = 16
SAMPLING = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
KERNELS_PLUGIN = '''
def register():
    """Use the Triton kernels, with tiles small enough for the interpreter, whatever the device."""
    import os
    import pathlib

    import fast_interpreter

    from sglang_sparsespec.attention_backend import backend
    from sglang_sparsespec.attention_backend.kernels import triton_draft, triton_prefill_scores, triton_verify
    from sglang_sparsespec.attention_backend.kernels.triton_kernels import TritonKernels

    fast_interpreter.install()

    def make_kernels(name, shape, table, req_to_token, early_start=True):
        pathlib.Path(os.environ["TRITON_KERNELS_USED"]).touch()
        return TritonKernels(
            shape,
            table,
            req_to_token,
            draft_config=triton_draft.DraftConfig(block_n=16, min_chunk=16),
            verify_config=triton_verify.VerifyConfig(block_n=16, min_blocks=1),
            scores_config=triton_prefill_scores.ScoresConfig(block_n=16, min_chunk=16),
        )

    backend.make_kernels = make_kernels
'''


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random two-layer Llama with head dim 64, the smallest that the kernels take."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def outputs(checkpoint: str, env: dict[str, str], schedule: str) -> list[list[int]]:
    settings = {
        "model_path": checkpoint,
        "device": "cpu",
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_total_tokens": 1000,
        "max_running_requests": 3,
        "speculative_algorithm": "SPARSESPEC",
        "sparsespec_speculate": "always",
        "speculative_num_steps": 3,
        "sparsespec_schedule": schedule,
        "sparsespec_min_budget": 16,
        "log_level": "warning",
    }
    with EngineProcess(env, **settings) as engine:
        answers = engine.generate(input_ids=PROMPTS, sampling_params=SAMPLING)
    return [answer["output_ids"] for answer in answers]


@pytest.fixture(scope="module")
def expected(checkpoint: str) -> list[list[int]]:
    """The target's greedy continuations, by transformers."""
    return [greedy_continuation(checkpoint, prompt, NEW_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("schedule", ["lockstep", pytest.param("unified", marks=pytest.mark.nightly)])
def test_triton_kernels_serve_the_targets_greedy_tokens(
    schedule: str, checkpoint: str, expected: list[list[int]], tmp_path: Path
) -> None:
    used = tmp_path / "used"
    plugin = install_plugin(tmp_path, "zz_triton_on_cpu", KERNELS_PLUGIN)
    if schedule == "lockstep":
        # Beside the other plugin, on the path that it has made.
        plugin = plain_rounds_plugin(tmp_path)
    env = {"TRITON_INTERPRET": "1", "TRITON_KERNELS_USED": str(used), **plugin}
    assert outputs(checkpoint, env, schedule) == expected
    assert used.exists()
