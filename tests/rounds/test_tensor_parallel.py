"""What a round exchanges between tensor-parallel ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_sparsespec.rounds.base import RoundContext


@pytest.mark.parametrize(
    ("greedy", "simulated", "exchanged"), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_only_what_is_drawn_at_random_is_exchanged(
    greedy: bool, simulated: bool, exchanged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy tokens follow from logits that all ranks have alike, as in SGLang's own speculation."""

    def broadcast(tensor: torch.Tensor, src: int) -> torch.Tensor:
        assert src == 0 and tensor.is_contiguous()
        return tensor.fill_(7)

    group = SimpleNamespace(world_size=2, broadcast=broadcast)
    monkeypatch.setattr("sglang_sparsespec.rounds.base.get_tp_group", lambda: group)
    context: Any = SimpleNamespace(simulated=object() if simulated else None)
    tokens, lens = RoundContext.from_first_rank(context, greedy, torch.zeros(3, 2).T, torch.zeros(3))
    assert tokens.shape == (2, 3)
    assert bool((tokens == 7).all() and (lens == 7).all()) == exchanged
