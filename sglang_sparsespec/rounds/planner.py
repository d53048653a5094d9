"""The planner: how many tokens the next round drafts, from none (a plain round) to k.

Where contexts are short or batches large, sparse drafts and a verification can take longer than decoding the accepted
tokens plainly; and where drafts are seldom accepted, few of them are worth their time. Both are known before a round: what
its forwards take (:mod:`round_times`, measured at start-up), and how many tokens it is likely to yield
(:mod:`acceptance`). The planner takes the number of drafts with the most tokens per second, and runs no round to find
something out. Every kind of round gives the target's output, whichever runs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sglang.srt.distributed import get_tp_group

from sglang_sparsespec.rounds.acceptance import AcceptanceBelief
from sglang_sparsespec.rounds.draft_budget import DraftBudget
from sglang_sparsespec.rounds.late_choice import LateChoice
from sglang_sparsespec.rounds.round_timer import RoundTimer
from sglang_sparsespec.rounds.round_times import Load, RoundTimes
from sglang_sparsespec.settings import ALWAYS, NEVER, Settings, check_speculate

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


@dataclass(frozen=True)
class RoundChoice:
    """What the next round is.

    Attributes:
        drafts: per request; 0 for a plain round.
        plain_steps: of a plain round, else 0.
        least_budget: tokens that draft steps attend to at least from the round's verification on; None: as configured.
    """

    drafts: int
    plain_steps: int = 0
    least_budget: int | None = None


class TimeCorrection:
    """What rounds of each kind really take, relative to the table: it lacks sampling and the like, which vary slowly.

    Of a kind that has not run it is not known whether what slows the other one slows it too: it is given one half of the
    other's deviation. Whatever was measured of it comes to that as well while the other one runs, since a wrong correction
    of a kind that is not chosen because of it must not stay.
    """

    #: How far a round moves its kind's correction to its own ratio, and the other kind's to what a kind that has not run
    #: is given.
    OWN, OTHER = 1 / 16, 1 / 500
    LEAST, MOST = 0.7, 1.5

    def __init__(self) -> None:
        self._ratios: dict[bool, float] = {}

    def of(self, plain: bool) -> float:
        """The factor of a kind's times."""
        return self._ratios.get(plain, (1 + self._ratios.get(not plain, 1.0)) / 2)

    def note(self, plain: bool, ratio: float) -> None:
        """A round took ``ratio`` times what the table says."""
        ratio = min(max(ratio, self.LEAST), self.MOST)
        own = self.of(plain)
        own += self.OWN * (ratio - own)
        self._ratios[plain] = own
        if (not plain) in self._ratios:
            self._ratios[not plain] += self.OTHER * ((1 + own) / 2 - self._ratios[not plain])


class Planner:
    """Decides for each round of a worker how many tokens it drafts, and how many steps it has if none.

    Args:
        num_steps: k, the most drafts of a round, and the most steps of a plain one.
        any_number: whether a round may draft fewer than k tokens.
        most_budget: tokens that a selection has room for.

    Attributes:
        speculate: which rounds speculate: "auto", "always" or "never" (``--sparsespec-speculate``).
        budget: how many tokens draft steps attend to at least.
        times: None until they are measured; then and with draft policies for study rounds draft k tokens unless
            ``speculate`` is "never".
        late_choice: told of each step of a round, says when the batch after it has to be chosen.
    """

    #: Seconds of the scheduler for one iteration on a GPU, and more for each request (profiled): no round takes less.
    HOST_S, HOST_REQUEST_S = 0.002, 50e-6
    #: Seconds more that a prefill takes on the host until the device gets its first work, and by which a wait may be late.
    PREFILL_S = 0.002
    #: Seconds that a plain round should last on a GPU, and more for each request. With longer rounds new requests wait;
    #: with shorter ones the GPU does.
    ROUND_S, REQUEST_S = 0.006, 100e-6
    #: The other kind of round must be that much faster, so that noise does not have the two take turns.
    MARGIN = 1.02
    #: Of the numbers of drafts that are nearly as fast as the best, the largest is taken: speeds are flat there, and only
    #: drafts that are made show how often the later ones of a window are accepted.
    NEARLY = 0.99

    def __init__(
        self, settings: Settings, num_steps: int, on_gpu: bool, any_number: bool = True, most_budget: int = 0
    ) -> None:
        self._settings = settings
        self.speculate = settings.speculate
        self.times: RoundTimes | None = None
        self._num_steps = num_steps
        self._on_gpu = on_gpu
        self._counts = tuple(range(1, num_steps + 1)) if any_number else (num_steps,)
        self._belief = AcceptanceBelief(num_steps)
        self.budget = DraftBudget(settings, most_budget)
        self._corrections: defaultdict[int, TimeCorrection] = defaultdict(TimeCorrection)
        self._is_plain = False
        self._timer = RoundTimer(on_gpu)
        self.late_choice = LateChoice(self._timer)
        self._timed: tuple[Any, tuple[Load, bool, float]] | None = None

    @property
    def acceptance_rates(self) -> list[float]:
        """By position, the share of drafts expected to be accepted of those whose predecessors are."""
        return self._belief.rates

    @property
    def time_corrections(self) -> dict[str, list[float]]:
        """By number of requests ("4-7"), what speculating and plain rounds take relative to the table."""
        return {
            f"{1 << bits >> 1}-{(1 << bits) - 1}": [correction.of(plain) for plain in (False, True)]
            for bits, correction in sorted(self._corrections.items())
        }

    def set_speculate(self, value: str) -> None:
        """Change :attr:`speculate` from the next round on.

        Raises:
            ValueError: unknown, or excluded by the draft policy.
        """
        settings = replace(self._settings, speculate=value)
        settings.check()
        check_speculate(settings)
        self.speculate = value

    def next_round(self, batch: ScheduleBatch) -> RoundChoice:
        """The round that is about to be launched; the same on all ranks."""
        group = get_tp_group()
        choice = RoundChoice(self._num_steps)
        if group.rank_in_group == 0:
            choice = self._choose(Load.of(batch), needs_verification(batch))
        if group.world_size == 1 or self.speculate == ALWAYS:
            return choice
        # Clocks, and what was learned from them, differ between ranks.
        return group.broadcast_object(choice, src=0)

    def note_launch(self) -> None:
        """The round has been launched."""
        if self._timed is not None:
            begin, label = self._timed
            self._timer.add(begin, self._timer.now(), label)
            self._timed = None

    def note_acceptance(self, accepted: Sequence[int], drafted: int) -> None:
        """A round's verifications have accepted so many of ``drafted`` drafts, one number for each request."""
        self._belief.note_round(accepted, drafted)

    def _choose(self, load: Load, must_verify: bool) -> RoundChoice:
        for seconds, (timed, plain, expected) in self._timer.finished():
            self._correction(timed).note(plain, seconds / expected)
        choice = self._choice(load, must_verify)
        if choice.plain_steps:
            self._belief.note_plain_steps(choice.plain_steps)
        if self.times is not None:
            self._timed = (self._timer.now(), (load, choice.drafts == 0, self._table_seconds(load, choice)))
            if self._on_gpu:
                self.late_choice.begin_round(self._steps_until_due(load, choice))
        return choice

    def _choice(self, load: Load, must_verify: bool) -> RoundChoice:
        if self.speculate == ALWAYS or (self.times is None and (must_verify or self.speculate != NEVER)):
            return RoundChoice(self._num_steps)
        plain = RoundChoice(0, self._plain_steps(load))
        if self.speculate == NEVER and not must_verify:
            return plain
        assert self.times is not None
        if self._on_gpu:

            def speed(least_budget: int, rejections: float) -> float:
                return max(self._speeds(load, least_budget, rejections).values())

            self._belief.scale_rejections(self.budget.reconsider(load, self.times, speed))
        speeds = self._speeds(load, self.budget.least)
        fastest = max(speeds.values())
        best = max(drafts for drafts, speed in speeds.items() if speed >= fastest * self.NEARLY)
        if must_verify:
            return RoundChoice(best, least_budget=self.budget.asked)
        plain_speed = plain.plain_steps / self._seconds(load, self._table_seconds(load, plain), plain=True)
        if self._is_plain:
            self._is_plain = fastest <= plain_speed * self.MARGIN
        else:
            self._is_plain = plain_speed > fastest * self.MARGIN
        return plain if self._is_plain else RoundChoice(best, least_budget=self.budget.asked)

    def _speeds(self, load: Load, least_budget: int, rejections: float = 1.0) -> dict[int, float]:
        """Tokens per second of rounds that speculate, for each number of drafts.

        Args:
            rejections: how often drafts are rejected, relative to what is believed.
        """
        tokens, of_table = self._belief.tokens(rejections), self._speculating_seconds(load, least_budget)
        return {drafts: tokens[drafts] / self._seconds(load, of_table[drafts], plain=False) for drafts in self._counts}

    def _table_seconds(self, load: Load, choice: RoundChoice) -> float:
        """What the forwards of a round take by the table."""
        assert self.times is not None
        if choice.drafts == 0:
            return choice.plain_steps * self.times.plain(load)
        return self._speculating_seconds(load, self._least_budget(choice))[choice.drafts]

    def _speculating_seconds(self, load: Load, least_budget: int) -> list[float]:
        """What a round's forwards take by the table if it has none to k drafts and is verified."""
        assert self.times is not None
        draft, verify = self.times.draft(self.budget.draft_load(load, least_budget)), self.times.verify(load)
        return [drafts * draft + verify for drafts in range(self._num_steps + 1)]

    def _least_budget(self, choice: RoundChoice) -> int:
        return self._settings.min_budget if choice.least_budget is None else choice.least_budget

    def _steps_until_due(self, load: Load, choice: RoundChoice) -> int:
        """How many steps of a round the device may have behind it when the scheduler must choose the next batch."""
        assert self.times is not None
        if choice.drafts:
            verify, *_, whole = self._speculating_seconds(load, self._least_budget(choice))[: choice.drafts + 1]
            steps, step, rest = choice.drafts, (whole - verify) / choice.drafts, verify
        else:
            steps, step, rest = choice.plain_steps, self.times.plain(load), 0.0
        host = self.HOST_S + self.HOST_REQUEST_S * load.requests + self.PREFILL_S
        return steps - max(1, math.ceil((host - rest) / step))

    def _correction(self, load: Load) -> TimeCorrection:
        """By number of requests, up to a factor of two: what is missing in the table is not the same share everywhere."""
        return self._corrections[load.requests.bit_length()]

    def _seconds(self, load: Load, table_seconds: float, plain: bool) -> float:
        """What a round is expected to take that takes ``table_seconds`` by the table."""
        seconds = table_seconds * self._correction(load).of(plain)
        return max(seconds, self.HOST_S + self.HOST_REQUEST_S * load.requests) if self._on_gpu else seconds

    def _plain_steps(self, load: Load) -> int:
        """As few as last long enough; all of them where the scheduler's work is not hidden behind the device's."""
        if self.times is None or not self._on_gpu:
            return self._num_steps
        step = self.times.plain(load) * self._correction(load).of(plain=True)
        return min(self._num_steps, math.ceil((self.ROUND_S + self.REQUEST_S * load.requests) / step))


def needs_verification(batch: ScheduleBatch) -> bool:
    """Whether the batch asks for what only a verification's logits give."""
    return bool(
        batch.has_grammar
        or batch.return_logprob
        or batch.return_hidden_states
        or batch.sampling_info.logit_bias is not None
    )
