"""Hidden states of an answer (``return_hidden_states``) are those of its tokens, as in plain SGLang.

A tiny random model in float32 on CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_process import PLAIN, PLAIN_ENV, EngineProcess, plain_rounds_plugin
from tiny_model import VOCAB, write_tiny_llama

pytestmark = pytest.mark.slow

PROMPTS = [[(3 * i + j) % VOCAB for j in range(length)] for i, length in enumerate((3, 17, 40, 5, 9, 26))]
#: Ends inside accepted runs and at their ends; by request, all states, the last one, or none.
LENGTHS = (1, 2, 9, 13, 20, 31)
MODES = (True, "last", True, False, "last", True)


def engine_args(checkpoint: Path) -> dict[str, Any]:
    return {
        "model_path": str(checkpoint),
        "skip_tokenizer_init": True,
        "device": "cpu",
        "dtype": "float32",
        "enable_return_hidden_states": True,
        "max_running_requests": 6,
        "max_total_tokens": 2048,
        "disable_radix_cache": True,  # the states of cached tokens are not computed
        "log_level": "warning",
    }


SPARSESPEC: dict[str, Any] = {"speculative_algorithm": "SPARSESPEC", "sparsespec_speculate": "always"}


def generate(engine: EngineProcess) -> list[dict[str, Any]]:
    params = [{"temperature": 0.0, "max_new_tokens": length, "ignore_eos": True} for length in LENGTHS]
    return engine.generate(input_ids=PROMPTS, sampling_params=params, return_hidden_states=list(MODES))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[dict[str, Any]]:
    with EngineProcess(PLAIN_ENV, **engine_args(checkpoint), **PLAIN) as engine:
        return generate(engine)


def states(answer: dict[str, Any]) -> np.ndarray:
    """The states as rows, whatever their nesting: float [tokens, hidden]."""
    found = answer["meta_info"].get("hidden_states") or []
    rows = found if found and isinstance(found[0], list) else [found]
    return np.concatenate([np.array(row, dtype=np.float32).reshape(-1, 32) for row in rows])


def assert_equal(answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for answer, plain, length, prompt, mode in zip(answers, expected, LENGTHS, PROMPTS, MODES, strict=True):
        assert answer["output_ids"] == plain["output_ids"] and len(plain["output_ids"]) == length
        found, wanted = states(answer), states(plain)
        assert len(wanted) == {True: len(prompt) + length - 1, "last": 1, False: 0}[mode]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[EngineProcess]:
    with EngineProcess(**engine_args(checkpoint), **SPARSESPEC) as engine:
        yield engine


def test_hidden_states_are_plain_sglangs(engine: EngineProcess, expected: list[dict[str, Any]]) -> None:
    assert_equal(generate(engine), expected)
    assert engine.state()["sparsespec_accept_length"] > 2
    # Such requests are verified: a plain round keeps no states.
    engine.set_speculate("never")
    assert_equal(generate(engine), expected)


def test_hidden_states_of_other_tokens_would_be_found(engine: EngineProcess, expected: list[dict[str, Any]]) -> None:
    shifted = [dict(answer) for answer in expected]
    moved = states(expected[5])
    shifted[5]["meta_info"] = {"hidden_states": [moved[:1].tolist(), *np.roll(moved[1:], 1, axis=0).tolist()]}
    with pytest.raises(AssertionError):
        assert_equal(shifted, expected)


@pytest.mark.nightly
def test_hidden_states_of_unified_batches_are_plain_sglangs(checkpoint: Path, expected: list[dict[str, Any]]) -> None:
    with EngineProcess(**engine_args(checkpoint), **SPARSESPEC, sparsespec_schedule="unified") as engine:
        assert_equal(generate(engine), expected)


@pytest.mark.nightly
def test_plain_rounds_would_lose_hidden_states(checkpoint: Path, expected: list[dict[str, Any]], tmp_path: Path) -> None:
    with EngineProcess(plain_rounds_plugin(tmp_path), **engine_args(checkpoint), **SPARSESPEC) as engine:
        with pytest.raises((AssertionError, ValueError)):
            assert_equal(generate(engine), expected)
