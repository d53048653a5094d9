"""Phases of requests in staggered rounds: which request verifies in which forward.

A staggered round is W = k + 1 forwards, one scheduler iteration of SGLang. Every request
verifies in exactly one of them, the forward of its phase, and drafts in the others: before
it the rest of its k drafts, after it the first drafts of its next window. With level phases
every forward holds the same number of verifications, and of drafts.

Pure host arithmetic: what is accepted is not known here and not needed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StaggeredForward:
    """Work of one forward; requests are named by their row of ``req_to_token``.

    Attributes:
        drafts: (row, offset): feed window token ``offset``, which gives token ``offset`` + 1.
        verifications: (row, number of drafts in the window).
    """

    drafts: tuple[tuple[int, int], ...]
    verifications: tuple[tuple[int, int], ...]

    def tokens(self, window: int) -> int:
        """Tokens that the model's forward takes."""
        return len(self.drafts) + window * len(self.verifications)


@dataclass
class _Placement:
    """What is known of a row between rounds.

    Attributes:
        owner: identity of the request that the drafts belong to.
        drafted: drafts made since the last verification.
    """

    owner: Hashable
    phase: int
    drafted: int


class UnifiedSchedule:
    """Keeps the phases of the running requests level (fullest and emptiest differ by at most one).

    Args:
        window: W.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._placements: dict[int, _Placement] = {}
        self._signature: tuple[tuple[int, int, int], ...] | None = None
        self._plan: tuple[StaggeredForward, ...] = ()

    def forget(self, rows: Iterable[int]) -> None:
        """Requests of ``rows`` begin anew (prefill: new, retracted or restored ones)."""
        for row in rows:
            self._placements.pop(row, None)

    def lose_drafts(self, rows: Iterable[int]) -> None:
        """The drafts of ``rows`` are void (a lock-step round ran, or their KV was freed); the phases stay."""
        for row in rows:
            if row in self._placements:
                self._placements[row].drafted = 0

    def phase(self, row: int) -> int:
        """Phase of a placed request."""
        return self._placements[row].phase

    def plan_round(self, requests: Sequence[tuple[int, Hashable]]) -> tuple[StaggeredForward, ...]:
        """Place and level the batch, and lay out its next round.

        Args:
            requests: (row, owner) of each; a row whose owner has changed is a new request.

        Returns:
            W forwards; the same object as last time if nothing has changed.
        """
        placements = self._place(requests)
        self._level(placements)
        signature = tuple((row, p.phase, p.drafted) for row, p in placements.items())
        if signature != self._signature:
            self._signature = signature
            self._plan = tuple(self._forward(placements, index) for index in range(self.window))
        for placement in placements.values():
            placement.drafted = self.window - 1 - placement.phase
        return self._plan

    def _counts(self, placements: Iterable[_Placement]) -> list[int]:
        counts = [0] * self.window
        for placement in placements:
            counts[placement.phase] += 1
        return counts

    def _place(self, requests: Sequence[tuple[int, Hashable]]) -> dict[int, _Placement]:
        """Placements of the batch by row, new requests put greedily into the emptiest phases."""
        for row, owner in requests:
            if row in self._placements and self._placements[row].owner != owner:
                del self._placements[row]
        counts = self._counts(self._placements[row] for row, _ in requests if row in self._placements)
        for row, owner in requests:
            if row not in self._placements:
                # A new request has no drafts yet: of equal phases the latest lets it make most.
                phase = min(range(self.window), key=lambda p: (counts[p], -p))
                self._placements[row] = _Placement(owner, phase, 0)
                counts[phase] += 1
        return {row: self._placements[row] for row, _ in requests}

    def _level(self, placements: dict[int, _Placement]) -> None:
        """Move requests from the fullest to the emptiest phases until these differ by at most one.

        Verifying later once costs a request nothing but idle forwards: it has its k drafts and
        waits. Verifying earlier once costs it the drafts that it had no time for. So later moves
        come first, then short ones.
        """
        counts = self._counts(placements.values())
        while max(counts) - min(counts) > 1:
            full = [p for p, count in enumerate(counts) if count == max(counts)]
            empty = [p for p, count in enumerate(counts) if count == min(counts)]
            source, target = min(
                ((a, b) for a in full for b in empty), key=lambda move: (max(0, move[0] - move[1]), abs(move[0] - move[1]))
            )
            # Of the phase's requests the newest in the batch: any would do, this one is deterministic.
            moved = [p for p in placements.values() if p.phase == source][-1]
            moved.phase = target
            counts[source] -= 1
            counts[target] += 1

    def _forward(self, placements: dict[int, _Placement], index: int) -> StaggeredForward:
        drafts, verifications = [], []
        k = self.window - 1
        for row, placement in placements.items():
            phase, drafted = placement.phase, placement.drafted
            if index == phase:
                verifications.append((row, min(k, drafted + phase)))
            elif index > phase:
                drafts.append((row, index - phase - 1))
            elif drafted + index < k:
                drafts.append((row, drafted + index))
        return StaggeredForward(tuple(drafts), tuple(verifications))


def forward_capacity(batch: int, window: int) -> tuple[int, int]:
    """Most (drafts, verifications) that one forward of a level batch of up to ``batch`` requests holds.

    Level phases hold floor(B/W) or ceil(B/W) requests each; both bounds grow with B, so they hold for
    every smaller batch too.
    """
    return batch - batch // window, -(-batch // window)
