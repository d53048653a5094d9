"""Tiny random checkpoints of the architectures that people serve, in float32, and what transformers computes from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 64
CONTEXT = 512
#: Tokens that a layer with a sliding window attends to: far fewer than the tests' prompts have.
WINDOW = 12

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
GEMMA = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
SLIDING, FULL = "sliding_attention", "full_attention"


#: The smallest sizes that the kernels of GPUs take, and weights that keep the scale of activations with these.
FOR_GPUS: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.15}
#: What some have besides. With all experts for each token, rounding changes no choice.
_OWN_FOR_GPUS: dict[str, dict[str, int]] = {
    "Gemma2ForCausalLM": {"query_pre_attn_scalar": 64},
    "Gemma3ForCausalLM": {"query_pre_attn_scalar": 64},
    "Qwen3MoeForCausalLM": {"num_experts_per_tok": 8},
    "GptOssForCausalLM": {"num_experts_per_tok": 8},
}


def for_gpus(architecture: str, **sizes: Any) -> dict[str, Any]:
    """What a model of ``architecture`` has on a GPU instead of :data:`CONFIGS`' sizes, and other ``sizes``."""
    return {**FOR_GPUS, **_OWN_FOR_GPUS.get(architecture, {}), **sizes}


def _config(kind: str, **own: Any) -> Callable[..., Any]:
    """Weights are larger than a fresh model's, so that attention is peaked: what a draft leaves out then matters."""
    return lambda **sizes: getattr(transformers, kind)(**{**COMMON, "initializer_range": 0.3, **own, **sizes})


#: By the name of the architecture as SGLang's model registry has it.
CONFIGS: dict[str, Callable[..., Any]] = {
    "LlamaForCausalLM": _config("LlamaConfig"),
    "Qwen2ForCausalLM": _config("Qwen2Config"),
    "Qwen3ForCausalLM": _config("Qwen3Config", head_dim=32),
    "Qwen3MoeForCausalLM": _config(
        "Qwen3MoeConfig",
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    ),
    "Gemma3ForCausalLM": _config(
        "Gemma3TextConfig",
        head_dim=32,
        query_pre_attn_scalar=32,
        tie_word_embeddings=True,
        sliding_window=WINDOW,
        layer_types=[SLIDING, SLIDING, FULL, SLIDING],
    ),
    "Gemma2ForCausalLM": _config(
        "Gemma2Config",
        hidden_act="gelu_pytorch_tanh",  # published under both names; SGLang reads this one
        head_dim=32,
        query_pre_attn_scalar=32,
        tie_word_embeddings=True,
        sliding_window=WINDOW,
        attn_logit_softcapping=1.5,
        layer_types=[SLIDING, FULL, SLIDING, FULL],
    ),
    "GptOssForCausalLM": _config(
        "GptOssConfig",
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        swiglu_limit=7.0,
        layer_types=[SLIDING, FULL, SLIDING, FULL],
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": CONTEXT // 4,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    ),
    "ApertusForCausalLM": _config("ApertusConfig"),
    "ArceeForCausalLM": _config("ArceeConfig"),
    "Cohere2ForCausalLM": _config(
        "Cohere2Config", tie_word_embeddings=True, sliding_window=WINDOW, layer_types=[SLIDING, SLIDING, SLIDING, FULL]
    ),
    "CohereForCausalLM": _config("CohereConfig", tie_word_embeddings=True),
    "GemmaForCausalLM": _config("GemmaConfig", head_dim=32, tie_word_embeddings=True),
    "Glm4ForCausalLM": _config("Glm4Config", head_dim=32, partial_rotary_factor=0.5, attention_bias=True),
    "Glm4MoeForCausalLM": _config(
        "Glm4MoeConfig",
        head_dim=32,
        partial_rotary_factor=0.5,
        attention_bias=True,
        use_qk_norm=True,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "GraniteForCausalLM": _config("GraniteConfig"),
    "GraniteMoeForCausalLM": _config("GraniteMoeConfig", num_local_experts=8, num_experts_per_tok=2),
    "Ministral3ForCausalLM": _config("Ministral3Config", sliding_window=None),
    "MistralForCausalLM": _config("MistralConfig", sliding_window=None),
    "MixtralForCausalLM": _config("MixtralConfig", sliding_window=None, num_local_experts=8, num_experts_per_tok=2),
    "Olmo2ForCausalLM": _config("Olmo2Config"),
    "OlmoeForCausalLM": _config("OlmoeConfig", num_key_value_heads=4, num_experts=8, num_experts_per_tok=2),
    "Phi3ForCausalLM": _config("Phi3Config", sliding_window=None),
    "StableLmForCausalLM": _config("StableLmConfig"),
    "Starcoder2ForCausalLM": _config("Starcoder2Config", sliding_window=None),
    # SGLang runs the following with the implementations of transformers.
    "CwmForCausalLM": _config(
        "CwmConfig",
        head_dim=32,
        bos_token_id=1,
        eos_token_id=2,
        sliding_window=WINDOW,
        layer_types=[SLIDING, FULL, SLIDING, FULL],
    ),
    "Ernie4_5ForCausalLM": _config("Ernie4_5Config", head_dim=32),
    "SeedOssForCausalLM": _config("SeedOssConfig", head_dim=32),
    "SmolLM3ForCausalLM": _config("SmolLM3Config"),
}


def write_tiny(architecture: str, folder: Path, seed: int = 0, **sizes: Any) -> Path:
    """Write ``config.json`` and safetensors of a random model of ``architecture``, in float32 if ``sizes`` has no ``dtype``.

    Args:
        sizes: what the configuration has instead of :data:`CONFIGS`', such as :data:`FOR_GPUS`.
    """
    torch.manual_seed(seed)
    config = CONFIGS[architecture](**sizes)
    dtype = config.dtype
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert type(model).__name__ == architecture
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if architecture in GEMMA and "embed_tokens" in name:
                # The model multiplies it by sqrt(hidden size), and each token would be followed by itself.
                weight.mul_(0.8 * config.hidden_size**-0.5)
            elif architecture in GEMMA and name == "model.norm.weight":
                weight.fill_(9.0)  # for logits as large as the other models' have; the model adds 1
            elif name.endswith(("bias", "sinks")):
                weight.normal_(std=0.5)
    model.to(dtype).save_pretrained(folder)
    return folder


@torch.no_grad()
def _logits(folder: Path, prompts: list[list[int]], outputs: list[list[int]]) -> Iterator[torch.Tensor]:
    """``(tokens, vocabulary)`` float32 for each output: what the token in each place was chosen by, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for prompt, output in zip(prompts, outputs, strict=True):
        yield model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]


def likeliest_tokens(folder: Path, prompts: list[list[int]], outputs: list[list[int]]) -> list[list[int]]:
    """The likeliest token in each output token's place, by transformers: the outputs themselves, if they are greedy."""
    return [logits.argmax(-1).tolist() for logits in _logits(folder, prompts, outputs)]


def shortfalls(folder: Path, prompts: list[list[int]], outputs: list[list[int]]) -> torch.Tensor:
    """By how much each output token's logit is less than the largest in its place, by transformers in float32.

    Returns:
        ``(tokens of all outputs,)`` float32.
    """
    chosen = [torch.tensor(output)[:, None] for output in outputs]
    pairs = zip(_logits(folder, prompts, outputs), chosen, strict=True)
    return torch.cat([logits.amax(-1) - logits.gather(1, tokens)[:, 0] for logits, tokens in pairs])
