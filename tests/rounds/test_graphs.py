"""Captured steps: which memory their graphs work in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_sparsespec.rounds import graphs
from sglang_sparsespec.rounds.graphs import StepGraphs, capture_prefill_selection

SHARED = "the pool of SGLang's graphs"


class Backend:
    """Stands in for SGLang's ``FullCudaGraphBackend``, which takes the shared pool unless it has one."""

    pools: list[Any]

    def __init__(self, runner: Any) -> None:
        self._pool: Any = None

    @contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        self._pool = self._pool or SHARED
        yield

    def capture_one(self, key: Any, step: Callable[[], Any]) -> None:
        step()
        self.pools.append(self._pool)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pool of each graph that was captured; no GPU is needed."""
    handles = iter(("first", "second"))
    monkeypatch.setattr(Backend, "pools", [], raising=False)
    monkeypatch.setattr(graphs, "FullCudaGraphBackend", Backend)
    monkeypatch.setattr(graphs, "model_capture_mode", nullcontext)
    monkeypatch.setattr(graphs, "graph_capture", lambda: nullcontext(SimpleNamespace(stream=None)))
    monkeypatch.setattr(graphs, "get_tp_group", lambda: SimpleNamespace(rank_in_group=1))
    monkeypatch.setattr(graphs, "get_available_gpu_memory", lambda *args, **kwargs: 0.0)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(graph_pool_handle=lambda: next(handles)))
    return Backend.pools


RUNNER: Any = SimpleNamespace(device="cuda", gpu_id=0)


class Step:
    """A step that does nothing."""

    def prepare(self, batch_size: int) -> Callable[[], torch.Tensor]:
        return lambda: torch.zeros(batch_size)


def test_a_rounds_graphs_share_memory_with_sglangs(pools: list[Any]) -> None:
    StepGraphs("draft", Step(), [1, 4], RUNNER, SimpleNamespace())  # type: ignore[arg-type]
    assert pools == [SHARED, SHARED]


def test_prefill_selections_overwrite_nothing_of_the_prefill_graph_that_they_interrupt(pools: list[Any]) -> None:
    runs: list[int] = []
    selection = SimpleNamespace(clear=lambda: None, run=runs.append, use_graphs=lambda replay: None)
    backend = SimpleNamespace(prefill_selection=selection, num_rows=4, table=SimpleNamespace(positions=torch.zeros(1)))
    assert capture_prefill_selection(RUNNER, backend) is not None  # type: ignore[arg-type]
    assert runs == [4, 2, 1] and pools == ["first"] * 3
