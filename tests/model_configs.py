"""Models that consist of a ``config.json``: SGLang reads no more before it resolves or refuses a server's arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "dtype": "float32",
}


def write_config(folder: Path, changes: dict[str, Any] | None = None) -> str:
    """Make ``folder`` with a Llama's ``config.json``, of which ``changes`` are other values; its path."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**LLAMA, **(changes or {})}))
    return str(folder)
