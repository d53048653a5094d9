"""Checkpoints without weights (``benchmarks/model_shapes.py``): transformers reads them, and their commands are valid."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import model_shapes  # noqa: E402
import parity  # noqa: E402


@pytest.mark.parametrize("name", model_shapes.SHAPES)
def test_configurations_are_whole(name: str, tmp_path: Path) -> None:
    (path,) = model_shapes.write_shapes(tmp_path, [name])
    config, asked = AutoConfig.from_pretrained(path), model_shapes.SHAPES[name]
    assert config.architectures == asked["architectures"] and config.num_hidden_layers == asked["num_hidden_layers"]
    kinds = getattr(config, "layer_types", None) or []
    assert kinds in ([], asked.get("layer_types", ["full_attention"] * config.num_hidden_layers))


def test_the_parity_command_is_one(tmp_path: Path) -> None:
    (path,) = model_shapes.write_shapes(tmp_path, ["gpt-oss-20b"])
    words = shlex.split(model_shapes.commands(path)[0])
    assert words[:2] == ["python", "benchmarks/parity.py"]
    args = parity.parse_arguments(words[2:])
    assert args.random_tokens == [40, 400, 4000] and args.load_format == "dummy"
    prompts = parity.random_prompts(args.random_tokens, 2, vocab_size=50)
    assert [len(prompt) for prompt in prompts] == [40, 40, 400, 400, 4000, 4000]
    assert prompts == parity.random_prompts(args.random_tokens, 2, vocab_size=50)
    assert all(0 <= token < 50 for prompt in prompts for token in prompt) and prompts[0] != prompts[1]
