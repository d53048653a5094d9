"""Requests with penalties and custom logit processors get plain SGLang's tokens, whatever runs beside them.

Plain SGLang is the one without overlap scheduling: with it, SGLang penalises by the output before the last token. Without,
it applies its penalizers in the order of a set, which differs from process to process; here it has the order that it has
with overlap scheduling, additive penalties first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from engine_process import PLAIN, PLAIN_ENV, EngineProcess, install_plugin, plain_rounds_plugin, retract_plugin
from penalised_calls import make_calls, write_model
from quickstart import server_environment
from server_client import ForkedServer, free_port, server_command
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
from thinking_processor import BUDGET, CountingProcessor, ThinkingProcessor

pytestmark = pytest.mark.slow

RULE_ENV = "SPARSESPEC_TEST_PENALTY_RULE_FILE"
BROKEN = ["rows see no drafts", "penalise the bonus token's row only", "rejected drafts are counted"]
#: A plugin that wraps the penalties; the file named by the variable says how to break them.
RULE_PLUGIN = f'''
import os

import torch


def register():
    from sglang_sparsespec.sampling.penalties import Penalties

    apply, commit = Penalties.apply, Penalties.commit

    def asked():
        return open(os.environ["{RULE_ENV}"]).read()

    def broken_apply(self, logits, rows, positions, candidates=None, drafts_seen=None):
        shaped = logits.unflatten(0, (len(rows), -1))
        width = shaped.shape[1]
        if width == 1:
            return apply(self, logits, rows, positions, candidates, drafts_seen)
        self.candidates = candidates
        if asked() == "{BROKEN[0]}":
            for index in range(width):
                apply(self, shaped[:, index], rows, positions.view(-1, width)[:, index])
            return
        before = shaped.clone()
        apply(self, logits, rows, positions, candidates, drafts_seen)
        if asked() == "{BROKEN[1]}":
            matches = candidates[:, 1:] == before.argmax(-1)[:, :-1]
            bonus = matches.int().cumprod(1).sum(1, keepdim=True)
            others = torch.arange(width) != bonus
            shaped[others] = before[others]

    def broken_commit(self, rows, tokens, accept_lens):
        commit(self, rows, tokens, accept_lens)
        drafted = getattr(self, "candidates", None)
        if asked() == "{BROKEN[2]}" and drafted is not None and drafted.shape == tokens.shape and self._counts_matter:
            rejected = torch.arange(1, tokens.shape[1]) >= accept_lens.unsqueeze(1)
            places = rows.unsqueeze(1) * self._vocab_size + drafted[:, 1:]
            self._counts.view(-1).index_add_(0, places.flatten(), rejected.flatten().int())

    Penalties.apply, Penalties.commit = broken_apply, broken_commit
'''
#: Additive penalties first. And SGLang compiles the other one, which takes long and changes nothing.
ORDER_PLUGIN = """
def register():
    from sglang.srt.sampling import sampling_batch_info
    from sglang.srt.sampling.penaltylib import BatchedPenalizerOrchestrator, repetition_penalty

    init = BatchedPenalizerOrchestrator.__init__

    def additive_first(self, vocab_size, batch, penalizers):
        init(self, vocab_size, batch, sorted(penalizers, key=lambda kind: kind.is_multiplicative))

    BatchedPenalizerOrchestrator.__init__ = additive_first
    for module in (sampling_batch_info, repetition_penalty):
        compiled = module.apply_scaling_penalties
        module.apply_scaling_penalties = getattr(compiled, "_torchdynamo_orig_callable", compiled)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("tiny") / "llama")


COMMON: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "random_seed": 1,
    "log_level": "info",
    "max_running_requests": 16,
    "max_total_tokens": 20_000,
    "enable_custom_logit_processor": True,
}
SPEC: dict[str, Any] = {
    **COMMON,
    "speculative_algorithm": "SPARSESPEC",
    "sparsespec_speculate": "always",
    "sparsespec_min_budget": 40,
    "sparsespec_budget_ratio": 0.01,
    "speculative_num_steps": 5,
}
RETRACTING: dict[str, Any] = {"max_total_tokens": 900, "schedule_conservativeness": 0.01}


@pytest.fixture(scope="module")
def plain(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    env = {**PLAIN_ENV, **install_plugin(tmp_path_factory.mktemp("site"), "order_of_penalties", ORDER_PLUGIN)}
    with EngineProcess(env, model_path=model, **COMMON, **PLAIN, disable_overlap_schedule=True, port=31500) as engine:
        yield engine


class Rules:
    """An engine and the file that says how its penalties are broken."""

    def __init__(self, engine: EngineProcess, file: Path) -> None:
        self.engine, self._file = engine, file
        file.write_text("as they are")

    @contextmanager
    def broken(self, rule: str) -> Iterator[None]:
        self._file.write_text(rule)
        try:
            yield
        finally:
            self._file.write_text("as they are")


@pytest.fixture(scope="module")
def served(model: str, plain: EngineProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rules]:
    """Lock-step rounds; every eighth is plain; requests are retracted."""
    site, file = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("rule") / "rule"
    env = {RULE_ENV: str(file), **install_plugin(site, "broken_penalties", RULE_PLUGIN)}
    env |= {**plain_rounds_plugin(site, every=8), **retract_plugin(site)}
    file.write_text("as they are")
    with EngineProcess(env, model_path=model, **{**SPEC, **RETRACTING}, port=31550) as engine:
        yield Rules(engine, file)


def answers(engine: EngineProcess, calls: dict[str, Any], **more: Any) -> list[tuple[list[int], Any]]:
    """Tokens and why they ended."""
    outputs = engine.generate(**calls, **more)
    return [(output["output_ids"], output["meta_info"]["finish_reason"]) for output in outputs]


#: Plain rounds that a test forces have no logit bias: the planner makes none of a batch with one.
CALLS = make_calls(32, bias=False)


@pytest.fixture(scope="module")
def expected(plain: EngineProcess) -> list[tuple[list[int], Any]]:
    found = answers(plain, CALLS)
    assert {reason["type"] for _, reason in found} == {"stop", "length"}
    # Penalties have changed the answers of those that have one.
    names = ("temperature", "max_new_tokens", "ignore_eos")
    free = [{name: params[name] for name in names} for params in CALLS["sampling_params"]]
    changed = [one != other for one, other in zip(found, answers(plain, {**CALLS, "sampling_params": free}), strict=True)]
    assert sum(changed) > 0.6 * len(changed)
    return found


def test_tokens_of_all_penalties_in_one_batch_are_plain_sglangs(
    served: Rules, expected: list[tuple[list[int], Any]]
) -> None:
    assert answers(served.engine, CALLS) == expected
    state = served.engine.state()
    assert state["sparsespec_accept_length"] > 1.3 and state["sparsespec_plain_rounds"] > 5
    assert "#retracted_reqs: " in served.engine.log()


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_penalty_is_found(rule: str, served: Rules, expected: list[tuple[list[int], Any]]) -> None:
    with served.broken(rule):
        assert answers(served.engine, CALLS) != expected


def logprobs(outputs: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Of the tokens of each output, and of the two likeliest in their places: float32 [tokens, 3]."""
    found = []
    for output in outputs:
        info = output["meta_info"]
        rows = zip(info["output_token_logprobs"], info["output_top_logprobs"], strict=True)
        found.append(torch.tensor([[own[0], *(top[0] for top in tops)] for own, tops in rows]))
    return found


def test_log_probabilities_are_those_after_penalties(plain: EngineProcess, served: Rules) -> None:
    calls = {name: values[:14] for name, values in make_calls(48, seed=1).items()}
    both = [e.generate(**calls, return_logprob=True, top_logprobs_num=2) for e in (plain, served.engine)]
    assert [output["output_ids"] for output in both[0]] == [output["output_ids"] for output in both[1]]
    for one, other in zip(*map(logprobs, both), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-4)


def processor_calls(return_logprob: bool) -> dict[str, Any]:
    """Requests with each processor, with penalties beside and without, and requests without a processor."""
    calls = {name: [value for value in values[:12]] for name, values in make_calls(48, bias=False, seed=2).items()}
    processors: list[str | None] = []
    for index, params in enumerate(calls["sampling_params"]):
        name = (None, ThinkingProcessor, CountingProcessor, DisallowedTokensLogitsProcessor)[index % 4]
        processors.append(name.to_str() if name else None)
        own = (None, {"thinking_budget": BUDGET}, {"calls": 0}, {"token_ids": [11, 12, 13, 59, 58]})[index % 4]
        calls["sampling_params"][index] = {**params, "max_new_tokens": 30, "custom_params": own}
        calls["input_ids"][index] = [*calls["input_ids"][index][:20], *([90] if name is ThinkingProcessor else [])]
    return {**calls, "custom_logit_processor": processors, "return_logprob": [return_logprob] * 2 + [False] * 10}


@pytest.mark.parametrize("return_logprob", [False, True])
def test_processors_are_called_as_in_plain_decoding(return_logprob: bool, plain: EngineProcess, served: Rules) -> None:
    """Among them one that counts its calls, and thinking budgets. With log-probabilities verifications decode them."""
    before = served.engine.state()
    found = answers(served.engine, processor_calls(return_logprob))
    assert found == answers(plain, processor_calls(return_logprob))
    thoughts = [tokens for tokens, _ in found[1::4]]
    assert any(tokens[BUDGET : BUDGET + 2] == [92, 91] for tokens in thoughts), thoughts
    after = served.engine.state()
    assert after["sparsespec_single_steps"] - before["sparsespec_single_steps"] >= 25
    assert after["sparsespec_accept_histogram"] == before["sparsespec_accept_histogram"] or not return_logprob


def test_a_processor_that_fails_is_refused_alone(served: Rules) -> None:
    own = {"custom_logit_processor": DisallowedTokensLogitsProcessor.to_str()}
    with pytest.raises(ValueError, match="DisallowedTokensLogitsProcessor failed"):
        served.engine.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 5}, **own)
    assert served.engine.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 5})


def test_a_grammar_that_allows_end_tokens_alone_and_too_early_ends_its_request(served: Rules) -> None:
    for temperature in (0.0, 0.8):
        params = {"ebnf": 'root ::= ""', "min_new_tokens": 3, "max_new_tokens": 5, "temperature": temperature}
        try:
            (answer,) = served.engine.generate(input_ids=[1, 2, 3], sampling_params=params)
        except ValueError as error:  # what a newer SGLang makes of it
            assert "Grammar accept_token failed" in str(error)
        else:
            assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert served.engine.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 5})


def test_a_model_whose_own_default_is_a_penalty_needs_no_flag(plain: EngineProcess, model: str, tmp_path: Path) -> None:
    """As Qwen2.5, whose generation_config.json has these values."""
    folder, port = tmp_path / "llama", free_port()
    shutil.copytree(model, folder)
    defaults = {"repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    # No digit 5 or 0: these are special tokens, which split words.
    prompt, length = [3, 14, 17, 92, 68], 40
    chat = {"model": "m", "messages": [{"role": "user", "content": " ".join(map(str, prompt))}], "max_tokens": length}
    greedy = {**chat, "temperature": 0, "ignore_eos": True}

    def ask(body: dict[str, Any]) -> str:
        answer = requests.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    command = server_command(str(folder), port, "--max-total-tokens", "8000")
    with ForkedServer(command, port, tmp_path / "server.log", server_environment(True)) as server:
        server.wait_until_ready(300)
        assert ask(chat)
        answers = [ask(greedy), ask({**greedy, "repetition_penalty": 1.0})]
    params = {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
    penalties = [{"repetition_penalty": 1.1}, {}]
    expected = [plain.generate(input_ids=prompt, sampling_params={**params, **own})[0]["text"] for own in penalties]
    assert answers == expected and answers[0] != answers[1]


#: Settings, and whether plain rounds of several steps are forced, in which no logit bias is served.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "lockstep": ({}, False),
    "unified": ({"sparsespec_schedule": "unified"}, False),
    "unified, retracting": ({"sparsespec_schedule": "unified", **RETRACTING, "chunked_prefill_size": 32}, False),
    "plain rounds, retracting": ({**RETRACTING, "chunked_prefill_size": 32}, True),
    "host tier": ({"sparsespec_host_kv_gb": 0.05}, True),
    "no overlap": ({"disable_overlap_schedule": True}, False),
    "triforce": ({"sparsespec_draft_policy": "triforce"}, False),
    "never": ({"sparsespec_speculate": "never"}, False),
}


@pytest.fixture(scope="module")
def many(plain: EngineProcess) -> dict[bool, tuple[dict[str, Any], list[tuple[list[int], Any]]]]:
    """200 requests without and with such that have a logit bias, and plain SGLang's answers."""
    calls = {bias: make_calls(200, bias, seed=3) for bias in (False, True)}
    return {bias: (asked, answers(plain, asked)) for bias, asked in calls.items()}


@pytest.mark.nightly
@pytest.mark.parametrize("way", WAYS)
def test_tokens_of_200_requests_are_plain_sglangs(
    way: str, model: str, many: dict[bool, tuple[dict[str, Any], list[tuple[list[int], Any]]]], tmp_path: Path
) -> None:
    settings, plain_rounds = WAYS[way]
    calls, expected = many[not plain_rounds]
    env = {"SPARSESPEC_TEST_OFFLOAD_INTERVAL": "3"} if way == "host tier" else {}
    env |= plain_rounds_plugin(tmp_path, every=4) if plain_rounds else {}
    env |= retract_plugin(tmp_path) if "retracting" in way else {}
    with EngineProcess(env, model_path=model, **{**SPEC, **settings}, port=31600) as engine:
        assert answers(engine, calls) == expected
        state, log = engine.state(), engine.log()
    assert state["sparsespec_accept_length"] > 1.2
    assert ("#retracted_reqs: " in log) == ("retracting" in way)
    assert (state["sparsespec_plain_rounds"] > 20) == plain_rounds
    if way == "host tier":
        assert state["sparsespec_kv_requests_offloaded"] > 40 and state["sparsespec_kv_requests_restored"] > 40
