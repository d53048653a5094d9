"""Hooks that give SGLang's tokenizer workers (``--tokenizer-worker-num``) its plugins."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import is_sparsespec

#: SGLang's HTTP application, and the same with the plugins loaded, as uvicorn's workers import them.
SGLANG_APP, APP_WITH_PLUGINS = "sglang.srt.entrypoints.http_server:app", "sglang_sparsespec.worker_app:app"

#: Whether the workers that are started next serve SPARSESPEC.
_serving: ContextVar[bool] = ContextVar("sparsespec_serving", default=False)


def note_what_is_served(result: Any, port_args: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """``write_data_for_multi_tokenizer``: SGLang writes down for its workers what they serve, and then starts them."""
    _serving.set(is_sparsespec(server_args))


def serve_app_with_plugins(original: Callable[..., Any], app: Any, *args: Any, **kwargs: Any) -> Any:
    """``uvicorn.run``: SGLang has its workers, which are new processes, import its application, and loads no plugins there.

    Without them the workers do not know SPARSESPEC, and end.
    """
    if app == SGLANG_APP and _serving.get():
        app = APP_WITH_PLUGINS
    return original(app, *args, **kwargs)


def register_hooks() -> None:
    """Register the hooks of this module."""
    add_hook("sglang.srt.managers.multi_tokenizer_mixin.write_data_for_multi_tokenizer", note_what_is_served, "after")
    add_hook("uvicorn.run", serve_app_with_plugins, "around")
