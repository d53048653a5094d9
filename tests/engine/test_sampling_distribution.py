"""Sampled sequences follow the target's distribution, end to end.

An engine with SPARSESPEC samples thousands of short sequences from a tiny random Llama. Budgets are so small that drafts
often miss (the accept length is checked). Broken acceptance rules, put into the same engine by a plugin of this test, must
fail the same check.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from engine_process import EngineProcess, install_plugin
from sampled_sequences import BOUND, KINDS, LENGTH, NUM_STEPS, engine_args, p_value, prompt_of
from tiny_model import VOCAB, Sampling, sequence_probabilities, write_tiny_llama, write_tokenizer
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.slow

#: What a broken rule must reach: far below the bound, so that it fails it on every run.
BROKEN = 1e-12
RULE_ENV = "SPARSESPEC_TEST_RULE_FILE"

#: A rule that is not broken: rounds draft 1 to k tokens in turn, and what follows in their windows is padding.
FEWER_DRAFTS = "fewer drafts"
#: A plugin that wraps the acceptance rule; the file named by the variable says how to break it.
BROKEN_RULE_PLUGIN = f'''
import os

import torch


def register():
    from sglang_sparsespec.rounds.planner import Planner, RoundChoice
    from sglang_sparsespec.sampling import reference
    from sglang_sparsespec.sampling.penalties import Penalties

    original, original_windows, original_round = reference.accept_by_rejection, reference.accept, Planner.next_round
    original_penalties, original_mask = Penalties.apply, Penalties._mask_ends

    def asked():
        return open(os.environ["{RULE_ENV}"]).read()

    def next_round(self, batch):
        self.rounds = getattr(self, "rounds", 0) + 1
        choice = original_round(self, batch)
        return RoundChoice(1 + self.rounds % self._num_steps) if "{FEWER_DRAFTS}" in asked() else choice

    def accept_windows(*args):
        if asked() == "{FEWER_DRAFTS}, accept their padding":
            args = (*args[:-1], None)
        return original_windows(*args)

    def accept(candidates, target_probs, draft_probs, coins, final_coins):
        rule = asked()
        if rule == "accept every draft":
            coins = torch.zeros_like(coins)
            possible = target_probs[:, :-1].clamp(min=1e-30)
            target_probs = torch.cat([possible, target_probs[:, -1:]], dim=1)
        elif rule == "accept by argmax":
            one_hot = torch.zeros_like(target_probs)
            target_probs = one_hot.scatter_(-1, target_probs.argmax(-1, keepdim=True), 1.0)
        tokens, accept_lens = original(candidates, target_probs, draft_probs, coins, final_coins)
        if rule == "sample the target after a rejection":
            last = (accept_lens - 1).long().unsqueeze(1)
            rows = torch.arange(len(tokens))
            fresh = torch.multinomial(target_probs[rows, last.squeeze(1)], 1)
            tokens = tokens.scatter(1, last, fresh)
        return tokens, accept_lens

    def penalise(self, logits, rows, positions, candidates=None, drafts_seen=None):
        width = len(logits) // len(rows)
        if asked() != "penalise no token for drafts" or width == 1:
            return original_penalties(self, logits, rows, positions, candidates, drafts_seen)
        for index in range(width):
            original_penalties(self, logits[index::width], rows, positions[index::width])

    def mask_ends(self, logits, rows, positions):
        if asked() == "mask end tokens by a window's first row":
            first = positions.view(len(rows), -1)[:, :1]
            positions = first.expand(-1, logits.shape[1]).reshape(-1)
        original_mask(self, logits, rows, positions)

    Penalties.apply = penalise
    Penalties._mask_ends = mask_ends
    reference.accept_by_rejection = accept
    reference.accept = accept_windows
    Planner.next_round = next_round
'''


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")
    # min_new_tokens is refused without a tokenizer.
    write_tokenizer(folder, VOCAB, KINDS["min_new_tokens"][0].stop_token_ids[0])
    return folder


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> dict[str, dict[tuple[int, ...], float]]:
    """Sequence probabilities of each kind of request under the target."""
    return {
        kind: sequence_probabilities(checkpoint, prompt_of(kind), LENGTH, sampling)
        for kind, (sampling, _) in KINDS.items()
    }


class Sampler:
    """An engine and its rule file, if it has one."""

    def __init__(self, engine: EngineProcess, rule_file: Path | None) -> None:
        self.engine = engine
        self.rule_file = rule_file
        self.accepted: Counter[int] = Counter()  # verifications by accepted drafts

    def sample(self, counts: dict[str, int]) -> dict[str, Counter[tuple[int, ...]]]:
        """Sequences of the given number of requests of each kind, all kinds in the same batches."""
        kinds = [kind for kind, count in counts.items() for _ in range(count)]
        order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(0)).tolist()
        kinds = [kinds[i] for i in order]
        outputs = self.engine.generate(
            input_ids=[prompt_of(kind) for kind in kinds],
            sampling_params=[KINDS[kind][0].as_request(LENGTH) for kind in kinds],
        )
        found: dict[str, Counter[tuple[int, ...]]] = {kind: Counter() for kind in counts}
        for kind, output in zip(kinds, outputs, strict=True):
            found[kind][tuple(output["output_ids"])] += 1
            for accepted, times in enumerate(output["meta_info"]["spec_correct_drafts_histogram"]):
                self.accepted[accepted] += times
        return found


@pytest.fixture(scope="module")
def engines(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Sampler]]:
    """Engines that start at the same time: as it is, with a rule that can be broken, and with staggered rounds."""
    rule_file = tmp_path_factory.mktemp("rule") / "rule"
    rule_file.write_text("as it is")
    site = tmp_path_factory.mktemp("site")
    env = {RULE_ENV: str(rule_file), **install_plugin(site, "broken_rule", BROKEN_RULE_PLUGIN)}
    args = partial(engine_args, checkpoint, skip_tokenizer_init=False)
    with (
        EngineProcess(**args(port=31160)) as plain,
        EngineProcess(env, **args(port=31170, disable_overlap_schedule=True)) as breakable,
        EngineProcess(**args(port=31180, sparsespec_schedule="unified")) as unified,
    ):
        yield {
            "overlap": Sampler(plain, None),
            "no overlap": Sampler(breakable, rule_file),
            "unified": Sampler(unified, None),
        }


#: 1500 sequences tell the subtlest broken rule below, another token after a rejection, with a p-value of 1e-17 or less; 700
#: tell a penalty that is missing with 1e-40, 500 another one with 1e-50. What a filter removes is impossible, and one such
#: sequence is enough.
UNFILTERED = {"temperature 1": 1500}
MIXED = {
    **UNFILTERED,
    "top_p": 400,
    "top_k": 400,
    "min_p": 400,
    "all filters": 400,
    "greedy": 50,
    "frequency penalty": 700,
    "presence penalty": 400,
    "repetition penalty": 500,
    "min_new_tokens": 500,
}


@pytest.fixture(scope="module", params=["overlap", "unified"])
def mixed_sampler(request: pytest.FixtureRequest, engines: dict[str, Sampler]) -> Sampler:
    return engines[request.param]


@pytest.fixture(scope="module")
def mixed_sequences(mixed_sampler: Sampler) -> dict[str, Counter[tuple[int, ...]]]:
    """Greedy requests and all kinds of sampled ones, served together."""
    return mixed_sampler.sample(MIXED)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "greedy"])
def test_sequences_of_a_mixed_batch_follow_the_target(
    kind: str,
    mixed_sequences: dict[str, Counter[tuple[int, ...]]],
    exact: dict[str, dict[tuple[int, ...], float]],
    checkpoint: Path,
) -> None:
    assert sum(mixed_sequences[kind].values()) == MIXED[kind]
    assert p_value(mixed_sequences[kind], exact[kind]) >= BOUND
    free = replace(
        KINDS[kind][0], frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0, min_new_tokens=0
    )
    if free != KINDS[kind][0]:
        unpenalised = sequence_probabilities(checkpoint, prompt_of(kind), LENGTH, free)
        assert p_value(mixed_sequences[kind], unpenalised) < BROKEN, "the penalty is too weak to be seen"


def test_greedy_requests_of_a_mixed_batch_are_exact(
    mixed_sequences: dict[str, Counter[tuple[int, ...]]], exact: dict[str, dict[tuple[int, ...], float]]
) -> None:
    (best,) = exact["greedy"]
    assert mixed_sequences["greedy"] == {best: MIXED["greedy"]}


def test_drafts_are_neither_all_accepted_nor_all_rejected(
    mixed_sampler: Sampler, mixed_sequences: dict[str, Counter[tuple[int, ...]]]
) -> None:
    """Otherwise the checks would say nothing about acceptance."""
    accepted = mixed_sampler.accepted
    rounds = sum(accepted.values())
    assert all(accepted[n] > 0.02 * rounds for n in range(NUM_STEPS + 1)), accepted
    accept_length = 1 + sum(n * times for n, times in accepted.items()) / rounds
    assert 1.2 < accept_length < NUM_STEPS + 0.8


@pytest.mark.parametrize("schedule", ["no overlap", "unified"])
def test_sequences_of_a_batch_without_filters_follow_the_target(
    schedule: str, engines: dict[str, Sampler], exact: dict[str, dict[tuple[int, ...], float]]
) -> None:
    """Another path of the sampler: no top-k, top-p or min-p in the whole batch."""
    found = engines[schedule].sample(UNFILTERED)["temperature 1"]
    assert p_value(found, exact["temperature 1"]) >= BOUND


@pytest.mark.parametrize("schedule", ["overlap", "no overlap", "unified"])
def test_served_tokens_have_the_targets_own_probabilities(
    schedule: str, engines: dict[str, Sampler], checkpoint: Path
) -> None:
    """Over several rounds, so nothing that a draft step wrote to the KV cache is left in it."""
    length, count = 12, 15
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    kinds = [kind for kind in KINDS for _ in range(count)]
    outputs = engines[schedule].engine.generate(
        input_ids=[prompt_of(kind) for kind in kinds],
        sampling_params=[Sampling().as_request(length)] * len(kinds),
        return_logprob=True,
    )
    for kind, output in zip(kinds, outputs, strict=True):
        prompt, tokens = prompt_of(kind), output["output_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        served = torch.tensor([logprob for logprob, *_ in output["meta_info"]["output_token_logprobs"]])
        torch.testing.assert_close(served, expected, rtol=0, atol=1e-4)


def test_sequences_of_rounds_with_fewer_drafts_follow_the_target(
    engines: dict[str, Sampler], exact: dict[str, dict[tuple[int, ...], float]]
) -> None:
    sampler, kinds = engines["no overlap"], {**UNFILTERED, "all filters": 400, "greedy": 50}
    assert sampler.rule_file is not None
    before = sampler.engine.state()["sparsespec_draft_length_histogram"]
    sampler.rule_file.write_text(FEWER_DRAFTS)
    try:
        found = sampler.sample(kinds)
    finally:
        sampler.rule_file.write_text("as it is")
    after = sampler.engine.state()["sparsespec_draft_length_histogram"]
    rounds = [now - then for now, then in zip(after, before, strict=True)]
    assert rounds[0] == 0 and min(rounds[1:]) > 0.2 * sum(rounds)
    (best,) = exact["greedy"]
    assert found["greedy"] == {best: kinds["greedy"]}
    assert all(p_value(found[kind], exact[kind]) >= BOUND for kind in kinds if kind != "greedy")


@pytest.mark.parametrize(
    "rule",
    [
        "accept every draft",
        "sample the target after a rejection",
        "accept by argmax",
        f"{FEWER_DRAFTS}, accept their padding",
    ],
)
def test_a_broken_acceptance_rule_is_found(
    rule: str, engines: dict[str, Sampler], exact: dict[str, dict[tuple[int, ...], float]]
) -> None:
    sampler = engines["no overlap"]
    assert sampler.rule_file is not None
    sampler.rule_file.write_text(rule)
    try:
        found = sampler.sample(UNFILTERED)["temperature 1"]
    finally:
        sampler.rule_file.write_text("as it is")
    assert p_value(found, exact["temperature 1"]) < BROKEN


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("frequency penalty", "penalise no token for drafts"),
        ("min_new_tokens", "mask end tokens by a window's first row"),
    ],
)
def test_a_penalty_that_overlooks_drafts_is_found(
    kind: str, rule: str, engines: dict[str, Sampler], exact: dict[str, dict[tuple[int, ...], float]]
) -> None:
    sampler = engines["no overlap"]
    assert sampler.rule_file is not None
    assert p_value(sampler.sample({kind: 500})[kind], exact[kind]) >= BOUND
    sampler.rule_file.write_text(rule)
    try:
        found = sampler.sample({kind: 1200})[kind]
    finally:
        sampler.rule_file.write_text("as it is")
    assert p_value(found, exact[kind]) < BROKEN
