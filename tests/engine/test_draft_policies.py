"""Every draft policy is lossless in a serving engine: greedy and sampled output is the target's.

So are rounds that do not speculate (``--sparsespec-speculate``) between rounds that do. One engine serves all:
a plugin of this test changes the policy before a prefill, between the test's calls, when no request is running.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_process import EngineProcess, install_plugin
from sampled_sequences import BOUND, KINDS, LENGTH, NUM_STEPS, engine_args, p_value, prompt_of
from tiny_model import Sampling, greedy_continuation, sequence_probabilities, write_tiny_llama

from sglang_sparsespec.settings import POLICIES

pytestmark = pytest.mark.slow

POLICY_ENV = "SPARSESPEC_TEST_POLICY_FILE"
PLAIN = "every other round plain"
SWITCH_PLUGIN = f'''
import dataclasses
import os


def register():
    """Serve with the policy that a file names; or with pillar, every other round being plain."""
    from sglang_sparsespec.attention_backend.backend import SparseSpecAttnBackend
    from sglang_sparsespec.rounds.planner import Planner, RoundChoice
    from sglang_sparsespec.settings import attach_settings, settings_of
    from sglang_sparsespec.worker import SparseSpecWorker

    original = SparseSpecWorker._prefill

    def asked():
        return open(os.environ["{POLICY_ENV}"]).read()

    def next_round(self, batch):
        self.rounds, k = getattr(self, "rounds", 0) + 1, self._num_steps
        is_plain = asked() == "{PLAIN}" and self.rounds % 2 == 0
        return RoundChoice(0, k) if is_plain else RoundChoice(k)

    def prefill(self, batch, publish):
        name, settings = asked().replace("{PLAIN}", "pillar"), settings_of(self.server_args)
        if settings.draft_policy != name:
            for args in (self.server_args, self.model_runner.server_args):
                attach_settings(args, dataclasses.replace(settings, draft_policy=name))
            self.model_runner.attn_backend = SparseSpecAttnBackend(self.model_runner, self.attn_backend.base)
            self._ngram = None
            self.init_attention_backends()
            self.init_cuda_graphs()
        return original(self, batch, publish)

    SparseSpecWorker._prefill = prefill
    Planner.next_round = next_round
'''
#: Rounds of a greedy request whose every draft is accepted; the first token is the prefill's.
ROUNDS = 8
SAMPLED = 1500


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


class Server:
    """An engine, and the file that names its policy."""

    def __init__(self, engine: EngineProcess, policy_file: Path) -> None:
        self.engine = engine
        self.policy_file = policy_file

    def generate(self, policy: str, prompts: list[list[int]], params: dict[str, Any]) -> list[dict[str, Any]]:
        self.policy_file.write_text(policy)
        return self.engine.generate(input_ids=prompts, sampling_params=params)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    site = tmp_path_factory.mktemp("site")
    policy_file = site / "policy"
    policy_file.write_text("pillar")
    env = {POLICY_ENV: str(policy_file), **install_plugin(site, "zz_policy_switch", SWITCH_PLUGIN)}
    # A budget that leaves something to choose.
    settings = {"sparsespec_min_budget": NUM_STEPS + 6, "port": 31180}
    with EngineProcess(env, **engine_args(checkpoint, **settings)) as engine:
        yield Server(engine, policy_file)


def histogram(outputs: list[dict[str, Any]]) -> list[int]:
    """Verifications by accepted drafts."""
    each = [output["meta_info"]["spec_correct_drafts_histogram"] for output in outputs]
    return [sum(row[n] for row in each if n < len(row)) for n in range(NUM_STEPS + 1)]


@pytest.fixture(scope="module")
def greedy(checkpoint: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Each kind's prompt and the target's greedy continuation, by transformers."""
    length = 1 + ROUNDS * (NUM_STEPS + 1)
    return {kind: (prompt_of(kind), greedy_continuation(checkpoint, prompt_of(kind), length)) for kind in KINDS}


@pytest.mark.parametrize("policy", [*POLICIES, PLAIN])
def test_greedy_output_is_the_targets(
    policy: str, server: Server, greedy: dict[str, tuple[list[int], list[int]]]
) -> None:
    length = 1 + ROUNDS * (NUM_STEPS + 1)
    prompts = [prompt for prompt, _ in greedy.values()]
    outputs = server.generate(policy, prompts, Sampling(temperature=0.0).as_request(length))
    assert [output["output_ids"] for output in outputs] == [tokens for _, tokens in greedy.values()]
    accepted = histogram(outputs)
    if policy == "full":
        assert accepted == [0] * NUM_STEPS + [ROUNDS * len(prompts)], "an accept length of k + 1 exactly"
    else:
        assert sum(accepted[1:]) > 0, "drafts were accepted"


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> dict[tuple[int, ...], float]:
    """Sequence probabilities of the target at temperature 1."""
    return sequence_probabilities(checkpoint, prompt_of("temperature 1"), LENGTH, Sampling())


#: Acceptance does not know which tokens a draft saw: policies differ in their greedy test.
SAMPLED_BY_DEFAULT = ("pillar", PLAIN)


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(policy, marks=() if policy in SAMPLED_BY_DEFAULT else pytest.mark.nightly)
        for policy in [*POLICIES, PLAIN]
    ],
)
def test_sampled_output_follows_the_target(
    policy: str, server: Server, exact: dict[tuple[int, ...], float]
) -> None:
    prompts = [prompt_of("temperature 1")] * SAMPLED
    outputs = server.generate(policy, prompts, Sampling().as_request(LENGTH))
    assert p_value(Counter(tuple(output["output_ids"]) for output in outputs), exact) >= BOUND
    accepted = histogram(outputs)
    rounds = sum(accepted)
    if policy == "full":
        assert accepted[NUM_STEPS] > 0.99 * rounds, "draft and target have the same distribution"
    else:
        assert accepted[0] > 0.02 * rounds, "drafts were rejected too, or this says nothing about acceptance"
