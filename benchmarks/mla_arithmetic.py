"""What sparse drafts could gain for multi-head latent attention, by bytes and FLOPs: the tables of ``docs/mla.md``.

    python benchmarks/mla_arithmetic.py

Nothing is measured. Times are lower bounds of one H200: bytes at its bandwidth, products of weights at its peak, attention
at the best rate published for such a kernel, with rows in tiles of 64. Launches, all-reduces and sampling count nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BANDWIDTH, BF16, FP8 = 4.8e12, 989e12, 1979e12
ATTENTION = 660e12  # FlashMLA's dense decoding on an H800, which has the same tensor cores
QK, V, TOKEN_BYTES, TILE = 576, 512, 1152, 64  # TILE: rows whose float32 outputs fill half of an SM's registers
MOST_DRAFTS, RATE = 8, 0.9416  # each draft's chance: eight yield 7.16 tokens, the paper's figure for Qwen3-8B
RATIO, TAIL, ROOM = 0.05, 12, 0.88 * 141e9  # ROOM: of a GPU's memory, for weights and KV


@dataclass(frozen=True)
class Shape:
    """A model by its ``config.json``, on ``gpus`` tensor-parallel GPUs.

    Attributes:
        attention: query heads, rank of queries (0: none), dims of a head's unrotated key and of its value.
        experts: routed experts, those of a token, shared ones, width.
        bytes: per weight, of routed experts and of the rest.
        mtp: (drafts, accept length) of its own MTP head, as published.
    """

    name: str
    layers: int
    dense_layers: int
    hidden: int
    attention: tuple[int, int, int, int]
    experts: tuple[int, int, int, int]
    dense_width: int
    vocab: int
    gpus: int = 1
    bytes: tuple[float, float] = (2, 2)
    mtp: tuple[tuple[int, float], ...] = ()

    @property
    def weights(self) -> tuple[float, float]:
        """Numbers of weights: of one routed expert in all layers, and of what every token uses."""
        heads, rank, nope, v = self.attention
        q, moe_layers = heads * (nope + 64), self.layers - self.dense_layers
        attention = (rank * (self.hidden + q) if rank else self.hidden * q) + self.hidden * (QK + heads * v)
        expert = 3 * self.hidden * self.experts[3] * moe_layers
        others = self.layers * (attention + V * heads * (nope + v)) + self.dense_layers * 3 * self.hidden * self.dense_width
        return expert, others + self.experts[2] * expert + self.hidden * (moe_layers * self.experts[0] + self.vocab)

    def products(self, tokens: int, most_bytes: float = 2) -> float:
        """Seconds of a forward's products, if no weight has more than ``most_bytes``."""
        (expert, others), (number, top_k, _, _) = self.weights, self.experts
        touched = number * (1 - (1 - top_k / number) ** tokens)
        expert_bytes, other_bytes = (min(most_bytes, size) for size in self.bytes)
        read = (touched * expert * expert_bytes + others * other_bytes) / BANDWIDTH
        return max(read, 2 * tokens * (top_k * expert + others) / (FP8 if other_bytes == 1 else BF16)) / self.gpus

    def forward(self, batch: int, context: float, queries: int = 1, most_bytes: float = 2) -> float:
        """Seconds of a forward of ``queries`` tokens per request, which attend to ``context`` tokens."""
        attention = attend(batch * context, self.attention[0] // self.gpus * queries)
        return self.products(batch * queries, most_bytes) + self.layers * attention

    def drafts(self, batch: int, context: int) -> list[float]:
        """Seconds of a draft step: with the model's own weights, and with FP8 copies of all of them."""
        return [self.forward(batch, RATIO * context + TAIL, most_bytes=size) for size in (2, 1)]

    def gains(self, batch: int, context: int) -> str:
        """Speed over plain decoding: own weights, FP8 copies, MTP. In brackets what does not fit the GPUs."""
        plain, best = self.forward(batch, context), {"own": 0.0, "fp8": 0.0}
        for k in range(1, MOST_DRAFTS + 1):
            verify, tokens = self.forward(batch, context, k + 1), sum(RATE**i for i in range(k + 1))
            for name, draft in zip(best, self.drafts(batch, context), strict=True):
                best[name] = max(best[name], tokens * plain / (k * draft + verify))
        (expert, others), head = self.weights, self.vocab * self.hidden * self.bytes[1]
        step = plain / self.layers + head / BANDWIDTH / self.gpus
        if self.mtp:
            best["mtp"] = max(n * plain / (self.forward(batch, context, k + 1) + k * step) for k, n in self.mtp)
        held = (self.experts[0] * expert * self.bytes[0] + others * self.bytes[1] + head) / self.gpus
        cell = " ".join(f"{gain:.2f}" for gain in best.values())
        return cell if held + batch * context * self.layers * TOKEN_BYTES <= ROOM else f"({cell})"


def attend(tokens: float, rows: int, dims: int = QK + V) -> float:
    """Seconds of attention in one layer; ``dims``: QK alone is a second pass over K, for scores."""
    return tokens * max(TOKEN_BYTES / BANDWIDTH, math.ceil(rows / TILE) * TILE * 2 * dims / ATTENTION)


SHAPES = (
    Shape("V2-Lite", 27, 1, 2048, (16, 0, 128, 128), (64, 6, 2, 1408), 10944, 102400),
    Shape("GLM-4.7-Flash", 47, 1, 2048, (20, 768, 192, 256), (64, 4, 1, 1536), 10240, 154880, mtp=((1, 1.60),)),
    Shape("V3, TP8", 61, 3, 7168, (128, 1536, 128, 128), (256, 8, 1, 2048), 18432, 129280, 8, (1, 1), ((1, 1.87), (7, 3.2))),
    Shape("Kimi K2, TP8", 61, 1, 7168, (64, 1536, 128, 128), (384, 8, 1, 2048), 18432, 163840, 8, (0.5, 2)),
)


def main() -> None:
    """Print the tables."""
    for heads in (8, 16, 64, 128):
        rows = heads * (MOST_DRAFTS + 1)
        for context in (8192, 32768):
            cells = [attend(context, heads), attend(context, rows), attend(context, rows, QK), attend(context, TILE, QK)]
            print(f"| {heads} | {rows} | {context // 1024}K | " + " | ".join(f"{1e6 * cell:.1f}" for cell in cells) + " |")
    for shape in SHAPES:
        for batch, context in ((1, 32768), (16, 32768), (64, 8192)):
            plain, verify = (shape.forward(batch, context, queries) for queries in (1, MOST_DRAFTS + 1))
            cells = [plain, *shape.drafts(batch, context), verify]
            print(f"| {shape.name} | {batch} x {context // 1024}K | " + " | ".join(f"{1e3 * c:.2f}" for c in cells) + " |")
    for shape in SHAPES:
        for context in (8192, 32768, 131072):
            cells = [shape.gains(batch, context) for batch in (1, 16, 64, 128)]
            print(f"| {shape.name} | {context // 1024}K | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
