"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait actively keep other processes of a small machine from their work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

#: A checkpoint folder to test with instead of SmolLM2-135M.
MODEL_ENV = "SPARSESPEC_TEST_MODEL"


@pytest.fixture(scope="session")
def model_path() -> str:
    """Folder of a small real model in float32, fetched once; fails if it cannot be had."""
    given = os.environ.get(MODEL_ENV)
    if given:
        if not (Path(given) / "config.json").is_file():
            pytest.fail(f"{MODEL_ENV}={given} is not a checkpoint folder (no config.json in it).")
        return given
    from environment import SetupError
    from fetch_model import ensure_model

    try:
        return str(ensure_model("smollm2-135m", "float32"))
    except SetupError as error:
        pytest.fail(
            f"The test model could not be fetched: {error} Set {MODEL_ENV} to a checkpoint folder instead."
        )


@pytest.fixture(scope="session")
def plugin() -> None:
    """SGLang's plugins are loaded in this process, as at the start of a server."""
    from sglang.srt.plugins import load_plugins

    from sglang_sparsespec.scheduler_patch.hooks import assert_hooks_applied

    load_plugins()
    assert_hooks_applied()


@pytest.fixture(autouse=True)
def _no_inherited_bridge() -> Iterator[None]:
    """Resolving SPARSESPEC's arguments for CPU sets a variable for child processes; not beyond a test."""
    from sglang_sparsespec.cpu_bridge import CPU_BRIDGE_ENV

    before = os.environ.get(CPU_BRIDGE_ENV)
    yield
    os.environ.pop(CPU_BRIDGE_ENV, None)
    if before is not None:
        os.environ[CPU_BRIDGE_ENV] = before


@pytest.fixture
def serving_args(plugin: None) -> Iterator[object]:
    """Publish ``ServerArgs`` as SGLang's process-wide ones: ``serving_args(args)``."""
    from sglang.srt.runtime_context import get_context

    with get_context().preserve_config():
        yield get_context().set_server_args
