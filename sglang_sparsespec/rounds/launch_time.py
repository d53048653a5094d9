"""When the next round is chosen: before the device is done with the round in flight, but not much before.

SGLang's overlap scheduler chooses and launches a batch as soon as it has read the results of the last but one. A request that
arrives right after that waits for two rounds, and rounds of many drafts are long. Chosen late, the next batch is a prefill of
what has arrived meanwhile, and the device does not wait either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class LaunchTime:
    """Waits until the next batch has to be chosen. Times are seconds of the host's clock.

    Args:
        is_idle: whether the device has finished every round.

    Attributes:
        lead: how long before the expected end of the round in flight the next batch is chosen, in units of the scheduler's
            time for an iteration. It grows when the device was idle at a launch after a wait, and shrinks otherwise.
    """

    #: What a launch after a wait adds to the lead or takes from it: in balance one such launch of 50 finds the device idle.
    RAISE, LOWER = 0.1, 0.002
    LEAST_LEAD, MOST_LEAD = 0.25, 3.0
    #: The longest wait between two looks at the device.
    TICK_S = 0.001

    def __init__(self, is_idle: Callable[[], bool]) -> None:
        self._is_idle = is_idle
        self.lead = 1.0
        self._results_at = 0.0
        self._round: tuple[float, float, float] | None = None
        self._waited = False

    def note_results(self) -> None:
        """The host has read the results of the batch before the one in flight: the device has begun with that one."""
        self._results_at = time.perf_counter()

    def note_launch(self, seconds: float, host_seconds: float) -> None:
        """A round is launched that will take ``seconds``; the scheduler takes ``host_seconds`` for an iteration."""
        self._learn()
        self._round = (time.perf_counter(), seconds, host_seconds)

    def wait(self, arrived: Callable[[float], bool]) -> None:
        """Wait until the batch after the last one launched has to be chosen, unless that is no round, or something arrives.

        Args:
            arrived: waits for so many seconds at most; whether there is something to receive.
        """
        self._waited = False
        if self._round is None:
            return
        launched_at, seconds, host_seconds = self._round
        self._round = None
        due = max(launched_at, self._results_at) + seconds - self.lead * host_seconds
        while due - time.perf_counter() > self.TICK_S and not self._is_idle():
            if arrived(self.TICK_S):
                self._waited = False
                return
            self._waited = True

    def _learn(self) -> None:
        """Called before the launch of the round that was chosen after a wait."""
        if self._waited:
            change = self.RAISE if self._is_idle() else -self.LOWER
            self.lead = min(max(self.lead + change, self.LEAST_LEAD), self.MOST_LEAD)
            self._waited = False
