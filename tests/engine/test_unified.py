"""Engines with the unified schedule: requests that come, go or are retracted.

``test_greedy_parity.py`` compares texts of a real model; here a tiny one is driven into the corners.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_process import PLAIN, PLAIN_ENV, EngineProcess, plain_rounds_plugin, retract_plugin
from tiny_model import CONTEXT, VOCAB, write_tiny_llama

pytestmark = pytest.mark.slow

#: Lengths of prompts, some of them sharing prefixes, and of outputs up to the context's end.
LENGTHS = [3, 40, 77, 120, 5, 9, 200, 31, 64, 65, 17, 150, 40, 2]


def requests() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    common = torch.randint(0, VOCAB, (CONTEXT,), generator=generator).tolist()
    prompts, parameters = [], []
    for index, length in enumerate(LENGTHS):
        own = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        prompts.append(common[:length] if index % 3 == 0 else own)
        room = CONTEXT - length - 1
        tokens = room if index % 6 == 0 else min(room, 5 + 11 * index)
        parameters.append({"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True})
    return {"input_ids": prompts, "sampling_params": parameters}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EngineProcess]]:
    """Plain SGLang, and unified servers: two that must retract, of which one has plain rounds too; one is simple."""
    common: dict[str, Any] = {
        "model_path": str(write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")),
        "device": "cpu",
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "random_seed": 1,
        "log_level": "info",
    }
    unified: dict[str, Any] = {
        **common,
        "speculative_algorithm": "SPARSESPEC",
        "sparsespec_speculate": "always",
        "sparsespec_schedule": "unified",
        "sparsespec_min_budget": 12,
        "sparsespec_budget_ratio": 0.01,
    }
    retracting: dict[str, Any] = {"max_total_tokens": 550, "schedule_conservativeness": 0.01, "chunked_prefill_size": 32}
    simple: dict[str, Any] = {"disable_overlap_schedule": True, "disable_radix_cache": True, "max_total_tokens": 8000}
    with (
        EngineProcess(PLAIN_ENV, **common, **PLAIN, max_total_tokens=8000, port=31300) as plain_engine,
        EngineProcess(
            retract_plugin(tmp_path_factory.mktemp("site")),
            **unified, **retracting, speculative_num_steps=8, max_running_requests=12, port=31350,
        ) as retracting_engine,
        EngineProcess(**unified, **simple, speculative_num_steps=3, max_running_requests=7, port=31400) as simple_engine,
        EngineProcess(
            plain_rounds_plugin(tmp_path_factory.mktemp("site")),
            # After a plain round drafts have an old selection and as many of the newest tokens as the budget leaves.
            **{**unified, "sparsespec_min_budget": 20}, **retracting, speculative_num_steps=5, max_running_requests=12,
            port=31360,
        ) as mixed_engine,
    ):  # fmt: skip
        yield {
            "plain": plain_engine,
            "retracting": retracting_engine,
            "no overlap": simple_engine,
            "plain rounds": mixed_engine,
        }


@pytest.fixture(scope="module")
def expected(engines: dict[str, EngineProcess]) -> list[list[int]]:
    return [output["output_ids"] for output in engines["plain"].generate(**requests())]


@pytest.mark.parametrize("name", ["retracting", "no overlap", "plain rounds"])
def test_greedy_tokens_are_plain_sglangs(
    name: str, engines: dict[str, EngineProcess], expected: list[list[int]]
) -> None:
    # The second time after requests of the first have left their rows, as retracted ones do in any case.
    for _ in range(1 if name == "retracting" else 2):
        outputs = engines[name].generate(**requests())
        assert [output["output_ids"] for output in outputs] == expected
        # Drafts were made and accepted: this is not plain decoding.
        accepted = [output["meta_info"]["spec_accept_length"] for output in outputs if len(output["output_ids"]) > 50]
        assert sum(accepted) / len(accepted) > 1.5
    if name == "retracting":
        assert "#retracted_reqs: " in engines[name].log()


def test_log_probabilities_are_plain_sglangs(engines: dict[str, EngineProcess]) -> None:
    served = {
        name: engines[name].generate(**requests(), return_logprob=True) for name in ("plain", "no overlap")
    }
    for one, other in zip(served["plain"], served["no overlap"], strict=True):
        found, expected = (
            torch.tensor([entry[0] for entry in output["meta_info"]["output_token_logprobs"]])
            for output in (other, one)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["retracting", "no overlap"])
def test_requests_with_a_bias_and_ones_that_sample_leave_greedy_ones_alone(
    name: str, engines: dict[str, EngineProcess], expected: list[list[int]]
) -> None:
    """In one batch: biased greedy requests are plain SGLang's too, whoever runs beside them."""
    asked = requests()
    biased = [index for index in range(len(LENGTHS)) if index % 3 == 1]
    for index in biased:
        asked["sampling_params"][index]["logit_bias"] = {"1": 2.0, "4": -5.0, str(index % VOCAB): 1.0}
    with_bias = [output["output_ids"] for output in engines["plain"].generate(**asked)]
    assert all(with_bias[index] != expected[index] for index in biased if len(expected[index]) > 20)
    for index in range(2, len(LENGTHS), 3):
        filters = [{}, {"top_p": 0.8}, {"top_k": 4}, {"min_p": 0.1}][index // 3 % 4]
        asked["sampling_params"][index].update(temperature=0.9, **filters)
    outputs = [output["output_ids"] for output in engines[name].generate(**asked)]
    for index in range(len(LENGTHS)):
        if index % 3 != 2:
            assert outputs[index] == with_bias[index]
        assert len(outputs[index]) == len(with_bias[index])


def test_tokens_per_forward_are_level(engines: dict[str, EngineProcess]) -> None:
    """By the server's own log: a lock-step server's vary by 80% and more."""
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(0, VOCAB, (12, 20), generator=generator).tolist()
    engines["no overlap"].generate(
        input_ids=prompts, sampling_params={"temperature": 0.0, "max_new_tokens": 200, "ignore_eos": True}
    )
    lines = re.findall(r"tokens per forward: ([\d.]+) \(variation (\d+)%", engines["no overlap"].log())
    assert lines and int(lines[0][1]) < 50
