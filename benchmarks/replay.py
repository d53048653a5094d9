"""Expected accept length of selections on a fixed text: which selection is better, with far fewer samples than outputs.

    python benchmarks/replay.py --model-path M --contexts 1024 --lookaheads 0 4 8 --weights 0.25 0.5

Sampled outputs of two settings differ, and so do their accept lengths, by chance alone. Here the model (in Transformers,
without an engine) writes a text once, and every setting drafts its next ``k`` tokens from many places of it. A draft is
accepted with probability sum(min(p, q)) of full and sparse attention's distributions, so the expected accept length
needs no sampling, and settings are compared place by place. At temperature 0 a draft is accepted or not.

As in the plugin, a selection is made from the mean attention of a window of ``k`` + 1 tokens, and drafts attend to it
and to everything since the window's begin; the first round's window is the prompt's end. Unlike there, the drafts are
the text's tokens, and so are those after the accepted ones in the window that the selection is made from.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _common import append_json_line, say
from _workloads import LEAST_DISTINCT, distinct_share, make_prompts

from sglang_sparsespec.attention_backend.page_table import num_selected
from sglang_sparsespec.attention_backend.torch_kernels import look_ahead
from sglang_sparsespec.config import SparseSpecConfig

#: Drafts accepted before, look-ahead and its weight.
Key = tuple[int, int, float]
ATTENTION = "sparsespec_replay"
#: Places of later rounds lie so many tokens apart.
STRIDE = 5


class Replay:
    """A text, and drafts from places of it.

    Attributes:
        attention: float32 [layers, Hkv, tokens - first, tokens], each query's probabilities, mean over a group's heads.
        logits: float32 [tokens, vocabulary].

    Args:
        model: a causal language model of Transformers, of plain attention.
        text: int64 [tokens].
        first: queries from this position on have their probabilities kept.
    """

    def __init__(self, model: Any, text: torch.Tensor, first: int) -> None:
        from transformers import AttentionInterface

        self.model, self.text, self.first = model, text, first
        config = model.config
        shape = (config.num_hidden_layers, config.num_key_value_heads, len(text) - first, len(text))
        self.attention = torch.empty(shape)
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._visible: torch.Tensor | None = None
        AttentionInterface.register(ATTENTION, self._attend)
        model.set_attn_implementation(ATTENTION)
        self.logits = self._forward(text.unsqueeze(0), torch.arange(len(text)).unsqueeze(0))[0]

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, position_ids=positions, use_cache=False).logits

    def _attend(
        self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """q: [rows, Hq, tokens, D]; k, v: [rows, Hkv, tokens, D]. Returns [rows, tokens, Hq, D]."""
        rows, heads, tokens, dim = q.shape
        layer, kv_heads = module.layer_idx, k.shape[1]
        grouped = q.view(rows, kv_heads, -1, tokens, dim)
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        own = (grouped @ k.unsqueeze(2).mT * scaling).masked_fill_(~causal, -torch.inf)
        if self._visible is None:
            self._keys[layer], self._values[layer] = k[0], v[0]
            probabilities = own.softmax(-1)
            self.attention[layer] = probabilities[0, :, :, self.first :].mean(1)
            out = probabilities @ v.unsqueeze(2)
        else:
            keys, values = self._keys[layer].unsqueeze(1), self._values[layer].unsqueeze(1)
            hidden = ~self._visible[:, layer].unsqueeze(2).unsqueeze(2)
            text = (grouped @ keys.mT * scaling).masked_fill_(hidden, -torch.inf)
            of_text, of_own = torch.cat([text, own], -1).softmax(-1).split([text.shape[-1], tokens], -1)
            out = of_text @ values + of_own @ v.unsqueeze(2)
        return out.reshape(rows, heads, tokens, dim).transpose(1, 2), None

    def window_scores(self, begins: torch.Tensor, window: int) -> torch.Tensor:
        """Scores [rounds, layers, Hkv, tokens] by the ``window`` queries from ``begins`` (int64 [rounds]) on."""
        rows = begins.unsqueeze(1) - self.first + torch.arange(window)
        scores = self.attention[:, :, rows].mean(3).permute(2, 0, 1, 3)
        return scores * (torch.arange(len(self.text)) < begins.view(-1, 1, 1, 1))

    def accept_lengths(
        self,
        scores: torch.Tensor,
        counts: torch.Tensor,
        begins: torch.Tensor,
        places: torch.Tensor,
        k: int,
        temperature: float,
    ) -> list[float]:
        """Expected accept length of each round.

        Args:
            scores: [rounds, layers, Hkv, tokens]; the ``counts`` (int [rounds]) best before the window are selected.
            begins, places: int64 [rounds], positions of the window's first token and of the first draft's query.
        """
        position = torch.arange(len(self.text))
        before = position < begins.view(-1, 1, 1, 1)
        order = scores.masked_fill(~before, -1).argsort(dim=-1, descending=True, stable=True)
        chosen = torch.zeros_like(order, dtype=torch.bool).scatter_(
            -1, order, (position < counts.view(-1, 1, 1, 1)).expand_as(order)
        )
        tail = ~before & (position < places.view(-1, 1, 1, 1))
        self._visible = (chosen & before) | tail
        positions = places.unsqueeze(1) + torch.arange(k)
        drafted, full = self._forward(self.text[positions], positions), self.logits[positions]
        self._visible = None
        if temperature == 0:
            accepted = (drafted.argmax(-1) == full.argmax(-1)).float()
        else:
            accepted = torch.minimum((drafted / temperature).softmax(-1), (full / temperature).softmax(-1)).sum(-1)
        return (1 + accepted.cumprod(-1).sum(-1)).tolist()


def write_text(model: Any, prompt: list[int], args: argparse.Namespace, seed: int) -> torch.Tensor:
    """The prompt and ``--new-tokens`` tokens of the model's after it, int64 [tokens]."""
    torch.manual_seed(seed)
    model.set_attn_implementation("sdpa")
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0} if args.temperature else {}
    ids = torch.tensor([prompt])
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.new_tokens,
        min_new_tokens=args.new_tokens,
        repetition_penalty=1.0,
        **{"do_sample": False, **sampling},
    )[0]


def replay_text(model: Any, text: torch.Tensor, context: int, args: argparse.Namespace) -> dict[Key, list[float]]:
    """Accept lengths of the rounds, the first one first."""
    window = args.k + 1
    replay = Replay(model, text, context - window)
    later = torch.arange(context + window, len(text) - args.k, STRIDE)
    places = torch.cat([torch.tensor([context]), later])
    found = {}
    for accepted in args.accepted:
        begins = places - accepted - 1
        begins[0] = context - window
        counts = num_selected(begins, args.budget_ratio, args.min_budget, window, len(text))
        scores = replay.window_scores(begins, window)
        for lookahead, weight in settings(args):
            ranked = torch.stack([look_ahead(row, lookahead, weight) for row in scores]) if lookahead else scores
            found[accepted, lookahead, weight] = replay.accept_lengths(
                ranked, counts, begins, places, args.k, args.temperature
            )
    return found


def settings(args: argparse.Namespace) -> list[tuple[int, float]]:
    """(look-ahead, weight), without look-ahead first."""
    return [(0, 0.0)] + [(n, weight) for n in args.lookaheads if n for weight in args.weights]


def summarise(texts: list[dict[Key, list[float]]], key: Key) -> dict[str, Any]:
    """Means over the rounds of all texts, and the difference that the look-ahead makes to each round."""
    plain = (key[0], 0, 0.0)
    changes = [b - a for text in texts for a, b in zip(text[plain][1:], text[key][1:], strict=True)]
    return {
        "accept_length": round(mean(x for text in texts for x in text[key][1:]), 3),
        "change": round(mean(changes), 3),
        "standard_error": round(stdev(changes) / len(changes) ** 0.5, 3),
        "rounds": len(changes),
        "first_round_accept_length": round(mean(text[key][0] for text in texts), 3),
        "first_round_change": round(mean(text[key][0] - text[plain][0] for text in texts), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024], help="prompt tokens")
    parser.add_argument("--corpora", nargs="+", choices=("math", "code"), default=["math", "code"])
    parser.add_argument("--prompts", type=int, default=8, help="texts per context")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--accepted", type=int, nargs="+", default=[8, 4], help="drafts accepted in the round before")
    parser.add_argument("--budget-ratio", type=float, default=0.05)
    parser.add_argument("--min-budget", type=int, default=64)
    parser.add_argument("--lookaheads", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.5])
    parser.add_argument("--results", help="JSON-lines file to append to")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_grad_enabled(False)
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    model = AutoModelForCausalLM.from_pretrained(args.model_path, dtype=torch.float32).eval()
    for context in args.contexts:
        texts: dict[bool, list[dict[Key, list[float]]]] = {False: [], True: []}
        for seed, prompt in enumerate(make_prompts(tokenizer, args.corpora, context, args.prompts)):
            text = write_text(model, prompt, args, seed)
            repeats = distinct_share(text[context:].tolist()) < LEAST_DISTINCT
            texts[repeats].append(replay_text(model, text, context, args))
            say(f"text {seed + 1} of {args.prompts}{', repeats itself' if repeats else ''}")
        for repeats, found in texts.items():
            for key in found[0] if found else ():
                record = {
                    "model": Path(args.model_path).name,
                    "temperature": args.temperature,
                    "context": context,
                    "budget": SparseSpecConfig(budget_ratio=args.budget_ratio, min_budget=args.min_budget).budget(context),
                    "texts": len(found),
                    "repeating": repeats,
                    **dict(zip(("accepted_before", "lookahead", "weight"), key, strict=True)),
                    **summarise(found, key),
                }
                print(append_json_line(args.results, record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
