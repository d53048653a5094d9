"""Engines whose drafts use FP8 copies of the weights: the output is the model's, whatever the copies are.

Tiny random models in float32 on CPU; greedy output is compared with transformers'.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_process import EngineProcess, install_plugin
from tiny_architectures import FOR_GPUS, shortfalls, write_tiny
from tiny_model import VOCAB, greedy_continuation, write_tiny_llama

pytestmark = pytest.mark.slow

NEW_TOKENS = 40
PROMPTS = [[(3 * i + j) % VOCAB for j in range(length)] for i, length in enumerate((3, 17, 40, 5))]

#: The file named by the variable says what becomes of the copies when the weights are updated: "noise", "stale" or else what
#: they ought to be; with "everywhere" they are noise and all forwards use them, which they must not.
MODE_ENV = "SPARSESPEC_TEST_COPIES"
PLUGIN = """
import os
from pathlib import Path

def register():
    import torch
    from sglang_sparsespec.draft_weights.copies import DraftWeights
    from sglang_sparsespec.scheduler_patch import draft_weights as hooks

    requantise, in_use = DraftWeights.requantise, hooks.weights_in_use
    weights = []

    def mode():
        return Path(os.environ["MODE_ENV"]).read_text()

    def change(self):
        weights.append(self)
        if mode() != "stale":
            requantise(self)
        if mode() in ("noise", "everywhere"):
            for copy in self._copies.values():
                values = torch.randn(copy.values.shape, generator=torch.Generator().manual_seed(1))
                copy.values.copy_(values.to(copy.values.dtype))

    DraftWeights.requantise = change
    hooks.weights_in_use = lambda: weights[0] if weights and mode() == "everywhere" else in_use()
""".replace("MODE_ENV", MODE_ENV)


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


def expected(checkpoint: Path) -> list[list[int]]:
    return [greedy_continuation(checkpoint, prompt, NEW_TOKENS) for prompt in PROMPTS]


class Server:
    """An engine whose copies can be spoilt."""

    def __init__(self, engine: EngineProcess, mode_file: Path) -> None:
        self.engine = engine
        self._mode_file = mode_file

    def load(self, checkpoint: Path, mode: str = "") -> None:
        """Update the weights, and do with the copies what ``mode`` says."""
        self._mode_file.write_text(mode)
        self.engine.update_weights(checkpoint)

    def generate(self) -> tuple[list[list[int]], float]:
        """Greedy outputs, and the accept length of their verifications."""
        sampling = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        before = self.engine.state()["sparsespec_accept_histogram"]
        outputs = self.engine.generate(input_ids=PROMPTS, sampling_params=sampling)
        after = self.engine.state()["sparsespec_accept_histogram"]
        histogram = [now - then for now, then in zip(after, before, strict=True)]
        accept_length = 1 + sum(n * count for n, count in enumerate(histogram)) / sum(histogram)
        return [output["output_ids"] for output in outputs], accept_length


@pytest.fixture(scope="module")
def server(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    mode_file = tmp_path_factory.mktemp("mode") / "mode"
    mode_file.write_text("")
    site = tmp_path_factory.mktemp("site")
    env = {MODE_ENV: str(mode_file), **install_plugin(site, "zz_spoilt_copies", PLUGIN)}
    with EngineProcess(env, **engine_args(checkpoints[0])) as engine:
        yield Server(engine, mode_file)


def test_copies_draft_well_and_change_no_token(server: Server, checkpoints: list[Path]) -> None:
    outputs, accept_length = server.generate()
    assert outputs == expected(checkpoints[0])
    assert accept_length > 5
    assert "FP8 draft weights: 9 linear layers" in server.engine.log()  # 2 layers of 4, and the head


def test_copies_are_made_anew_when_weights_are_updated(server: Server, checkpoints: list[Path]) -> None:
    server.load(checkpoints[0])
    server.load(checkpoints[1], "stale")
    outputs, of_old_copies = server.generate()
    assert outputs == expected(checkpoints[1])
    server.load(checkpoints[1])
    outputs, recovered = server.generate()
    assert outputs == expected(checkpoints[1])
    assert recovered > 1.5 * of_old_copies


def test_no_token_depends_on_the_copies(server: Server, checkpoints: list[Path]) -> None:
    server.load(checkpoints[0], "noise")
    outputs, accept_length = server.generate()
    assert outputs == expected(checkpoints[0])
    assert accept_length < 3, "drafts do not use the copies"


def test_a_verification_that_used_the_copies_would_be_found(server: Server, checkpoints: list[Path]) -> None:
    server.load(checkpoints[0], "everywhere")
    outputs, _ = server.generate()
    assert outputs != expected(checkpoints[0])


#: Of logits of these random models in bfloat16; their best two are 0.7 apart in the median.
ROUNDING = 0.4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: the tests above run on the CPU")
def test_on_a_gpu_copies_follow_the_weights_and_change_no_token(tmp_path: Path) -> None:
    """All of the above with the kernels of GPUs and captured graphs, in one engine."""
    sizes = {**FOR_GPUS, "dtype": "bfloat16"}
    checkpoints = [write_tiny("LlamaForCausalLM", tmp_path / str(seed), seed, **sizes) for seed in (0, 1)]
    mode_file = tmp_path / "mode"
    mode_file.write_text("")
    env = {MODE_ENV: str(mode_file), **install_plugin(tmp_path, "zz_spoilt_copies", PLUGIN)}
    args = {**engine_args(checkpoints[0]), "device": "cuda", "dtype": "bfloat16", "mem_fraction_static": 0.3}
    with EngineProcess(env, **args, cuda_graph_bs_decode=[1, 4]) as engine:
        server = Server(engine, mode_file)
        found = {}
        for name, seed, mode in (("first", 0, ""), ("stale", 1, "stale"), ("second", 1, ""), ("noise", 0, "noise")):
            server.load(checkpoints[seed], mode)
            outputs, accept_length = server.generate()
            missing = float(shortfalls(checkpoints[seed], PROMPTS, outputs).max())
            print(name, "accept length", accept_length, "largest shortfall", missing)
            assert missing < ROUNDING, name
            found[name] = accept_length
        server.load(checkpoints[0], "everywhere")
        outputs, _ = server.generate()
    assert float(shortfalls(checkpoints[0], PROMPTS, outputs).max()) > 2 * ROUNDING
    assert min(found["first"], found["second"]) > 1.5 * max(found["stale"], found["noise"])
