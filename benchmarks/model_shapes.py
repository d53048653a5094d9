"""Checkpoints without weights, of models that people serve: write them, and print what to run with them on a GPU.

    python benchmarks/model_shapes.py shapes                     # all of them
    python benchmarks/model_shapes.py shapes gpt-oss-20b qwen3-8b-fp8-block

Each is a folder with a ``config.json`` of the published shapes, for ``--load-format dummy``. Two commands are printed for
each: parity of greedy outputs with plain SGLang's (with a control, which shows how far two plain backends differ), and
throughput beside plain SGLang's at two loads, where acceptance is simulated, since random weights accept as they please.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"

QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN3_1_7B = {
    **QWEN3_8B,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
QWEN3_14B = {
    **QWEN3_8B,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
QWEN3_30B_A3B = {
    **QWEN3_8B,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GEMMA3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "layer_types": [FULL if layer % 6 == 5 else SLIDING for layer in range(26)],
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
#: The text model of Gemma 3 27B, by itself.
GEMMA3_27B = {
    **GEMMA3_1B,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
    "sliding_window": 1024,
    "layer_types": [FULL if layer % 6 == 5 else SLIDING for layer in range(62)],
    "max_position_embeddings": 131072,
}
GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "layer_types": [SLIDING, FULL] * 12,
    "swiglu_limit": 7.0,
    "attention_bias": True,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def _compressed(weights: dict[str, Any], activations: dict[str, Any] | None, storage: str) -> dict[str, Any]:
    """``quantization_config`` of a checkpoint of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": storage,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


#: ``quantization_config`` of checkpoints, as they are published.
QUANTISED: dict[str, dict[str, Any]] = {
    "fp8-block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "compressed-fp8": _compressed(
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
        "float-quantized",
    ),
    "compressed-w4a16": _compressed(
        {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False},
        None,
        "pack-quantized",
    ),
}
#: Configurations by name.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-1.7b": QWEN3_1_7B,
    "qwen3-8b": QWEN3_8B,
    "qwen3-14b": QWEN3_14B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "gemma3-1b": GEMMA3_1B,
    "gemma3-27b-text": GEMMA3_27B,
    "gpt-oss-20b": GPT_OSS_20B,
    **{f"qwen3-8b-{name}": {**QWEN3_8B, "quantization_config": how} for name, how in QUANTISED.items()},
    "qwen3-30b-a3b-fp8-block": {**QWEN3_30B_A3B, "quantization_config": QUANTISED["fp8-block"]},
}
#: Loads of the throughput command: requests x context, where verifications read much KV, and where they read little.
LOADS = ("random:8192,64,256,0", "random:2048,32,256,0")
ACCEPT_LENGTH = 5.0


def write_shapes(folder: Path, names: Iterable[str]) -> list[Path]:
    """Write the named configurations below ``folder``; their paths."""
    written = []
    for name in names:
        path = folder / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(SHAPES[name], indent=1) + "\n")
        written.append(path)
    return written


def commands(path: Path) -> list[str]:
    """What to run with a folder of :func:`write_shapes`."""
    model = f"--model-path {path} --load-format dummy"
    tokens = '--engine-args \'{"skip_tokenizer_init": true}\''
    speculates = "sparsespec sparsespec:pillar:unified"
    engines = "plain sparsespec"
    if "num_experts_per_tok" in SHAPES[path.name] and "quantization_config" not in SHAPES[path.name]:
        # The copies are for Triton's experts; SGLang's choice for gpt-oss is another.
        with_experts = " sparsespec,sparsespec_draft_weights=fp8_experts,moe_runner_backend=triton"
        speculates += with_experts
        engines += with_experts
    return [
        f"python benchmarks/parity.py {model} {tokens} --random-tokens 40,400,4000 --max-new-tokens 64 "
        f"--engines plain:triton {speculates} --results {path.name}-parity.jsonl",
        f"SGLANG_SIMULATE_ACC_LEN={ACCEPT_LENGTH} python benchmarks/throughput.py {model} --engines {engines} "
        f"--loads {' '.join(LOADS)} --results {path.name}-throughput.jsonl",
    ]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHAPES)}; default: all")
    args = parser.parse_args()
    if unknown := set(args.names) - set(SHAPES):
        parser.error(f"no shapes are called {', '.join(sorted(unknown))}")
    for path in write_shapes(args.folder, args.names or SHAPES):
        print(*commands(path), sep="\n")


if __name__ == "__main__":
    main()
