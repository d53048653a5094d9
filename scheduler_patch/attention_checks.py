"""SGLang's list of the attention backends that have what a model needs."""

from __future__ import annotations

from typing import Any

from sglang_sparsespec import ATTENTION_BACKEND
from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.scheduler_patch.cpu import bridges_plain
from sglang_sparsespec.sglang_compat import ATTENTION_BACKENDS_OF, model_config_of

#: Models that SGLang serves with the backends of a list, since others have no attention sinks.
WITH_SINKS = "GptOssForCausalLM"
#: One of that list.
LISTED = "triton"


def attention_has_sinks(result: tuple[Any, Any], server_args: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any] | None:
    """The attention backends (of prefill and decoding) that SGLang looks for in the list of those with sinks.

    The list is a literal. The kernels here have sinks, and so has PyTorch's attention on CPU (``cpu.attention_on_cpu``).
    """
    unlisted = {ATTENTION_BACKEND, "torch_native"} if bridges_plain() else {ATTENTION_BACKEND}
    if not unlisted.intersection(result) or model_config_of(server_args).hf_config.architectures[0] != WITH_SINKS:
        return None  # None keeps the original result
    prefill, decode = (LISTED if name in unlisted else name for name in result)
    return prefill, decode


def register_hooks() -> None:
    """Register the hook of this module."""
    add_hook(ATTENTION_BACKENDS_OF, attention_has_sinks, "after")
