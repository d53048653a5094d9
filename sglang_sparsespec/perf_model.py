"""Predicted decoding throughput: plain, lock-step SPARSESPEC, and SPARSESPEC with staggered ("unified") rounds.

A roofline of one forward, summed over its kernels:

- a matrix product takes a latency and the longer of its bytes over bandwidth and its operations over matrix rate;
- attention takes a latency and its KV bytes over bandwidth, with fractions of their own for full decoding, drafts,
  verification with scores, and selection (or its operations over the attention rate, if longer);
- every other kernel moves its activations, and takes at least a minimum;
- every kernel of a CUDA graph is followed by a short gap, every forward and scheduler step by a fixed time;
- tensor parallelism adds two all-reduces a layer and gathers the logits.

The constants (:class:`Calibration`) were fitted once to measurements of one H100 (``benchmarks/results``: the kernels'
times, and the kernels of profiled rounds), not to each point; ``benchmarks/model.py`` prints the error of every measured
point. Other GPUs are scaled by their data sheets (four rounds of an H200 lie within 9%), and tensor parallelism rests
on assumed link rates: not measured. Greedy decoding; prefill, the queue and the tail of a run are not modelled.

Units: seconds, bytes, operations (a multiply-add is two). No GPU is needed, and SGLang is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_sparsespec.config import SparseSpecConfig

#: Largest relative error on measured points that predictions claim (checked by the tests).
STATED_ERROR = 0.15
#: 6.16 of 8 drafts accepted is what the SparseSpec paper reports, and every verification yields a token more.
PAPER_ACCEPT_LENGTH = 7.16
DEFAULT_K = 8
#: Keys of ``config.json`` that tell a model is not a dense decoder with one KV head per group of heads.
NOT_COVERED = {
    "num_experts": "mixture of experts",
    "num_local_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "kv_lora_rank": "multi-head latent attention",
}


# ---------------------------------------------------------------------- what runs


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder's shape, as in its Hugging Face ``config.json``.

    Attributes:
        intermediate: width of the gated MLP.
        tied: whether the output head shares the embedding's weights.
        qk_norm: whether queries and keys are normalised per head (Qwen3), two small kernels more.
        weight_bytes, kv_bytes: bytes of one weight and of one cached key or value element.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qk_norm: bool = False
    weight_bytes: float = 2
    kv_bytes: float = 2

    @classmethod
    def from_config(cls, config: dict[str, Any], name: str) -> ModelShape:
        """From the contents of ``config.json``.

        Raises:
            ValueError: a key is missing, or the model is not dense multi-head or grouped-query attention.
        """
        for key, what in NOT_COVERED.items():
            if config.get(key):
                raise ValueError(f"{name}: {what} ({key}) is not covered; the performance model covers dense decoders.")
        try:
            heads = config["num_attention_heads"]
            return cls(
                name=name,
                layers=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                intermediate=config["intermediate_size"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                vocab=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
                qk_norm=config.get("model_type") == "qwen3",
            )
        except KeyError as error:
            raise ValueError(f"{name}: config.json has no {error}; a dense decoder's configuration is needed.") from None

    def layer_products(self, tp: int) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's four matrix products on one of ``tp`` GPUs."""
        heads, kv_heads, inter = self.heads / tp, self.kv_heads_per_gpu(tp), self.intermediate / tp
        return [
            (self.hidden, round((heads + 2 * kv_heads) * self.head_dim)),
            (round(heads * self.head_dim), self.hidden),
            (self.hidden, round(2 * inter)),
            (round(inter), self.hidden),
        ]

    def kv_heads_per_gpu(self, tp: int) -> int:
        """KV heads on each GPU; they are replicated beyond one each."""
        return max(1, self.kv_heads // tp)

    def weights(self, tp: int = 1) -> float:
        """Bytes of the weights on each GPU."""
        layer = sum(inputs * outputs for inputs, outputs in self.layer_products(tp))
        return (self.layers * layer + (1 if self.tied else 2) * self.vocab * self.hidden / tp) * self.weight_bytes

    def kv_per_token(self, tp: int = 1) -> float:
        """Bytes of one cached token on each GPU, all layers."""
        return self.layers * self.kv_per_token_layer(tp)

    def kv_per_token_layer(self, tp: int = 1) -> float:
        """Bytes of one cached token on each GPU in one layer."""
        return 2 * self.kv_heads_per_gpu(tp) * self.head_dim * self.kv_bytes


def _qwen3(name: str, layers: int, hidden: int, intermediate: int, heads: int, tied: bool = False) -> ModelShape:
    return ModelShape(name, layers, hidden, intermediate, heads, 8, 128, 151936, tied, qk_norm=True)


#: Shapes from the models' public configurations.
MODELS = {
    shape.name.lower(): shape
    for shape in (
        ModelShape("Qwen2.5-Coder-1.5B", 28, 1536, 8960, 12, 2, 128, 151936, tied=True),
        _qwen3("Qwen3-1.7B", 28, 2048, 6144, 16, tied=True),
        _qwen3("Qwen3-8B", 36, 4096, 12288, 32),
        _qwen3("Qwen3-14B", 40, 5120, 17408, 40),
        _qwen3("Qwen3-32B", 64, 5120, 25600, 64),
    )
}


def find_model(name_or_path: str) -> ModelShape:
    """A known model by name (``Qwen/Qwen3-8B``, ``qwen3-8b``), or the ``config.json`` of a checkpoint folder.

    Raises:
        ValueError: neither, or a model that is not covered.
    """
    path = Path(name_or_path).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            config = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
        return ModelShape.from_config(config, file.parent.name if file.name == "config.json" else file.stem)
    known = MODELS.get(name_or_path.rstrip("/").rsplit("/", 1)[-1].lower())
    if known is None:
        names = ", ".join(shape.name for shape in MODELS.values())
        raise ValueError(f"--model {name_or_path}: no such folder or config.json, and not one of {names}; give a folder.")
    return known


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet (dense rates, no sparsity).

    Attributes:
        bandwidth: bytes per second of device memory.
        matrix_rate: bf16 operations per second.
        memory: bytes of device memory.
        link: bytes per second to the other GPUs, one direction.
        measured: whether the calibration was made on this GPU.
    """

    name: str
    bandwidth: float
    matrix_rate: float
    memory: float
    link: float
    measured: bool = False


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 3.35e12, 989e12, 85.0e9, 450e9, measured=True),
        Gpu("h200", 4.8e12, 989e12, 150.7e9, 450e9),
        Gpu("a100-80gb", 2.04e12, 312e12, 85.0e9, 300e9),
        Gpu("b200", 8.0e12, 2250e12, 192.0e9, 900e9),
    )
}


@dataclass(frozen=True)
class Calibration:
    """What kernels achieve on the measured H100: fractions of the data sheet's rates, and fixed times in seconds.

    Fitted by relative least squares to ``kernels-h100-b5fbcde.jsonl`` (attention, selection) and read off the kernels of
    ``profile-b5fbcde.jsonl`` (matrix products, other kernels, gaps). ``attention_rate`` and the two ``allreduce`` values
    are assumptions.
    """

    decode_bandwidth: float = 3.04e12 / 3.35e12
    verify_bandwidth: float = 2.88e12 / 3.35e12
    draft_bandwidth: float = 2.84e12 / 3.35e12
    select_bandwidth: float = 0.572e12 / 3.35e12
    product_bandwidth: float = 2.7e12 / 3.35e12
    elementwise_bandwidth: float = 2.0e12 / 3.35e12
    matrix_rate: float = 680e12 / 989e12
    attention_rate: float = 300e12 / 989e12
    decode_latency: float = 12.2e-6
    verify_latency: float = 22.6e-6
    draft_latency: float = 9.1e-6
    select_latency: float = 6.0e-6
    product_latency: float = 3.5e-6
    smallest_kernel: float = 2.3e-6
    kernel_gap: float = 0.7e-6
    forward_overhead: float = 50e-6
    step_overhead: float = 0.45e-3
    allreduce_latency: float = 8e-6
    allreduce_link: float = 0.75
    static_memory: float = 0.82


H100_CALIBRATION = Calibration()
_SCORE_BYTES = 2
_POSITION_BYTES = 4
_ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class Setup:
    """What is served, on what, and how.

    Attributes:
        context: mean length of the running requests, tokens.
        batch: requests that decode together, on all ``tp`` GPUs.
        accept_length: tokens a verification yields, the bonus token included (1 to ``k`` + 1).
    """

    shape: ModelShape
    gpu: Gpu
    context: int
    batch: int
    accept_length: float = PAPER_ACCEPT_LENGTH
    k: int = DEFAULT_K
    tp: int = 1
    sparse: SparseSpecConfig = SparseSpecConfig()
    calibration: Calibration = H100_CALIBRATION

    def __post_init__(self) -> None:
        for name in ("context", "batch", "k", "tp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 1 <= self.accept_length <= self.k + 1:
            raise ValueError(f"the accept length must lie between 1 and k + 1 = {self.k + 1}, got {self.accept_length}.")
        if self.shape.heads % self.tp:
            raise ValueError(f"{self.shape.name} has {self.shape.heads} heads, which --tp {self.tp} does not divide.")
        self.sparse.check()

    @property
    def kv_capacity(self) -> int:
        """Tokens that the KV pool holds; 0 if the weights do not fit."""
        free = self.calibration.static_memory * self.gpu.memory - self.shape.weights(self.tp)
        return max(0, int(free / self.shape.kv_per_token(self.tp)))

    @property
    def fits(self) -> bool:
        """Whether all requests of the batch fit the KV pool at this context."""
        return self.context * self.batch <= self.kv_capacity


@dataclass
class Cost:
    """Seconds by kind of work."""

    products: float = 0.0
    attention: float = 0.0
    selection: float = 0.0
    other_kernels: float = 0.0
    gaps: float = 0.0
    communication: float = 0.0
    overhead: float = 0.0

    @property
    def total(self) -> float:
        """All kinds together, seconds."""
        return sum(vars(self).values())

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{key: value + getattr(other, key) for key, value in vars(self).items()})

    def __mul__(self, times: float) -> Cost:
        return Cost(**{key: value * times for key, value in vars(self).items()})


@dataclass
class Prediction:
    """A method's predicted throughput.

    Attributes:
        cost: seconds of one step (plain: a token of each request; else a round of each request).
        tokens_per_step: tokens that all requests gain by it.
    """

    method: str
    cost: Cost
    tokens_per_step: float
    parts: dict[str, Cost] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second, all requests together."""
        return self.tokens_per_step / self.cost.total


# ---------------------------------------------------------------------- one forward


def forward(setup: Setup, rows: float, attention: float, selection: float = 0.0, attention_kernels: int = 1) -> Cost:
    """A forward of ``rows`` tokens, from the embedding to greedy tokens.

    Args:
        attention, selection: seconds in one layer.
        attention_kernels: kernels that these are made of.
    """
    shape, tp, rates = setup.shape, setup.tp, setup.calibration
    small = _small_kernels(setup, rows)
    kernels = shape.layers * (len(small) + attention_kernels + 4)
    products = sum(_product(setup, rows, *size) for size in shape.layer_products(tp))
    return Cost(
        products=shape.layers * products + _product(setup, rows, shape.hidden, shape.vocab // tp),
        attention=shape.layers * attention,
        selection=shape.layers * selection,
        other_kernels=shape.layers * sum(small) + _logits(setup, rows),
        gaps=kernels * rates.kernel_gap,
        communication=_communication(setup, rows),
        overhead=rates.forward_overhead,
    )


def _product(setup: Setup, rows: float, inputs: int, outputs: int) -> float:
    """Seconds of one [rows, inputs] x [inputs, outputs] product."""
    rates, gpu = setup.calibration, setup.gpu
    moved = inputs * outputs * setup.shape.weight_bytes + rows * (inputs + outputs) * _ACTIVATION_BYTES
    by_bytes = moved / (rates.product_bandwidth * gpu.bandwidth)
    by_rate = 2 * rows * inputs * outputs / (rates.matrix_rate * gpu.matrix_rate)
    return rates.product_latency + max(by_bytes, by_rate)


def _small_kernels(setup: Setup, rows: float) -> list[float]:
    """Seconds of a layer's other kernels: two fused norms, activation, rotary, KV store, split-K sum, q and k norms."""
    shape, tp, rates = setup.shape, setup.tp, setup.calibration
    heads = (shape.heads / tp + shape.kv_heads_per_gpu(tp)) * shape.head_dim
    norm, inter = 4 * shape.hidden, shape.intermediate / tp
    elements = [norm, norm, 3 * inter, 2 * heads, 4 * shape.kv_heads_per_gpu(tp) * shape.head_dim, 2 * shape.hidden]
    if shape.qk_norm:
        elements += [heads, heads]
    bandwidth = rates.elementwise_bandwidth * setup.gpu.bandwidth
    return [max(rates.smallest_kernel, rows * count * _ACTIVATION_BYTES / bandwidth) for count in elements]


def _logits(setup: Setup, rows: float) -> float:
    """Seconds to turn 16-bit logits into float32 and take their maxima (2 + 4 + 4 bytes each)."""
    return rows * setup.shape.vocab * 10 / (setup.calibration.elementwise_bandwidth * setup.gpu.bandwidth)


def _communication(setup: Setup, rows: float) -> float:
    """Seconds of two all-reduces a layer and of gathering the logits."""
    if setup.tp == 1:
        return 0.0
    shape, tp, rates = setup.shape, setup.tp, setup.calibration
    link = rates.allreduce_link * setup.gpu.link
    share = (tp - 1) / tp
    reduced = 2 * share * rows * shape.hidden * _ACTIVATION_BYTES / link
    gathered = share * rows * shape.vocab * _ACTIVATION_BYTES / link
    return 2 * shape.layers * (rates.allreduce_latency + reduced) + rates.allreduce_latency + gathered


def _attention(setup: Setup, kind: str, requests: float, tokens: float, queries: int = 1) -> float:
    """Seconds of one attention kernel over ``tokens`` cached tokens of each of ``requests`` requests."""
    if not requests:
        return 0.0
    rates, gpu, shape = setup.calibration, setup.gpu, setup.shape
    bandwidth = getattr(rates, f"{kind}_bandwidth") * gpu.bandwidth
    by_bytes = requests * tokens * shape.kv_per_token_layer(setup.tp) / bandwidth
    operations = 4 * requests * queries * tokens * shape.heads / setup.tp * shape.head_dim
    return getattr(rates, f"{kind}_latency") + max(by_bytes, operations / (rates.attention_rate * gpu.matrix_rate))


def _selection(setup: Setup, requests: float) -> float:
    """Seconds of one layer's selection."""
    rates, heads = setup.calibration, setup.shape.kv_heads_per_gpu(setup.tp)
    moved = requests * heads * (setup.context * _SCORE_BYTES + setup.sparse.budget(setup.context) * _POSITION_BYTES)
    return rates.select_latency + moved / (rates.select_bandwidth * setup.gpu.bandwidth)


def kernel_seconds(setup: Setup, kind: str) -> float:
    """Seconds of one layer's kernel: ``decode``, ``draft`` (of the budget alone), ``verify`` or ``select``."""
    if kind == "select":
        return _selection(setup, setup.batch)
    tokens = setup.sparse.budget(setup.context) if kind == "draft" else setup.context
    return _attention(setup, kind, setup.batch, tokens, setup.k + 1 if kind == "verify" else 1)


# -------------------------------------------------------------------------- methods


def plain(setup: Setup) -> Prediction:
    """Decoding without speculation (FlashInfer's decoding kernels)."""
    attention = _attention(setup, "decode", setup.batch, setup.context)
    cost = forward(setup, setup.batch, attention) + Cost(overhead=setup.calibration.step_overhead)
    return Prediction("plain", cost, setup.batch, {"step": cost})


def draft_tokens(setup: Setup) -> float:
    """Tokens a draft step attends to, on average over a round: the budget and the drafts so far."""
    return setup.sparse.budget(setup.context) + (setup.k + 1) / 2


def lock_step(setup: Setup) -> Prediction:
    """All requests draft k tokens together, then verify together."""
    draft = forward(setup, setup.batch, _attention(setup, "draft", setup.batch, draft_tokens(setup)))
    window = setup.k + 1
    verify = forward(
        setup,
        setup.batch * window,
        _attention(setup, "verify", setup.batch, setup.context, window),
        _selection(setup, setup.batch),
        attention_kernels=3,
    )
    cost = draft * setup.k + verify + Cost(overhead=setup.calibration.step_overhead)
    return Prediction("lock-step", cost, setup.batch * setup.accept_length, {"draft": draft, "verify": verify})


def unified(setup: Setup) -> Prediction:
    """Rounds are staggered: at each of k + 1 steps one of k + 1 requests verifies, and the others draft.

    Each step is one forward of both (paper, section 4.2): the weights are read once for more rows, and every layer
    launches both attention kernels (one after the other here; that they run side by side hides some of it). The
    scheduler's work is done once a round, as in lock-step.
    """
    window = setup.k + 1
    verifying = setup.batch / window
    drafting = setup.batch - verifying
    attention = _attention(setup, "draft", drafting, draft_tokens(setup))
    attention += _attention(setup, "verify", verifying, setup.context, window)
    step = forward(setup, drafting + verifying * window, attention, _selection(setup, verifying), attention_kernels=4)
    cost = step * window + Cost(overhead=setup.calibration.step_overhead)
    return Prediction("unified", cost, setup.batch * setup.accept_length, {"step": step})


METHODS: dict[str, Callable[[Setup], Prediction]] = {"plain": plain, "lock-step": lock_step, "unified": unified}


# ------------------------------------------------------------------------ crossover


def gain(setup: Setup, method: str = "lock-step") -> float:
    """Throughput of ``method`` over plain decoding's."""
    return METHODS[method](setup).tokens_per_s / plain(setup).tokens_per_s


def break_even_accept_length(setup: Setup, method: str = "lock-step") -> float:
    """Accept length at which ``method`` and plain decoding are equally fast (it may exceed k + 1)."""
    cost = METHODS[method](setup).cost.total
    return cost * plain(setup).tokens_per_s / setup.batch


def crossover_context(setup: Setup, method: str = "lock-step", longest: int = 1 << 20) -> int | None:
    """Shortest context from which on ``method`` is at least as fast as plain decoding; None up to ``longest``.

    Searched on contexts 2% apart, from the longest down. Whether the KV pool holds them is not asked.
    """
    found = None
    context = longest
    while context >= 1 and gain(replace(setup, context=context), method) >= 1:
        found = context
        context = min(context - 1, int(context / 1.02))
    return found


def largest_batch(setup: Setup, limit: int = 256) -> int:
    """Requests of this context that the KV pool holds, at most ``limit``; 0 if not one."""
    return min(limit, setup.kv_capacity // setup.context)


def gain_table(setup: Setup, contexts: Sequence[int], batches: Sequence[int], method: str) -> list[list[float | None]]:
    """Gains by context (rows) and batch (columns); None where the batch does not fit."""
    rows: list[list[float | None]] = []
    for context in contexts:
        cases = [replace(setup, context=context, batch=batch) for batch in batches]
        rows.append([gain(case, method) if case.fits else None for case in cases])
    return rows
