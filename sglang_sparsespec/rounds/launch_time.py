"""When the next round is chosen: before the device is done with the round in flight, but not much before.

SGLang's overlap scheduler chooses and launches a batch as soon as it has read the results of the last but one. A request
that arrives right after that waits for two rounds, and rounds of many drafts are long. Chosen late, the next batch is a
prefill of what has arrived meanwhile, and the device does not wait either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Batch:
    """The batch launched last. Times are seconds, ``begun_at`` is by the host's clock.

    Attributes:
        seconds: that the device will take, None if that is not known.
        host_seconds: what the scheduler usually takes for an iteration with such a batch.
        begun_at: when the device has begun with it, None while it has others to do.
    """

    seconds: float | None
    host_seconds: float
    begun_at: float | None


class LaunchTime:
    """Waits until the next batch has to be chosen.

    Args:
        is_idle: whether the device has finished every round.

    Attributes:
        lead: what an iteration takes from its begin to the launch of a whole round, in units of ``host_seconds``: so long
            before the end of the round in flight the next batch is chosen. It follows what iterations take, quickly upwards.
    """

    RAISE, LOWER = 0.25, 0.01
    #: One iteration that takes very long, such as one with a garbage collection, moves the lead no further than this many
    #: times its value would.
    OUTLIER = 2.0
    #: What rounds may differ from what is expected of them.
    TOLERANCE = 0.02
    #: The longest wait between two looks at the device.
    TICK_S = 0.001

    def __init__(self, is_idle: Callable[[], bool]) -> None:
        self._is_idle = is_idle
        self.lead = 1.0
        self._batch: Batch | None = None
        self._unread = 0
        self._iteration_at: float | None = None

    def note_batch(self, seconds: float | None = None, host_seconds: float = 0.0) -> None:
        """A batch is about to be launched, see :class:`Batch`."""
        now = time.perf_counter()
        if not self._unread:
            # This iteration has waited for the device, so what it takes says nothing about the host.
            self._iteration_at = None
        is_next = not self._unread or (self._batch is not None and self._batch.seconds is not None and self._is_idle())
        self._batch = Batch(seconds, host_seconds, now if is_next else None)
        self._unread = min(self._unread, 1) + 1

    def note_round_launched(self) -> None:
        """All forwards of the round are launched."""
        batch, begun = self._batch, self._iteration_at
        if batch is None or batch.seconds is None or begun is None:
            return
        ratio = min((time.perf_counter() - begun) / batch.host_seconds, self.OUTLIER * self.lead)
        self.lead += (self.RAISE if ratio > self.lead else self.LOWER) * (ratio - self.lead)

    def note_results(self) -> None:
        """The host has waited for the results of the oldest batch whose results it had not read."""
        self._unread = max(self._unread - 1, 0)
        if self._unread and self._batch is not None and self._batch.begun_at is None:
            self._batch.begun_at = time.perf_counter()

    def end_iteration(self, arrived: Callable[[float], bool] | None) -> None:
        """Wait until the batch after the one in flight has to be chosen; not if the end of that one is not known.

        What arrives in the wait becomes one batch, which is chosen twice as early: a prefill takes the host longer.

        Args:
            arrived: waits for so many seconds at most; whether there is something to receive. None: do not wait.
        """
        batch = self._batch
        if arrived is not None and batch is not None and batch.seconds is not None and batch.begun_at is not None:
            lead = self.lead * batch.host_seconds
            due = batch.begun_at + batch.seconds * (1 - self.TOLERANCE) - lead
            has_arrived = False
            while time.perf_counter() < due - self.TICK_S and not self._is_idle():
                if has_arrived:
                    time.sleep(self.TICK_S)
                elif arrived(self.TICK_S):
                    has_arrived = True
                    due -= lead
        self._iteration_at = time.perf_counter()
