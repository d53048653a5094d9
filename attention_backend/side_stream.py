"""Work beside the current CUDA stream; it can be captured into graphs, where it becomes a parallel branch.

Forwards of the unified schedule use it: draft attention runs beside verification, and selection beside the rest of the
layer. ``docs/results-archive.md`` says what that gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A second stream of ``device``. Without CUDA, or if not ``enabled``, everything runs in order.

    Work in :meth:`beside` starts once everything issued before it is done, and in the order it was issued. Nothing
    may rely on it, or free what it reads, before :meth:`join`.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self._stream = torch.cuda.Stream(device) if enabled and device.type == "cuda" else None
        self._has_work = False

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched within runs beside what is launched afterwards."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._has_work = True
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is launched from now on waits for all work beside.

        Without such work nothing is launched: a graph that is being captured may not wait for a stream that is no branch
        of it.
        """
        if self._stream is not None and self._has_work:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._has_work = False
