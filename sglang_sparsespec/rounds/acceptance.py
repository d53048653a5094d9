"""What is believed of the next drafts' acceptance, from the verifications so far."""

from __future__ import annotations

from collections.abc import Sequence


class AcceptanceBelief:
    """How likely the drafts of a window are accepted, each on condition that the ones before it are.

    Kept are the attempts and successes of each position, which fade as new ones come in, so that a change of the text is
    learned within tens of rounds. Conditional rates are nearly flat over the positions, so a position that has seldom been
    tried lately leans on the one before it.

    Args:
        positions: k, drafts of the longest window.
    """

    #: Rate of every position before any is known, and how many attempts that is worth. Measured were 0.92 to 0.97. A prior
    #: that is too high costs the first rounds; one that is too low may never be corrected, since plain rounds say nothing.
    PRIOR, PRIOR_ATTEMPTS = 0.95, 10.0
    #: Rounds in which evidence fades to one half; more where a round has few requests, so that some 64 attempts count in
    #: any case: at batch 1 sixteen rounds alone would be noise.
    HALF_LIFE_ROUNDS, HALF_LIFE_ATTEMPTS = 16.0, 45.0
    #: Attempts that the rate of the position before is worth.
    LEAN = 4.0
    #: Plain steps in which rates come half way back to the prior. Plain rounds say nothing of acceptance, and without this
    #: one bad text would keep a server plain for ever. The price: where speculation does not pay, a round or two in some
    #: hundreds speculate all the same, with few drafts, until that is known again.
    HALF_LIFE_PLAIN_STEPS = 2000.0
    #: Plain steps in which the attempts beyond those of the prior are forgotten to one half, so that it is known again at
    #: once: what is left of an earlier text would outweigh the first rounds.
    HALF_LIFE_PLAIN_ATTEMPTS = 200.0

    def __init__(self, positions: int) -> None:
        self._attempts = [self.PRIOR_ATTEMPTS] * positions
        self._successes = [self.PRIOR * self.PRIOR_ATTEMPTS] * positions

    def note_round(self, accepted: Sequence[int], drafted: int) -> None:
        """One verification per request has accepted so many of its ``drafted`` drafts."""
        if not accepted:
            return
        keep = 0.5 ** (1 / max(self.HALF_LIFE_ROUNDS, self.HALF_LIFE_ATTEMPTS / len(accepted)))
        for index in range(len(self._attempts)):
            self._attempts[index] *= keep
            self._successes[index] *= keep
            if index < drafted:
                self._attempts[index] += sum(count >= index for count in accepted)
                self._successes[index] += sum(count > index for count in accepted)

    def note_plain_steps(self, steps: int) -> None:
        """So many steps were decoded plainly: what is known grows old."""
        keep_rate = 0.5 ** (steps / self.HALF_LIFE_PLAIN_STEPS)
        keep_attempts = 0.5 ** (steps / self.HALF_LIFE_PLAIN_ATTEMPTS)
        for index, attempts in enumerate(self._attempts):
            excess = max(0.0, attempts - self.PRIOR_ATTEMPTS)
            kept = attempts - (1 - keep_attempts) * excess
            successes = keep_rate * self._successes[index] + (1 - keep_rate) * self.PRIOR * attempts
            self._attempts[index] = kept
            self._successes[index] = successes * kept / attempts if attempts else 0.0

    def scale_rejections(self, factor: float) -> None:
        """From now on drafts are expected to be rejected ``factor`` times as often."""
        for index, (attempts, successes) in enumerate(zip(self._attempts, self._successes, strict=True)):
            self._successes[index] = max(0.0, attempts - factor * (attempts - successes))

    @property
    def rates(self) -> list[float]:
        """By position, the share of drafts that are accepted of those whose predecessors are."""
        rates, before = [], self.PRIOR
        for attempts, successes in zip(self._attempts, self._successes, strict=True):
            before = (successes + self.LEAN * before) / (attempts + self.LEAN)
            rates.append(before)
        return rates

    def tokens(self, rejections: float = 1.0) -> list[float]:
        """Entry m: expected tokens of a round with m drafts, the bonus token included.

        Args:
            rejections: what drafts would be rejected as often as, relative to what is believed.
        """
        expected, reached = [1.0], 1.0
        for rate in self.rates:
            reached *= max(0.0, 1 - rejections * (1 - rate))
            expected.append(expected[-1] + reached)
        return expected
