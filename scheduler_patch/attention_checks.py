"""SGLang's list of the attention backends that have what a model needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sglang_sparsespec import ALGORITHM, ATTENTION_BACKEND
from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.scheduler_patch.cpu import bridges_plain
from sglang_sparsespec.settings import is_sparsespec
from sglang_sparsespec.sglang_compat import DECLARES_RESOLUTION, model_config_of

#: Models that SGLang serves with the backends of a list, since others have no attention sinks.
WITH_SINKS = "GptOssForCausalLM"
#: One of that list.
LISTED = "triton"

#: Whether SGLang is about to look for the backends of such a model in that list.
_looks_for_sinks: ContextVar[bool] = ContextVar("sparsespec_looks_for_sinks", default=False)


@contextmanager
def _looking(server_args: Any) -> Iterator[None]:
    served = is_sparsespec(server_args) or bridges_plain()
    token = _looks_for_sinks.set(served and model_config_of(server_args).hf_config.architectures[0] == WITH_SINKS)
    try:
        yield
    except AssertionError as error:
        if ATTENTION_BACKEND not in str(error):
            raise
        raise ValueError(
            f"--model-path {server_args.model_path}: SGLang serves this model with some attention backends only, and "
            f"{ALGORITHM}'s is not among them ({error}); serve it without --speculative-algorithm."
        ) from error
    finally:
        _looks_for_sinks.reset(token)


def model_checks(original: Callable[..., None], server_args: Any) -> None:
    """``ServerArgs._handle_model_specific_adjustments``: SGLang stops at backends that are not in its list.

    The list is a literal. The kernels here have sinks, and so has PyTorch's attention on CPU (``cpu.attention_on_cpu``).
    Where a model with another list is not served (Exaone 4), the user is told what to do.

    Raises:
        ValueError: SPARSESPEC's backend is in no list of the model.
    """
    with _looking(server_args):
        original(server_args)


def model_checks_of_a_step(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Resolution step ``handle_model_specific_adjustments``: as :func:`model_checks`."""
    with _looking(server_args):
        previous(server_args)


def attention_has_sinks(result: tuple[Any, Any], *args: Any, **kwargs: Any) -> tuple[Any, Any] | None:
    """What SGLang looks for in its list: a backend of the list for each (of prefill and decoding) that has sinks too."""
    unlisted = {ATTENTION_BACKEND, "torch_native"} if bridges_plain() else {ATTENTION_BACKEND}
    if not _looks_for_sinks.get() or not unlisted.intersection(result):
        return None  # None keeps the original result
    prefill, decode = (LISTED if name in unlisted else name for name in result)
    return prefill, decode


def register_hooks() -> None:
    """Register the hooks of this module."""
    if DECLARES_RESOLUTION:
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

        add_hook("sglang.srt.arg_groups.model_hook.attention_backends_of", attention_has_sinks, "after")
        register_resolution_hook("handle_model_specific_adjustments")(model_checks_of_a_step)
    else:
        server_args = "sglang.srt.server_args.ServerArgs."
        add_hook(server_args + "_resolved_attention_backends", attention_has_sinks, "after")
        add_hook(server_args + "_handle_model_specific_adjustments", model_checks, "around")
