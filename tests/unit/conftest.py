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
    """``ServerArgs`` that ask for SPARSESPEC on CPU, resolved; keyword arguments are added, as to ``sglang.Engine``."""
    from sglang.srt.entrypoints.engine import Engine
    from sglang_parts import resolved

    def make(**kwargs: Any) -> Any:
        asked = {"model_path": llama, "device": "cpu", "speculative_algorithm": ALGORITHM, **kwargs}
        return resolved(Engine.server_args_class(**asked))

    return make


@pytest.fixture
def serving_plain(serving_args: Callable[[Any], None], llama: str) -> None:
    """This process serves on CPU without speculation."""
    from sglang.srt.server_args import ServerArgs

    serving_args(ServerArgs(model_path=llama, device="cpu"))
