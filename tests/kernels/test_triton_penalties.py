"""The Triton kernel of penalties gives what the CPU's path gives, which unit/test_penalties.py compares with SGLang's.

Without a GPU the child process of test_triton_sampling.py runs this file in Triton's interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch
from penalty_checks import VOCAB, WINDOW, batch_of_all, penalties_of, positions_of, random_windows, rows_of

from sglang_sparsespec.sampling import triton_penalties

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
kernels_run_here = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no CUDA GPU: test_triton_sampling.py runs this in a child process"
)


def penalised(use_triton: bool, step: int | None) -> torch.Tensor:
    """Logits of windows, or of a step of them, of a batch of all kinds of requests."""
    reqs = batch_of_all()
    penalties = penalties_of(reqs, DEVICE, use_triton)
    candidates, logits = random_windows(len(reqs), DEVICE)
    rows, positions = rows_of(reqs, DEVICE), positions_of(reqs, DEVICE)
    if step is None:
        penalties.apply(logits, rows, positions, candidates)
    else:
        own = logits.view(-1, WINDOW, VOCAB)[:, step]
        seen = torch.tensor(step, device=DEVICE).expand(len(reqs))
        penalties.apply(own, rows, positions.view(-1, WINDOW)[:, step], candidates, seen)
    return logits.cpu()


@kernels_run_here
@pytest.mark.parametrize("step", [None, 0, 2, WINDOW - 1])
def test_logits_are_those_of_the_torch_path(step: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = penalised(False, step)
    # Two blocks, of which the last is not full.
    defaults = (8,)
    monkeypatch.setattr(triton_penalties.penalise, "__defaults__", defaults)
    torch.testing.assert_close(penalised(True, step), expected, rtol=1e-6, atol=1e-6)


@kernels_run_here
def test_logits_of_another_layout_are_refused() -> None:
    reqs = batch_of_all()
    rows = rows_of(reqs, DEVICE)
    penalties = penalties_of(reqs, DEVICE, True)
    wide = torch.zeros(len(reqs), 2 * VOCAB, device=DEVICE)
    for logits in (wide[:, ::2], wide[:, :VOCAB].half()):
        with pytest.raises(ValueError, match="float32 with unit stride"):
            penalties.apply(logits, rows, positions_of(reqs, DEVICE).view(-1, WINDOW)[:, 0])
