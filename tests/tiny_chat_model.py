"""A tiny random chat model with a tokenizer, whose answers end in many ways within a few dozen tokens.

Its vocabulary is small: all bytes, some pieces of several letters, and special tokens for turns and for reasoning. Greedy
answers therefore hold end tokens, ends of reasoning, line breaks and characters of several tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_model import tiny_config
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 512
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<think>", "</think>"]
END, THINK_END = 0, 4
PIECES = ["ab", "abc", "the", "an", ". ", "\n\n", "é", "ß", "→", "😀", ") ", '{"', '": ', "12"]
#: Sizes of rows of the head, relative to letters: of bytes that are no text, and of what ends an answer or its reasoning.
RARE, COMMON = 0.75, 1.25
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


def _tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    merges = []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for piece in PIECES:
        pieces = list(byte_level.pre_tokenize_str(piece)[0][0])
        for end in range(2, len(pieces) + 1):
            merged = "".join(pieces[:end])
            if merged not in vocabulary:
                vocabulary[merged] = len(vocabulary)
                merges.append(("".join(pieces[: end - 1]), pieces[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer


def write_tiny_chat_model(folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint of a two-layer Llama in float32 with grouped-query attention, and its tokenizer."""
    tokenizer = _tokenizer()
    size = tokenizer.get_vocab_size()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(size, CONTEXT, END))
    with torch.no_grad():
        for token, index in tokenizer.get_vocab().items():
            if index in (END, THINK_END):
                model.lm_head.weight[index] *= COMMON
            elif len(SPECIAL) <= index < len(SPECIAL) + 256 and not ("a" <= token <= "z" or token in '0123456789.{}"ĠĊ'):
                model.lm_head.weight[index] *= RARE
    model.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=TEMPLATE)
    wrapped.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    return folder
