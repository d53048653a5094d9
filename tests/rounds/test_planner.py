"""The planner: the number of drafts with the most tokens per second, by made-up times."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_sparsespec.rounds import planner as planner_module
from sglang_sparsespec.rounds.planner import Planner, RoundChoice, TimeCorrection
from sglang_sparsespec.rounds.round_times import Load
from sglang_sparsespec.settings import Settings

K = 8


class Times:
    """Made-up times: seconds of each forward at a load."""

    def __init__(
        self, draft: Callable[[Load], float], verify: Callable[[Load], float], plain: Callable[[Load], float]
    ) -> None:
        self.draft, self.verify, self.plain = draft, verify, plain


def constant(draft: float, verify: float, plain: float) -> Times:
    return Times(lambda load: draft, lambda load: verify, lambda load: plain)


#: Of a model whose weights take 10 ms: plain steps read all of the KV cache, drafts a twentieth.
GROWING = Times(
    lambda load: 0.010 + load.tokens * 0.05 * 1e-7,
    lambda load: 0.013 + load.tokens * 1e-7,
    lambda load: 0.010 + load.tokens * 1e-7,
)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_module, "get_tp_group", lambda: SimpleNamespace(world_size=1, rank_in_group=0))


def planner_for(speculate: str = "auto", times: Any = None, on_gpu: bool = False, **settings: Any) -> Planner:
    any_number = settings.pop("any_number", True)
    planner = Planner(Settings(speculate=speculate, **settings), K, on_gpu=on_gpu, any_number=any_number)
    planner.times = times
    return planner


def a_batch(requests: int = 2, tokens: int = 72, **given: Any) -> Any:
    ids = [range(tokens // requests)] * requests
    reqs = [SimpleNamespace(origin_input_ids=prompt, output_ids=()) for prompt in ids]
    info = SimpleNamespace(logit_bias=given.pop("logit_bias", None))
    flags = {"has_grammar": False, "return_logprob": False, "return_hidden_states": False, **given}
    return SimpleNamespace(reqs=reqs, sampling_info=info, **flags)


class Server:
    """Runs rounds; their times and acceptance come in two rounds late.

    Args:
        times: what the planner knows. ``factors`` by which rounds that speculate and plain ones take longer than that.
    """

    def __init__(self, times: Any, rate: float = 0.85, batch: int = 32, noise: float = 0.0, **given: Any) -> None:
        self.planner = planner_for(times=times, **given)
        self.times, self.rate, self.batch, self.noise = times, rate, batch, noise
        self.factors = {False: 1.0, True: 1.0}
        self.rng = random.Random(0)
        self.late: deque[tuple[RoundChoice, Load]] = deque()
        self.timed: list[tuple[float, Any]] = []
        self.planner._timer = SimpleNamespace(  # type: ignore[assignment]
            now=lambda: 0.0, add=lambda begin, end, label: None, finished=self._finished
        )
        self.tokens = self.seconds = 0.0

    def _finished(self) -> list[tuple[float, Any]]:
        timed, self.timed = self.timed, []
        return timed

    def run(self, rounds: int, context: int = 1000) -> Counter[int]:
        """Run rounds; the numbers of drafts that they had."""
        load, found = Load(self.batch, self.batch * context), Counter[int]()
        for _ in range(rounds):
            choice = self.planner.next_round(a_batch(self.batch, load.tokens))
            self.planner.note_launch()
            found[choice.drafts] += 1
            self.late.append((choice, load))
            if len(self.late) > 2:
                self._finish(*self.late.popleft())
        return found

    def _finish_all(self) -> None:
        while self.late:
            self._finish(*self.late.popleft())

    def _finish(self, choice: RoundChoice, load: Load) -> None:
        plain = choice.drafts == 0
        expected = self.planner._table_seconds(load, choice)
        seconds = expected * self.factors[plain] * (1 + self.noise * self.rng.uniform(-1, 1))
        self.timed.append((seconds, (load, plain, expected)))
        self.seconds += seconds
        if plain:
            self.tokens += choice.plain_steps
            return
        accepted = []
        for _ in range(self.batch):
            count = 0
            while count < choice.drafts and self.rng.random() < self.rate:
                count += 1
            accepted.append(count)
        self.tokens += 1 + sum(accepted) / self.batch
        self.planner.note_acceptance(accepted, choice.drafts)


# -------------------------------------------------------------------------------- choice


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.7, 0.85, 0.99])
@pytest.mark.parametrize(
    ("draft", "verify", "plain"), [(1.0, 1.5, 1.0), (0.3, 1.2, 1.0), (0.1, 1.1, 1.0), (0.05, 3.0, 1.0), (0.6, 4.0, 1.0)]
)
def test_the_choice_is_the_best_of_all_numbers_of_drafts(rate: float, draft: float, verify: float, plain: float) -> None:
    server = Server(constant(draft, verify, plain), rate=rate)
    server.planner._belief.note_plain_steps = lambda steps: None  # type: ignore[method-assign]
    for _ in range(200):  # what is known of acceptance
        server._finish(RoundChoice(K), Load(32, 1))
    tokens = [sum(rate**i for i in range(m + 1)) for m in range(K + 1)]
    speeds = [1 / plain] + [tokens[m] / (m * draft + verify) for m in range(1, K + 1)]
    (found,) = server.run(1)
    assert speeds[found] > 0.95 * max(speeds)


def test_of_numbers_that_are_nearly_as_fast_the_largest_is_drafted() -> None:
    planner = planner_for(times=constant(0.70, 1.3, 1.0))
    tokens = planner._belief.tokens()
    speeds = {drafts: tokens[drafts] / (0.70 * drafts + 1.3) for drafts in range(1, K + 1)}
    best = max(speeds, key=speeds.__getitem__)
    chosen = planner.next_round(a_batch(logit_bias=1)).drafts
    assert best < chosen < K and speeds[chosen] > 0.98 * speeds[best], "later positions are learned of at little cost"


def test_what_slows_rounds_of_many_requests_is_not_taken_for_granted_of_few() -> None:
    server = Server(constant(0.7, 1.3, 1.0), rate=0.95, batch=32)
    server.factors = {False: 1.45, True: 1.0}  # where plain rounds are faster in truth
    assert server.run(200)[0] > 100
    server.batch, server.factors = 1, {False: 1.0, True: 1.0}
    server._finish_all()
    assert server.run(3)[0] == 0
    known = server.planner.time_corrections
    assert known["32-63"] == [pytest.approx(1.3, abs=0.15), pytest.approx(1.0, abs=0.1)] and known["1-1"] == [1.0, 1.0]


def test_before_any_round_the_choice_is_by_the_times_and_the_prior() -> None:
    assert planner_for(times=constant(0.1, 1.1, 1.0)).next_round(a_batch()).drafts == K
    assert planner_for(times=constant(0.9, 1.5, 1.0)).next_round(a_batch()) == RoundChoice(0, K)


def test_growing_contexts_move_the_choice_at_the_crossover() -> None:
    server, shares = Server(GROWING, batch=16), {}
    for context in range(100, 30_000, 300):
        shares[context] = server.run(5, context)
    kinds = [counts[0] > 0 for counts in shares.values()]
    assert kinds[0] and not kinds[-1]
    assert sum(a != b for a, b in zip(kinds[:-1], kinds[1:], strict=True)) == 1
    drafts = [max(counts) for counts in shares.values()]
    assert drafts[-1] > drafts[kinds.index(False)] > 0, "longer contexts are worth more drafts"


@pytest.mark.parametrize("batch", [1, 32])
def test_a_change_of_the_text_is_followed_within_tens_of_rounds(batch: int) -> None:
    server = Server(constant(0.3, 1.3, 1.0), rate=0.95, batch=batch)
    assert sum(drafts * rounds for drafts, rounds in server.run(100).items()) > 500
    server.rate = 0.3
    server.run(200 if batch == 1 else 30)
    assert server.run(100)[0] > 80
    # Plain rounds learn nothing: what is known grows old, and is learned again in a few rounds.
    server.rate = 0.95
    server.run(1000)
    assert server.run(100)[0] < 5


def test_text_that_stays_bad_is_tried_seldom() -> None:
    server = Server(constant(0.3, 1.3, 1.0), rate=0.3)
    server.run(200)
    found = server.run(5000)
    assert 0 < sum(found.values()) - found[0] < 0.03 * 5000
    server.tokens = server.seconds = 0.0
    server.run(5000)
    assert server.tokens / server.seconds > 0.99, "all but 1% of the speed of plain rounds"


@pytest.mark.parametrize("excess", [0.985, 1.0, 1.015])
def test_noise_near_the_crossover_does_not_have_the_kinds_take_turns(excess: float) -> None:
    """Both kinds are equally fast within 1.5%, rounds vary by 10%, and acceptance by chance.

    Plain rounds make what is known grow old, so speculation is taken up again now and then.
    """
    rate = 0.8
    tokens = sum(rate**i for i in range(K + 1))
    server = Server(constant(0.001, tokens * excess, 1.0), rate=rate, batch=64, noise=0.1)
    server.run(200)
    changes, last = 0, None
    for _ in range(1000):
        (drafts,) = server.run(1)
        changes += last is not None and (drafts == 0) != last
        last = drafts == 0
    assert changes <= 40


def test_only_all_drafts_or_none_where_a_round_can_have_no_other_number() -> None:
    times = constant(0.3, 1.2, 1.0)
    any_number, all_or_none = Server(times, rate=0.6), Server(times, rate=0.6, any_number=False)
    assert {*any_number.run(300)} - {0, K}
    assert {*all_or_none.run(300)} <= {0, K}


# ------------------------------------------------------------------------------ speculate


def test_always_is_taken_literally() -> None:
    assert Server(constant(5.0, 5.0, 1.0), speculate="always").run(50) == {K: 50}


def test_never_is_taken_literally() -> None:
    server = Server(constant(0.01, 1.0, 1.0), speculate="never")
    assert server.run(50) == {0: 50}


@pytest.mark.parametrize(("speculate", "expected"), [("auto", RoundChoice(K)), ("never", RoundChoice(0, K))])
def test_without_a_table_all_rounds_are_alike(speculate: str, expected: RoundChoice) -> None:
    assert planner_for(speculate).next_round(a_batch()) == expected


@pytest.mark.parametrize("speculate", ["auto", "never"])
@pytest.mark.parametrize(
    "asked", [{"has_grammar": True}, {"return_logprob": True}, {"return_hidden_states": True}, {"logit_bias": 1}]
)
def test_what_needs_a_verification_is_never_decoded_plainly(asked: dict[str, Any], speculate: str) -> None:
    planner = planner_for(speculate, constant(2.0, 1.2, 1.0))
    assert planner.next_round(a_batch(**asked)) == RoundChoice(1), "more drafts would be slower still"
    assert planner.next_round(a_batch()).drafts == 0
    assert planner_for(speculate).next_round(a_batch(**asked)) == RoundChoice(K)
    fast = planner_for(speculate, constant(0.01, 1.0, 1.0))
    assert fast.next_round(a_batch(**asked)) == RoundChoice(K)


def test_all_ranks_follow_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for said in (RoundChoice(3), RoundChoice(0, 5)):
        group = SimpleNamespace(world_size=2, rank_in_group=1, broadcast_object=lambda mine, src, said=said: said)
        monkeypatch.setattr(planner_module, "get_tp_group", lambda group=group: group)
        assert planner_for("auto", GROWING).next_round(a_batch()) == said
        assert planner_for("always", GROWING).next_round(a_batch()) == RoundChoice(K), "nothing to be told"


def test_a_running_planner_takes_another_value_of_speculate() -> None:
    planner = planner_for("always", constant(0.1, 1.1, 1.0))
    assert planner.next_round(a_batch()) == RoundChoice(K)
    planner.set_speculate("never")
    assert planner.speculate == "never"
    assert planner.next_round(a_batch()) == RoundChoice(0, K)
    planner.set_speculate("auto")
    assert planner.next_round(a_batch()).drafts > 0


def test_an_unknown_value_of_speculate_is_refused_and_changes_nothing() -> None:
    planner = planner_for("always")
    with pytest.raises(ValueError, match="--sparsespec-speculate must be one of"):
        planner.set_speculate("sometimes")
    assert planner.speculate == "always"


def test_study_policies_go_on_speculating_always() -> None:
    planner = planner_for("always", draft_policy="full")
    with pytest.raises(ValueError, match="draft-policy full"):
        planner.set_speculate("never")
    assert planner.speculate == "always"


# ----------------------------------------------------------------------------- host, plain


@pytest.mark.parametrize(("step_ms", "requests", "steps"), [(2.5, 2, 3), (20, 2, 1), (0.5, 2, K), (5.5, 250, 6)])
def test_plain_rounds_are_no_longer_than_hides_the_schedulers_work(step_ms: float, requests: int, steps: int) -> None:
    """Who arrives waits for the end of a round; two requests want 6.2 ms, 250 want 31."""
    planner = planner_for("never", constant(1.0, 1.0, step_ms / 1000), on_gpu=True)
    planner._timer = SimpleNamespace(now=lambda: None, finished=list)  # type: ignore[assignment]
    assert planner.next_round(a_batch(requests, 1000 * requests)) == RoundChoice(0, steps)


def test_where_nothing_is_hidden_plain_rounds_have_all_their_steps() -> None:
    planner = planner_for("never", constant(1.0, 1.0, 20.0))
    assert planner.next_round(a_batch()) == RoundChoice(0, K)


def test_drafts_that_the_host_hides_are_free() -> None:
    """By the device alone one or two drafts are best; but the scheduler needs 7 ms for the round."""
    times = constant(0.0005, 0.0015, 0.0015)
    for on_gpu, least, most in ((False, 0, 4), (True, 7, K)):
        planner = planner_for(times=times, on_gpu=on_gpu)
        planner._timer = SimpleNamespace(now=lambda: None, finished=list)  # type: ignore[assignment]
        for _ in range(100):
            planner.note_acceptance([3] * 60 + [1] * 40, K)
        planner._is_plain = False
        load, choices = Load(100, 10_000), range(1, K + 1)
        seconds = {m: planner._seconds(load, planner._table_seconds(load, RoundChoice(m)), plain=False) for m in choices}
        speeds = {m: planner._belief.tokens()[m] / seconds[m] for m in choices}
        assert least <= max(speeds, key=speeds.__getitem__) <= most


# ------------------------------------------------------------------------------ correction


def test_a_kind_that_has_not_run_is_corrected_half_as_much_as_the_other() -> None:
    correction = TimeCorrection()
    assert correction.of(plain=True) == correction.of(plain=False) == 1
    for _ in range(100):
        correction.note(plain=False, ratio=1.2)
    assert correction.of(plain=False) == pytest.approx(1.2, abs=0.01)
    assert correction.of(plain=True) == pytest.approx(1.1, abs=0.01)
    for _ in range(100):
        correction.note(plain=True, ratio=1.0)
    assert correction.of(plain=True) == pytest.approx(1.0, abs=0.01)
    assert 1.1 < correction.of(plain=False) < 1.2


def test_a_wrong_correction_is_bounded_and_does_not_stay() -> None:
    correction = TimeCorrection()
    correction.note(plain=True, ratio=1.0)
    for _ in range(100):
        correction.note(plain=False, ratio=50.0)
    assert correction.of(plain=False) < 1.5
    for _ in range(3000):
        correction.note(plain=True, ratio=1.0)
    assert correction.of(plain=False) == pytest.approx(1.0, abs=0.01)


def test_a_kind_that_is_slower_than_its_forwards_loses() -> None:
    """By the table speculation is 15% faster; its rounds take 1.4 times as long as that."""
    rate = 0.8
    tokens = sum(rate**i for i in range(K + 1))
    server = Server(constant(0.001, tokens / 1.15, 1.0), rate=rate)
    server.factors[False] = 1.4
    server.run(200)
    server.tokens = server.seconds = 0.0
    found = server.run(3000)
    assert found[0] > 0.9 * 3000
    assert server.tokens / server.seconds > 0.97


def test_what_slows_both_kinds_alike_changes_nothing() -> None:
    server = Server(constant(0.1, 1.1, 1.0))
    server.factors = {False: 1.3, True: 1.3}
    assert server.run(500)[0] == 0
