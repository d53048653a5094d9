"""Writes the tables and plots of README.md, docs/results.md and docs/results-archive.md from ``benchmarks/results``.

    python benchmarks/make_results.py           # write them
    python benchmarks/make_results.py --check   # exit status 1 if a page or a plot is not current

A table stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``. To add a row to one, add a line to its ``rows`` below; of a
load: the results file, and the load as throughput.py's ``--loads`` takes it. Plots are made anew if what they show has
changed, which needs matplotlib; each holds a digest of it. ``_result_tables`` says how figures are found.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import REPO
from _result_plots import ACCEPT_LENGTHS, BATCHES, OVER_PLAIN, STEP, Plot, digest, digest_in, save
from _result_tables import (
    MODELS,
    Column,
    Line,
    Record,
    Results,
    Row,
    Table,
    Words,
    load,
    load_name,
    model_name,
    over,
    speed,
    value_of,
)

sys.path.append(str(REPO / "scripts"))

import generated_parts  # noqa: E402

RESULTS = REPO / "benchmarks" / "results"

# ---------------------------------------------------------------------------- files

TWELVE = "2026-11-29-h200/throughput-twelve-loads-qwen2.5-coder-1.5b-48b05a3.jsonl"
FOUR = "2026-11-29-h200/throughput-four-loads-qwen2.5-coder-1.5b-d657e13.jsonl"
LARGE = "2026-11-30-h200/throughput-qwen3-8b-shapes-c190c0f.jsonl"
MIXTURE = "2026-11-30-h200/throughput-seven-drafts-qwen3-30b-a3b-shapes-c190c0f.jsonl"
LONG = "2026-11-30-h200/long-outputs-qwen2.5-coder-1.5b-c190c0f.jsonl"
LONG_SHARED = "2026-12-01-h200/long-outputs-qwen2.5-coder-1.5b-ef54aa9.jsonl"
FP8_BLOCK = "2026-12-01-h200/throughput-qwen3-8b-fp8-block-shapes-ef54aa9.jsonl"
NEWER = "2026-11-30-h200/throughput-sglang-0.5.23-qwen2.5-coder-1.5b.jsonl"
MIXTURE_512 = "2026-11-30-h200/throughput-fa3-prefill-qwen3-30b-a3b-shapes-3554c8b.jsonl"
GPT_OSS = "2026-11-30-h200/throughput-gpt-oss-20b-shapes-3554c8b.jsonl"
GEMMA = "2026-12-01-h200/throughput-gemma3-1b-shapes-139e6f5.jsonl"
#: Acceptance was simulated there by a rule that put all rejections at a window's end.
FLATTERED_LARGE = "2026-11-29-h200/throughput-qwen3-8b-14b-shapes-d6b174a.jsonl"
FLATTERED_TWO_GPUS = "2026-11-30-h200/throughput-tp2-qwen3-8b-shapes-46f74c2.jsonl"
FLATTERED_MIXTURE = "2026-11-30-h200/throughput-qwen3-30b-a3b-shapes-c41baa6.jsonl"
BY_CONTEXT = "2026-11-29-h200/throughput-draft-weights-by-context-qwen2.5-coder-1.5b.jsonl"
FP8 = "2026-11-29-h200/throughput-fp8-drafts-qwen2.5-coder-1.5b.jsonl"
STEP_8B = "2026-11-29-h200/profile-qwen3-8b-shapes-13933b1.jsonl"
STEP_1B = "2026-11-29-h200/profile-qwen2.5-1.5b-shapes-13933b1.jsonl"
KERNELS = "2026-11-29-h200/kernels-h200-5cc1318.jsonl"
SAMPLING = "2026-11-29-h200/sampling-h200-5cc1318.jsonl"
PRODUCTS = "2026-11-29-h200/draft-products-e478547.jsonl"
PARITY = "2026-11-29-h200/parity-fp8-drafts-smollm2-135m-e4828f2.jsonl"
PARITY_CPU = "2026-11-25-cpu/parity-smollm2-135m.jsonl"
PARITY_CPU_ROUNDS = "2026-11-25-cpu/parity-speculate-smollm2-135m-05abc4e.jsonl"
PARITY_10K = "2026-11-30-h200/parity-10k-qwen2.5-coder-1.5b-3554c8b.jsonl"
PARITY_YARN = "2026-12-01-h200/parity-yarn-qwen2.5-coder-1.5b-ef54aa9.jsonl"
PARITY_TWO_GPUS = "2026-11-30-h200/parity-tp2-qwen2.5-coder-1.5b-3554c8b.jsonl"
PARITY_NEWER = "2026-11-30-h200/parity-sglang-0.5.23-qwen2.5-coder-1.5b-3554c8b.jsonl"
PARITY_QUANTISED = "2026-11-30-h200/parity-quantised-qwen2.5-coder-1.5b-3554c8b.jsonl"
ACCURACY = "2026-12-01-h200/accuracy-qwen2.5-coder-1.5b-ef54aa9.jsonl"
SOAK = "2026-11-30-h200/soak-qwen2.5-coder-1.5b-c41baa6.jsonl"
WINDOW = "2026-11-25-h100/accept-length-qwen2.5-coder-1.5b.jsonl"
WINDOW_CPU = "2026-11-25-cpu/accept-length-smollm2-135m.jsonl"
RIVALS = "2026-11-27-h100/run-rivals-qwen2.5-coder-1.5b-d090498.jsonl"
KV_LARGE = "2026-11-30-h200/kv-manager-whole-qwen3-8b-shapes-ea16086.jsonl"
KV_CUT = "2026-11-27-h200/kv-manager-qwen2.5-coder-1.5b-114c942.jsonl"
KV_NEWER = "2026-11-30-h200/kv-manager-sglang-0.5.23-qwen2.5-coder-1.5b-3554c8b.jsonl"
KV_WHOLE = "2026-11-25-h100/kv-manager-qwen2.5-coder-1.5b-fbcdd84.jsonl"
SHARES = "2026-11-30-h200/serving-shares-qwen2.5-coder-1.5b.jsonl"
SHARES_ONE_MACHINE = "2026-12-01-h200/serving-late-choice-qwen2.5-coder-1.5b.jsonl"
SERVED = "2026-11-28-h200/open-loop-qwen2.5-coder-1.5b-ff95889.jsonl"
SERVED_BEFORE = "2026-11-28-h200/open-loop-qwen2.5-coder-1.5b-15c64e0.jsonl"
SPECULATE = "2026-11-27-h200/run-speculate-qwen2.5-coder-1.5b-4b77175.jsonl"
POLICIES = "2026-11-25-h100/run-policies-qwen2.5-coder-1.5b-1e875a9.jsonl"
SCHEDULES = "2026-11-25-h100/run-schedules-qwen2.5-coder-1.5b-1e875a9.jsonl"
SCHEDULES_8B = "2026-11-25-h100/run-schedules-qwen3-8b-shapes-1e875a9.jsonl"
FLASHINFER = "2026-11-29-h200/throughput-qwen2.5-coder-1.5b-5cc1318.jsonl"
CPU = "2026-11-25-cpu/run-smoke-cpu.jsonl"

# -------------------------------------------------------------------- what columns show

ALWAYS = "sparsespec,sparsespec_speculate=always"
KV_HOST = "sparsespec,sparsespec_host_kv_gb=24"
EXPERTS = "sparsespec,sparsespec_draft_weights=fp8_experts,moe_runner_backend=triton"
FP8_DRAFTS = f"{ALWAYS},sparsespec_draft_weights=fp8"
PLAIN_FP8 = "plain,quantization=fp8,kv_cache_dtype=fp8_e4m3"
OWN_DRAFTS = f"{ALWAYS},sparsespec_draft_weights=model"
LOAD = {"requests x context": load_name}
MODEL_AND_LOAD = {"model": model_name, **LOAD}

#: Bytes of a draft step's FP8 weights (products of all layers, and the head), and of one token's KV.
STEP_BYTES = {"qwen3-8b-shapes": (7.568e9, 147_456), "qwen2.5-1.5b-shapes": (1.544e9, 28_672)}
H200_BYTES_PER_S = 4.8e12
BUDGET = 0.05


def step_of(*kernels: str) -> Callable[[Record], float]:
    """Milliseconds of a draft step in kernels, by parts of their names."""
    return lambda record: sum(
        kernel["ms"] for kernel in record["draft_step"]["kernels"] if any(name in kernel["kernel"] for name in kernels)
    )


def step_share(name: str) -> Callable[[Record], float]:
    """Milliseconds of a draft step in a group of kernels."""
    return lambda record: record["draft_step"]["ms"] * record["draft_step"]["shares"][name]


SMALL_KERNELS = ("_norm_kernel", "_silu_kernel", "per_token_quant", "_inputs_kernel")


def step_rest(record: Record) -> float:
    """Milliseconds of a draft step in none of the kernels that have a column."""
    named = sum(step_share(name)(record) for name in ("matrix products", "attention", "idle"))
    return record["draft_step"]["ms"] - named - step_of(*SMALL_KERNELS)(record)


def step_bytes(record: Record) -> float:
    """Milliseconds in which an H200's memory gives what a draft step reads."""
    weights, token = STEP_BYTES[record["model"]]
    return 1e3 * (weights + BUDGET * record["batch"] * record["context"] * token) / H200_BYTES_PER_S


def kernel(what: str, name: str) -> dict[str, str]:
    """What rows of a kernel table hold."""
    return {"kind": "row", "what": what, "name": name}


def microseconds(record: Record) -> float:
    """Of a kernel."""
    return 1e3 * record["ms"]


def context_of(record: Record) -> str:
    """Tokens of the prompts."""
    return f"{int(record['dataset'].partition(':')[2]):,}"


def shapes(model: str) -> str:
    """Whose shapes a model has."""
    return MODELS[model].removesuffix(" shapes")


def attention_case(shape: str, context: int, batch: int) -> Row:
    """A batch of the kernel table whose slots lie anywhere in the pool."""
    names = {"shapes": shapes(f"{shape}-shapes"), "requests x context": f"{batch} x {context:,}"}
    unit = "qwen2.5-coder-1.5b" if shape == "qwen2.5-1.5b" else shape
    return Row(KERNELS, {"unit": f"{unit}/b{batch}/c{context}/random"}, names)


def prompts_equal(records: Sequence[Record]) -> str:
    """How many greedy outputs are the baseline's."""
    equal = sum(value_of(record, "equal_prompts" if "equal_prompts" in record else "equal") for record in records)
    asked = sum(value_of(record, "prompts" if "prompts" in record else "compared") for record in records)
    return f"{equal:,} of {asked:,}"


def largest_margin(records: Sequence[Record]) -> str:
    """The largest distance of two tokens where outputs part, in the baseline's log-probabilities."""
    margins = [found["margin"] for record in records for found in record["divergences"]]
    for record in records:
        if record.get("ties_only") and record["compared"] - record["equal"] > len(record["divergences"]):
            # Only some were written down, but all were compared with the largest margin of a tie.
            return f"at most {record['tie_margin']:g}"
    return f"{max(margins):.4g}" if margins else "-"


def difference(records: Sequence[Record]) -> str:
    """Of two accuracies, with the interval in which the true one lies."""
    (record,) = records
    return f"{record['difference']:+.1%}, {record['low']:+.1%} to {record['high']:+.1%}"


def moved(records: Sequence[Record]) -> str:
    """Requests that left the GPU while they ran."""
    (record,) = records
    if "offloads" in record:
        return f"{record['offloads']} moved, {record['restores']} back"
    return f"{record['retractions']} retracted"


def computed_again(records: Sequence[Record]) -> str:
    """Tokens prefilled twice."""
    (record,) = records
    waiting = record["cut_by_time_limit"] and record["retractions"]
    return "not yet" if waiting else f"{value_of(record, 'recomputed_tokens'):,}"


def is_sparsespec(label: str) -> bool:
    """Whether records of a label are of SPARSESPEC, with whichever settings."""
    return label.partition(",")[0] == "sparsespec"


def is_vllm(label: str) -> bool:
    """Whether records of a label are of vLLM without speculation, with whichever settings."""
    return label.partition(",")[0] == "vllm"


def is_vllm_with_ngrams(label: str) -> bool:
    """Whether records of a label are of vLLM with n-grams, with whichever settings."""
    return label.partition(",")[0] == "vllm:ngram"


def is_plain(engine: str) -> bool:
    """Whether records of an engine are of plain SGLang, with whichever attention."""
    return engine.partition(":")[0] == "plain"


def is_without_late_choice(commit: str) -> bool:
    """Whether SPARSESPEC under served load was one that chooses batches as SGLang does."""
    return commit in ("cd723a8", "ef54aa9")


def engine(label: str, name: str, file: str, where: Any, **names: str) -> Row:
    """A row of one engine."""
    return Row(file, where, {**names, label: name})


# --------------------------------------------------------------------------- tables

DEFAULT_ROWS = [
    load(TWELVE, "code:8192,128,512,0.6"),
    load(TWELVE, "code:4096,64,512,0.6"),
    load(TWELVE, "code:8192,16,512,0.6"),
    load(TWELVE, "code:28000,8,512,1"),
    load(FOUR, "code:28000,4,512,0"),
    load(TWELVE, "code:2048,128,512,0.6"),
    load(TWELVE, "code:1024,256,512,0.6"),
    load(TWELVE, "code:512,256,512,1"),
    load(FOUR, "code:2048,32,512,0"),
    load(TWELVE, "code:512,32,512,0.6"),
    load(FOUR, "code:8192,1,512,1"),
    load(FOUR, "code:512,1,512,0"),
]
LARGE_ROWS = [
    load(LARGE, "random:32256,9,512,0"),
    load(LARGE, "random:8192,84,512,0"),
    load(LARGE, "random:4096,64,512,0"),
    load(LARGE, "random:8192,8,512,0"),
    load(LARGE, "random:8192,1,512,0"),
]

TABLES = [
    Table(
        "default-settings",
        "Default settings against plain SGLang",
        """
        With real weights, SPARSESPEC's default settings give {x[over plain].lowest} to {x[over plain].highest} times the
        tokens per second of plain SGLang. The gain comes with long contexts and full batches, where reading KV takes most
        of the time. Batches of up to 2,048 tokens of context gain less than a tenth, and 32 x 2,048 loses a little:
        {x[over plain][32 x 2,048, greedy]}. With the shapes of larger models and simulated acceptance, SPARSESPEC gives
        {x[over plain].simulated_lowest} to {x[over plain].simulated_highest} times.""",
        MODEL_AND_LOAD,
        [
            speed("plain", "plain"),
            speed("SPARSESPEC", "sparsespec"),
            over("over plain", "SPARSESPEC", "plain", bold=True),
        ],
        [*DEFAULT_ROWS, *LARGE_ROWS],
        note="""
        Output tokens per second, 512 new tokens, prompts in the cache. Plain is SGLang without speculation, with its
        default attention (FlashAttention 3). The simulated accept length is 7.02 with all eight drafts: the paper's 7.16
        less 2%, which FP8 drafts cost. At 8 requests and at 1 the planner chose fewer drafts, and it was 5.5 to 6.4. Whole
        runs lose up to a ninth at their end, when only the requests with the lowest acceptance are left. In these runs
        SPARSESPEC prefilled with SGLang's Triton kernels. Today it prefills with FlashAttention 3, which is faster
        ("Prefill by FlashAttention 3" in docs/results.md).""",
    ),
    Table(
        "long-outputs",
        "Long outputs, and vLLM",
        """
        While the batch is full, SPARSESPEC is the fastest lossless engine in every row: {x[over plain].lowest} to {x[over
        plain].highest} times plain SGLang's tokens per second, and {x[over vLLM].lowest} to {x[over vLLM].highest} times
        vLLM's. vLLM with n-grams is slower than vLLM without. FP8 weights and KV, which change the output, do not make
        SGLang faster with this small model. Over whole runs less of the gain is left. Requests with high acceptance end
        early, and at the end the others run in a batch that is no longer full; without speculation all requests end
        at once. With two requests for each place in the batch the whole run of questions was {x[whole over plain][128 x AIME
        and OlympiadBench, 64 at once, 4,096 new, T 0.6]} times as fast as plain SGLang's, with three {x[whole over
        vLLM][192 x AIME and OlympiadBench, 64 at once, 4,096 new, T 0.6]} times as fast as vLLM's. A server with a queue has
        no such end.""",
        LOAD,
        [
            speed("plain", "plain"),
            speed("SPARSESPEC", "sparsespec"),
            Column("vLLM", "tokens_per_s", {"label": is_vllm}, optional=True),
            Column("vLLM, n-grams", "tokens_per_s", {"label": is_vllm_with_ngrams}, optional=True),
            Column("plain in FP8, not lossless", "tokens_per_s", {"label": PLAIN_FP8}, optional=True),
            over("over plain", "SPARSESPEC", "plain", bold=True),
            over("over vLLM", "SPARSESPEC", "vLLM"),
            *(
                Column(f"{title}, whole run", "tokens_per_s_whole", {"label": label}, hidden=True)
                for title, label in (("plain", "plain"), ("SPARSESPEC", "sparsespec"))
            ),
            Column("vLLM, whole run", "tokens_per_s_whole", {"label": is_vllm}, hidden=True, optional=True),
            over("whole over plain", "SPARSESPEC, whole run", "plain, whole run", hidden=True),
            over("whole over vLLM", "SPARSESPEC, whole run", "vLLM, whole run", hidden=True),
        ],
        [
            load(LONG_SHARED, "aime+olympiadbench,64,4096,0.6,192"),
            load(LONG_SHARED, "code-reading,64,4096,0.6,192"),
            load(LONG, "aime+olympiadbench,64,4096,0.6,128"),
            load(LONG, "code:8192,128,512,0.6"),
        ],
        note="""
        Qwen2.5-Coder-1.5B, each engine with its own defaults, vLLM 0.26.0. In the runs of 192 requests all engines were on
        one GPU, each with memory for 320,000 tokens of KV (vLLM 10 GB), and took turns. That held 62.2 of plain SGLang's 64
        requests on average, 63.6 of SPARSESPEC's and all of vLLM's: for each request that runs, SPARSESPEC gives 1.25 times
        plain SGLang's tokens with the questions. A few of plain SGLang's requests ran after all others, so its whole runs
        there are not compared. Most outputs of code reading repeat themselves, and a fifth to a quarter of those to the
        questions (148 of 192 in FP8). In the last row the prompts are a million tokens, which SPARSESPEC prefilled with
        Triton's kernels, not with FlashAttention 3 as today. With 8,192 new tokens plain SGLang gave 15,237 tokens per
        second while the batch was full, and vLLM 14,909; SPARSESPEC's run was cut when the machine's time ended.""",
    ),
    Table(
        "mixture",
        "Mixtures of experts",
        """
        With FP8 copies of the experts for drafts, the shapes of Qwen3-30B-A3B give {x[over plain][60 x 8,192, greedy]} times
        plain SGLang's throughput in whole runs of 512 tokens, and less in runs of 256, where the end is a larger part: there
        requests finish one by one. In the middle of a run it is 1.63 SIMULATED: a round of seven drafts over 60 requests
        takes 34.7 + 7 x 11.2 ms for 6.43 tokens each, and a plain step 28.8 ms (by the table measured at start-up, from
        which rounds differ by at most 1%).""",
        MODEL_AND_LOAD,
        [
            speed("plain", "plain"),
            Column("SPARSESPEC", "tokens_per_s", {"label": is_sparsespec}, ",.0f"),
            over("over plain", "SPARSESPEC", "plain", bold=True),
        ],
        [
            load(MIXTURE_512, "random:8192,60,512,0"),
            load(MIXTURE, "random:8192,60,256,0"),
            load(MIXTURE, "random:8192,48,256,0"),
        ],
        note="""
        Seven drafts, the default with eight query heads per KV head ([operations](operations.md#tuning)). Qwen3-30B-A3B:
        `--sparsespec-draft-weights fp8_experts --moe-runner-backend triton`; 64 requests of 8,704 tokens do not fit beside
        the copies. In the runs of 256 tokens SPARSESPEC prefilled with Triton's kernels, in the other with FlashAttention
        3.""",
    ),
    Table(
        "windows",
        "Sliding windows",
        """
        Models with sliding windows gain little or nothing, since KV is a small part of what a step reads. In gpt-oss-20b
        half of the layers have windows of 128 tokens, in Gemma 3 1B 22 of 26 have windows of 512. With Gemma's shapes the
        planner expected nothing of speculation, and every round was a plain one; they ran at
        {x[over plain].simulated_lowest} times plain SGLang's speed.""",
        MODEL_AND_LOAD,
        [
            speed("plain", "plain"),
            speed("SPARSESPEC", "sparsespec"),
            over("over plain", "SPARSESPEC", "plain", bold=True),
        ],
        [load(GPT_OSS, "random:8192,64,256,0"), load(GEMMA, "random:8192,64,256,0")],
        note="""
        Default settings, 256 new tokens. gpt-oss-20b has experts in 16 bits and a simulated accept length of 6.43, Gemma's
        would be 7.02 if it speculated. Gemma's run also timed a change of the planner that is not in the code; it concerns
        rounds that speculate only.""",
    ),
    Table(
        "fp8-target",
        "A checkpoint in FP8",
        """
        A checkpoint whose weights are FP8 by block drafts with those weights. At 16 requests of 8,192 tokens the shapes of
        Qwen3-8B give {x[over plain].simulated_lowest} times plain SGLang's throughput with the same checkpoint.""",
        MODEL_AND_LOAD,
        [
            speed("plain", "plain"),
            speed("SPARSESPEC", "sparsespec"),
            over("over plain", "SPARSESPEC", "plain", bold=True),
        ],
        [load(FP8_BLOCK, "random:8192,16,512,0")],
        note="""
        SGLang computed the products with its Triton kernel, whose time does not grow with the number of rows here: a draft
        step of 16 requests takes 6.0 ms, a plain step 11.2 and a verification 14.7, and with one request a draft step takes
        longer than a verification. SGLang's default on an H200 is DeepGEMM, which was not installed; with it all of them
        should be faster.""",
    ),
    Table(
        "newer",
        "SGLang 0.5.23",
        """
        On SGLang 0.5.23 (torch 2.14.1) default settings give {x[over plain].lowest} to {x[over plain].highest} times the
        tokens per second of plain SGLang 0.5.23, with its own default attention (FlashAttention 3).""",
        LOAD,
        [
            speed("plain", "plain"),
            speed("default", "sparsespec"),
            speed("always", ALWAYS),
            over("over plain", "default", "plain", bold=True),
        ],
        [
            load(NEWER, "code:8192,128,512,0.6"),
            load(NEWER, "code:4096,64,512,0.6"),
            load(NEWER, "code:8192,16,512,0.6"),
            load(NEWER, "code:2048,128,512,0.6"),
            load(NEWER, "code:1024,256,512,0.6"),
            load(NEWER, "code:512,32,512,0.6"),
        ],
        note="""
        Qwen2.5-Coder-1.5B on an H200; the first table has the same loads on 0.5.17. Plain SGLang and
        SPARSESPEC were measured on two machines of the same kind. SPARSESPEC prefilled with Triton's kernels.""",
    ),
    Table(
        "planner",
        "What the planner gives up",
        """
        The planner chooses the number of drafts of each round, down to none. Throughput with it is {x[over best].lowest} to
        {x[over best].highest} times the better of plain SGLang and of always drafting eight, so there is no need to switch
        it by hand. Always drafting eight loses at short contexts, down to {x[always over plain].lowest} times plain
        SGLang.""",
        LOAD,
        [
            speed("plain", "plain", hidden=True),
            speed("default", "sparsespec", hidden=True),
            speed("always", ALWAYS, hidden=True),
            over("always over plain", "always", "plain"),
            over("default over plain", "default", "plain"),
            over("over best", "default", "plain", "always"),
        ],
        DEFAULT_ROWS,
    ),
    Table(
        "rivals",
        "Beside SGLang's own speculation",
        """
        At these batches SGLang's own methods are slower than plain SGLang: a draft model of 0.5B (STANDALONE) gives
        {x[STANDALONE over plain].lowest} to {x[STANDALONE over plain].highest} of its throughput, n-grams less. SPARSESPEC
        gives {x[over plain].lowest} to {x[over plain].highest}. On the two sets of questions most of its rounds were plain
        ones; there the gain comes from decoding several tokens in one scheduler step, not from speculation.""",
        LOAD,
        [
            speed("plain", "plain:flashinfer"),
            speed("SPARSESPEC", "sparsespec"),
            speed("STANDALONE", "standalone"),
            speed("NGRAM", "ngram"),
            over("over plain", "SPARSESPEC", "plain"),
            over("STANDALONE over plain", "STANDALONE", "plain", hidden=True),
        ],
        [
            load(RIVALS, "code:8192,36,512,0.6"),
            load(RIVALS, "aime,72,3072,0.6"),
            load(RIVALS, "olympiadbench,72,3072,0.6"),
        ],
        command="""
python benchmarks/throughput.py --model-path M --engines plain sparsespec ngram standalone,speculative_draft_model_path=D \\
    --loads code:8192,36,512,0.6 {aime,olympiadbench},72,3072,0.6 --results rivals.jsonl""",
        note="""
        Qwen2.5-Coder-1.5B. Plain decodes with FlashInfer here. All engines were on one GPU and took turns, so batches are
        as large as their shares of the memory allow.""",
    ),
    Table(
        "accept-length",
        "Accept length",
        """
        Of nine tokens at most, a round gives {x[FP8].lowest} to {x[FP8].highest}: as a rule more with a longer context and
        a lower temperature. FP8 copies of the weights give {x[FP8 over own].lowest} to {x[FP8 over own].highest} times the
        accept length of the model's own. The accept length of 16 sampled texts has a noise of some 3%; only the row of
        16,384 tokens at T 1 lies outside it.""",
        {"context": context_of, "T": lambda record: f"{record['temperature']:g}"},
        [
            Column("FP8", "accept_length", {"label": FP8_DRAFTS}, ".2f"),
            Column("FP8, not repeating", "accept_length_not_repetitive", {"label": FP8_DRAFTS}, ".2f"),
            Column("own weights", "accept_length", {"label": OWN_DRAFTS}, ".2f"),
            Column("own, not repeating", "accept_length_not_repetitive", {"label": OWN_DRAFTS}, ".2f"),
            over("FP8 over own", "FP8", "own weights"),
        ],
        [
            load(BY_CONTEXT, f"code+math:{context},16,512,{temperature}")
            for context in (2048, 8192, 16384, 32000)
            for temperature in (0, 0.6, 1)
        ],
        note="""
        Qwen2.5-Coder-1.5B, every round speculates. Outputs that repeat themselves raise every drafter's acceptance; the
        columns "not repeating" leave them out.""",
    ),
    Table(
        "window",
        "PillarAttn against a sliding window",
        """
        Drafts that read the tokens that PillarAttn selects are accepted far more often than drafts that read as many of the
        newest ones. The difference grows with the context.""",
        {"model": lambda record: MODELS[record["model"]], "context": lambda record: f"{record['context']:,}"},
        [
            Column("`pillar`", "accept_length", {"policy": "pillar"}, ".2f"),
            Column("not repeating", "accept_length_not_repetitive", {"policy": "pillar"}, ".2f"),
            Column("`window`", "accept_length", {"policy": "window"}, ".2f"),
            Column("`window`, not repeating", "accept_length_not_repetitive", {"policy": "window"}, ".2f"),
        ],
        [
            *(Row(WINDOW, {"context": context}) for context in (2048, 4096, 8192)),
            *(Row(WINDOW_CPU, {"context": context}) for context in (2048, 4096, 7900)),
        ],
        command="""
python benchmarks/accept_length.py --model-path M --contexts 2048 4096 8192 --policies pillar window --prompts 16 \\
    --new-tokens 512 --results accept-length.jsonl
python benchmarks/accept_length.py --model-path M --device cpu --dtype float32 --contexts 2048 4096 7900 --prompts 4 \\
    --new-tokens 96 --temperature 0.8 --results accept-length.jsonl""",
        note="The first three rows are greedy on an H100, the others at T 0.8 on a CPU.",
    ),
    Table(
        "fp8-drafts",
        "FP8 drafts",
        """
        Drafting with an FP8 copy of the weights is faster than drafting with the model's own at every load,
        {x[FP8 over own].lowest} to {x[FP8 over own].highest} times. It gains least in batches of 64 and more, where KV
        and the verification take the time.""",
        LOAD,
        [
            speed("FP8", ALWAYS),
            speed("own weights", OWN_DRAFTS),
            over("FP8 over own", "FP8", "own weights"),
        ],
        [
            load(FP8, "code:8192,128,512,0.6"),
            load(FP8, "code:4096,64,512,0.6"),
            load(FP8, "code:8192,16,512,0.6"),
            load(FP8, "code:2048,128,512,0.6"),
            load(FP8, "code:512,32,512,0.6"),
            load(FP8, "code:8192,1,256,0.6"),
        ],
        note="Qwen2.5-Coder-1.5B, tokens per second; every round speculates.",
    ),
    Table(
        "draft-step",
        "A draft step, kernel by kernel",
        """
        Matrix products are the largest part of a draft step. They read weights at less than the memory's speed, so a step
        takes {x[step over bytes].simulated_lowest} (8B shapes) to {x[step over bytes].simulated_highest} (1.5B) times what
        its bytes need. To make a draft step faster, faster products of few rows would help more than less attention.""",
        {
            "shapes": lambda record: shapes(record["model"]),
            "requests x context": lambda record: f"{record['batch']} x {record['context']:,}",
        },
        [
            Column("step, ms", "draft_step.ms", spec=".2f"),
            Column("kernels", "draft_step.launches"),
            Column("products", step_share("matrix products"), spec=".2f"),
            Column("attention", step_share("attention"), spec=".2f"),
            Column("small kernels", step_of(*SMALL_KERNELS), spec=".2f"),
            Column("rest", step_rest, spec=".2f"),
            Column("idle", step_share("idle"), spec=".2f"),
            Column("bytes", step_bytes, spec=".2f"),
            over("step over bytes", "step, ms", "bytes", hidden=True),
        ],
        [
            *(Row(STEP_8B, {"batch": batch}) for batch in (1, 16, 64)),
            *(Row(STEP_1B, {"batch": batch}) for batch in (1, 16, 64)),
        ],
        note="""
        Dummy weights, 8,192 tokens of context. The acceptance is simulated, which changes nothing in a step. "Small kernels"
        are norms, SiLU, quantisation and what comes before attention; "bytes" is what reading the FP8 weights and 5% of the
        KV takes at 4.8 TB/s.""",
        mark_rows=True,
    ),
    Table(
        "attention-kernels",
        "Attention kernels",
        """
        Plain decoding's attention takes {x[decode over draft].lowest} to {x[decode over draft].highest} times as long as a
        draft step's. Triton's draft attention is faster than FlashInfer's, so it is the default. Small launches do not reach
        the memory's speed. A verification that also gives PillarAttn its scores costs up to {x[verify over FA3].highest}
        times FlashAttention 3 without scores: that is the price of selecting.""",
        {"shapes": "", "requests x context": ""},
        [
            Column("draft, Triton, us", microseconds, kernel("draft", "triton"), ".1f"),
            Column("TB/s", lambda record: record["bytes"] / record["ms"] / 1e9, kernel("draft", "triton"), ".2f"),
            Column("draft, FlashInfer", microseconds, kernel("draft", "flashinfer"), ".1f"),
            Column("decode, FA3", microseconds, kernel("decode", "fa3"), ",.0f"),
            over("decode over draft", "decode, FA3", "draft, Triton, us"),
            Column("verify", microseconds, kernel("verify", "triton"), hidden=True),
            Column("FA3", microseconds, kernel("verify", "fa3"), hidden=True),
            over("verify over FA3", "verify", "FA3"),
        ],
        [
            attention_case(shape, context, batch)
            for shape in ("qwen2.5-1.5b", "qwen3-8b")
            for context in (8192, 32768)
            for batch in (32, 256)
        ],
        note="""
        Microseconds of one layer. Slots lie anywhere in the pool, the worst case that page size 1 allows. The file has
        36 batches.""",
    ),
    Table(
        "sampling",
        "Sampling",
        """
        Sampling takes {x[224 requests][Triton, from logits]} to {x[224 requests][Triton, top-k 20 and top-p 0.95]} ms of a
        round of 224 requests, where FlashInfer's kernels take {x[224 requests][FlashInfer]} to {x[224 requests][FlashInfer,
        top-k 20 and top-p 0.95]}. For a single request FlashInfer's are faster.""",
        {"sampler": "implementation"},
        [
            Column(f"{batch} request{'s' if batch > 1 else ''}", "round_ms", {"batch": batch}, ".2f")
            for batch in (1, 32, 128, 224)
        ],
        [
            engine("sampler", name, SAMPLING, {"implementation": implementation})
            for implementation, name in (
                ("triton", "Triton, from logits"),
                ("triton, min-p", "Triton, min-p 0.05"),
                ("triton, top-k and top-p", "Triton, top-k 20 and top-p 0.95"),
                ("argmax", "argmax (greedy)"),
                ("flashinfer", "FlashInfer"),
                ("flashinfer, top-k and top-p", "FlashInfer, top-k 20 and top-p 0.95"),
            )
        ],
        note="Milliseconds of a round: eight draws and the acceptance, vocabulary of 151,936, T 0.7.",
    ),
    Table(
        "kv-manager",
        "Dynamic KV manager",
        """
        A whole workload that needs more memory than there is ends after {x[host tier].simulated_lowest} seconds with the
        host tier: {x[of retraction].simulated_lowest} of the time that SPARSESPEC takes with SGLang's retraction, and {x[of
        plain].simulated_lowest} of plain SGLang's. Nothing is computed again.""",
        {"seconds of the whole run": ""},
        [
            Column("host tier", "seconds", {"engine": KV_HOST}, ".0f"),
            Column("retraction", "seconds", {"engine": "sparsespec"}, ".0f"),
            Column("plain", "seconds", {"engine": "plain"}, ".0f"),
            over("of retraction", "host tier", "retraction", bold=True),
            over("of plain", "host tier", "plain", bold=True),
        ],
        [Row(KV_LARGE, {}, {"seconds of the whole run": "200 requests"})],
        mark_rows=True,
        note="""
        Qwen3-8B shapes with dummy weights and simulated acceptance on an H200, accept length 7.02 with all eight drafts; a
        pool of 300,000 tokens. Prompts of 512 tokens, all at once, at most 160 running; outputs of 200 to 16,000 tokens
        (757,000 in all), whose lengths the scheduler does not know. The longest request runs from the beginning to the end,
        so no policy could end this workload much earlier. With the host tier more requests run at a time, 87 in the mean
        while memory is short; with retraction it is 72, since memory is kept free until the scheduler has learned how long
        outputs are. The host tier moved 23 requests there and back; retraction computed 47,088 tokens again, plain SGLang's
        44,792. While requests are being moved, a round takes 0.996 +- 0.020 times as long as otherwise. In these runs
        each batch was chosen late ("Tried and left out").""",
    ),
    Table(
        "kv-manager-small",
        "Dynamic KV manager, small model",
        """
        With a small model plain SGLang was faster where memory is short and outputs are long: its steps are so short that
        rounds of drafts gain little. Runs that were cut compare different work: an engine that puts long requests off runs
        more of the short ones.""",
        {"workload": "", "engine": ""},
        [
            Column("pool in use", "utilisation_steady", spec=".1%"),
            Words("left the GPU", moved),
            Words("computed again", computed_again),
            Column("tokens/s", "tokens_per_s"),
        ],
        [
            *(
                engine("engine", name, KV_CUT, {"engine": label}, workload="400 requests, H200, cut after 75 s")
                for label, name in (
                    ("sparsespec:host", "SPARSESPEC, host tier"),
                    ("sparsespec:retract", "SPARSESPEC, SGLang's retraction"),
                    ("sparsespec:retract-aggressive", "the same, conservativeness 0"),
                    ("plain:default", "plain"),
                    ("plain:aggressive", "plain, conservativeness 0"),
                )
            ),
            engine(
                "engine", "SPARSESPEC, host tier", KV_NEWER, {"engine": "sparsespec,sparsespec_host_kv_gb=12"},
                workload="300 requests, H200, SGLang 0.5.23, cut after 60 s",
            ),
            *(
                engine("engine", name, KV_WHOLE, {"engine": label}, workload="160 requests, H100, whole run")
                for label, name in (
                    ("sparsespec:host", "SPARSESPEC, host tier"),
                    ("sparsespec:retract", "SPARSESPEC, SGLang's retraction"),
                )
            ),
        ],
        command="""
python benchmarks/kv_manager.py --model-path M --results kv_manager.jsonl \\
    --engines sparsespec,sparsespec_host_kv_gb=12 {sparsespec,plain} {sparsespec,plain},schedule_conservativeness=0 \\
    --requests 400 --max-new-tokens 16000 --max-total-tokens 200000 --max-running-requests 160 --time-limit 75""",
        note="""
        Qwen2.5-Coder-1.5B, prompts of 512 tokens, all at once; outputs of 200 to 16,000 tokens on the H200, of 200 to 6,000
        on the H100, whose lengths the scheduler does not know. While requests are being moved, a round takes 0.993 +- 0.012
        times as long as otherwise on 0.5.23 (1.00 to 1.02 on 0.5.17), at equal batch sizes, draft lengths and KV in use.""",
    ),
    Table(
        "shares",
        "Served load",
        """
        At half of plain SGLang's capacity a token takes {x[per token, over plain][50%, one machine]} of plain SGLang's time,
        and at 90% of it {x[per token, over plain][90%]}. The first token comes later at half of the capacity: {x[TTFT, over
        plain][50%, one machine]} times as late in the median, {x[p99, over plain][50%, one machine]} at p99. At 90% it comes
        earlier, since faster decoding leaves more time for prefill: {x[TTFT, over plain][90%]} in the median, {x[p99, over
        plain][90%]} at p99.""",
        {"of capacity": "rate_share"},
        [
            *(
                Column(f"{title}, {name}", value, where, spec)
                for title, value, spec in (
                    ("TTFT", "median_ttft_ms", ".0f"), ("p99", "p99_ttft_ms", ".0f"), ("per token", "mean_tpot_ms", ".2f")
                )
                for name, where in (
                    ("plain", {"engine": "plain"}),
                    ("ours", {"engine": "sparsespec", "commit": is_without_late_choice}),
                )
            ),
            *(
                over(f"{title}, over plain", f"{title}, ours", f"{title}, plain", hidden=True)
                for title in ("TTFT", "p99", "per token")
            ),
        ],
        [
            Row(SHARES_ONE_MACHINE, {"rate_share": "50%"}, {"of capacity": "50%, one machine"}),
            *(Row(SHARES, {"rate_share": share}) for share in ("50%", "90%")),
        ],
        note="""
        Milliseconds: of the time to first token (TTFT) the median and p99, per token the mean. Qwen2.5-Coder-1.5B on an
        H200, default settings of both, plain SGLang with FlashAttention 3. 320 requests arrive by a Poisson process at
        shares of the 20.2 requests per second that plain SGLang answers when all come at once. Prompts have 512, 2,048 or
        8,192 tokens, outputs 128, 512 or 1,024, T 0.6. In the first row both servers ran on one machine, in turn, with
        memory for 400,000 tokens of KV; in the others on two machines of the same kind. The files have more rates, with
        batches chosen late ("Tried and left out").""",
    ),
    Table(
        "served",
        "Time to first token",
        """
        Earlier runs at a fixed rate, with Triton's prefill: the first token came later than with plain SGLang, in the median
        after {x[median over plain].lowest} to {x[median over plain].highest} times as long, at p99 after {x[p99 over
        plain].lowest} to {x[p99 over plain].highest}.""",
        {"commit": "commit", "requests/s": "request_rate"},
        [
            *(
                Column(f"{title}, {name}", value, {"engine": is_engine}, ".1f" if "ttft" in value else ".2f")
                for title, value in (("TTFT", "median_ttft_ms"), ("p99", "p99_ttft_ms"), ("per token", "mean_tpot_ms"))
                for is_engine, name in ((is_plain, "plain"), ("sparsespec", "ours"))
            ),
            over("median over plain", "TTFT, ours", "TTFT, plain", hidden=True),
            over("p99 over plain", "p99, ours", "p99, plain", hidden=True),
        ],
        [
            Row(SERVED, {"request_rate": "8", "date": lambda date: date < "2026-11-28T03:52"}),
            Row(SERVED_BEFORE, {"request_rate": "8"}),
            Row(SERVED_BEFORE, {"request_rate": "16"}),
        ],
        command="""
python benchmarks/serving.py --model-path M --engines plain:flashinfer sparsespec --rates 8 16 \\
    --dataset code:2048 --new-tokens 512 --requests 320 --results serving.jsonl""",
        note="""
        Milliseconds; Qwen2.5-Coder-1.5B, Poisson arrivals, prompts of 2,048 tokens, outputs of 512, plain with FlashInfer.
        The two servers of a row ran at the same time, each on a GPU of its own. Nearly all rounds were plain ones.""",
    ),
    Table(
        "accuracy",
        "Accuracy",
        """
        On the questions of AIME 2024 and OlympiadBench with numeric answers, SPARSESPEC is as accurate as plain SGLang
        within sampling error. This finds gross errors only: a difference of three percentage points could be missed. That
        decoding is lossless is shown by the parity below, and by the tests that compare sampled outputs with the exact
        distribution.""",
        {"model": "model"},
        [
            Column("answers", "questions"),
            Column("correct, plain", "first", spec=".1%"),
            Column("correct, SPARSESPEC", "second", spec=".1%"),
            Column("by plain alone", "only_first"),
            Column("by SPARSESPEC alone", "only_second"),
            Column("McNemar's p", "p_value", spec=".2f"),
            Words("difference, 95% interval", difference),
        ],
        [Row(ACCURACY, {"kind": "comparison"}, {"model": "Qwen2.5-Coder-1.5B, H200"})],
        command="""
python benchmarks/accuracy.py --model-path M --results accuracy.jsonl --max-new-tokens 2048 --concurrency 128 --samples 2""",
        note="""
        306 questions twice, T 0.6, at most 2,048 tokens; every round speculates. 52 of plain SGLang's outputs were cut at
        that length, and 56 of SPARSESPEC's. The model is small and made for code, so few answers are correct. Answers were
        graded by math-verify afterwards, on a machine without a GPU.""",
    ),
    Table(
        "parity",
        "Greedy parity",
        """
        In float32 every output is plain SGLang's, token for token. In 16 bits many part at some token, because kernels of
        different shapes round differently; so do outputs of plain SGLang with two of its own attention backends (the
        control). Where an output parts, the two tokens' margin is never larger than the difference of margins in the
        control: 0.25 to 0.375, and 1.0 with FP8 weights by block.""",
        {"model": "", "engine": ""},
        [
            Words("equal", prompts_equal),
            Words("largest margin where they part", largest_margin),
        ],
        [
            *(
                engine("engine", name, file, {"dtype": "float32"}, model="SmolLM2-135M, float32, CPU")
                for file, name in (
                    (PARITY_CPU, "both schedules, 8 settings"),
                    (PARITY_CPU_ROUNDS, "with plain rounds, 3 settings"),
                )
            ),
            *(
                engine("engine", name, PARITY, {"engine": label}, model="SmolLM2-135M, bfloat16, H200")
                for label, name in (
                    ("plain:triton", "*plain SGLang with Triton attention (control)*"),
                    ("sparsespec", "lock-step, FP8 drafts"),
                    ("sparsespec,sparsespec_draft_weights=model", "lock-step, the model's own weights"),
                    ("sparsespec:pillar:unified", "unified"),
                    ("sparsespec,sparsespec_speculate=never", "plain rounds only"),
                )
            ),
            *(
                engine("engine", name, file, {"engine": label}, model=f"Qwen2.5-Coder-1.5B, bfloat16, H200{where}")
                for file, where in (
                    (PARITY_10K, ""),
                    (PARITY_TWO_GPUS, ", tensor parallelism 2"),
                    (PARITY_NEWER, ", SGLang 0.5.23"),
                )
                for label, name in (
                    ("plain:triton", "*plain SGLang with Triton attention (control)*"),
                    ("sparsespec", "default settings, every round speculates"),
                )
            ),
            *(
                engine(
                    "engine", name, PARITY_QUANTISED, {"engine": label, "model": f"qwen2.5-coder-1.5b-{form}"},
                    model=f"the same, {form}",
                )
                for form in ("awq", "gptq", "compressed-w4a16", "fp8-block")
                for label, name in (
                    ("plain:triton", "*control*"),
                    ("sparsespec", "default settings, every round speculates"),
                )
                if (form, label) != ("gptq", "plain:triton")  # not run
            ),
            engine(
                "engine", "one request from 32,388 to 33,028 tokens, 16 short ones", PARITY_YARN, {"engine": "sparsespec"},
                model="the same with YaRN",
            ),
            engine(
                "engine", "twelve kinds of requests at once", SOAK, {"engine": "sparsespec"},
                model="Qwen2.5-Coder-1.5B, bfloat16, H200",
            ),
        ],
        command="""
python benchmarks/parity.py --model-path M --device cpu --dtype float32 --results parity.jsonl \\
    --engines sparsespec sparsespec:pillar:unified sparsespec,sparsespec_speculate={auto,never}""",
        note="""
        Margins are distances of the two tokens in the baseline's log-probabilities; 0.125 is one step of a bfloat16 logit
        between 16 and 32.""",
    ),
    # ------------------------------------------------------------------ of the archive
    Table(
        "speculate",
        "Rounds that speculate, and plain rounds (H200, FlashInfer baseline)",
        """
        A plain round of SPARSESPEC is faster than plain SGLang's steps, since several tokens are decoded in one scheduler
        step. The planner of that commit ran rounds of the slower kind to time them, which cost it 10% on AIME. Today's
        planner runs none.""",
        LOAD,
        [
            speed("plain", "plain:flashinfer"),
            speed("always", "sparsespec", hidden=True),
            speed("auto", "sparsespec, speculate auto", hidden=True),
            speed("never", "sparsespec, speculate never", hidden=True),
            *(over(f"{name} over plain", name, "plain") for name in ("always", "auto", "never")),
        ],
        [
            load(SPECULATE, "code:1024,256,512,0"),
            load(SPECULATE, "code:2048,128,512,0"),
            load(SPECULATE, "code:8192,32,512,0"),
            load(SPECULATE, "aime,64,3072,0.6"),
        ],
        command="""
python benchmarks/throughput.py --model-path M --results speculate.jsonl --engines plain:flashinfer \\
    sparsespec,sparsespec_speculate={always,auto,never} \\
    --loads code:1024,256,512,0 code:2048,128,512,0 code:8192,32,512,0 aime,64,3072,0.6""",
    ),
    Table(
        "policies",
        "Draft policies (H100, FlashInfer baseline)",
        """
        `vegas` (k = 8, a budget of 7%) is as fast as `pillar`; `streaming` and `triforce` are slower than plain SGLang.
        `triforce` ran without CUDA graphs.""",
        LOAD,
        [
            speed("plain", "plain:flashinfer"),
            speed("`pillar`", "sparsespec"),
            *(speed(f"`{policy}`", f"sparsespec:{policy}") for policy in ("vegas", "streaming", "triforce")),
            over("`pillar` over plain", "`pillar`", "plain"),
        ],
        [load(POLICIES, "code:8192,28,512,0.6"), load(POLICIES, "aime,64,3072,0.6")],
        command="""
python benchmarks/throughput.py --model-path M --results policies.jsonl --engines plain:flashinfer \\
    sparsespec:{pillar,vegas,streaming,triforce},sparsespec_speculate=always \\
    --loads code:8192,28,512,0.6 aime,64,3072,0.6""",
    ),
    Table(
        "schedules",
        "Schedules, and delayed verification (H100, FlashInfer baseline)",
        """
        Delayed verification gains {x[delayed over immediate].lowest} to {x[delayed over immediate].highest} times. The
        unified schedule is slower than lock-step with this model ({x[unified over lock-step].lowest} to {x[unified over
        lock-step].highest}), so lock-step is the default.""",
        LOAD,
        [
            speed("plain", "plain:flashinfer"),
            speed("lock-step", "lock-step"),
            speed("immediate", "lock-step, immediate verification"),
            speed("unified", "unified"),
            over("delayed over immediate", "lock-step", "immediate"),
            over("unified over lock-step", "unified", "lock-step"),
        ],
        [
            load(SCHEDULES, "code:1024,256,512,0"),
            load(SCHEDULES, "code:2048,128,512,0"),
            load(SCHEDULES, "code:2048,128,512,0.6"),
            load(SCHEDULES, "code:4096,64,512,0"),
            load(SCHEDULES, "code:8192,32,512,0"),
        ],
        command="""
python benchmarks/throughput.py --model-path M --results schedules.jsonl --repeats 2 --engines plain:flashinfer \\
    sparsespec:pillar:{lockstep,unified},sparsespec_speculate=always \\
    sparsespec,sparsespec_speculate=always,disable_overlap_schedule=true \\
    --loads code:1024,256,512,0 code:2048,128,512,{0,0.6} code:4096,64,512,0 code:8192,32,512,0""",
    ),
    Table(
        "schedules-8b",
        "Schedules, Qwen3-8B shapes (H100)",
        """
        With larger shapes the unified schedule comes closer, but is no faster: of lock-step's two runs in the first row, the
        first is slow, as first runs are.""",
        LOAD,
        [
            speed("lock-step", "lock-step"),
            speed("unified", "unified"),
            over("unified over lock-step", "unified", "lock-step"),
        ],
        [
            load(SCHEDULES_8B, "random:576,128,256,0"),
            load(SCHEDULES_8B, "random:832,96,256,0"),
            load(SCHEDULES_8B, "random:1408,64,256,0"),
            load(SCHEDULES_8B, "random:3072,32,256,0"),
        ],
        command="""
SGLANG_SIMULATE_ACC_LEN=7.16 python benchmarks/throughput.py --model-path qwen3-8b-shapes --load-format dummy \\
    --engines sparsespec:pillar:{lockstep,unified},sparsespec_speculate=always --repeats 2 --results schedules-8b.jsonl \\
    --loads random:576,128,256,0 random:832,96,256,0 random:1408,64,256,0 random:3072,32,256,0""",
    ),
    Table(
        "flattered",
        "Larger shapes, by a simulation that flattered short rounds",
        """
        **Do not quote these.** Until c190c0f simulated acceptance put nearly all rejections at the end of a window: a round
        of six drafts yielded 6.5 tokens where a real model of the same accept length with eight, 7.02, would yield 5.8. The
        planner took that for a gain and chose six or seven. Measured again with the same chance at every position, the 8B
        shapes at 84 x 8,192 gave 2.16 SIMULATED instead of 2.32.""",
        MODEL_AND_LOAD,
        [
            speed("plain", "plain"),
            speed("SPARSESPEC", "sparsespec"),
            over("over plain", "SPARSESPEC", "plain"),
            Column("accept length", "accept_length", {"label": "sparsespec"}, ".2f"),
        ],
        [
            load(FLATTERED_LARGE, "random:8192,84,512,0"),
            load(FLATTERED_LARGE, "random:8192,60,512,0", model="qwen3-14b-shapes"),
            load(FLATTERED_TWO_GPUS, "random:8192,176,256,0"),
            load(FLATTERED_MIXTURE, "random:8192,64,256,0"),
        ],
    ),
    Table(
        "products",
        "Products of a draft step",
        """
        `fp8_scaled_mm` is the fastest of the three, or as fast, so drafts use it. PyTorch's FP8 product is slower than the
        weights' own type where products are small.""",
        {"shapes": "shape", "product": ""},
        [
            Column(f"{name}, {rows}", microseconds, {"kernel": label, "rows": rows}, ".1f")
            for rows in (1, 64)
            for label, name in (("model's", "own"), ("fp8_scaled_mm", "FP8"), ("torch._scaled_mm", "PyTorch FP8"))
        ],
        [
            engine("product", what, PRODUCTS, {"shape": shape, "what": f"product {what}"}, shapes=name)
            for shape, name in (("qwen3-8b", "Qwen3-8B"), ("qwen2.5-coder-1.5b", "Qwen2.5-1.5B"))
            for what in ("qkv", "o", "gate and up", "down", "head")
        ],
        note="Microseconds at 1 and at 64 tokens; weights are not in the L2 cache.",
    ),
    Table(
        "own-weights",
        "Before FP8 drafts",
        """
        With the model's own weights for drafts, default settings gave {x[over plain].lowest} times plain SGLang's throughput
        at this load. FlashInfer's kernels were 3% slower than Triton's.""",
        LOAD,
        [
            speed("plain", "plain"),
            speed("default", "sparsespec"),
            speed("always", ALWAYS),
            speed("always, FlashInfer", "sparsespec,sparsespec_kernels=flashinfer,sparsespec_speculate=always"),
            over("over plain", "default", "plain"),
        ],
        [load(FLASHINFER, "code:8192,128,512,0.6")],
    ),
    Table(
        "cpu",
        "On a CPU",
        "On a CPU speculation is slower than plain decoding. Both engines gave the same tokens.",
        LOAD,
        [
            speed("plain", "plain:torch_native", ".1f"),
            speed("SPARSESPEC", "sparsespec", ".1f"),
            over("over plain", "SPARSESPEC", "plain"),
            Column("accept length", "accept_length", {"label": "sparsespec"}, ".2f"),
        ],
        [load(CPU, "aime,2,24,0"), load(CPU, "code:512,2,24,0")],
        command="""
python benchmarks/throughput.py --model-path M --device cpu --dtype float32 --results cpu.jsonl \\
    --engines plain sparsespec,sparsespec_speculate=always --loads aime,2,24,0 code:512,2,24,0""",
        note="SmolLM2-135M, two cores of an AMD EPYC; every round speculates.",
    ),
]

#: Plots below the conclusion of a table.
TABLE_PLOTS = {
    "default-settings": [OVER_PLAIN, BATCHES],
    "accept-length": [ACCEPT_LENGTHS],
    "draft-step": [STEP],
}
ARCHIVED = ("speculate", "policies", "schedules", "schedules-8b", "own-weights", "flattered", "products", "cpu")


@dataclass(frozen=True)
class Page:
    """A page with tables.

    Attributes:
        heading: each table has a heading of its own.
        plots: the most plots of one table.
    """

    path: Path
    tables: Sequence[str]
    heading: bool = True
    plots: int = 2

    @property
    def root(self) -> str:
        """The way from the page to the repository's root."""
        return "../" * (len(self.path.relative_to(REPO).parts) - 1)


PAGES = [
    Page(REPO / "README.md", ["default-settings"], heading=False, plots=1),
    Page(REPO / "docs" / "results.md", [table.name for table in TABLES if table.name not in ARCHIVED]),
    Page(REPO / "docs" / "results-archive.md", ARCHIVED),
]

# -------------------------------------------------------------------------- program


def parts_of(page: Page, results: Results) -> dict[str, str]:
    """The tables of a page, as they should stand in it."""
    by_name = {table.name: table for table in TABLES}
    parts = {}
    for name in page.tables:
        plots = [plot.markdown(page.root) for plot in TABLE_PLOTS.get(name, [])[: page.plots]]
        parts[name] = by_name[name].text(results, page.root, page.heading, plots)
    return parts


def stale_plots(results: Results) -> dict[Plot, list[Line]]:
    """The plots that are missing or show other rows than today's, with today's rows."""
    by_name = {table.name: table for table in TABLES}
    found: dict[Plot, list[Line]] = {}
    for name, plots in TABLE_PLOTS.items():
        lines = by_name[name].lines(results)
        found |= {plot: lines for plot in plots if digest_in(plot.path) != digest(lines)}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given command line; 1 if ``--check`` finds something that is not current."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    results = Results(RESULTS)
    stale = []
    for page in PAGES:
        text = page.path.read_text(encoding="utf-8")
        new = generated_parts.filled(text, parts_of(page, results))
        if new != text:
            stale.append(page.path)
            if not args.check:
                page.path.write_text(new, encoding="utf-8")
    for plot, lines in stale_plots(results).items():
        stale.append(plot.path)
        if not args.check:
            save(plot, lines)
    names = ", ".join(str(path.relative_to(REPO)) for path in stale)
    if stale and args.check:
        print(f"not current: {names}; run python benchmarks/make_results.py", file=sys.stderr)
        return 1
    if stale:
        print(f"written: {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
