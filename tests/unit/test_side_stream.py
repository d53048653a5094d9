"""Work beside the current stream, as a branch of captured graphs."""

from __future__ import annotations

import pytest
import torch

from sglang_sparsespec.attention_backend.side_stream import SideStream


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: streams and graphs are CUDA's")
def test_graphs_may_be_captured_with_work_beside_and_without() -> None:
    side = SideStream(torch.device("cuda"))
    numbers, graphs = torch.zeros(2, device="cuda"), [torch.cuda.CUDAGraph() for _ in range(3)]
    for has_work, graph in zip((True, False, True), graphs, strict=True):
        with torch.cuda.graph(graph):
            if has_work:
                with side.beside():
                    numbers[0] += 1
            side.join()
            numbers[1] += 1
    for graph in graphs:
        graph.replay()
    assert numbers.tolist() == [2, 3]


def test_without_cuda_everything_runs_in_order() -> None:
    side, order = SideStream(torch.device("cpu")), []
    with side.beside():
        order.append("beside")
    side.join()
    order.append("after")
    assert order == ["beside", "after"]
