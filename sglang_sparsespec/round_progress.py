"""How far the device is in the decode round launched last, and when the next one is to be launched.

SGLang's overlap loop launches a round as soon as the one before it begins on the device. A request that arrives after
that waits for all of both. Nothing is gained by launching so early: a round need only be there when the one before it
ends. ``scheduler_patch.late_launch`` waits until shortly before that, by what is known here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Event(Protocol):
    """What is used of ``torch.cuda.Event``."""

    def record(self) -> None:
        """Make this the place in the device's work that has been launched so far."""

    def query(self) -> bool:
        """Whether the device has got there."""


class RoundProgress:
    """Places in the device's work: where each forward of the last decode round begins, and where the round ends.

    The next round is launched when ``lead`` forwards of this one are still ahead. How many it takes depends on the CPU,
    the model and the batch, so it is found out as the server runs: a launch that finds the round over came too late,
    the device may have idled, and ``lead`` grows; it shrinks again after :attr:`GOOD_ROUNDS` without such a launch.
    Too long a lead costs arriving requests a forward, too short a one costs all requests the idle time, so it grows at
    once and shrinks slowly: in a steady state one launch of about :attr:`GOOD_ROUNDS` is late.

    Args:
        window: forwards of a round at most.
        new_event: makes an event of the device; None where launches wait for the device, so that nothing is in flight
            when they return: nothing is recorded then, and nobody waits.

    Attributes:
        lead: 1 to ``window``; nobody waits for a round of no more forwards.
        waits: launches that were waited with.
        late_launches: those of them that came after the end of the round that was waited for.
    """

    #: The launch of a round takes some time: the last forward at least is left to cover it.
    LEAST_LEAD = 1
    #: Rounds in a row without a late launch, after which a shorter lead is tried. Rounds that are too short to be
    #: waited for count too: else a lead that covers all rounds, after a while of a slow CPU, would stay for good.
    GOOD_ROUNDS = 64

    def __init__(self, window: int, new_event: Callable[[], Event] | None) -> None:
        self._window = window
        self._new_event = new_event
        self.lead = self.LEAST_LEAD
        self.waits = 0
        self.late_launches = 0
        #: Begins of forwards, of which the first :attr:`_num_forwards` are the round's. They are recorded anew in each
        #: round: nobody asks for the last one's any more when the next is launched.
        self._begins: list[Event] = []
        self._num_forwards = 0
        self._end: Event | None = None
        #: The last batch was a round, and nobody has asked yet how long to wait for it.
        self._awaited = False
        #: Someone has waited for that round until the lead was all that was left, and nothing has been launched since.
        self._waited = False
        #: The launch that follows such a wait has begun.
        self._to_judge = False
        self._good_rounds = 0

    @classmethod
    def on_device(cls, device: str, window: int) -> RoundProgress:
        """The progress of rounds on ``device``; only "cuda" is ever waited for."""
        return cls(window, torch.cuda.Event if device == "cuda" else None)

    # -------------------------------------------------------------------- launches

    def begin(self, follows_results: bool = False) -> None:
        """A batch is about to be launched, a round or another one: the round before is of no interest any more.

        Args:
            follows_results: SGLang has waited for the last round's results first, so this launch comes after its end
                however early it was begun.
        """
        self._to_judge = self._waited and not follows_results
        self._num_forwards = 0
        self._awaited = self._waited = False

    def mark(self) -> None:
        """A forward of the round is about to be launched; those before it, and what follows from them, have been."""
        if self._new_event is None:
            return
        if self._to_judge and self._end is not None:
            # Now, and not when the launch began: what the host prepares in between takes as long as a forward.
            self._judge(late=self._end.query())
            self._to_judge = False
        if self._num_forwards == len(self._begins):
            self._begins.append(self._new_event())
        self._begins[self._num_forwards].record()
        self._num_forwards += 1

    def end(self) -> None:
        """All of the round has been launched."""
        if self._new_event is None:
            return
        if self._end is None:
            self._end = self._new_event()
        self._end.record()
        self._awaited = self._num_forwards > 0

    # ------------------------------------------------------------------------ waiting

    def take_moment(self) -> Event | None:
        """The event to wait for before the next launch: the begin of the last ``lead`` forwards.

        None if there is nothing to wait for: after a batch that was no round, for a short one, and when asked again.
        """
        # Nothing was launched after the last wait. What is launched after this one may come any time later: a server
        # without requests is not late.
        self._waited = False
        if not self._awaited:
            return None
        self._awaited = False
        if self._num_forwards <= self.lead:
            self._judge(late=False)
            return None
        return self._begins[self._num_forwards - self.lead]

    def note_wait(self, to_the_lead: bool) -> None:
        """The event of :meth:`take_moment` was waited for.

        Args:
            to_the_lead: until it was over. A wait that a message has ended says nothing about the lead.
        """
        self.waits += 1
        self._waited = to_the_lead

    def _judge(self, late: bool) -> None:
        if late:
            self.late_launches += 1
            self.lead = min(self.lead + 1, self._window)
            self._good_rounds = 0
            return
        self._good_rounds += 1
        if self._good_rounds == self.GOOD_ROUNDS:
            self.lead = max(self.lead - 1, self.LEAST_LEAD)
            self._good_rounds = 0


# SGLang's request receiver is a frozen dataclass with slots that knows neither the scheduler nor its worker. It lives in
# the worker's process, which has one worker.
_current: RoundProgress | None = None


def current() -> RoundProgress | None:
    """The progress of this process's worker; None if it has none of this plugin."""
    return _current


def set_current(progress: RoundProgress | None) -> None:
    """``progress`` is that of this process's worker."""
    global _current
    _current = progress
