"""What draft steps, plain steps and verifications take at a load, from a table of times.

The table is made at start-up (:mod:`measurement`). It holds the forwards alone: drawing tokens, penalties and whatever
else a round launches beside them are not in it, the planner corrects for them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


@dataclass(frozen=True)
class PointTimes:
    """One point of the table: seconds of each forward of ``batch`` requests of ``context`` tokens."""

    batch: int
    context: int
    draft: float
    verify: float
    plain: float


class RoundTimes:
    """Times at any load, between the points of the table and beyond.

    A forward takes a + b * requests + c * tokens of all contexts, more or less, with other a, b and c for draft steps,
    whose contexts are budgets. Each batch size of the table has its own line of pieces over the mean context, and between
    batch sizes time is linear at the same mean context, so that this form is met exactly. Below the table time is that of
    its edge, above it the last piece goes on.

    Args:
        points: at least one.
        sizes: batch sizes that graphs are captured for, ascending. Batches run at the next larger one, padded with
            requests of no tokens; larger batches, and all if none is captured, run at their own size.
    """

    def __init__(self, points: Iterable[PointTimes], sizes: Sequence[int] = ()) -> None:
        self.points = tuple(sorted(points, key=lambda point: (point.batch, point.context)))
        if not self.points:
            raise ValueError("a table of times needs a point")
        self._sizes = tuple(sizes)
        self._by_batch: dict[int, list[PointTimes]] = {}
        for point in self.points:
            self._by_batch.setdefault(point.batch, []).append(point)

    def draft(self, load: Load) -> float:
        """Seconds of one draft step."""
        return self._at(load, lambda point: point.draft)

    def verify(self, load: Load) -> float:
        """Seconds of the verification of a window of W tokens per request."""
        return self._at(load, lambda point: point.verify)

    def plain(self, load: Load) -> float:
        """Seconds of one plain step."""
        return self._at(load, lambda point: point.plain)

    def longest_context(self, requests: int) -> int:
        """The longest context of which times are known at the batch sizes next to so many requests."""
        batches = sorted(self._by_batch)
        above = min(bisect.bisect_left(batches, requests), len(batches) - 1)
        below = above if batches[above] <= requests else max(above - 1, 0)
        return min(self._by_batch[batches[index]][-1].context for index in (below, above))

    def _at(self, load: Load, seconds: Callable[[PointTimes], float]) -> float:
        index = bisect.bisect_left(self._sizes, load.requests)
        size = self._sizes[index] if index < len(self._sizes) else max(load.requests, 1)
        # Padding has no tokens: the batch that is run has a smaller mean context.
        context = load.tokens / size
        lines = [
            (float(batch), piecewise([(float(point.context), seconds(point)) for point in points], context))
            for batch, points in self._by_batch.items()
        ]
        return piecewise(lines, size)


def piecewise(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at ``x`` of the line through ``points`` (x ascending, y): flat below them, and going on above them.

    Above, it does not fall: a slope that noise has made negative is taken as 0.
    """
    xs = [point[0] for point in points]
    if x <= xs[0] or len(points) == 1:
        return points[0][1]
    right = min(bisect.bisect_left(xs, x), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    slope = (y1 - y0) / (x1 - x0)
    if x > x1:
        return y1 + max(slope, 0.0) * (x - x1)
    return y0 + slope * (x - x0)
