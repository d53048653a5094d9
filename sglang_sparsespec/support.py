"""What SPARSESPEC can serve: what start-up refuses, as tables, and what it fills in for the user."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_sparsespec import ALGORITHM, ATTENTION_BACKEND
from sglang_sparsespec.attention_backend.kernels.triton_common import FAST_ROWS, tile_rows
from sglang_sparsespec.hook_registry import assert_hooks_applied
from sglang_sparsespec.settings import (
    AUTO,
    AUTO_HOST_KV,
    FP8_WEIGHTS,
    MODEL_WEIGHTS,
    PILLAR,
    POLICIES,
    Settings,
    attach_settings,
    check_speculate,
    draft_steps,
    settings_of,
)
from sglang_sparsespec.sglang_compat import DECLARES_RESOLUTION, VERSION, model_config_of
from sglang_sparsespec.start_checks import check_settings_arrive

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

#: Requests running at once, by device, unless ``--max-running-requests`` says otherwise. SGLang uses 48 for its own
#: algorithms; self-speculation has no draft model to make room for.
DEFAULT_MAX_RUNNING_REQUESTS = {"cuda": 256, "cpu": 16}
#: ``--sparsespec-host-kv-gb auto``: this share of the free memory, beyond what SGLang leaves to others.
AUTO_HOST_KV_SHARE = 0.5
KV_CACHE_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2")


# ---------------------------------------------------------------------- what is refused


@dataclass(frozen=True)
class Context:
    """What is judged: the server's arguments as given, as SGLang will resolve them (``view``), and the settings."""

    args: ServerArgs
    view: Any
    settings: Settings


@dataclass(frozen=True)
class Refusal:
    """A combination that cannot be served correctly.

    Attributes:
        applies: whether the server asked for it.
        flag: what was asked for; ``{args.NAME}`` and the like are filled in from the :class:`Context`.
        why, remedy: parts of the message.
    """

    applies: Callable[[Context], bool]
    flag: str
    why: str
    remedy: str

    def message(self, context: Context) -> str:
        """One sentence with flag, reason and remedy."""
        flag = self.flag.format(args=context.args, view=context.view, settings=context.settings)
        return f"{flag} is not supported with --speculative-algorithm {ALGORITHM}: {self.why}; {self.remedy}."


def _is_unknown_base_backend(context: Context) -> bool:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    base = context.settings.base_attention_backend
    return base is not None and (base == ATTENTION_BACKEND or base not in ATTENTION_BACKENDS)


def serves_lora(args: ServerArgs) -> bool:
    """Whether requests may name a LoRA adapter. SGLang sets ``enable_lora`` where only paths are given."""
    return bool(args.enable_lora or (args.lora_paths and args.enable_lora is not False))


_NO_HOST_TIER = "remove it, or use --sparsespec-host-kv-gb 0"

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        lambda c: c.args.device not in ("cpu", "cuda"),
        "--device {args.device}",
        "only CPU and CUDA kernels exist",
        "use --device cuda or cpu",
    ),
    Refusal(
        lambda c: c.settings.schedule == "unified" and POLICIES[c.settings.draft_policy].lockstep_only,
        "--sparsespec-schedule unified together with --sparsespec-draft-policy {settings.draft_policy}",
        "its drafts have no fixed length",
        "use --sparsespec-schedule lockstep or another policy",
    ),
    Refusal(
        lambda c: c.settings.kernels in ("triton", "flashinfer") and c.args.device != "cuda",
        "--sparsespec-kernels {settings.kernels}",
        "the device is not CUDA",
        "use --sparsespec-kernels auto",
    ),
    Refusal(
        lambda c: c.settings.has_fp8_drafts and c.settings.schedule == "unified",
        "--sparsespec-draft-weights {settings.draft_weights} together with --sparsespec-schedule unified",
        "its drafts and verifications share every product with the weights",
        "use --sparsespec-draft-weights model or --sparsespec-schedule lockstep",
    ),
    Refusal(
        lambda c: c.settings.has_fp8_drafts and c.args.device == "cuda" and not has_fp8(),
        "--sparsespec-draft-weights {settings.draft_weights}",
        "the GPU's compute capability is below 8.9",
        "use --sparsespec-draft-weights model",
    ),
    Refusal(
        _is_unknown_base_backend,
        "--sparsespec-base-attention-backend {settings.base_attention_backend}",
        "it is not an attention backend of SGLang",
        "leave it out for the default of the device",
    ),
    Refusal(
        lambda c: c.args.speculative_draft_model_path is not None,
        "--speculative-draft-model-path",
        "the target model drafts for itself",
        "remove it, or use --speculative-algorithm STANDALONE",
    ),
    Refusal(
        lambda c: c.args.speculative_eagle_topk not in (None, 1),
        "--speculative-eagle-topk above 1",
        "drafts are one chain",
        "remove it",
    ),
    Refusal(
        lambda c: c.args.speculative_adaptive,
        "--speculative-adaptive",
        "SGLang adapts draft models only",
        "remove it, and set the draft length with --speculative-num-steps",
    ),
    Refusal(
        lambda c: (c.args.speculative_accept_threshold_single, c.args.speculative_accept_threshold_acc) != (1, 1),
        "--speculative-accept-threshold-single/-acc below 1",
        "it changes the output distribution",
        "remove it",
    ),
    Refusal(
        lambda c: c.args.disaggregation_mode != "null",
        "--disaggregation-mode {args.disaggregation_mode}",
        "the sparse selection is not transferred",
        "serve without disaggregation",
    ),
    Refusal(
        lambda c: c.view.enable_dp_attention,
        "--enable-dp-attention",
        "draft steps are not padded across ranks",
        "use --dp-size replicas",
    ),
    Refusal(
        lambda c: c.view.moe_a2a_backend not in (None, "none"),
        "--moe-a2a-backend {view.moe_a2a_backend}",
        "draft steps are not padded and scattered across ranks",
        "use --ep-size without it",
    ),
    Refusal(
        lambda c: c.view.moe_dense_tp_size is not None,
        "--moe-dense-tp-size {view.moe_dense_tp_size}",
        "draft steps are not padded and scattered across ranks",
        "remove it",
    ),
    Refusal(
        lambda c: c.args.pp_size != 1,
        "--pp-size above 1",
        "SGLang has no pipelined speculation",
        "use --tp-size",
    ),
    Refusal(
        lambda c: c.view.dcp_size != 1 or c.args.attn_cp_size != 1,
        "context parallelism (--dcp-size, --attn-cp-size)",
        "selection needs whole heads",
        "use --tp-size",
    ),
    Refusal(
        lambda c: serves_lora(c.args) and c.args.device == "cuda" and c.args.lora_backend != "csgmv",
        "--lora-backend {args.lora_backend}",
        "what it keeps of a batch has no room for verifications",
        "use --lora-backend csgmv",
    ),
    Refusal(
        lambda c: c.args.enable_two_batch_overlap,
        "--enable-two-batch-overlap",
        "draft steps are not split",
        "remove it",
    ),
    Refusal(
        lambda c: c.args.enable_pdmux,
        "--enable-pdmux",
        "one attention backend is shared by all streams",
        "remove it",
    ),
    Refusal(
        lambda c: c.args.enable_hisparse,
        "--enable-hisparse",
        "two sparse KV schemes exclude each other",
        "remove one of them",
    ),
    Refusal(
        lambda c: c.args.dllm_algorithm is not None,
        "--dllm-algorithm",
        "diffusion models do not draft chains",
        "remove it",
    ),
    Refusal(
        lambda c: c.args.enable_torch_compile,
        "--enable-torch-compile",
        "draft graphs are captured without it",
        "remove it",
    ),
    Refusal(
        lambda c: c.args.is_embedding,
        "--is-embedding",
        "there is nothing to decode",
        "remove --speculative-algorithm",
    ),
    Refusal(
        lambda c: c.args.kv_cache_dtype not in KV_CACHE_DTYPES,
        "--kv-cache-dtype {args.kv_cache_dtype}",
        "the kernels read caches of 8, 16 and 32 bits only",
        "use --kv-cache-dtype auto or fp8_e4m3",
    ),
    Refusal(
        lambda c: c.args.device == "cpu" and c.args.kv_cache_dtype.startswith("fp8"),
        "--kv-cache-dtype {args.kv_cache_dtype}",
        "SGLang's CPU attention reads no 8-bit cache",
        "use --kv-cache-dtype auto",
    ),
    Refusal(
        lambda c: c.view.page_size not in (None, 1),
        "--page-size {view.page_size}",
        "the sparse page table addresses single tokens",
        "use --page-size 1",
    ),
    Refusal(
        lambda c: c.args.tokenizer_worker_num > 1 and c.args.enable_http2,
        "--tokenizer-worker-num above 1 with --enable-http2",
        "the workers of SGLang's HTTP/2 server start without plugins",
        "remove one of the two",
    ),
    Refusal(
        lambda c: c.args.enable_unified_memory,
        "--enable-unified-memory",
        "slots of its pool are not the rows that the kernels read",
        "remove it",
    ),
    Refusal(
        lambda c: c.settings.has_host_tier and c.args.disable_radix_cache,
        "--disable-radix-cache with --sparsespec-host-kv-gb",
        "requests are kept in the radix cache",
        _NO_HOST_TIER,
    ),
    Refusal(
        lambda c: c.settings.has_host_tier and c.args.enable_hierarchical_cache,
        "--enable-hierarchical-cache with --sparsespec-host-kv-gb",
        "the host tier is SGLang's hierarchical cache, with a size and policy of its own",
        _NO_HOST_TIER,
    ),
    Refusal(
        lambda c: c.args.device == "cpu" and c.args.enable_hierarchical_cache,
        "--enable-hierarchical-cache with --device cpu",
        "SGLang's host pools need a GPU",
        "remove it, or use --sparsespec-host-kv-gb, which works on a CPU",
    ),
    Refusal(
        lambda c: c.settings.has_host_tier and c.args.strip_thinking_cache,
        "--strip-thinking-cache with --sparsespec-host-kv-gb",
        "an offloaded request's whole output is in the radix cache",
        _NO_HOST_TIER,
    ),
    Refusal(
        lambda c: c.settings.host_kv_gb == AUTO_HOST_KV and c.args.nnodes > 1,
        f"--sparsespec-host-kv-gb {AUTO_HOST_KV} with --nnodes {{args.nnodes}}",
        "nodes have different amounts of free memory, and their host tiers must be equal",
        "give a size in GB",
    ),
)
if DECLARES_RESOLUTION:
    REFUSALS += (
        Refusal(
            # SGLang turns --enable-dp-attention into this, and resets it.
            lambda c: c.view.attn_dp_size > 1,
            "--enable-dp-attention (--attn-dp-size {view.attn_dp_size})",
            "draft steps are not padded across ranks",
            "use --dp-size replicas",
        ),
        Refusal(
            lambda c: c.args.enable_watermark,
            "--enable-watermark",
            "accepted tokens would not carry the watermark",
            "remove it",
        ),
    )


def _has_mla(model: ModelConfig) -> bool:
    # A value is a part of its key, and the kernels read keys and values of one width (docs/mla.md).
    from sglang.srt.configs.model_config import AttentionArch

    return model.attention_arch == AttentionArch.MLA


def _has_chunks(model: ModelConfig) -> bool:
    return "chunked_attention" in (getattr(model.hf_text_config, "layer_types", None) or ())


def _is_recurrent(model: ModelConfig) -> bool:
    from sglang.srt.configs.hybrid_arch import linear_attn_model_spec, mambaish_config

    return mambaish_config(model) is not None or linear_attn_model_spec(model) is not None


#: Models that are refused: which, and the beginning of "... not supported by SPARSESPEC".
MODEL_REFUSALS: tuple[tuple[Callable[[ModelConfig], bool], str], ...] = (
    (lambda model: not model.is_generation, "models that do not generate text are"),
    (_has_mla, "multi-head latent attention (MLA) is"),
    (_has_chunks, "layers that attend within chunks are"),
    (lambda model: model.is_encoder_decoder, "encoder-decoder models are"),
    (lambda model: model.is_multimodal, "multimodal models are"),
    (_is_recurrent, "models with recurrent layers are"),
)


def validate_server_args(server_args: ServerArgs) -> None:
    """Refuse, at start-up, whatever SPARSESPEC cannot serve correctly.

    This runs inside ``ServerArgs.__post_init__`` (``sglang.srt.arg_groups.speculative_hook``).

    Raises:
        ValueError: with a sentence that names the flag and the remedy.
        RuntimeError: the plugin is only partly loaded.
    """
    from sglang.srt.arg_groups.overrides import resolved_view

    assert_hooks_applied()
    check_settings_arrive()
    settings = settings_of(server_args)
    settings.check()
    check_speculate(settings)
    context = Context(server_args, resolved_view(server_args), settings)
    for refusal in REFUSALS:
        if refusal.applies(context):
            raise ValueError(refusal.message(context))
    if context.view.attention_backend != ATTENTION_BACKEND:
        found = context.view.attention_backend
        raise RuntimeError(f"sglang-sparsespec does not fit this sglang {VERSION}: the attention backend is {found}.")
    _check_draft_length(server_args, settings)
    model = model_config_of(server_args)
    for applies, what in MODEL_REFUSALS:
        if applies(model):
            raise ValueError(
                f"--model-path {server_args.model_path}: {what} not supported by {ALGORITHM}; serve it without "
                "--speculative-algorithm, or choose a model with plain grouped-query attention."
            )
    if settings.has_host_tier and model.is_hybrid_swa:
        raise ValueError(
            f"--sparsespec-host-kv-gb {settings.host_kv_gb} is not supported for --model-path {server_args.model_path}: "
            "SGLang keeps the layers with a sliding window in a pool and a radix cache that the host tier does not know; "
            f"{_NO_HOST_TIER}."
        )


def _check_draft_length(server_args: ServerArgs, settings: Settings) -> None:
    """Check k and W against each other and against the budget.

    Raises:
        ValueError: they contradict each other.
    """
    steps, tokens = server_args.speculative_num_steps, server_args.speculative_num_draft_tokens
    usual = PILLAR.num_steps
    if steps is not None and steps < 1:
        raise ValueError(f"--speculative-num-steps must be at least 1, got {steps}; {usual} is the default.")
    if tokens is not None and tokens < 2:
        raise ValueError(
            f"--speculative-num-draft-tokens must be at least 2 (one draft and the token before it), got {tokens}; "
            f"{usual + 1} is the default."
        )
    if steps is not None and tokens is not None and tokens != steps + 1:
        raise ValueError(
            f"--speculative-num-draft-tokens {tokens} must be --speculative-num-steps {steps} plus 1 (drafts are one chain, "
            "verified together with the token before it); give one of the two."
        )
    window = draft_steps(server_args) + 1
    if settings.min_budget < window:
        raise ValueError(
            f"--sparsespec-min-budget {settings.min_budget} must be at least the verify window of {window} tokens; use "
            f"--sparsespec-min-budget {max(Settings.min_budget, window)} or fewer --speculative-num-steps."
        )


# ---------------------------------------------------------------------- what is filled in


def resolve_server_args(server_args: ServerArgs) -> None:
    """Fill in what SPARSESPEC needs, in place; every change of a user's flag is logged.

    Raises:
        ValueError: ``--sparsespec-host-kv-gb auto`` finds no free memory.
    """
    steps = draft_steps(server_args)
    if server_args.speculative_num_steps is None and server_args.speculative_num_draft_tokens is None:
        steps = _fitting_steps(server_args, steps)
    server_args.speculative_num_steps = steps
    server_args.speculative_num_draft_tokens = steps + 1
    server_args.speculative_eagle_topk = 1
    if server_args.max_running_requests is None:
        server_args.max_running_requests = DEFAULT_MAX_RUNNING_REQUESTS[server_args.device]
        logger.info("--max-running-requests is %d with %s unless given.", server_args.max_running_requests, ALGORITHM)
    settings = settings_of(server_args)
    if server_args.enable_mixed_chunk:
        # SGLang asserts that it is off for every speculative algorithm (check_server_args).
        server_args.enable_mixed_chunk = False
        settings = dataclasses.replace(settings, prefill_beside_decoding=True)
        logger.info(
            "--enable-mixed-chunk with %s: prefill chunks and decode rounds take turns (SGLang has no forwards of both with "
            "speculation).",
            ALGORITHM,
        )
    if settings.base_attention_backend is None:
        settings = dataclasses.replace(settings, base_attention_backend=_default_base_backend(server_args))
    if settings.draft_weights == AUTO:
        settings = dataclasses.replace(settings, draft_weights=_auto_draft_weights(server_args, settings))
    attach_settings(server_args, settings)
    if serves_lora(server_args) and server_args.device == "cpu":
        server_args.lora_backend = "torch_native"  # SGLang's others are kernels for GPUs
    if settings.has_host_tier:
        _resolve_host_tier(server_args, settings)
    _resolve_graphs(server_args)


def _fitting_steps(server_args: ServerArgs, steps: int) -> int:
    """``steps``, or one fewer if the queries of a verify window then fit into half as wide a tile of the verify kernel.

    With eight query heads per KV head nine tokens are 72 rows, whose verification takes 1.7 times as long as one of 64.
    """
    model = model_config_of(server_args)
    group = model.get_num_attention_heads(server_args.tp_size) // model.get_num_kv_heads(server_args.tp_size)
    if tile_rows((steps + 1) * group) <= max(FAST_ROWS, tile_rows(steps * group)):
        return steps
    logger.info(
        "--speculative-num-steps is %d unless given: with %d query heads per KV head the verification of %d drafts is slow.",
        steps - 1,
        group,
        steps,
    )
    return steps - 1


def _default_base_backend(server_args: ServerArgs) -> str:
    """SGLang's backend that runs prefill: FlashAttention 3 where SGLang prefers it, on Hopper, and Triton on other GPUs."""
    import torch
    from sglang.srt.utils.common import is_hopper_with_cuda_12_3

    if server_args.device == "cpu":
        return "torch_native"
    # SGLang has it compute in the type of the cache, which may not be FP8 E5M2; out of FP8 comes bfloat16.
    dtype, cache = model_config_of(server_args).dtype, server_args.kv_cache_dtype
    fits = (dtype == torch.bfloat16 and cache != "fp8_e5m2") or (dtype == torch.float16 and cache == "auto")
    return "fa3" if fits and is_hopper_with_cuda_12_3() else "triton"


def has_fp8() -> bool:
    """Whether the GPU multiplies FP8 values."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def _auto_draft_weights(server_args: ServerArgs, settings: Settings) -> str:
    """What ``--sparsespec-draft-weights auto`` means here."""
    suits = settings.schedule == "lockstep" and not POLICIES[settings.draft_policy].for_study
    return FP8_WEIGHTS if suits and server_args.device == "cuda" and has_fp8() else MODEL_WEIGHTS


def _resolve_host_tier(server_args: ServerArgs, settings: Settings) -> None:
    """Turn on SGLang's hierarchical cache, the host tier's home."""
    total = free_host_gb() * AUTO_HOST_KV_SHARE if settings.host_kv_gb == AUTO_HOST_KV else settings.host_kv_gb
    assert isinstance(total, float | int)
    server_args.enable_hierarchical_cache = True
    server_args.hicache_size = total / (server_args.tp_size * server_args.dp_size)  # in GB, for each GPU
    # The other policies copy prefixes at their first use, or while evicting, which blocks.
    server_args.hicache_write_policy = "write_through_selective"
    # With pages of one token, the layout that one kernel copies all tokens of a node in.
    server_args.hicache_mem_layout = "layer_first"
    logger.info("Host KV tier: %.3g GB of pinned memory for each GPU.", server_args.hicache_size)


def free_host_gb() -> float:
    """Host memory, in GB, that is available and that SGLang's host pools may take.

    Raises:
        ValueError: there is none.
    """
    import psutil
    from sglang.srt.mem_cache.pool_host.base import HICACHE_HOST_MEMORY_RESERVE_BYTES

    free = (psutil.virtual_memory().available - HICACHE_HOST_MEMORY_RESERVE_BYTES) / 1e9
    if free <= 0:
        raise ValueError(
            f"--sparsespec-host-kv-gb {AUTO_HOST_KV}: no host memory is free beyond the "
            f"{HICACHE_HOST_MEMORY_RESERVE_BYTES / 1e9:.0f} GB that SGLang leaves to others; use 0."
        )
    return free


def _resolve_graphs(server_args: ServerArgs) -> None:
    """Turn off the CUDA graphs that cannot be captured."""
    from sglang.srt.model_executor.cuda_graph_config import Backend

    graphs = server_args.cuda_graph_config
    if server_args.device == "cpu":
        # There are no graphs on CPU without torch.compile; SGLang stops at prefill graph capture unless they are disabled.
        server_args.disable_cuda_graph = True
        decode = dataclasses.replace(graphs.decode, backend=Backend.DISABLED)
        prefill = dataclasses.replace(graphs.prefill, backend=Backend.DISABLED)
        server_args.cuda_graph_config = dataclasses.replace(graphs, decode=decode, prefill=prefill)
    elif graphs.prefill.backend not in (Backend.DISABLED, Backend.BREAKABLE):
        # A whole prefill graph would capture attention with the base backend's metadata and skip the scores of the prompt's
        # last queries. Breakable graphs leave attention out.
        prefill = dataclasses.replace(graphs.prefill, backend=Backend.DISABLED)
        server_args.cuda_graph_config = dataclasses.replace(graphs, prefill=prefill)
        logger.info(
            "Prefill CUDA graphs are off: with %s only --cuda-graph-backend-prefill breakable can be captured (decode and "
            "draft graphs stay on).",
            ALGORITHM,
        )
