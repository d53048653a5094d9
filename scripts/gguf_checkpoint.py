"""Turn a GGUF file (Llama or Qwen2 architecture) into a Hugging Face checkpoint.

Weights are dequantised with the numpy code of the package ``gguf``, rows of all tensors in
parallel processes, straight into the safetensors file. Neither PyTorch nor transformers is
imported. The tensors are bit-identical to what ``transformers`` makes of the same file; the
tokenizer is built from the file's vocabulary, merges and pre-tokenizer name.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
CHUNK_ELEMENTS = 1 << 21
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type


class ConversionError(RuntimeError):
    """The file cannot be converted; the message says why."""


# ------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]  # rows first, as in PyTorch
    kind: int  # ggml type
    start: int  # byte offset in the file


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GGUFFile:
    """Metadata and tensor directory of a GGUF file (version 2 or 3, little-endian).

    Attributes:
        fields: metadata by key.
        tensors: the tensors, in file order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ConversionError(f"{path} is not a GGUF file.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as self._data:
                self._read()

    def _read(self) -> None:
        self._at = 4
        version, tensor_count, field_count = self._unpack("<IQQ")
        if version not in (2, 3):
            raise ConversionError(f"{self.path}: GGUF version {version} is not supported.")
        self.fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = self._string()
            self.fields[key] = self._value(self._unpack("<I")[0])
        directory = []
        for _ in range(tensor_count):
            name = self._string()
            shape = self._unpack(f"<{self._unpack('<I')[0]}Q")
            directory.append((name, shape[::-1], *self._unpack("<IQ")))
        alignment = self.fields.get("general.alignment", 32)
        base = -(-self._at // alignment) * alignment
        self.tensors = [Tensor(name, shape, kind, base + offset) for name, shape, kind, offset in directory]

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._unpack("<IQ")
            if item in _SCALARS:
                return list(self._unpack(f"<{count}{_SCALARS[item]}"))
            return [self._value(item) for _ in range(count)]
        return self._unpack(f"<{_SCALARS[kind]}")[0]


# -------------------------------------------------------------------- names and config

_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def checkpoint_name(gguf_name: str) -> str:
    """The Hugging Face name of a GGUF tensor."""
    parts = gguf_name.split(".")
    try:
        if parts[0] == "blk":
            _, layer, module, suffix = parts
            return f"model.layers.{layer}.{_MODULES[module]}.{suffix}"
        module, suffix = parts
        return f"{_MODULES[module]}.{suffix}"
    except (KeyError, ValueError):
        raise ConversionError(f"tensor {gguf_name} has no known place in a Llama or Qwen2 model.") from None


def model_config(gguf: GGUFFile, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    arch = gguf.fields["general.architecture"]
    if arch not in _ARCHITECTURES:
        raise ConversionError(f"architecture {arch!r} is not supported, only {', '.join(_ARCHITECTURES)}.")
    scaling = sorted(key for key in gguf.fields if key.startswith(f"{arch}.rope.scaling"))
    if scaling:
        raise ConversionError(f"scaled rotary embeddings are not supported ({', '.join(scaling)}).")

    def get(key: str) -> Any:
        return gguf.fields[f"{arch}.{key}"]

    heads, hidden = get("attention.head_count"), get("embedding_length")
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[arch]],
        # Of the layout of this file; without it, transformers warns of a wrong tokenizer.
        "transformers_version": "5.0.0",
        "model_type": arch,
        "dtype": dtype,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": get("block_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": gguf.fields.get(f"{arch}.attention.key_length", hidden // heads),
        # The file holds a float32 (9.99999997e-07): its shortest decimal is what was meant.
        "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
        "rope_theta": get("rope.freq_base"),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in gguf.tensors),
        "vocab_size": len(gguf.fields["tokenizer.ggml.tokens"]),
    }
    if arch == "qwen2":
        config["use_sliding_window"] = False
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = gguf.fields.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            config[f"{name}_token_id"] = token
    return config


# --------------------------------------------------------------------------- tokenizer

# Qwen2's pattern, by way of transformers' Qwen2Tokenizer (Apache-2.0).
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def write_tokenizer(gguf: GGUFFile, output: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    def field(key: str, default: Any = None) -> Any:
        return gguf.fields.get(f"tokenizer.ggml.{key}", default)

    if field("model") != "gpt2":
        raise ConversionError(f"tokenizer model {field('model')!r} is not supported, only byte-level BPE (gpt2).")
    tokens, kinds = field("tokens"), field("token_type")
    # Control and user-defined tokens stay in the vocabulary too; unused padding entries do not.
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] in (NORMAL, CONTROL, USER_DEFINED)}
    merges = [tuple(merge.split(" ", 1)) for merge in field("merges")]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=field("pre") != "qwen2")
    if field("pre") == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated")
    elif field("pre") == "smollm":
        split = pre_tokenizers.Digits(individual_digits=True)
    else:
        raise ConversionError(f"pre-tokenizer {field('pre')!r} is not supported, only qwen2 and smollm.")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        tokenizer.add_tokens(
            [
                AddedToken(token, special=special, normalized=False)
                for i, token in enumerate(tokens)
                if kinds[i] == kind
            ]
        )
    tokenizer.save(str(output / "tokenizer.json"))

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(field("add_bos_token", False)),
        "model_max_length": gguf.fields[f"{gguf.fields['general.architecture']}.context_length"],
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token = field(f"{key}_token_id")
        if token is not None:
            config[f"{name}_token"] = tokens[token]
    template = gguf.fields.get("tokenizer.chat_template")
    if template:
        config["chat_template"] = template
    write_json(output / "tokenizer_config.json", config)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Piece:
    """Some rows of one tensor: where they are read, and where they go."""

    kind: int
    columns: int  # elements per row
    rows: int  # of the whole tensor
    first: int
    count: int
    start: int  # byte offset of the tensor in the GGUF file
    target: int  # byte offset of the tensor in the safetensors file
    permuted_heads: int  # > 0: rows are interleaved by head for llama.cpp's rotary embedding


def row_bytes(kind: int, columns: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return columns // block * size


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even; the result is its 16 bits."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def convert_piece(source: Path, target: Path, dtype: str, piece: Piece) -> int:
    """Dequantise the rows of ``piece``; return how many elements were written."""
    from gguf import GGMLQuantizationType, dequantize

    size = row_bytes(piece.kind, piece.columns)
    raw = np.fromfile(source, np.uint8, piece.count * size, offset=piece.start + piece.first * size)
    kind = GGMLQuantizationType(piece.kind)
    values = np.ascontiguousarray(dequantize(raw.reshape(piece.count, size), kind), np.float32)
    cells = to_bfloat16(values) if dtype == "bfloat16" else values
    # Written through a map, so that pieces of one tensor need no order.
    out = np.memmap(target, cells.dtype, "r+", piece.target, (piece.rows, piece.columns))
    rows = np.arange(piece.first, piece.first + piece.count)
    if piece.permuted_heads:
        half = piece.rows // piece.permuted_heads // 2
        head, inner = np.divmod(rows, 2 * half)
        rows = head * 2 * half + inner % 2 * half + inner // 2
        out[rows] = cells
    else:
        out[piece.first : piece.first + piece.count] = cells
    return cells.size


def plan(gguf: GGUFFile, config: dict[str, Any], dtype: str) -> tuple[bytes, list[Piece], int]:
    """The safetensors header, the pieces of work, and the size of the file."""
    label, width = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in gguf.tensors:
        begin, end = end, end + int(np.prod(tensor.shape)) * width
        header[checkpoint_name(tensor.name)] = {
            "dtype": label,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = struct.pack("<Q", len(text)) + text
    pieces = []
    for tensor in gguf.tensors:
        columns, rows = tensor.shape[-1], int(np.prod(tensor.shape[:-1]))
        heads = 0
        if config["model_type"] == "llama" and tensor.name.split(".")[-2] in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if ".attn_q." in tensor.name else "num_key_value_heads"]
        target = len(text) + header[checkpoint_name(tensor.name)]["data_offsets"][0]
        step = max(1, CHUNK_ELEMENTS // columns)
        pieces += [
            Piece(tensor.kind, columns, rows, first, min(step, rows - first), tensor.start, target, heads)
            for first in range(0, rows, step)
        ]
    pieces.sort(key=lambda piece: -piece.count * piece.columns)
    return text, pieces, len(text) + end


def convert_weights(
    gguf: GGUFFile, config: dict[str, Any], dtype: str, target: Path, workers: int, say: Callable[[str], None]
) -> None:
    """Write all weights into one safetensors file."""
    header, pieces, size = plan(gguf, config, dtype)
    with target.open("wb") as file:
        file.write(header)
        file.truncate(size)
    total, done = sum(piece.count * piece.columns for piece in pieces), 0
    started = shown = time.monotonic()
    for count in _converted(gguf.path, target, dtype, pieces, workers):
        done += count
        if time.monotonic() - shown > 2 or done == total:
            shown = time.monotonic()
            say(f"  weights: {done / 1e6:.0f} of {total / 1e6:.0f} million, {shown - started:.0f} s")


def _converted(source: Path, target: Path, dtype: str, pieces: list[Piece], workers: int) -> Iterator[int]:
    if workers <= 1:
        for piece in pieces:
            yield convert_piece(source, target, dtype, piece)
        return
    # Nothing that starts threads is loaded in this process, unless a caller did: then do not fork.
    method = "spawn" if "torch" in sys.modules or "tokenizers" in sys.modules else "fork"
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method)) as pool:
        for future in as_completed([pool.submit(convert_piece, source, target, dtype, p) for p in pieces]):
            yield future.result()


# ------------------------------------------------------------------------------- whole


def convert(source: Path, output: Path, dtype: str, say: Callable[[str], None], workers: int = 0) -> None:
    """Write the checkpoint of the GGUF file ``source`` into the existing empty folder ``output``.

    Args:
        dtype: ``float32`` or ``bfloat16``.
        workers: processes that dequantise; 0 for one per core.
        say: takes progress lines.

    Raises:
        ConversionError: the file holds something that is not supported.
    """
    if dtype not in DTYPES:
        raise ConversionError(f"dtype {dtype!r} is not supported, only {', '.join(DTYPES)}.")
    gguf = GGUFFile(source)
    config = model_config(gguf, dtype)
    convert_weights(
        gguf, config, dtype, output / "model.safetensors", workers or len(os.sched_getaffinity(0)), say
    )
    write_tokenizer(gguf, output)
    write_json(output / "config.json", config)
    special: dict[str, Any] = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    write_json(output / "generation_config.json", special)
