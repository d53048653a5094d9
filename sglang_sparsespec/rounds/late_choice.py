"""When the batch after a round has to be chosen: when the device comes to the round's last steps, and not before.

SGLang's overlap scheduler chooses and launches the next batch when the device begins with the round in flight. A request
that arrives after that waits for both, and rounds of many drafts are long. So the scheduler waits for arrivals until the
device has come to a place in the round in flight after which there is just enough time to launch what follows.
"""

from __future__ import annotations

import time
from typing import Any

from sglang_sparsespec.rounds.round_timer import RoundTimer


class LateChoice:
    """The place in the round in flight at which the next batch is due, and the wait for it.

    Args:
        timer: of the rounds.

    Attributes:
        waits: rounds in which the scheduler has waited.
        waits_too_long: of these, those that were over when the next round was planned: the device was idle.
    """

    #: Seconds between two looks at the device.
    TICK_S = 0.0005

    def __init__(self, timer: RoundTimer) -> None:
        self._timer = timer
        self._due_step = 0
        self._due: Any = None
        self._waited = False
        self.waits = 0
        self.waits_too_long = 0

    def begin_round(self, due_step: int) -> None:
        """A round is about to be launched whose successor is due before its step ``due_step``; at 0 and below at once."""
        if self._waited and self._timer.is_idle():
            self.waits_too_long += 1
        self._due_step = due_step

    def note_step(self, step: int) -> None:
        """Step ``step`` of the round is about to be launched."""
        if 0 < step == self._due_step:
            self._due = self._timer.now()

    def end_iteration(self, wait: bool) -> None:
        """The scheduler chooses the next batch after this: when it is due, if it should ``wait`` and a round is in flight.

        What arrives meanwhile becomes one prefill. It does not end the wait: a burst would become a prefill for every few
        requests, and the device has enough to do.
        """
        due, self._due, self._due_step = self._due, None, 0
        self._waited = wait and due is not None and not due.query()
        if self._waited:
            self.waits += 1
            while not due.query():
                time.sleep(self.TICK_S)
