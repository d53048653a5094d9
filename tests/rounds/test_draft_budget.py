"""How many tokens drafts attend to at least, by made-up times and rejections."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from sglang_sparsespec.rounds import planner as planner_module
from sglang_sparsespec.rounds.planner import Planner
from sglang_sparsespec.rounds.round_times import Load, PointTimes, RoundTimes
from sglang_sparsespec.settings import Settings

K = 8
SETTINGS = Settings()
MOST = 2000


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_module, "get_tp_group", lambda: SimpleNamespace(world_size=1, rank_in_group=0))


class Model:
    """A model on a device: seconds of its forwards, and how often drafts are rejected.

    Args:
        token_s: seconds that a token of a request's budget adds to a draft step.
        rejections: of drafts that attend to 128 tokens; they fall with the budget to the power of minus ``gain``.
        longest: context of the largest points of the table.
    """

    def __init__(
        self,
        requests: int,
        context: int,
        token_s: float = 1e-8,
        rejections: float = 0.06,
        gain: float = 0.7,
        longest: int = 16384,
    ) -> None:
        self.load = Load(requests, requests * context)
        self.context, self.token_s, self.rejections, self.gain = context, token_s, rejections, gain
        points = [
            PointTimes(batch, length, self.draft(batch, SETTINGS.budget(length)), self.verify(batch, length), 1.0)
            for batch in (1, 16, 64, 128)
            for length in (512, 2048, longest)
        ]
        self.planner = Planner(SETTINGS, K, on_gpu=True, most_budget=MOST)
        self.planner.times = RoundTimes(points)
        self.planner._timer = SimpleNamespace(finished=lambda: (), now=lambda: 0.0)  # type: ignore[assignment]
        self.rng = random.Random(0)
        self.seen: list[int] = []

    def draft(self, requests: int, budget: float) -> float:
        return 0.0013 + self.token_s * requests * budget

    def verify(self, requests: int, length: int) -> float:
        return 0.0025 + 4e-5 * requests + 5e-9 * requests * length

    def rate(self, least: int) -> float:
        budget = max(least, SETTINGS.budget(self.context))
        return 1 - self.rejections * (budget / 128) ** -self.gain

    def speed(self, least: int) -> float:
        """Tokens of a request per second, with the best number of drafts."""
        rate, budget = self.rate(least), max(least, SETTINGS.budget(self.context))
        tokens, speeds = 1.0, []
        for drafts in range(1, K + 1):
            tokens += rate**drafts
            seconds = drafts * self.draft(self.load.requests, budget) + self.verify(self.load.requests, self.context)
            speeds.append(tokens / seconds)
        return max(speeds)

    def run(self, rounds: int) -> int:
        """The least budget after so many rounds."""
        for _ in range(rounds):
            choice = self.planner._choose(self.load, must_verify=True)
            self.seen.append(choice.least_budget or SETTINGS.min_budget)
            rate, accepted = self.rate(self.seen[-1]), []
            for _ in range(self.load.requests):
                count = 0
                while count < choice.drafts and self.rng.random() < rate:
                    count += 1
                accepted.append(count)
            self.planner.note_acceptance(accepted, choice.drafts)
        return self.seen[-1]


@pytest.mark.parametrize("gain", [0.4, 0.7, 1.0])
@pytest.mark.parametrize(("requests", "context"), [(1, 1000), (4, 4096), (16, 2048), (64, 2048), (64, 6000), (128, 1000)])
def test_the_budget_is_nearly_the_best(requests: int, context: int, gain: float) -> None:
    model = Model(requests, context, gain=gain)
    model.run(800)
    speeds = {least: model.speed(least) for least in (128, 256, 512, 768)}
    found = [speeds[least] for least in model.seen[-200:]]
    assert sum(found) / len(found) > 0.97 * max(speeds.values())
    assert sum(found) / len(found) > 0.99 * speeds[128], "never much slower than what is configured"


def test_small_batches_attend_to_more_than_large_ones() -> None:
    assert Model(1, 1000).run(400) > 128
    assert Model(128, 1000, token_s=3e-8).run(400) == 128


def test_a_budget_grows_by_at_most_a_factor_of_two_and_is_then_looked_at() -> None:
    model = Model(1, 1000, gain=1.0)
    model.run(400)
    pairs = enumerate(zip(model.seen, model.seen[1:], strict=False))
    changes = [(after / before, at) for at, (before, after) in pairs if after != before]
    assert changes and all(growth <= 2 for growth, _ in changes)
    assert all(later - earlier >= 16 for (_, earlier), (_, later) in zip(changes, changes[1:], strict=False))


def test_where_drafts_are_not_rejected_the_budget_stays() -> None:
    assert Model(16, 1000, rejections=0.0005).run(400) == 128


def test_a_budget_whose_time_is_not_known_is_not_chosen() -> None:
    assert Model(4, 1000, longest=2560).run(400) == 128
    assert Model(4, 1000, longest=6000).run(400) == 256


def test_a_selection_has_room_for_the_budget() -> None:
    model = Model(1, 1000, gain=1.0)
    model.planner.budget._choices = Planner(SETTINGS, K, on_gpu=True, most_budget=300).budget._choices
    assert model.run(400) == 256


@pytest.mark.parametrize("speculate", ["always", "never"])
def test_only_auto_changes_the_budget(speculate: str) -> None:
    model = Model(1, 1000)
    model.planner.speculate = speculate
    must_verify = speculate == "always"
    assert {model.planner._choose(model.load, must_verify).least_budget for _ in range(100)} == {None}


def test_a_share_of_a_long_context_is_not_mistaken_for_the_least_budget() -> None:
    """At 8,192 tokens drafts attend to 410: up to there the least budget changes nothing."""
    model = Model(64, 8192, token_s=5e-8)
    assert model.run(400) == 128
    budget = model.planner.budget
    assert dict(budget._factors(model.load, model.planner.times)) == pytest.approx(  # type: ignore[arg-type]
        {128: 1.0, 256: 1.0, 512: (512 / 409.6) ** -budget.GAIN, 768: (768 / 409.6) ** -budget.GAIN}
    )
