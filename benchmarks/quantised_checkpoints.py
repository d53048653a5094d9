"""Quantised checkpoints made from a 16-bit one by rounding to the nearest value, for parity of quantised targets.

    python benchmarks/quantised_checkpoints.py MODEL FOLDER                 # all forms
    python benchmarks/quantised_checkpoints.py MODEL FOLDER awq fp8-block

Writes FOLDER/MODEL-FORM for each form of ``model_shapes.QUANTISED``, as their own tools write them: linear layers of the
decoder quantised, all else as it was. Nothing is calibrated, so texts are worse than a published checkpoint's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from model_shapes import QUANTISED
from safetensors.torch import load_file, save_file

GROUP = 128
BLOCK = 128
LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max
#: Which of eight columns is in which four bits of an AWQ word.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NIBBLES = torch.arange(8) * 4


def pack(values: torch.Tensor) -> torch.Tensor:
    """``(..., 8 n)`` values from 0 to 15 as ``(..., n)`` int32, the first in the lowest four bits."""
    words = values.unflatten(-1, (-1, 8)).to(torch.int64) << NIBBLES.to(values.device)
    return words.sum(-1).to(torch.uint32).view(torch.int32)


def to_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric, by groups of inputs.

    Args:
        weight: ``(outputs, inputs)``.

    Returns:
        ``(outputs, inputs)`` values from 0 to 15, where 8 stands for 0; ``(outputs, inputs / GROUP)`` scales.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp_(min=1e-8).half().float()
    return ((groups / scale).round() + 8).clamp_(0, 15).to(torch.uint8).flatten(1), scale[..., 0]


def fp8_block(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """One scale for each block of ``BLOCK`` outputs and inputs."""
    outputs, inputs = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -inputs % BLOCK, 0, -outputs % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)) / LARGEST_FP8
    values = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return {"weight": values[:outputs, :inputs].to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def fp8_channel(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """One scale for each output."""
    scale = weight.float().abs().amax(1, keepdim=True) / LARGEST_FP8
    return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def packed_int4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Words hold eight inputs of an output."""
    values, scale = to_int4(weight)
    return {
        "weight_packed": pack(values),
        "weight_scale": scale.to(weight.dtype),
        "weight_shape": torch.tensor(weight.shape),
    }


def gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Words hold eight inputs of an output; a zero point is kept less 1."""
    values, scale = to_int4(weight)
    inputs = torch.arange(weight.shape[1], dtype=torch.int32)
    return {
        "qweight": pack(values).T,
        "scales": scale.T.half(),
        "qzeros": pack(torch.full_like(scale.T, 7, dtype=torch.uint8)),
        "g_idx": inputs // GROUP,
    }


def awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Words hold eight outputs of an input."""
    values, scale = to_int4(weight)
    ordered = values.T.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2)
    return {
        "qweight": pack(ordered),
        "scales": scale.T.half(),
        "qzeros": pack(torch.full_like(scale.T, 8, dtype=torch.uint8)),
    }


FORMS: dict[str, Callable[[torch.Tensor], dict[str, torch.Tensor]]] = {
    "fp8-block": fp8_block,
    "awq": awq,
    "gptq": gptq,
    "compressed-fp8": fp8_channel,
    "compressed-w4a16": packed_int4,
}


def quantise(model: Path, folder: Path, form: str) -> Path:
    """Write the checkpoint of ``form``; its folder."""
    target = folder / f"{model.name}-{form}"
    target.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name.endswith("_proj.weight"):
                parts = FORMS[form](tensor.to(device))
                layer = name.removesuffix("weight")
                tensors |= {layer + part: value.cpu().contiguous() for part, value in parts.items()}
            else:
                tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    for file in model.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json") and file.is_file():
            shutil.copy(file, target)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = QUANTISED[form]
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return target


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("forms", nargs="*", metavar="FORM", help=f"of {', '.join(FORMS)}; default: all")
    args = parser.parse_args()
    if unknown := set(args.forms) - set(FORMS):
        parser.error(f"no form is called {', '.join(sorted(unknown))}")
    for form in args.forms or FORMS:
        print(quantise(args.model, args.folder, form), flush=True)


if __name__ == "__main__":
    main()
