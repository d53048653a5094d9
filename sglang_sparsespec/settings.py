"""The plugin's settings: one frozen value, whose fields say all that is known of a setting.

The command line, the keywords of ``sglang.Engine``, the checks of values and the table in ``docs/operations.md`` are
generated from the metadata of the fields of :class:`Settings` (see ``flags.py`` and ``scripts/make_docs.py``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_sparsespec import ALGORITHM
from sglang_sparsespec.sglang_compat import record_of


@dataclass(frozen=True)
class PolicyFacts:
    """What is known of a draft policy without a device; ``attention_backend.policy`` has its code.

    Attributes:
        name: value of ``--sparsespec-draft-policy``.
        summary: which tokens draft steps attend to, for the flag's help.
        budget_ratio: default of ``--sparsespec-budget-ratio``.
        num_steps: default of ``--speculative-num-steps``.
        uses_scores: prefill and verification score the tokens, and the best ones are selected.
        lockstep_only: the unified schedule cannot have it.
        for_study: a warning for the log if the policy is for the study of speculation, else "".
        num_proposals: n-gram proposals that a draft forward checks beside its current token.
    """

    name: str
    summary: str
    budget_ratio: float = 0.05
    num_steps: int = 8
    uses_scores: bool = False
    lockstep_only: bool = False
    for_study: str = ""
    num_proposals: int = 0


POLICIES: dict[str, PolicyFacts] = {
    facts.name: facts
    for facts in (
        PolicyFacts("pillar", "the best by the last verification's attention scores", uses_scores=True),
        PolicyFacts("window", "the newest (a control for measurements)"),
        PolicyFacts("streaming", "sinks and the newest"),
        PolicyFacts(
            "vegas",
            "as pillar, a quarter of the budget being the newest",
            budget_ratio=0.07,
            num_steps=6,
            uses_scores=True,
        ),
        PolicyFacts(
            "triforce",
            "as pillar, checking n-gram proposals (for study)",
            uses_scores=True,
            lockstep_only=True,
            for_study="Draft steps run without CUDA graphs (policy triforce): for study.",
            num_proposals=3,
        ),
        PolicyFacts(
            "full",
            "all (for study: nothing is saved)",
            for_study="Draft steps read the whole KV cache (policy full): for study, slower than no speculation.",
        ),
    )
}
PILLAR = POLICIES["pillar"]

KERNELS = ("auto", "torch", "triton", "flashinfer")
SCHEDULES = ("lockstep", "unified")
ALWAYS, AUTO, NEVER = "always", "auto", "never"
SPECULATE = (ALWAYS, AUTO, NEVER)
MODEL_WEIGHTS, FP8_WEIGHTS, FP8_EXPERTS = "model", "fp8", "fp8_experts"
DRAFT_WEIGHTS = (AUTO, MODEL_WEIGHTS, FP8_WEIGHTS, FP8_EXPERTS)
#: ``--sparsespec-host-kv-gb auto``: a share of the free memory (``support.AUTO_HOST_KV_SHARE``).
AUTO_HOST_KV = "auto"


def flag_of(name: str) -> str:
    """``min_budget`` -> ``--sparsespec-min-budget``."""
    return "--sparsespec-" + name.replace("_", "-")


def size_or_auto(text: str) -> float | str:
    """A size in GB, or ``auto``, from the command line."""
    return text if text == AUTO_HOST_KV else float(text)


def default_by_policy(attribute: str) -> str:
    """The policies' default of ``budget_ratio`` or ``num_steps``, for people: "0.05 (0.07 with vegas)"."""
    usual = getattr(PILLAR, attribute)
    others = [
        f"{value} with {policy.name}" for policy in POLICIES.values() if (value := getattr(policy, attribute)) != usual
    ]
    return f"{usual} ({', '.join(others)})" if others else str(usual)


def _setting(
    default: Any,
    help: str,
    *,
    parse: Callable[[str], Any] = str,
    choices: Sequence[str] | None = None,
    valid: Callable[[Any], bool] | None = None,
    rule: str = "",
    shown_default: str | None = None,
) -> Any:
    """A field with a flag.

    Args:
        help: one or two sentences, without the default.
        parse: makes the value of the command line's text.
        choices: all values.
        valid, rule: whether a value is in range, and the rule as it follows the flag ("must be ...").
        shown_default: for people, where it is not the default itself.
    """
    if choices is not None:
        allowed = tuple(choices)
        valid, rule = allowed.__contains__, f"must be one of {', '.join(allowed)}"
    shown_default = str(default) if shown_default is None else shown_default
    metadata = {
        "help": help,
        "parse": parse,
        "choices": choices,
        "valid": valid,
        "rule": rule,
        "shown_default": shown_default,
    }
    return dataclasses.field(default=default, metadata=metadata)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


@dataclass(frozen=True)
class Settings:
    """The plugin's own settings; section 4.1 of the paper (arXiv 2512.01278) names the first two.

    A field without metadata has no flag: ``prefill_beside_decoding`` is set by SGLang's ``--enable-mixed-chunk``, which
    SGLang itself refuses with speculation. With it, decode rounds run between prefill batches.
    """

    budget_ratio: float = _setting(
        PILLAR.budget_ratio,
        "Share of a request's context that draft steps attend to, per layer and KV head. A smaller share is faster, a "
        "larger one is accepted more often.",
        parse=float,
        valid=lambda value: _is_number(value) and 0.0 < value <= 1.0,
        rule="must be in (0, 1]",
        shown_default=default_by_policy("budget_ratio"),
    )
    min_budget: int = _setting(
        128,
        "Draft steps attend to at least this many tokens; with --sparsespec-speculate auto on a GPU to up to six times as "
        "many, where that is faster.",
        parse=int,
        valid=lambda value: isinstance(value, int) and value >= 1,
        rule="must be at least 1 token",
    )
    draft_policy: str = _setting(
        PILLAR.name,
        "Which tokens draft steps attend to: "
        + "; ".join(f"'{policy.name}' {policy.summary}" for policy in POLICIES.values())
        + ".",
        choices=tuple(POLICIES),
    )
    num_sinks: int = _setting(
        4,
        "Sink tokens of the draft policy 'streaming'.",
        parse=int,
        valid=lambda value: isinstance(value, int) and value >= 0,
        rule="must not be negative",
    )
    base_attention_backend: str | None = _setting(
        None,
        f"SGLang attention backend that runs prefill. --attention-backend NAME together with {ALGORITHM} means the same.",
        shown_default="torch_native on CPU, fa3 on Hopper GPUs, triton on others",
    )
    kernels: str = _setting(
        "auto",
        "Kernels of draft attention, verification and selection: 'torch' is the slow reference; 'triton' and 'flashinfer' "
        "(FlashInfer's paged decoding for draft attention, Triton for the rest) are for CUDA; 'auto' is torch on CPU and "
        "triton on CUDA.",
        choices=KERNELS,
    )
    schedule: str = _setting(
        "lockstep",
        "Order of a batch's work. 'lockstep': all requests draft, then all verify. 'unified': they verify in turns, so that "
        "every forward holds the same share of drafts and verifications.",
        choices=SCHEDULES,
    )
    host_kv_gb: float | str = _setting(
        0.0,
        "Pinned host memory, in GB for all GPUs together, that running requests move to when the KV pool is full, instead "
        "of being computed again; 'auto' takes half of what is free, 0 turns it off.",
        parse=size_or_auto,
        valid=lambda value: value == AUTO_HOST_KV or (_is_number(value) and value >= 0),
        rule=f"must be a size in GB, 0 for no host tier, or {AUTO_HOST_KV!r}",
    )
    speculate: str = _setting(
        AUTO,
        "Which rounds speculate, and with how many drafts: 'auto' whatever is fastest, by what a round takes (timed at "
        "start-up) and how many drafts are accepted; 'always' all, with k drafts; 'never' none, for comparison (requests "
        "with a grammar, logit bias, log-probabilities or hidden states still do). A running server takes another value "
        "through /set_internal_state.",
        choices=SPECULATE,
        shown_default="auto (always with draft policies that are for study)",
    )
    draft_weights: str = _setting(
        AUTO,
        "Weights that draft steps multiply with: 'model' the model's own; 'fp8' an FP8 copy of its linear layers, of half "
        "their size, which verification never uses; 'fp8_experts' one of a mixture's experts too; 'auto' is fp8 on GPUs "
        "that have it, for models of 16 bits in lock-step.",
        choices=DRAFT_WEIGHTS,
    )
    prefill_beside_decoding: bool = False

    @property
    def has_fp8_drafts(self) -> bool:
        """Whether draft steps multiply with FP8 copies."""
        return self.draft_weights in (FP8_WEIGHTS, FP8_EXPERTS)

    @property
    def has_host_tier(self) -> bool:
        """Whether running requests may be moved to host memory."""
        return self.host_kv_gb != 0

    def budget(self, length: int) -> int:
        """Tokens that a draft step may attend to, of ``length`` committed ones."""
        return min(length, max(self.min_budget, math.ceil(self.budget_ratio * length)))

    def check(self) -> None:
        """Check each value by itself.

        Raises:
            ValueError: a value is out of range; the message names the flag, the range and the default.
        """
        for name, facts in FLAGS.items():
            value = getattr(self, name)
            if facts["valid"] is not None and not facts["valid"](value):
                raise ValueError(
                    f"{flag_of(name)} {facts['rule']}, got {value!r}; {getattr(Settings, name)} is the default."
                )


#: The metadata of every setting that has a flag, by its name in :class:`Settings`; see :func:`_setting` for the keys.
FLAGS: dict[str, Mapping[str, Any]] = {
    field.name: field.metadata for field in dataclasses.fields(Settings) if field.metadata
}
_ATTRIBUTE = "_sparsespec_settings"


def make_settings(**given: Any) -> Settings:
    """The settings that were given, and the policy's own defaults or the general ones for the others."""
    policy = POLICIES.get(str(given.get("draft_policy", PILLAR.name)), PILLAR)  # Settings.check refuses unknown ones
    speculate = ALWAYS if policy.for_study else AUTO
    return Settings(**{"budget_ratio": policy.budget_ratio, "speculate": speculate, **given})


def check_speculate(settings: Settings) -> None:
    """Check that the draft policy lets rounds go without speculation, if ``settings`` let them.

    Raises:
        ValueError: the policy is for the study of speculation, and ``speculate`` is not "always".
    """
    if settings.speculate != ALWAYS and POLICIES[settings.draft_policy].for_study:
        raise ValueError(
            f"--sparsespec-speculate {settings.speculate} together with --sparsespec-draft-policy {settings.draft_policy} "
            f"is not supported with --speculative-algorithm {ALGORITHM}: that policy is for the study of speculation; use "
            f"--sparsespec-speculate {ALWAYS} or another policy."
        )


def settings_of(server_args: Any) -> Settings:
    """The settings that SGLang's ``server_args`` carry, the defaults if none were given."""
    return getattr(server_args, _ATTRIBUTE, None) or Settings()


def attach_settings(server_args: Any, settings: Settings) -> None:
    """Let ``server_args`` carry ``settings``; they are pickled with it for the scheduler process."""
    vars(record_of(server_args))[_ATTRIBUTE] = settings


def is_sparsespec(server_args: Any) -> bool:
    """Whether ``server_args`` (None: no server) ask for this plugin's algorithm."""
    return server_args is not None and str(server_args.speculative_algorithm).upper() == ALGORITHM


def draft_steps(server_args: Any) -> int:
    """k, the number of tokens drafted in each round, at most: ``support`` may choose one fewer if none is given."""
    if server_args.speculative_num_steps is not None:
        return server_args.speculative_num_steps
    if server_args.speculative_num_draft_tokens is not None:
        return server_args.speculative_num_draft_tokens - 1
    return POLICIES[settings_of(server_args).draft_policy].num_steps
