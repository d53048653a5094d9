"""A hook that starts the detokenizer for tokens that arrive several at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sglang_sparsespec.detokenizer import RunDetokenizer
from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import is_sparsespec


def detokenize_runs(
    original: Callable[..., Any], engine: type, server_args: Any, port_args: Any, run_detokenizer_process_func: Any
) -> Any:
    """``Engine._launch_detokenizer_subprocesses``: SGLang starts a detokenizer that may send parts of a text twice.

    It does so where a round's tokens end within a character. Its process takes the detokenizer's class as an argument.
    """
    if is_sparsespec(server_args):
        run_detokenizer_process_func = partial(run_detokenizer_process_func, detokenizer_manager_class=RunDetokenizer)
    return original(engine, server_args, port_args, run_detokenizer_process_func)


def register_hooks() -> None:
    """Register the hook of this module."""
    add_hook("sglang.srt.entrypoints.engine.Engine._launch_detokenizer_subprocesses", detokenize_runs, "around")
