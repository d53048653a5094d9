"""Tokenizer workers import SGLang's application with its plugins loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from sglang_sparsespec.scheduler_patch.tokenizer_workers import (
    APP_WITH_PLUGINS,
    SGLANG_APP,
    note_what_is_served,
    serve_app_with_plugins,
)

pytestmark = pytest.mark.usefixtures("plugin")


def served(app: Any, args: Any) -> Any:
    def serve() -> Any:
        note_what_is_served(None, None, args)
        return serve_app_with_plugins(lambda app, **kwargs: (app, kwargs), app, workers=2)

    return copy_context().run(serve)


def test_workers_are_given_the_application_with_plugins(resolve: Callable[..., Any]) -> None:
    args = resolve(tokenizer_worker_num=2)
    assert served(SGLANG_APP, args) == (APP_WITH_PLUGINS, {"workers": 2})
    application = object()
    assert served(application, args) == (application, {"workers": 2})


def test_other_servers_are_left_alone(llama: str) -> None:
    assert served(SGLANG_APP, ServerArgs(model_path=llama, device="cpu")) == (SGLANG_APP, {"workers": 2})


@pytest.mark.nightly
def test_the_application_is_imported_after_the_plugins() -> None:
    """Its routes read hooks while it is imported."""
    code = (
        "from sglang_sparsespec.worker_app import app; from sglang.srt.entrypoints import http_server; "
        "from sglang_sparsespec.hook_registry import assert_hooks_applied; assert_hooks_applied(); "
        "assert app is http_server.app; import uvicorn; assert hasattr(uvicorn.run, '__wrapped__')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
