"""The planner: which rounds speculate, and how many steps the plain ones have.

Where contexts are short or batches large, k sparse drafts and a verification can take longer than decoding the accepted
tokens plainly. How long depends on the GPU, the model, the batch and the contexts, so it is measured as the server runs.
Both kinds of round give the target's output, whichever runs.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.distributed import get_tp_group

from sglang_sparsespec.settings import ALWAYS, NEVER, Settings, check_speculate

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


@dataclass(frozen=True)
class Load:
    """What the time of a round depends on: requests, and committed tokens of all of them."""

    requests: int
    tokens: int

    @classmethod
    def of(cls, batch: ScheduleBatch) -> Load:
        """As far as the host knows: the tokens of the round in flight are missing."""
        return cls(len(batch.reqs), sum(len(req.origin_input_ids) + len(req.output_ids) for req in batch.reqs))

    def ratio(self, other: Load) -> float:
        """How far two loads are apart: the product of the ratios, larger by smaller (1: the same)."""
        return 1 / (self.least_share_of(other) * other.least_share_of(self))

    def least_share_of(self, other: Load) -> float:
        """A round of this load takes at least this share of the time of one of ``other``: 0 to 1.

        This is a lower bound: time shrinks at most linearly with load.
        """
        share = 1.0
        for ours, theirs in ((self.requests, other.requests), (self.tokens, other.tokens)):
            share *= min(1.0, max(ours, 1) / max(theirs, 1))
        return share


@dataclass
class _Measured:
    """Time of the last rounds of one kind: at which load, of how many rounds since it began to run, up to which."""

    seconds: float
    load: Load
    rounds: int
    round: float


class RoundChoice:
    """Chooses between rounds that speculate and plain ones.

    The kind that runs is timed all along. The other one is tried now and then: at first, after
    :attr:`STALE` rounds, and when it could be the faster one by now, that is, if it took no longer than when it
    was measured, or in proportion less where the load has shrunk since (:meth:`Load.least_share_of`). A kind that
    is tried runs until its time is known, a few rounds.

    Args:
        plain_tokens: tokens that a plain round yields per request.
    """

    #: Weight of what was known, when a round's time (of a kind that has run for a while) or acceptance comes in.
    KEEP = 0.7
    #: Rounds that must have been timed before a kind that is tried is judged.
    LEAST = 3
    #: Rounds of the same load share their time.
    NEAR = 1.25
    #: Rounds after which the kind that does not run is tried again. Here and below a plain round counts by its steps: as
    #: a part of one that takes them all.
    STALE = 1000
    #: Rounds before it is tried again, or that share of them which is left of the load: some six rounds are spent in a
    #: try, and near the crossover growing contexts, or requests that come and go, would have it tried all the time.
    RETRY = 200
    #: The other kind must be that much faster: it costs a round of the first sort to return.
    MARGIN = 1.03

    def __init__(self, plain_tokens: int) -> None:
        self._plain_tokens = plain_tokens
        self._measured: dict[bool, _Measured] = {}
        self._accept_length: float | None = None
        #: Of the round just chosen: steps by ``plain_tokens``, for a plain one.
        self.length = 1.0
        self._round = 0.0
        #: The kind of the last round, and the round that its run began in.
        self._plain, self._since = False, 0.0
        #: Whether the kind that runs has been found the faster one since.
        self._settled = False

    def next_is_plain(self, load: Load) -> bool:
        """The kind of the next round, which has ``load``: whether it is a plain one."""
        self._round += self.length
        self.length = 1.0
        if self._wants_other(load):
            self._plain, self._since, self._settled = not self._plain, self._round, False
        return self._plain

    @property
    def is_typical(self) -> bool:
        """Whether the round just chosen is one to learn from: not the first of its kind after the other.

        The first to speculate drafts with an old selection and a long tail, since plain rounds select nothing. And the
        GPU may wait in the first round of either kind for the CPU, which launches something new.
        """
        return self._round > self._since

    def note_time(self, plain: bool, load: Load, seconds: float) -> None:
        """A typical round of ``load`` took so long."""
        known, rounds = self._measured.get(plain), 1
        # Times of the other kind are still coming in after a change: they belong to its last run.
        is_of_earlier_run = known is not None and plain == self._plain and known.round < self._since
        if known is not None and not is_of_earlier_run and load.ratio(known.load) < self.NEAR:
            rounds = known.rounds + 1
            keep = min(self.KEEP, known.rounds / rounds)
            seconds = keep * known.seconds + (1 - keep) * seconds
        self._measured[plain] = _Measured(seconds, load, rounds, self._round)

    @property
    def plain_step_seconds(self) -> float | None:
        """Time of a step of the last plain rounds, None before any was timed."""
        measured = self._measured.get(True)
        return measured.seconds / self._plain_tokens if measured else None

    def note_acceptance(self, accept_length: float) -> None:
        """A typical round that speculated yielded so many tokens per request."""
        if self._accept_length is not None:
            accept_length = self.KEEP * self._accept_length + (1 - self.KEEP) * accept_length
        self._accept_length = accept_length

    def _wants_other(self, load: Load) -> bool:
        current, other = self._measured.get(self._plain), self._measured.get(not self._plain)
        if self._accept_length is None or current is None or current.round < self._since:
            return False  # the kind that runs is not known yet
        if not self._settled and current.rounds < self.LEAST:
            return False  # nor well enough
        if other is None or self._round - other.round > self.STALE:
            return True
        share = load.least_share_of(other.load)
        changed = share * self.NEAR < 1
        rate = self._tokens(self._plain) / current.seconds
        best_of_other = self._tokens(not self._plain) / (other.seconds * (share if changed else 1))
        is_too_soon = self._settled and self._round - other.round < self.RETRY * (share if changed else 1)
        self._settled = True
        return best_of_other > rate * self.MARGIN and not is_too_soon

    def _tokens(self, plain: bool) -> float:
        """Tokens that a round of the kind yields per request."""
        assert self._accept_length is not None
        return self._plain_tokens if plain else self._accept_length


class RoundTimer:
    """Times rounds by the device's clock, without waiting for them: launches are not what is timed.

    Args:
        on_gpu: whether to record CUDA events on the current stream; else the host's clock is the device's.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._rounds: deque[tuple[Any, Any, Any]] = deque()

    def now(self) -> Any:
        """The place in the device's work that has been launched so far."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, begin: Any, end: Any, label: Any) -> None:
        """A round was launched between two :meth:`now`."""
        self._rounds.append((begin, end, label))

    def finished(self) -> list[tuple[float, Any]]:
        """Seconds and labels of the rounds that the device has finished since the last call."""
        done = []
        while self._rounds and (not self._on_gpu or self._rounds[0][1].query()):
            begin, end, label = self._rounds.popleft()
            done.append((begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin, label))
        return done


class Planner:
    """Decides for each round of a worker whether it speculates, and how long it is if not.

    Args:
        most_steps: of a plain round.

    Attributes:
        speculate: which rounds speculate: "auto", "always" or "never" (``--sparsespec-speculate``).
    """

    #: Seconds that a plain round should last on a GPU, and more for each request: twice what the scheduler does in one
    #: iteration (2 ms and 50 us a request, profiled). With longer rounds new requests wait; with shorter ones the GPU does.
    ROUND_S, REQUEST_S = 0.006, 100e-6

    def __init__(self, settings: Settings, most_steps: int, on_gpu: bool) -> None:
        self._settings = settings
        self.speculate = settings.speculate
        self._most_steps = most_steps
        self._on_gpu = on_gpu
        # Plain rounds are timed as if all of them had that many steps.
        self._choice = RoundChoice(most_steps)
        self._timer = RoundTimer(on_gpu)
        self._timed: tuple[Any, tuple[int, Load]] | None = None

    def set_speculate(self, value: str) -> None:
        """Change :attr:`speculate` from the next round on.

        Raises:
            ValueError: unknown, or excluded by the draft policy.
        """
        settings = replace(self._settings, speculate=value)
        settings.check()
        check_speculate(settings)
        self.speculate = value
        self._choice = RoundChoice(self._most_steps)
        self._timer = RoundTimer(self._on_gpu)

    def plain_steps(self, batch: ScheduleBatch) -> int:
        """Steps of the round that is about to be launched if it is a plain one, else 0. The same on all ranks."""
        if self.speculate == ALWAYS or needs_verification(batch):
            return 0
        group = get_tp_group()
        steps = self._choose(batch) if group.rank_in_group == 0 else 0
        # Clocks differ between ranks.
        return steps if group.world_size == 1 else group.broadcast_object(steps, src=0)

    def note_launch(self) -> bool:
        """The round has been launched. Returns whether its acceptance is to be told to :meth:`note_acceptance`."""
        if self._timed is None:
            return False
        begin, label = self._timed
        self._timer.add(begin, self._timer.now(), label)
        self._timed = None
        return True

    def note_acceptance(self, accepted: list[int]) -> None:
        """The accepted drafts of each request, of a typical round that speculated."""
        if accepted:
            self._choice.note_acceptance(1 + sum(accepted) / len(accepted))

    def _choose(self, batch: ScheduleBatch) -> int:
        for seconds, (steps, load) in self._timer.finished():
            self._choice.note_time(steps > 0, load, seconds * self._most_steps / steps if steps else seconds)
        load = Load.of(batch)
        plain = self.speculate == NEVER or self._choice.next_is_plain(load)
        steps = self._plain_steps(load) if plain else 0
        self._choice.length = steps / self._most_steps if plain else 1.0
        if self.speculate == NEVER or self._choice.is_typical:
            self._timed = (self._timer.now(), (steps, load))
        return steps

    def _plain_steps(self, load: Load) -> int:
        """As few as last long enough; all of them where the scheduler's work is not hidden behind the device's."""
        step = self._choice.plain_step_seconds
        if step is None or not self._on_gpu:
            return self._most_steps
        return min(self._most_steps, math.ceil((self.ROUND_S + self.REQUEST_S * load.requests) / step))


def needs_verification(batch: ScheduleBatch) -> bool:
    """Whether the batch asks for what only a verification's logits give."""
    return bool(
        batch.has_grammar
        or batch.return_logprob
        or batch.return_hidden_states
        or batch.sampling_info.logit_bias is not None
    )
