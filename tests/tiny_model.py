"""A tiny random Llama checkpoint, and the exact distribution of the sequences it generates.

Small enough that every sequence of a few tokens can be enumerated, so sampled output can be
compared with the target's distribution itself instead of with other samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 6
CONTEXT = 256


def tiny_config(vocab: int, context: int, end: int | None = None) -> LlamaConfig:
    """A two-layer Llama in float32 with grouped-query attention, whose texts end with the token ``end``.

    Weights are larger than a fresh model's, so that attention is peaked: what a draft leaves
    out then changes its distribution.
    """
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=end,
        tie_word_embeddings=False,
        dtype="float32",
    )


def write_tiny_llama(folder: Path, seed: int = 0, context: int = CONTEXT, vocab: int = VOCAB) -> Path:
    """Write config.json and float32 safetensors of :func:`tiny_config`."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(vocab, context))
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, vocab: int, end: int) -> None:
    """Write a tokenizer of the words "0", "1" and so on, one for each token; ``end`` ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(token): token for token in range(vocab)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=str(end), unk_token="0")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    fast.save_pretrained(folder)


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one request, under SGLang's names and defaults."""

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def as_request(self, max_new_tokens: int) -> dict[str, float | int | bool | list[int]]:
        """The ``sampling_params`` of a request."""
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty,
            "min_new_tokens": self.min_new_tokens,
            "max_new_tokens": max_new_tokens,
            "stop_token_ids": list(self.stop_token_ids),
            "ignore_eos": not self.stop_token_ids,
        }

    def penalised(self, logits: torch.Tensor, output: Sequence[int]) -> torch.Tensor:
        """A row of logits [vocab] after ``output``, token by token from the definitions of SGLang's penalties."""
        logits = logits.double()
        for token in set(output):
            logit = logits[token] - output.count(token) * self.frequency_penalty - self.presence_penalty
            logits[token] = logit * self.repetition_penalty if logit < 0 else logit / self.repetition_penalty
        if len(output) < self.min_new_tokens:
            logits[list(self.stop_token_ids)] = -torch.inf
        return logits

    def distribution(self, logits: torch.Tensor) -> torch.Tensor:
        """Next-token distribution, float64 [vocab], of one row of logits [vocab].

        Token by token from the definitions: a token stays if fewer than top_k tokens are
        likelier, if these have at most top_p of the mass, and if it has at least min_p of
        the likeliest token's probability.
        """
        logits = logits.double()
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
        probs = torch.softmax(logits / self.temperature, dim=-1)
        kept = torch.zeros_like(probs)
        for token, prob in enumerate(probs.tolist()):
            likelier = probs[probs > prob]
            in_top_k = self.top_k < 0 or len(likelier) < self.top_k
            in_top_p = float(likelier.sum()) <= self.top_p
            in_min_p = prob >= self.min_p * float(probs.max())
            if in_top_k and in_top_p and in_min_p:
                kept[token] = prob
        return kept / kept.sum()


@torch.no_grad()
def greedy_continuation(folder: str | Path, prompt: list[int], length: int) -> list[int]:
    """The ``length`` tokens that the checkpoint continues ``prompt`` with at temperature 0, by transformers."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def sequence_probabilities(
    folder: Path, prompt: list[int], length: int, sampling: Sampling
) -> dict[tuple[int, ...], float]:
    """Probability of every sequence that may follow ``prompt``: ``length`` tokens, fewer where one of them is a stop token.

    Computed by transformers from the same weights, with plain full attention; sequences
    of probability 0 are left out.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sequences: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        extended = {prefix: prob for prefix, prob in sequences.items() if set(prefix) & set(sampling.stop_token_ids)}
        prefixes = [prefix for prefix in sequences if prefix not in extended]
        inputs = torch.tensor([prompt + list(prefix) for prefix in prefixes])
        logits = torch.cat([model(chunk).logits[:, -1] for chunk in inputs.split(512)])
        for prefix, row in zip(prefixes, logits, strict=True):
            for token, prob in enumerate(sampling.distribution(sampling.penalised(row, prefix)).tolist()):
                if prob > 0:
                    extended[(*prefix, token)] = sequences[prefix] * prob
        sequences = extended
    return sequences
