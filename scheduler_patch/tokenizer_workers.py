"""The hook that gives SGLang's tokenizer workers (``--tokenizer-worker-num``) its plugins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.runtime_context import get_server_args

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import is_sparsespec

#: SGLang's HTTP application, and the same with the plugins loaded, as uvicorn's workers import them.
SGLANG_APP, APP_WITH_PLUGINS = "sglang.srt.entrypoints.http_server:app", "sglang_sparsespec.worker_app:app"


def serve_app_with_plugins(original: Callable[..., Any], app: Any, *args: Any, **kwargs: Any) -> Any:
    """``uvicorn.run``: SGLang has its workers, which are new processes, import its application, and loads no plugins there.

    Without them the workers would check no request, and would not know SPARSESPEC's settings.
    """
    if app == SGLANG_APP and is_sparsespec(get_server_args()):
        app = APP_WITH_PLUGINS
    return original(app, *args, **kwargs)


def register_hooks() -> None:
    """Register the hook of this module."""
    add_hook("uvicorn.run", serve_app_with_plugins, "around")
