"""The planner: its choice between two kinds of round whose times are made up here."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_sparsespec.rounds import planner as planner_module
from sglang_sparsespec.rounds.planner import Load, Planner, RoundChoice, RoundTimer
from sglang_sparsespec.settings import Settings

STEPS = 8


class Server:
    """Runs the rounds that a ``RoundChoice`` wants; their times and acceptance come in two rounds late.

    Args:
        speculating, plain: seconds of a round at a load.
    """

    def __init__(self, speculating: Callable[[Load], float], plain: Callable[[Load], float]) -> None:
        self.choice = RoundChoice(STEPS)
        self.seconds = {False: speculating, True: plain}
        self.accept_length = 6.0
        self.late: deque[tuple[bool, bool, Load]] = deque()

    def run(self, rounds: int, load: Load) -> int:
        """Run rounds; how many of them were plain."""
        plain_rounds = 0
        for _ in range(rounds):
            plain = self.choice.next_is_plain(load)
            plain_rounds += plain
            self.late.append((plain, self.choice.is_typical, load))
            if len(self.late) > 2:
                self._finish(*self.late.popleft())
        return plain_rounds

    def _finish(self, plain: bool, typical: bool, load: Load) -> None:
        if not typical:
            return
        self.choice.note_time(plain, load, self.seconds[plain](load))
        if not plain:
            self.choice.note_acceptance(self.accept_length)


@pytest.mark.parametrize(("plain_round", "share"), [(0.05, 1.0), (0.12, 0.0)], ids=["plain", "speculating"])
def test_the_faster_kind_runs_nearly_always(plain_round: float, share: float) -> None:
    """A round that speculates yields 6 tokens in 60 ms: as many as 8 plain ones in 80 ms."""
    server = Server(lambda load: 0.06, lambda load: plain_round)
    found = server.run(5000, Load(16, 4000)) / 5000
    assert abs(found - share) < 0.02
    assert found not in (0.0, 1.0)  # both kinds were tried


def test_growing_contexts_move_the_choice_at_the_crossover() -> None:
    """Plain steps read all of the KV cache; drafts a twentieth, and a verification all of it once."""
    server = Server(
        lambda load: 0.040 + load.tokens * (8 * 0.05 + 1) * 4e-7, lambda load: 0.032 + load.tokens * 8 * 4e-7
    )
    tokens = 4000
    shares = {}
    while tokens < 80_000:
        shares[tokens] = server.run(40, Load(16, tokens)) / 40
        tokens += 500

    def is_plain_faster(tokens: int) -> bool:
        load = Load(16, tokens)
        return STEPS / server.seconds[True](load) > server.accept_length / server.seconds[False](load)

    crossover = next(tokens for tokens in shares if not is_plain_faster(tokens))
    assert 5000 < crossover < 70_000
    below = [share for tokens, share in shares.items() if tokens < 0.8 * crossover]
    above = [share for tokens, share in shares.items() if tokens > 1.25 * crossover]
    assert sum(below) / len(below) > 0.97
    assert sum(above) / len(above) < 0.02


def test_what_grew_no_faster_is_not_tried_again() -> None:
    """Twice as fast as the other kind can be: growing contexts alone are no reason to try it."""
    server = Server(lambda load: 0.12 + 1e-7 * load.tokens, lambda load: 0.06 + 1e-7 * load.tokens)
    server.run(100, Load(16, 1000))
    assert all(server.run(10, Load(16, tokens)) == 10 for tokens in range(1000, 100_000, 2000))


def test_a_fall_in_acceptance_moves_the_choice() -> None:
    server, load = Server(lambda load: 0.06, lambda load: 0.1), Load(16, 4000)
    assert server.run(300, load) < 10
    server.accept_length = 2.0
    assert server.run(300, load) > 270
    server.accept_length = 6.0
    # Noticed only when speculating is tried again.
    assert server.run(2 * RoundChoice.STALE, load) < 1.1 * RoundChoice.STALE


def test_a_batch_that_shrinks_is_measured_anew() -> None:
    """Where weights dominate, a small batch decodes plainly in less time than it takes to draft and verify."""
    server = Server(lambda load: 0.05 + 1e-4 * load.requests, lambda load: 0.04 + 8e-4 * load.requests)
    assert server.run(300, Load(128, 128 * 2000)) < 10
    assert server.run(300, Load(2, 2 * 2000)) > 280


@pytest.mark.parametrize("steps", [2, STEPS])
def test_requests_that_come_and_go_do_not_have_the_slower_kind_tried_all_the_time(steps: int) -> None:
    """Speculating takes 1.3 times as long for a token; the share of the time that its tries take."""
    rng, choice = random.Random(0), RoundChoice(STEPS)
    late: deque[tuple[bool, bool, Load, float]] = deque()
    spent = {False: 0.0, True: 0.0}
    requests = 30
    for _ in range(20_000):
        requests = min(50, max(8, requests + rng.choice((-1, 0, 0, 0, 1))))
        load = Load(requests, requests * rng.randrange(2200, 2400))
        step = 0.0021 + load.tokens * 7e-9 + load.requests * 1e-5
        plain = choice.next_is_plain(load)
        choice.length = steps / STEPS if plain else 1.0
        spent[plain] += step * (steps if plain else 1.3 * 7)
        late.append((plain, choice.is_typical, load, step * (STEPS if plain else 1.3 * 7)))
        if len(late) > 2:
            was_plain, typical, at, seconds = late.popleft()
            if typical:
                choice.note_time(was_plain, at, seconds)
            if typical and not was_plain:
                choice.note_acceptance(7.0)
    assert 0 < spent[False] < 0.03 * spent[True]


def run_until(choice: RoundChoice, load: Load, plain: bool, seconds: float) -> None:
    """Run rounds, told at once that they take so long, until the next one is of the other kind."""
    while choice.next_is_plain(load) == plain:
        if choice.is_typical:
            choice.note_time(plain, load, seconds)


def test_the_first_round_of_a_kind_after_the_other_is_not_learned_from() -> None:
    choice, load = RoundChoice(STEPS), Load(1, 100)
    choice.note_acceptance(9.0)
    assert not choice.next_is_plain(load) and choice.is_typical
    run_until(choice, load, plain=False, seconds=1.0)
    assert not choice.is_typical
    assert choice.next_is_plain(load) and choice.is_typical
    run_until(choice, load, plain=True, seconds=10.0)
    assert not choice.is_typical
    assert not choice.next_is_plain(load) and choice.is_typical


def test_a_kind_is_judged_by_several_rounds() -> None:
    """The second round of each run waits for something too, and takes twice as long."""
    load, found = Load(16, 4000), []
    choice, since = RoundChoice(STEPS), 0
    choice.note_acceptance(6.0)
    for number in range(400):
        plain = choice.next_is_plain(load)
        found.append(plain)
        if found[-2:-1] != [plain]:
            since = number
        if choice.is_typical:
            choice.note_time(plain, load, (0.06 if plain else 0.05) * (1 + (number - since == 1)))
    assert sum(found) / len(found) > 0.97


def test_loads_differ_by_the_product_of_their_ratios() -> None:
    assert Load(8, 1000).ratio(Load(8, 1000)) == 1
    assert Load(8, 1000).ratio(Load(16, 500)) == Load(16, 500).ratio(Load(8, 1000)) == 4


def test_a_round_takes_no_less_than_in_proportion_to_what_is_less_of_it() -> None:
    assert Load(4, 500).least_share_of(Load(8, 1000)) == 0.25
    assert Load(8, 1000).least_share_of(Load(4, 500)) == 1
    assert Load(4, 1000).least_share_of(Load(8, 500)) == 0.5


def test_a_timer_gives_each_round_once() -> None:
    timer = RoundTimer(on_gpu=False)
    timer.add(timer.now(), timer.now(), "first")
    begin = timer.now()
    timer.add(begin, begin + 2.5, "second")
    (first, name), second = timer.finished()
    assert name == "first" and 0 <= first < 1
    assert second == (2.5, "second")
    assert timer.finished() == []


def planner_for(speculate: str) -> Planner:
    return Planner(Settings(speculate=speculate), STEPS, on_gpu=False)


def a_batch(**given: Any) -> Any:
    reqs = [SimpleNamespace(origin_input_ids=array("q", range(30)), output_ids=array("q", range(n))) for n in (5, 7)]
    info = SimpleNamespace(logit_bias=given.pop("logit_bias", None))
    flags = {"has_grammar": False, "return_logprob": False, "return_hidden_states": False, **given}
    return SimpleNamespace(reqs=reqs, sampling_info=info, **flags)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_module, "get_tp_group", lambda: SimpleNamespace(world_size=1, rank_in_group=0))


def test_the_load_of_a_batch_is_its_requests_and_their_tokens() -> None:
    assert Load.of(a_batch()) == Load(2, 72)


@pytest.mark.parametrize(("when", "steps"), [("always", 0), ("never", STEPS)])
def test_always_and_never_are_taken_literally(when: str, steps: int, one_rank: None) -> None:
    planner = planner_for(when)
    for _ in range(20):
        assert planner.plain_steps(a_batch()) == steps
        planner.note_launch()


@pytest.mark.parametrize(("step_ms", "requests", "steps"), [(2.5, 2, 3), (20, 2, 1), (0.5, 2, STEPS), (5.5, 250, 6)])
@pytest.mark.parametrize("first", [STEPS, 3])
def test_plain_rounds_are_no_longer_than_hides_the_schedulers_work(
    step_ms: float, requests: int, steps: int, first: int, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who arrives waits for the end of a round; two requests want 6.2 ms, 250 want 31."""
    planner = planner_for("never")
    monkeypatch.setattr(planner, "_on_gpu", True)
    monkeypatch.setattr(Load, "of", lambda batch: Load(requests, 1000))
    assert planner.plain_steps(a_batch()) == STEPS  # how long a step takes is not known yet
    timed = [(first * step_ms / 1e3, (first, Load(requests, 1000)))]
    monkeypatch.setattr(planner._timer, "finished", lambda: timed)
    assert planner.plain_steps(a_batch()) == steps


def test_where_nothing_is_hidden_plain_rounds_have_all_their_steps(one_rank: None) -> None:
    planner = planner_for("never")
    for _ in range(5):
        assert planner.plain_steps(a_batch()) == STEPS
        planner.note_launch()


def test_short_and_long_plain_rounds_are_compared_by_their_steps(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    planner, load = planner_for("auto"), Load(2, 72)
    for timed in ((0.08, (8, load)), (0.01, (1, load))):
        monkeypatch.setattr(planner._timer, "finished", lambda timed=timed: [timed])
        planner.plain_steps(a_batch())
        assert planner._choice.plain_step_seconds == pytest.approx(0.01)


@pytest.mark.parametrize(
    "asked", [{"has_grammar": True}, {"return_logprob": True}, {"return_hidden_states": True}, {"logit_bias": 1}]
)
def test_what_needs_a_verification_is_never_decoded_plainly(asked: dict[str, Any]) -> None:
    assert not planner_for("never").plain_steps(a_batch(**asked))


def test_auto_tries_both_kinds(one_rank: None) -> None:
    planner = planner_for("auto")
    found = []
    for _ in range(20):
        plain = planner.plain_steps(a_batch()) > 0
        if planner.note_launch() and not plain:
            planner.note_acceptance([8, 8])
        found.append(plain)
    assert len(set(found)) == 2


def test_all_ranks_follow_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for said in (3, 0):
        group = SimpleNamespace(world_size=2, rank_in_group=1, broadcast_object=lambda mine, src, said=said: said)
        monkeypatch.setattr(planner_module, "get_tp_group", lambda group=group: group)
        assert planner_for("auto").plain_steps(a_batch()) == said


def test_a_running_planner_takes_another_value_of_speculate(one_rank: None) -> None:
    planner = planner_for("always")
    assert planner.plain_steps(a_batch()) == 0
    planner.set_speculate("never")
    assert planner.speculate == "never"
    assert planner.plain_steps(a_batch()) == STEPS
    assert planner.note_launch()
    planner.set_speculate("always")
    assert planner.plain_steps(a_batch()) == 0
    assert not planner.note_launch()


def test_an_unknown_value_of_speculate_is_refused_and_changes_nothing() -> None:
    planner = planner_for("always")
    with pytest.raises(ValueError, match="--sparsespec-speculate must be one of"):
        planner.set_speculate("sometimes")
    assert planner.speculate == "always"


def test_study_policies_go_on_speculating_always() -> None:
    planner = Planner(Settings(speculate="always", draft_policy="full"), STEPS, on_gpu=False)
    with pytest.raises(ValueError, match="draft-policy full"):
        planner.set_speculate("never")
    assert planner.speculate == "always"
