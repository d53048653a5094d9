"""When the next batch is chosen: before the device is done with the round in flight, but not much before.

SGLang's overlap scheduler chooses and launches a batch as soon as it has read the results of the last but one. A request
that arrives right after that waits for two rounds, and rounds of many drafts are long. Chosen late, the next batch is a
prefill of what has arrived meanwhile, and the device does not wait either way.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol


class DeviceClock(Protocol):
    """What is asked of :class:`round_timer.RoundTimer`."""

    def is_idle(self) -> bool:
        """Whether the device has finished all rounds."""
        ...

    def since_begin(self) -> float | None:
        """Seconds since the device has begun with the round launched last; None if it has not."""
        ...


class Lead:
    """How long an iteration takes on the host until the device gets the first work of its batch: what nine of ten take.

    It follows the times of iterations by small steps of its own size, so that no single one matters.
    """

    SHARE, STEP = 0.9, 0.1
    LEAST_S, MOST_S = 0.0002, 0.05

    def __init__(self) -> None:
        self.seconds = 0.003

    def note(self, seconds: float) -> None:
        """An iteration has taken so long."""
        share = self.SHARE if seconds > self.seconds else self.SHARE - 1
        self.seconds = min(max(self.seconds * (1 + self.STEP * share), self.LEAST_S), self.MOST_S)


class LaunchTime:
    """Waits until the next batch has to be chosen."""

    #: What rounds may differ from what is expected of them.
    TOLERANCE = 0.02
    #: The longest wait between two looks at the device.
    TICK_S = 0.001

    def __init__(self, device: DeviceClock) -> None:
        self._device = device
        self._leads: defaultdict[int, Lead] = defaultdict(Lead)
        self._prefill_lead = Lead()
        self._iteration_at: float | None = None
        #: Of the batch launched last, if it is a round whose time is known: seconds, and the lead of its size.
        self._round: tuple[float, Lead] | None = None

    @property
    def leads(self) -> dict[str, float]:
        """Seconds, by number of requests ("4-7"), and of prefills."""
        rounds = {f"{1 << bits >> 1}-{(1 << bits) - 1}": lead.seconds for bits, lead in sorted(self._leads.items())}
        return {**rounds, "prefill": self._prefill_lead.seconds}

    def note_prefill(self) -> None:
        """A prefill is about to be launched."""
        self._note_time(self._prefill_lead)
        self._round = None

    def note_round(self, seconds: float | None = None, requests: int = 0, waits_for_results: bool = False) -> None:
        """A round is about to be launched.

        Args:
            seconds: that the device will take, None if that is not known.
            waits_for_results: of the round before; what the iteration takes then says nothing about the host.
        """
        self._round = None if seconds is None else (seconds, self._leads[requests.bit_length()])
        if waits_for_results:
            self._iteration_at = None

    def note_first_launch(self) -> None:
        """The device has been given the first forward of the round."""
        if self._round is not None:
            self._note_time(self._round[1])

    def end_iteration(self, arrived: Callable[[float], bool] | None) -> None:
        """Wait until the batch after the one in flight has to be chosen; not if the end of that one is not known.

        What arrives in the wait becomes one batch, which is chosen as early as a prefill has to be.

        Args:
            arrived: waits for so many seconds at most; whether there is something to receive. None: do not wait.
        """
        if arrived is not None and self._round is not None:
            seconds, lead = self._round
            elapsed = self._device.since_begin()
            if elapsed is not None:
                self._wait(time.perf_counter() + seconds * (1 - self.TOLERANCE) - elapsed, lead, arrived)
        self._iteration_at = time.perf_counter()

    def _wait(self, end: float, lead: Lead, arrived: Callable[[float], bool]) -> None:
        due, has_arrived = end - lead.seconds, False
        while time.perf_counter() < due - self.TICK_S and not self._device.is_idle():
            if has_arrived:
                time.sleep(self.TICK_S)
            elif arrived(self.TICK_S):
                has_arrived = True
                due = end - max(lead.seconds, self._prefill_lead.seconds)

    def _note_time(self, lead: Lead) -> None:
        """What the iteration has taken up to now; once in an iteration."""
        if self._iteration_at is not None:
            lead.note(time.perf_counter() - self._iteration_at)
            self._iteration_at = None
