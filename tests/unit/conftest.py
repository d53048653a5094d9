"""Fixtures of the unit tests: server arguments without a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from model_configs import write_config

from sglang_sparsespec import ALGORITHM


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a Llama that consists of its configuration."""
    return write_config(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def resolve(plugin: None, llama: str) -> Callable[..., Any]:
    """``ServerArgs`` that ask for SPARSESPEC on CPU; keyword arguments are added."""
    from sglang.srt.server_args import ServerArgs

    def make(**kwargs: Any) -> Any:
        return ServerArgs(**{"model_path": llama, "device": "cpu", "speculative_algorithm": ALGORITHM, **kwargs})

    return make
