"""Two flags of SGLang whose answers are plain SGLang's: seeded sampling on a CPU, and hidden states of the answer's tokens.

``--enable-deterministic-inference`` and ``--enable-return-hidden-states``, in one engine, on a tiny random model in float32.
Plain SGLang allows the first with attention backends of GPUs only; a plugin of this test has it take PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_process import ALLOW_TORCH, PLAIN, PLAIN_ENV, EngineProcess, install_plugin
from tiny_model import VOCAB, write_tiny_llama

pytestmark = pytest.mark.slow

PROMPTS = [[(3 * i + j) % VOCAB for j in range(length)] for i, length in enumerate((3, 17, 40, 5, 9, 26, 11, 8))]
NEW_TOKENS = 25
SEEDED: list[dict[str, Any]] = [
    {"temperature": 1.0, "sampling_seed": 7},
    {"temperature": 0.7, "sampling_seed": 2**40 + 1, "top_p": 0.8},
    {"temperature": 1.3},
    {"temperature": 1.0, "sampling_seed": 7, "top_k": 3},
    {"temperature": 0.0, "sampling_seed": 3},
    {"temperature": 1.5, "sampling_seed": -5},
    {"temperature": 1.0, "sampling_seed": 8},
    {"temperature": 1.0, "sampling_seed": 9},
]
#: Greedy requests end inside accepted runs and at their ends; each wants all hidden states, the last one, or none.
LENGTHS = (1, 2, 9, 13, 20, 31)
MODES = (True, "last", True, False, "last", True)
SPARSESPEC: dict[str, Any] = {"speculative_algorithm": "SPARSESPEC", "sparsespec_speculate": "always"}
#: Drafts and verifications with the noise of the next position.
SHIFT_NOISE = """
def register():
    from sglang_sparsespec.sampling import reference
    original = reference.sample_seeded
    reference.sample_seeded = lambda logits, rows, positions: original(logits, rows, positions + 1)
"""


def engine_args(checkpoint: Path) -> dict[str, Any]:
    return {
        "model_path": str(checkpoint),
        "skip_tokenizer_init": True,
        "device": "cpu",
        "dtype": "float32",
        "enable_deterministic_inference": True,
        "enable_return_hidden_states": True,
        "disable_radix_cache": True,  # the states of cached tokens are not computed
        "max_running_requests": 8,
        "max_total_tokens": 2048,
        "log_level": "warning",
    }


def seeded(engine: EngineProcess, turns: range = range(len(PROMPTS))) -> list[list[int]]:
    """Tokens of the requests with seeds."""
    params = [{**SEEDED[i], "max_new_tokens": NEW_TOKENS, "ignore_eos": True} for i in turns]
    return [out["output_ids"] for out in engine.generate(input_ids=[PROMPTS[i] for i in turns], sampling_params=params)]


def with_states(engine: EngineProcess) -> list[dict[str, Any]]:
    """Answers of the requests for hidden states."""
    params = [{"temperature": 0.0, "max_new_tokens": length, "ignore_eos": True} for length in LENGTHS]
    prompts = PROMPTS[: len(LENGTHS)]
    return engine.generate(input_ids=prompts, sampling_params=params, return_hidden_states=list(MODES))


@dataclass(frozen=True)
class Expected:
    """What plain SGLang gives."""

    seeded: list[list[int]]
    with_states: list[dict[str, Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    env = {**PLAIN_ENV, **install_plugin(tmp_path_factory.mktemp("site"), "zz_allow_torch", ALLOW_TORCH)}
    with EngineProcess(env, **engine_args(checkpoint), **PLAIN) as engine:
        return Expected(seeded(engine), with_states(engine))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[EngineProcess]:
    with EngineProcess(**engine_args(checkpoint), **SPARSESPEC) as engine:
        yield engine


# ----------------------------------------------------------------------- seeded sampling


def test_seeds_give_plain_sglangs_tokens(engine: EngineProcess, expected: Expected) -> None:
    assert seeded(engine) == expected.seeded
    assert engine.state()["sparsespec_accept_length"] > 2
    # Beside other requests, and in plain rounds.
    assert seeded(engine, range(2, 5)) == expected.seeded[2:5]
    engine.set_speculate("never")
    assert seeded(engine) == expected.seeded
    engine.set_speculate("always")


@pytest.mark.nightly
def test_noise_of_other_positions_would_be_found(checkpoint: Path, expected: Expected, tmp_path: Path) -> None:
    with EngineProcess(install_plugin(tmp_path, "zz_shift", SHIFT_NOISE), **engine_args(checkpoint), **SPARSESPEC) as engine:
        found = seeded(engine)
    assert found[4] == expected.seeded[4], "a greedy request takes no noise"
    assert found != expected.seeded


# ------------------------------------------------------------------------- hidden states


def states(answer: dict[str, Any]) -> np.ndarray:
    """The states as rows, whatever their nesting: float [tokens, hidden]."""
    found = answer["meta_info"].get("hidden_states") or []
    rows = found if found and isinstance(found[0], list) else [found]
    return np.concatenate([np.array(row, dtype=np.float32).reshape(-1, 32) for row in rows])


def assert_states_equal(answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for answer, plain, length, prompt, mode in zip(answers, expected, LENGTHS, PROMPTS, MODES, strict=False):
        assert answer["output_ids"] == plain["output_ids"] and len(plain["output_ids"]) == length
        found, wanted = states(answer), states(plain)
        assert len(wanted) == {True: len(prompt) + length - 1, "last": 1, False: 0}[mode]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_hidden_states_are_plain_sglangs(engine: EngineProcess, expected: Expected) -> None:
    assert_states_equal(with_states(engine), expected.with_states)
    # Such requests are verified: a plain round keeps no states.
    engine.set_speculate("never")
    assert_states_equal(with_states(engine), expected.with_states)
    engine.set_speculate("always")


#: Plain rounds whatever a batch asks for.
BROKEN_RULE = """
def register():
    from sglang_sparsespec.rounds.planner import Planner, RoundChoice

    Planner.next_round = lambda self, batch: RoundChoice(0, 3)
"""


@pytest.mark.nightly
def test_plain_rounds_would_lose_hidden_states(checkpoint: Path, expected: Expected, tmp_path: Path) -> None:
    environment = install_plugin(tmp_path, "zz_broken", BROKEN_RULE)
    with EngineProcess(environment, **engine_args(checkpoint), **SPARSESPEC) as engine:
        with pytest.raises((AssertionError, ValueError)):
            assert_states_equal(with_states(engine), expected.with_states)


@pytest.mark.nightly
def test_unified_batches_give_the_same(checkpoint: Path, expected: Expected) -> None:
    with EngineProcess(**engine_args(checkpoint), **SPARSESPEC, sparsespec_schedule="unified") as engine:
        assert seeded(engine) == expected.seeded
        assert_states_equal(with_states(engine), expected.with_states)
