"""What is believed of acceptance: the prior, evidence and its fading."""

from __future__ import annotations

import random

import pytest

from sglang_sparsespec.rounds.acceptance import AcceptanceBelief

K = 8
PRIOR = AcceptanceBelief.PRIOR


def accepted(rng: random.Random, rate: float, drafted: int) -> int:
    count = 0
    while count < drafted and rng.random() < rate:
        count += 1
    return count


def run(belief: AcceptanceBelief, rng: random.Random, rounds: int, batch: int, rate: float, drafted: int = K) -> None:
    for _ in range(rounds):
        belief.note_round([accepted(rng, rate, drafted) for _ in range(batch)], drafted)


def test_the_prior_holds_at_first() -> None:
    belief = AcceptanceBelief(K)
    assert belief.rates == [pytest.approx(PRIOR)] * K
    assert belief.tokens() == [pytest.approx(sum(PRIOR**n for n in range(m + 1))) for m in range(K + 1)]


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.95])
def test_rates_are_those_of_the_drafts_seen(rate: float) -> None:
    belief = AcceptanceBelief(K)
    run(belief, random.Random(0), 100, 32, rate)
    for position, found in enumerate(belief.rates):
        if rate**position > 0.05:  # else there were next to no attempts
            assert found == pytest.approx(rate, abs=0.03 if rate**position > 0.2 else 0.15)


def test_each_position_has_its_own_rate() -> None:
    """Of 100 verifications 80 accept the first draft, 40 the second as well, and 30 all three."""
    belief = AcceptanceBelief(3)
    for _ in range(200):
        belief.note_round([3] * 30 + [2] * 10 + [1] * 40 + [0] * 20, 3)
    assert belief.rates == pytest.approx([0.8, 0.5, 0.75], abs=0.005)
    assert belief.tokens() == pytest.approx([1, 1.8, 2.2, 2.5], abs=0.01)


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_a_change_of_the_text_is_learned_within_tens_of_rounds(batch: int) -> None:
    belief, rng = AcceptanceBelief(K), random.Random(1)
    run(belief, rng, 200, batch, 0.9)
    run(belief, rng, 150 if batch == 1 else 50, batch, 0.4)
    assert belief.rates[0] == pytest.approx(0.4, abs=0.2 if batch == 1 else 0.12)


def test_one_request_is_not_ruled_by_noise() -> None:
    belief, rng, found = AcceptanceBelief(K), random.Random(2), []
    run(belief, rng, 300, 1, 0.7)
    for _ in range(400):
        run(belief, rng, 1, 1, 0.7)
        found.append(belief.rates[0])
    assert max(found) - min(found) < 0.4
    assert sum(found) / len(found) == pytest.approx(0.7, abs=0.05)


def test_positions_that_are_not_drafted_borrow_the_last_ones_rate() -> None:
    belief = AcceptanceBelief(K)
    run(belief, random.Random(3), 100, 32, 0.95)
    run(belief, random.Random(3), 300, 32, 0.5, drafted=2)
    rates = belief.rates
    assert rates[1] == pytest.approx(0.5, abs=0.08)
    assert all(rate == pytest.approx(rates[1], abs=0.02) for rate in rates[2:])


def test_rounds_of_requests_that_have_all_ended_count_for_nothing() -> None:
    belief = AcceptanceBelief(K)
    before = belief.rates
    belief.note_round([], 3)
    assert belief.rates == before


def test_plain_steps_bring_rates_back_to_the_prior_slowly() -> None:
    belief = AcceptanceBelief(K)
    run(belief, random.Random(4), 100, 32, 0.25)
    low = belief.rates[0]
    for _ in range(250):
        belief.note_plain_steps(8)
    half_way, kept, lean = (low + PRIOR) / 2, AcceptanceBelief.PRIOR_ATTEMPTS, AcceptanceBelief.LEAN
    assert belief.rates[0] == pytest.approx((half_way * kept + PRIOR * lean) / (kept + lean), abs=0.03)
    for _ in range(10_000):
        belief.note_plain_steps(8)
    assert belief.rates == [pytest.approx(PRIOR, abs=0.01)] * K


def test_after_many_plain_steps_the_first_rounds_count() -> None:
    belief = AcceptanceBelief(K)
    run(belief, random.Random(5), 100, 32, 0.9)
    for _ in range(250):
        belief.note_plain_steps(8)
    run(belief, random.Random(5), 3, 32, 0.3)
    assert belief.rates[0] < 0.5
