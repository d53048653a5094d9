"""How many tokens draft steps attend to at least, beside their share of the context.

A share of a short context is few tokens, and then many drafts are rejected; while the draft steps of a small batch take
their time from the weights, and more tokens hardly cost any. What more tokens cost is in the table of times
(:mod:`round_times`), whose contexts differ in their budgets, and in nothing else that a draft step could notice. What
they gain is known roughly: rejections fall with the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from sglang_sparsespec.rounds.round_times import Load, RoundTimes
from sglang_sparsespec.settings import Settings


class DraftBudget:
    """The least budget of a draft step.

    Args:
        most: tokens that a selection has room for.

    Attributes:
        least: tokens, as chosen last.
    """

    #: Rejections are proportional to the budget to the power of minus this.
    GAIN = 0.7
    #: Multiples of the least budget that is configured.
    MULTIPLES = (1, 2, 4, 6)
    #: The most by which a budget grows at once, and the rounds in which its effect is seen before it may change again.
    GROWTH, ROUNDS = 2.0, 16
    #: Another budget must be that much faster, so that noise does not have two take turns.
    MARGIN = 1.01

    def __init__(self, settings: Settings, most: int) -> None:
        self._settings = settings
        self._choices = [multiple * settings.min_budget for multiple in self.MULTIPLES]
        self._choices = [least for least in self._choices if least <= max(most, settings.min_budget)]
        self.least = settings.min_budget
        self._rounds_left = 0

    @property
    def asked(self) -> int | None:
        """:attr:`least`; None: as configured."""
        return None if self.least == self._settings.min_budget else self.least

    def tokens(self, load: Load, least: int) -> float:
        """Of a draft step's budget for each request."""
        return max(least, self._settings.budget_ratio * load.tokens / max(load.requests, 1))

    def draft_load(self, load: Load, least: int) -> Load:
        """A load whose draft steps take as long by the table, which was measured with the budget as configured."""
        if least == self._settings.min_budget:
            return load
        return Load(load.requests, max(load.tokens, math.ceil(load.requests * least / self._settings.budget_ratio)))

    def reconsider(self, load: Load, times: RoundTimes, speed: Callable[[int, float], float]) -> float:
        """Choose :attr:`least` for the rounds to come, every :attr:`ROUNDS` rounds.

        Args:
            speed: tokens per second with a least budget, if that multiplies rejections by so much.

        Returns:
            by how much rejections are expected to be multiplied from now on.
        """
        self._rounds_left -= 1
        if self._rounds_left > 0:
            return 1.0
        self._rounds_left = self.ROUNDS
        factors = dict(self._factors(load, times))
        speeds = {least: speed(least, factor) for least, factor in factors.items()}
        best = max(speeds, key=speeds.__getitem__)
        if speeds[best] <= speeds[self.least] * self.MARGIN:
            return 1.0
        self.least = best
        return factors[best]

    def _factors(self, load: Load, times: RoundTimes) -> Iterator[tuple[int, float]]:
        """The least budgets that may be chosen now, and what they multiply rejections by."""
        now = self.tokens(load, self.least)
        for least in self._choices:
            growth = self.tokens(load, least) / now
            is_known = least / self._settings.budget_ratio <= times.longest_context(load.requests)
            if least == self.least or (growth <= self.GROWTH and (is_known or least < self.least)):
                yield least, growth**-self.GAIN
