"""Engines whose drafts use FP8 copies of the weights: the output is the model's, whatever the copies are.

Tiny random models in float32 on CPU; greedy output is compared with transformers'.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_process import EngineProcess, install_plugin
from tiny_model import VOCAB, greedy_continuation, write_tiny_llama

pytestmark = pytest.mark.slow

NEW_TOKENS = 40
PROMPTS = [[(3 * i + j) % VOCAB for j in range(length)] for i, length in enumerate((3, 17, 40, 5))]

#: Turns every copy into noise, as it is made and when it is made anew, if ``SPOIL`` is set. With ``EVERYWHERE`` all forwards
#: use the copies, which they must not.
PLUGIN = """
import os

def register():
    import torch
    from sglang_sparsespec.draft_weights.copies import DraftWeights
    from sglang_sparsespec.scheduler_patch import draft_weights as hooks

    requantise, made = DraftWeights.requantise, DraftWeights.__init__
    weights = []

    def spoil(self):
        for copy in self._copies.values():
            values = torch.randn(copy.values.shape, generator=torch.Generator().manual_seed(1))
            copy.values.copy_(values.to(copy.values.dtype))

    def init(self, model):
        made(self, model)
        weights.append(self)
        if os.environ.get("SPOIL"):
            spoil(self)

    DraftWeights.__init__ = init
    if os.environ.get("EVERYWHERE"):
        hooks.weights_in_use = lambda: weights[0] if weights else None
    if os.environ.get("STALE"):
        DraftWeights.requantise = lambda self: None
"""


def engine_args(checkpoint: Path) -> dict[str, Any]:
    return {
        "model_path": str(checkpoint),
        "skip_tokenizer_init": True,
        "device": "cpu",
        "dtype": "float32",
        "speculative_algorithm": "SPARSESPEC",
        "sparsespec_draft_weights": "fp8",
        "sparsespec_speculate": "always",
        "max_running_requests": 4,
        "max_total_tokens": 2048,
        "random_seed": 0,
        "log_level": "info",
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [write_tiny_llama(folder / str(seed), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return install_plugin(tmp_path_factory.mktemp("site"), "zz_spoiled_copies", PLUGIN)


def expected(checkpoint: Path) -> list[list[int]]:
    return [greedy_continuation(checkpoint, prompt, NEW_TOKENS) for prompt in PROMPTS]


def generate(engine: EngineProcess) -> list[list[int]]:
    sampling = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    return [output["output_ids"] for output in engine.generate(input_ids=PROMPTS, sampling_params=sampling)]


def accept_length(engine: EngineProcess, before: dict[str, Any] | None = None) -> float:
    """Mean tokens of a verification, of those since ``before``."""
    histogram = engine.state()["sparsespec_accept_histogram"]
    if before is not None:
        histogram = [now - then for now, then in zip(histogram, before["sparsespec_accept_histogram"], strict=True)]
    return 1 + sum(n * count for n, count in enumerate(histogram)) / sum(histogram)


@pytest.fixture(scope="module")
def healthy(checkpoints: list[Path]) -> Iterator[EngineProcess]:
    with EngineProcess(**engine_args(checkpoints[0])) as engine:
        yield engine


def test_copies_draft_well_and_change_no_token(healthy: EngineProcess, checkpoints: list[Path]) -> None:
    assert generate(healthy) == expected(checkpoints[0])
    assert accept_length(healthy) > 5
    assert "FP8 draft weights: 9 linear layers" in healthy.log()  # 2 layers of 4, and the head


def test_copies_are_made_anew_when_weights_are_updated(
    healthy: EngineProcess, checkpoints: list[Path], site: dict[str, str]
) -> None:
    before = healthy.state()
    healthy.update_weights(checkpoints[1])
    assert generate(healthy) == expected(checkpoints[1])
    recovered = accept_length(healthy, before)
    with EngineProcess({**site, "STALE": "1"}, **engine_args(checkpoints[0])) as stale:
        stale.update_weights(checkpoints[1])
        assert generate(stale) == expected(checkpoints[1])
        assert recovered > 1.5 * accept_length(stale)


def test_no_token_depends_on_the_copies(checkpoints: list[Path], site: dict[str, str]) -> None:
    with EngineProcess({**site, "SPOIL": "1"}, **engine_args(checkpoints[0])) as engine:
        assert generate(engine) == expected(checkpoints[0])
        assert accept_length(engine) < 3, "drafts do not use the copies"


def test_a_verification_that_used_the_copies_would_be_found(checkpoints: list[Path], site: dict[str, str]) -> None:
    with EngineProcess({**site, "SPOIL": "1", "EVERYWHERE": "1"}, **engine_args(checkpoints[0])) as engine:
        assert generate(engine) != expected(checkpoints[0])
