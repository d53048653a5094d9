"""When the batch after a round has to be chosen: when the device comes to the round's last steps, and not before.

SGLang's overlap scheduler chooses and launches the next batch when the device begins with the round in flight. A request
that arrives after that waits for both, and rounds of many drafts are long. So the scheduler waits for arrivals until the
device has come to a place in the round in flight after which there is just enough time to launch what follows.
"""

from __future__ import annotations

from collections.abc import Callable
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
        self._waited = False
        self._due_step = due_step

    def note_step(self, step: int) -> None:
        """Step ``step`` of the round is about to be launched."""
        if 0 < step == self._due_step:
            self._due = self._timer.now()

    def wait(self, arrived: Callable[[], bool] | None) -> None:
        """Wait until the next batch is due, or something has arrived; not after anything but a round.

        Args:
            arrived: waits for a short time; whether there is something to receive. None: do not wait.
        """
        due, self._due, self._due_step = self._due, None, 0
        self._waited = False
        if due is None or arrived is None or due.query():
            return
        self._waited = True
        self.waits += 1
        while not (due.query() or arrived()):
            pass
