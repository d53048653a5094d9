"""Tokenizer workers import SGLang's application with its plugins loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from sglang_sparsespec.scheduler_patch.tokenizer_workers import APP_WITH_PLUGINS, SGLANG_APP, serve_app_with_plugins

pytestmark = pytest.mark.usefixtures("plugin")


def served(app: Any) -> Any:
    return serve_app_with_plugins(lambda app, **kwargs: (app, kwargs), app, workers=2)


def test_workers_are_given_the_application_with_plugins(
    serving_args: Callable[[Any], None], resolve: Callable[..., Any]
) -> None:
    serving_args(resolve(tokenizer_worker_num=2))
    assert served(SGLANG_APP) == (APP_WITH_PLUGINS, {"workers": 2})
    application = object()
    assert served(application) == (application, {"workers": 2})


def test_other_servers_are_left_alone(serving_args: Callable[[Any], None], llama: str) -> None:
    serving_args(ServerArgs(model_path=llama, device="cpu"))
    assert served(SGLANG_APP) == (SGLANG_APP, {"workers": 2})


@pytest.mark.nightly
def test_the_application_is_imported_after_the_plugins() -> None:
    """Its routes read hooks while it is imported."""
    code = (
        "from sglang_sparsespec.worker_app import app; from sglang.srt.entrypoints import http_server; "
        "from sglang_sparsespec.hook_registry import assert_hooks_applied; assert_hooks_applied(); "
        "assert app is http_server.app; import uvicorn; assert hasattr(uvicorn.run, '__wrapped__')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
