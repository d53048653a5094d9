"""Configuration: the plugin's flags, and what start-up refuses.

Flags reach the plugin in two ways, both through hooks on ``ServerArgs``: the command
line (``--sparsespec-*``) and ``sglang.Engine(sparsespec_*=...)``. They are kept on the
``ServerArgs`` object as one attribute, so that they travel to the scheduler process
with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sglang_sparsespec import ALGORITHM, ATTENTION_BACKEND
from sglang_sparsespec.attention_backend.interface import LOOKAHEAD_WEIGHT, LOOKAHEADS
from sglang_sparsespec.attention_backend.policy import POLICIES, Pillar
from sglang_sparsespec.cpu_bridge import CPU_BRIDGE_ENV, install_cpu_bridge

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

DEFAULT_NUM_DRAFT_STEPS = Pillar.default_num_steps
#: Requests running at once, unless ``--max-running-requests`` says otherwise. SGLang uses
#: 48 for its own algorithms; self-speculation has no draft model to make room for.
DEFAULT_MAX_RUNNING_REQUESTS = 256
DRAFT_POLICIES = tuple(POLICIES)
KERNELS = ("auto", "torch", "cuda")
SCHEDULES = ("lockstep", "unified")
ALWAYS, AUTO, NEVER = "always", "auto", "never"
SPECULATE = (ALWAYS, AUTO, NEVER)
#: ``--sparsespec-host-kv-gb``: this share of the free memory, beyond what SGLang leaves to others.
AUTO_HOST_KV = "auto"
AUTO_HOST_KV_SHARE = 0.5
KV_CACHE_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2")


@dataclasses.dataclass(frozen=True)
class SparseSpecConfig:
    """The plugin's own settings (paper section 4.1 names the first two).

    Attributes:
        budget_ratio: share of a request's committed tokens that a draft step attends to.
        min_budget: lower bound of that number, in tokens.
        draft_policy: which tokens those are, see ``attention_backend.policy``.
        num_sinks: sink tokens of ``streaming``.
        base_attention_backend: SGLang backend that runs prefill; None for the default of
            the device.
        kernels: ``torch`` (the oracle), ``cuda`` (Triton), or ``auto`` by device.
        schedule: ``lockstep``: all requests draft, then all verify. ``unified``: every forward
            holds drafts and verifications in the same proportion (paper section 4.2).
        host_kv_gb: pinned host memory, in GB, that running requests may be moved to (all GPUs
            of the server together); 0 for none, ``auto`` for half of the free memory.
        draft_cost: time of a draft step relative to a verification, for ``adaptive``. The default is
            that of 128 requests of 8,192 tokens on an H100 (``benchmarks/results``, profile-c10904a).
        speculate: which rounds speculate: ``auto`` those where that is faster than plain decoding, ``always`` all of
            them (default of the policies that are for study), ``never`` none but those that need a verification (see
            ``round_choice``).
        lookahead: positions after each token that selection by scores takes as wanted next (``PillarKernels.select``).
        late_launch: rounds are launched shortly before the one before ends (``scheduler_patch.late_launch``).
        prefill_beside_decoding: decode rounds run between prefill batches. Set by SGLang's own
            ``--enable-mixed-chunk``, which SGLang itself refuses with speculation.
    """

    budget_ratio: float = Pillar.default_budget_ratio
    min_budget: int = 128
    draft_policy: str = Pillar.name
    num_sinks: int = 4
    base_attention_backend: str | None = None
    kernels: str = "auto"
    schedule: str = "lockstep"
    host_kv_gb: float | str = 0.0
    draft_cost: float = 0.15
    speculate: str = AUTO
    lookahead: int = 0
    late_launch: bool = False
    prefill_beside_decoding: bool = dataclasses.field(default=False, metadata={"flag": False})

    @property
    def has_host_tier(self) -> bool:
        """Whether running requests may be moved to host memory."""
        return self.host_kv_gb != 0

    def check(self) -> None:
        """Raise ``ValueError`` that names flag and remedy for a value out of range."""
        if not 0.0 < self.budget_ratio <= 1.0:
            raise ValueError(
                f"--sparsespec-budget-ratio must be in (0, 1], got {self.budget_ratio}; 0.05 is the default."
            )
        if self.min_budget < 1:
            raise ValueError(
                f"--sparsespec-min-budget must be at least 1 token, got {self.min_budget}; 128 is the default."
            )
        if self.draft_policy not in DRAFT_POLICIES:
            raise ValueError(
                f"--sparsespec-draft-policy must be one of {', '.join(DRAFT_POLICIES)}, "
                f"got {self.draft_policy!r}."
            )
        if self.num_sinks < 0:
            raise ValueError(f"--sparsespec-num-sinks must not be negative, got {self.num_sinks}.")
        if not self.draft_cost > 0:
            raise ValueError(
                f"--sparsespec-draft-cost must be above 0, got {self.draft_cost}; 0.15 is the default."
            )
        if self.lookahead not in LOOKAHEADS:
            raise ValueError(
                f"--sparsespec-lookahead must be one of {', '.join(map(str, LOOKAHEADS))}, got {self.lookahead}; "
                "0 is the default."
            )
        if self.kernels not in KERNELS:
            raise ValueError(
                f"--sparsespec-kernels must be one of {', '.join(KERNELS)}, got {self.kernels!r}."
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"--sparsespec-schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}."
            )
        if self.speculate not in SPECULATE:
            raise ValueError(
                f"--sparsespec-speculate must be one of {', '.join(SPECULATE)}, got {self.speculate!r}."
            )
        if self.host_kv_gb != AUTO_HOST_KV and (isinstance(self.host_kv_gb, str) or self.host_kv_gb < 0):
            raise ValueError(
                f"--sparsespec-host-kv-gb must be a size in GB, 0 for no host tier, or {AUTO_HOST_KV!r}, "
                f"got {self.host_kv_gb!r}."
            )

    def budget(self, length: int) -> int:
        """Tokens that a draft step may attend to, of ``length`` committed ones."""
        return min(length, max(self.min_budget, math.ceil(self.budget_ratio * length)))


def make_config(**given: Any) -> SparseSpecConfig:
    """The settings that were given, and the policy's own defaults or the general ones for the others."""
    policy = POLICIES.get(given.get("draft_policy", Pillar.name), Pillar)  # check() refuses unknown ones
    speculate = ALWAYS if policy.warning else AUTO
    return SparseSpecConfig(**{"budget_ratio": policy.default_budget_ratio, "speculate": speculate, **given})


FLAG_NAMES = tuple(field.name for field in dataclasses.fields(SparseSpecConfig) if field.metadata.get("flag", True))
_ATTRIBUTE = "sparsespec_config"


def get_config(server_args: Any) -> SparseSpecConfig:
    """The plugin's settings carried by ``server_args`` (defaults if none were given)."""
    return getattr(server_args, _ATTRIBUTE, None) or SparseSpecConfig()


# --------------------------------------------------------------------------- flags


def _other_defaults(setting: str) -> str:
    """" (0.07 with vegas)": the policies whose own default of ``setting`` differs from pillar's."""
    others = [
        f"{value} with {policy.name}"
        for policy in POLICIES.values()
        if (value := getattr(policy, setting)) != getattr(Pillar, setting)
    ]
    return f" ({', '.join(others)})" if others else ""


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add the ``--sparsespec-*`` flags to SGLang's parser."""
    group = parser.add_argument_group(
        "SPARSESPEC", "Sparse self-speculative decoding (--speculative-algorithm SPARSESPEC)"
    )
    group.add_argument(
        "--sparsespec-budget-ratio",
        type=float,
        default=None,
        help="Share of a request's context that draft steps attend to, per layer and KV head. "
        f"Smaller is faster, larger is accepted more often. Default: {SparseSpecConfig.budget_ratio}"
        f"{_other_defaults('default_budget_ratio')}.",
    )
    group.add_argument(
        "--sparsespec-min-budget",
        type=int,
        default=SparseSpecConfig.min_budget,
        help="Draft steps attend to at least this many tokens. Default: %(default)s.",
    )
    group.add_argument(
        "--sparsespec-draft-policy",
        type=str,
        choices=DRAFT_POLICIES,
        default=SparseSpecConfig.draft_policy,
        help="How the tokens that draft steps attend to are chosen: "
        + "; ".join(f"'{policy.name}' {policy.summary}" for policy in POLICIES.values())
        + ". Default: %(default)s.",
    )
    group.add_argument(
        "--sparsespec-num-sinks",
        type=int,
        default=SparseSpecConfig.num_sinks,
        help="Sink tokens of the draft policy 'streaming'. Default: %(default)s.",
    )
    group.add_argument(
        "--sparsespec-draft-cost",
        type=float,
        default=SparseSpecConfig.draft_cost,
        help="Time of a draft step relative to a verification; the draft policy 'adaptive' drafts fewer "
        "tokens where it is high. Default: %(default)s.",
    )
    group.add_argument(
        "--sparsespec-lookahead",
        type=int,
        choices=LOOKAHEADS,
        default=SparseSpecConfig.lookahead,
        help="Experimental. Policies that select by scores take so many positions after a token for "
        f"{LOOKAHEAD_WEIGHT:g} times as good as it; 0: as good as their own scores. Default: %(default)s.",
    )
    group.add_argument(
        "--sparsespec-base-attention-backend",
        type=str,
        default=None,
        help="SGLang attention backend that runs prefill (default: torch_native on CPU, triton on "
        "CUDA). --attention-backend NAME together with SPARSESPEC means the same.",
    )
    group.add_argument(
        "--sparsespec-kernels",
        type=str,
        choices=KERNELS,
        default=SparseSpecConfig.kernels,
        help="Kernels of draft attention, verification and selection: 'torch' is the slow reference, "
        "'cuda' is Triton, 'auto' picks by device. Default: %(default)s.",
    )
    group.add_argument(
        "--sparsespec-schedule",
        type=str,
        choices=SCHEDULES,
        default=SparseSpecConfig.schedule,
        help="Order of a batch's work. 'lockstep': all requests draft, then all verify. 'unified': they verify in "
        "turns, so that every forward holds the same share of drafts and verifications. Default: %(default)s.",
    )
    group.add_argument(
        "--sparsespec-speculate",
        type=str,
        choices=SPECULATE,
        help="Which rounds speculate: 'auto' those where it is faster than plain decoding, by the time that both take, "
        "which is measured as the server runs; 'always' all of them; 'never' none, for comparison (requests with a "
        f"grammar, logit bias or log-probabilities still do). Default: {SparseSpecConfig.speculate}; always with draft "
        "policies that are for study.",
    )
    group.add_argument(
        "--sparsespec-late-launch",
        action="store_true",
        default=SparseSpecConfig.late_launch,
        help="Experimental: launch each round shortly before the one before it ends instead of when that begins, so that a "
        "request that arrives is prefilled a round earlier. Default: off.",
    )
    group.add_argument(
        "--sparsespec-host-kv-gb",
        type=_size_or_auto,
        default=SparseSpecConfig.host_kv_gb,
        help="Pinned host memory, in GB for all GPUs together, that running requests move to when the KV "
        "pool is full, instead of being computed again; 'auto' takes half of what is free, 0 turns it "
        "off. Default: %(default)s.",
    )


def _size_or_auto(text: str) -> float | str:
    return text if text == AUTO_HOST_KV else float(text)


_pending: ContextVar[SparseSpecConfig | None] = ContextVar("sparsespec_pending_config", default=None)


def _hook_add_cli_args(result: Any, parser: argparse.ArgumentParser) -> None:
    add_cli_args(parser)


def _hook_from_cli_args(original: Any, cls: Any, args: argparse.Namespace) -> Any:
    asked = {name: getattr(args, f"sparsespec_{name}", None) for name in FLAG_NAMES}
    values = {name: value for name, value in asked.items() if value is not None}
    token = _pending.set(make_config(**values))
    try:
        return original(cls, args)
    finally:
        _pending.reset(token)


def _hook_init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    values = {
        name: kwargs.pop(f"sparsespec_{name}") for name in FLAG_NAMES if f"sparsespec_{name}" in kwargs
    }
    pending = _pending.get()
    config = make_config(**values) if values or pending is None else pending
    if str(kwargs.get("speculative_algorithm") or "").upper() == ALGORITHM:
        config = claim_attention_backend(kwargs, config)
    elif values:
        logger.warning("sparsespec_* settings have no effect without speculative_algorithm=%r.", ALGORITHM)
    object.__setattr__(self, _ATTRIBUTE, config)
    original(self, *args, **kwargs)


def claim_attention_backend(kwargs: dict[str, Any], config: SparseSpecConfig) -> SparseSpecConfig:
    """Make ``sparsespec`` the attention backend, keep the user's choice as the prefill one.

    Done before ``ServerArgs`` resolves anything, so that SGLang's own resolution sees an
    explicit backend and does not pick another.

    Raises:
        ValueError: two different backends were asked for, or a split one.
    """
    for flag in ("prefill_attention_backend", "decode_attention_backend"):
        if kwargs.get(flag) not in (None, ATTENTION_BACKEND):
            raise ValueError(
                f"--{flag.replace('_', '-')} {kwargs[flag]} cannot be combined with "
                f"--speculative-algorithm {ALGORITHM}, whose own backend runs draft and verify; "
                f"use --sparsespec-base-attention-backend {kwargs[flag]} to choose the prefill backend."
            )
    asked = kwargs.get("attention_backend")
    if asked not in (None, ATTENTION_BACKEND):
        if config.base_attention_backend not in (None, asked):
            raise ValueError(
                f"--attention-backend {asked} and --sparsespec-base-attention-backend "
                f"{config.base_attention_backend} contradict each other; give one of them."
            )
        config = dataclasses.replace(config, base_attention_backend=asked)
    kwargs["attention_backend"] = ATTENTION_BACKEND
    return config


def register_flags() -> None:
    """Hook the plugin's flags into ``ServerArgs`` (command line and keyword arguments)."""
    from sglang.srt import server_args as sa

    from sglang_sparsespec.scheduler_patch.hooks import add_hook

    sa.add_attention_backend_choices([ATTENTION_BACKEND])
    # Seeded sampling (--enable-deterministic-inference) works with this backend, and its
    # results do not depend on what the radix cache held.
    sa.add_deterministic_attention_backend_choices([ATTENTION_BACKEND])
    sa.add_radix_supported_deterministic_attention_backend_choices([ATTENTION_BACKEND])
    prefix = "sglang.srt.server_args.ServerArgs."
    # ServerArgs is a dataclass without a place for foreign fields: carry ours beside them.
    add_hook(prefix + "add_cli_args", _hook_add_cli_args, "after")
    add_hook(prefix + "from_cli_args", _hook_from_cli_args, "around")
    add_hook(prefix + "__init__", _hook_init, "around")


# ---------------------------------------------------------------------- validation


def validate_server_args(server_args: ServerArgs) -> None:
    """Refuse, at start-up, whatever SPARSESPEC cannot serve correctly.

    Runs inside ``ServerArgs.__post_init__`` (``speculative_hook.handle_speculative_decoding``).

    Raises:
        ValueError: with a sentence that names the flag and the remedy.
    """
    from sglang.srt.arg_groups.overrides import resolved_view

    from sglang_sparsespec.scheduler_patch.hooks import assert_hooks_applied

    assert_hooks_applied()
    config = get_config(server_args)
    config.check()
    view = resolved_view(server_args)

    def refuse(flag: str, why: str, remedy: str) -> None:
        raise ValueError(f"{flag} is not supported with --speculative-algorithm {ALGORITHM}: {why}; {remedy}.")

    if server_args.device not in ("cpu", "cuda"):
        refuse(f"--device {server_args.device}", "only CPU and CUDA kernels exist", "use --device cuda or cpu")
    if config.schedule == "unified" and POLICIES[config.draft_policy].lockstep_only:
        refuse(
            f"--sparsespec-schedule unified together with --sparsespec-draft-policy {config.draft_policy}",
            "its drafts have no fixed length",
            "use --sparsespec-schedule lockstep or another policy",
        )
    if config.speculate != ALWAYS and POLICIES[config.draft_policy].warning:
        refuse(
            f"--sparsespec-speculate {config.speculate} together with --sparsespec-draft-policy {config.draft_policy}",
            "that policy is for the study of speculation",
            "use --sparsespec-speculate always or another policy",
        )
    if config.kernels == "cuda" and server_args.device != "cuda":
        refuse("--sparsespec-kernels cuda", "the device is not CUDA", "use --sparsespec-kernels auto")
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    base = config.base_attention_backend
    if base is not None and (base == ATTENTION_BACKEND or base not in ATTENTION_BACKENDS):
        refuse(
            f"--sparsespec-base-attention-backend {base}",
            "it is not an attention backend of SGLang",
            "leave it out for the default of the device",
        )
    if server_args.enable_deterministic_inference and server_args.device == "cpu":
        refuse("--enable-deterministic-inference", "SGLang has seeded sampling on GPUs only", "remove it")
    if server_args.speculative_draft_model_path is not None:
        refuse(
            "--speculative-draft-model-path",
            "the target model drafts for itself",
            "remove it, or use --speculative-algorithm STANDALONE",
        )
    if server_args.speculative_eagle_topk not in (None, 1):
        refuse("--speculative-eagle-topk above 1", "drafts are one chain", "remove it")
    if server_args.speculative_adaptive:
        refuse(
            "--speculative-adaptive",
            "SGLang adapts draft models only",
            "remove it, and use --sparsespec-draft-policy adaptive",
        )
    if (server_args.speculative_accept_threshold_single, server_args.speculative_accept_threshold_acc) != (1, 1):
        refuse(
            "--speculative-accept-threshold-single/-acc below 1",
            "it changes the output distribution",
            "remove it",
        )
    if server_args.disaggregation_mode != "null":
        refuse(
            f"--disaggregation-mode {server_args.disaggregation_mode}",
            "the sparse selection is not transferred",
            "serve without disaggregation",
        )
    if view.enable_dp_attention:
        refuse("--enable-dp-attention", "draft steps are not padded across ranks", "use --dp-size replicas")
    if view.moe_a2a_backend not in (None, "none"):
        refuse(
            f"--moe-a2a-backend {view.moe_a2a_backend}",
            "draft steps are not padded and scattered across ranks",
            "use --ep-size without it",
        )
    if view.moe_dense_tp_size is not None:
        refuse(
            f"--moe-dense-tp-size {view.moe_dense_tp_size}",
            "draft steps are not padded and scattered across ranks",
            "remove it",
        )
    if server_args.pp_size != 1:
        refuse("--pp-size above 1", "SGLang has no pipelined speculation", "use --tp-size")
    if view.dcp_size != 1 or server_args.attn_cp_size != 1:
        refuse("context parallelism (--dcp-size, --attn-cp-size)", "selection needs whole heads", "use --tp-size")
    if server_args.enable_lora or server_args.lora_paths:
        refuse("--enable-lora", "SGLang supports LoRA with NGRAM speculation only", "merge the adapter")
    if server_args.enable_two_batch_overlap:
        refuse("--enable-two-batch-overlap", "draft steps are not split", "remove it")
    if server_args.enable_pdmux:
        refuse("--enable-pdmux", "one attention backend is shared by all streams", "remove it")
    if server_args.enable_hisparse:
        refuse("--enable-hisparse", "two sparse KV schemes exclude each other", "remove one of them")
    if server_args.dllm_algorithm is not None:
        refuse("--dllm-algorithm", "diffusion models do not draft chains", "remove it")
    if server_args.enable_torch_compile:
        refuse("--enable-torch-compile", "draft graphs are captured without it", "remove it")
    if server_args.is_embedding:
        refuse("--is-embedding", "there is nothing to decode", "remove --speculative-algorithm")
    if server_args.kv_cache_dtype not in KV_CACHE_DTYPES:
        refuse(
            f"--kv-cache-dtype {server_args.kv_cache_dtype}",
            "the kernels read caches of 8, 16 and 32 bits only",
            "use --kv-cache-dtype auto or fp8_e4m3",
        )
    if server_args.device == "cpu" and server_args.kv_cache_dtype.startswith("fp8"):
        refuse(
            f"--kv-cache-dtype {server_args.kv_cache_dtype}",
            "SGLang's CPU attention reads no 8-bit cache",
            "use --kv-cache-dtype auto",
        )
    if view.page_size not in (None, 1):
        refuse(
            f"--page-size {view.page_size}",
            "the sparse page table addresses single tokens",
            "use --page-size 1",
        )
    if server_args.tokenizer_worker_num > 1:
        refuse(
            "--tokenizer-worker-num above 1",
            "SGLang does not load plugins in its tokenizer workers",
            "use one tokenizer worker",
        )
    if config.has_host_tier:
        _validate_host_tier(server_args, refuse)
    _validate_draft_length(server_args, config)
    _validate_model(server_args)


def _validate_host_tier(server_args: ServerArgs, refuse: Callable[[str, str, str], None]) -> None:
    """Refuse what excludes ``--sparsespec-host-kv-gb``."""
    off = "remove it, or use --sparsespec-host-kv-gb 0"
    if server_args.disable_radix_cache:
        refuse("--disable-radix-cache with --sparsespec-host-kv-gb", "requests are kept in the radix cache", off)
    if server_args.enable_hierarchical_cache:
        refuse(
            "--enable-hierarchical-cache with --sparsespec-host-kv-gb",
            "the host tier is SGLang's hierarchical cache, with a size and policy of its own",
            off,
        )
    if server_args.strip_thinking_cache:
        refuse(
            "--strip-thinking-cache with --sparsespec-host-kv-gb",
            "an offloaded request's whole output is in the radix cache",
            off,
        )
    if server_args.nnodes > 1 and get_config(server_args).host_kv_gb == AUTO_HOST_KV:
        refuse(
            f"--sparsespec-host-kv-gb {AUTO_HOST_KV} with --nnodes {server_args.nnodes}",
            "nodes have different amounts of free memory, and their host tiers must be equal",
            "give a size in GB",
        )


def _validate_draft_length(server_args: ServerArgs, config: SparseSpecConfig) -> None:
    steps, tokens = server_args.speculative_num_steps, server_args.speculative_num_draft_tokens
    if steps is not None and steps < 1:
        raise ValueError(f"--speculative-num-steps must be at least 1, got {steps}; 8 is the default.")
    if tokens is not None and tokens < 2:
        raise ValueError(
            f"--speculative-num-draft-tokens must be at least 2 (one draft and the token before it), got "
            f"{tokens}; 9 is the default."
        )
    if steps is not None and tokens is not None and tokens != steps + 1:
        raise ValueError(
            f"--speculative-num-draft-tokens {tokens} must be --speculative-num-steps {steps} plus 1 "
            "(drafts are one chain, verified together with the token before it); give one of the two."
        )
    window = draft_steps(server_args) + 1
    if config.min_budget < window:
        raise ValueError(
            f"--sparsespec-min-budget {config.min_budget} must be at least the verify window of {window} "
            f"tokens; use --sparsespec-min-budget {max(128, window)} or fewer --speculative-num-steps."
        )


def _validate_model(server_args: ServerArgs) -> None:
    from sglang.srt.configs.model_config import AttentionArch

    model = server_args.get_model_config()
    remedy = "serve it without --speculative-algorithm"

    def refuse(what: str) -> None:
        raise ValueError(
            f"--model-path {server_args.model_path}: {what} not supported by {ALGORITHM}; {remedy}, or choose "
            "a model with plain grouped-query attention."
        )

    if not model.is_generation:
        refuse("models that do not generate text are")
    if model.attention_arch == AttentionArch.MLA:
        refuse("multi-head latent attention (MLA) is")
    text = model.hf_text_config
    layer_types = getattr(text, "layer_types", None) or ()
    windowed = {"sliding_attention", "chunked_attention"}.intersection(layer_types)
    if model.is_hybrid_swa or getattr(text, "use_sliding_window", False) or windowed:
        refuse("sliding-window layers are")
    if model.is_encoder_decoder:
        refuse("encoder-decoder models are")
    if model.is_multimodal:
        refuse("multimodal models are")
    from sglang.srt.configs.hybrid_arch import linear_attn_model_spec, mambaish_config

    if mambaish_config(model) is not None or linear_attn_model_spec(model) is not None:
        refuse("models with recurrent layers are")


def draft_steps(server_args: Any) -> int:
    """k, the number of tokens drafted per round."""
    if server_args.speculative_num_steps is not None:
        return server_args.speculative_num_steps
    if server_args.speculative_num_draft_tokens is not None:
        return server_args.speculative_num_draft_tokens - 1
    return POLICIES[get_config(server_args).draft_policy].default_num_steps


# ---------------------------------------------------------------------- resolution


def resolve_server_args(server_args: ServerArgs) -> None:
    """Fill in what SPARSESPEC needs, in place; every change of a user's flag is logged."""
    steps = draft_steps(server_args)
    server_args.speculative_num_steps = steps
    server_args.speculative_num_draft_tokens = steps + 1
    server_args.speculative_eagle_topk = 1
    if server_args.max_running_requests is None:
        server_args.max_running_requests = DEFAULT_MAX_RUNNING_REQUESTS if server_args.device == "cuda" else 16
        logger.info(
            "--max-running-requests is %d with %s unless given.", server_args.max_running_requests, ALGORITHM
        )
    config = get_config(server_args)
    if server_args.enable_mixed_chunk:
        # SGLang asserts that it is off for every speculative algorithm (check_server_args).
        server_args.enable_mixed_chunk = False
        config = dataclasses.replace(config, prefill_beside_decoding=True)
        logger.info(
            "--enable-mixed-chunk with %s: prefill chunks and decode rounds take turns (SGLang has no forwards "
            "of both with speculation).",
            ALGORITHM,
        )
    if config.base_attention_backend is None:
        # Of SGLang's CUDA backends, Triton is the one that prefill was measured and checked with.
        base = "triton" if server_args.device == "cuda" else "torch_native"
        config = dataclasses.replace(config, base_attention_backend=base)
    object.__setattr__(server_args, _ATTRIBUTE, config)
    if config.has_host_tier:
        _resolve_host_tier(server_args, config)
    if server_args.device == "cpu":
        _resolve_cpu(server_args)
    _resolve_prefill_graph(server_args)


def _resolve_host_tier(server_args: ServerArgs, config: SparseSpecConfig) -> None:
    """Turn on SGLang's hierarchical cache, the host tier's home."""
    total = free_host_gb() * AUTO_HOST_KV_SHARE if config.host_kv_gb == AUTO_HOST_KV else config.host_kv_gb
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


def _resolve_cpu(server_args: ServerArgs) -> None:
    from sglang.srt.model_executor.cuda_graph_config import Backend

    # There are no graphs on CPU without torch.compile; SGLang 0.5.17 stops at prefill graph
    # capture unless they are disabled.
    server_args.disable_cuda_graph = True
    server_args.cuda_graph_config.decode.backend = Backend.DISABLED
    server_args.cuda_graph_config.prefill.backend = Backend.DISABLED
    os.environ[CPU_BRIDGE_ENV] = "1"  # inherited by the scheduler process
    install_cpu_bridge()


def _resolve_prefill_graph(server_args: ServerArgs) -> None:
    from sglang.srt.model_executor.cuda_graph_config import Backend

    if server_args.cuda_graph_config.prefill.backend not in (Backend.DISABLED, Backend.BREAKABLE):
        # A whole prefill graph would capture attention with the base backend's metadata and skip the scores of the
        # prompt's last queries. Breakable graphs leave attention out.
        server_args.cuda_graph_config.prefill.backend = Backend.DISABLED
        logger.info(
            "Prefill CUDA graphs are off: with %s only --cuda-graph-backend-prefill breakable can be captured (decode and "
            "draft graphs stay on).",
            ALGORITHM,
        )
