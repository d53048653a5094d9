"""What drafting did: acceptance histogram and share of KV read.

Accept length and rate are SGLang's own metrics. Added here, to the log at SGLang's
interval, to ``/server_info`` (``internal_states``) and to Prometheus:

- ``sparsespec:accepted_drafts_total{count="n"}``: verifications that accepted n drafts;
- ``sparsespec:kv_read_share``: KV tokens that draft steps attended to, divided by those
  that full attention would have, since the start of the server.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)


class DraftMetrics:
    """Counters of one worker.

    Attributes:
        histogram: histogram[n] verifications accepted n of the k drafts.
        drafted: drafts made, summed over verifications; k each unless the policy drafts fewer. (Where
            requests of a round differ, the most that one of them could have.)
    """

    def __init__(self, num_steps: int, kv_read: torch.Tensor) -> None:
        self.histogram = [0] * (num_steps + 1)
        self.drafted = 0
        self._kv_read = kv_read
        pinned = kv_read.is_cuda
        self._kv_read_cpu = torch.zeros(2, dtype=kv_read.dtype, pin_memory=pinned)
        self._prometheus: tuple[Any, Any] | None = None
        self._exported = [0] * (num_steps + 1)

    def count(self, num_correct_drafts: list[int], num_drafted: int) -> None:
        """Account one verification per request, of ``num_drafted`` drafts each."""
        for accepted in num_correct_drafts:
            self.histogram[accepted] += 1
        self.drafted += num_drafted * len(num_correct_drafts)

    def refresh(self, wait: bool = False) -> None:
        """Fetch the device's counters; without ``wait`` they arrive for a later read."""
        self._kv_read_cpu.copy_(self._kv_read, non_blocking=not wait)
        if wait and self._kv_read.is_cuda:
            torch.cuda.current_stream().synchronize()

    @property
    def kv_read_share(self) -> float:
        """KV tokens read while drafting / those of full attention; 0 before any draft."""
        read, full = self._kv_read_cpu.tolist()
        return read / full if full else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The values under the names used in ``/server_info``."""
        rounds = sum(self.histogram)
        accepted = sum(n * count for n, count in enumerate(self.histogram))
        return {
            "sparsespec_accept_histogram": list(self.histogram),
            "sparsespec_accept_length": 1 + accepted / rounds if rounds else 0.0,
            "sparsespec_draft_length": self.drafted / rounds if rounds else 0.0,
            "sparsespec_kv_read_share": self.kv_read_share,
            "sparsespec_kv_tokens_read": int(self._kv_read_cpu[0]),
            "sparsespec_kv_tokens_full": int(self._kv_read_cpu[1]),
        }

    def log(self) -> None:
        """One line beside SGLang's decode line."""
        logger.info(
            "SPARSESPEC draft: accepted histogram (0 to k): %s, KV read: %.2f%%",
            self.histogram,
            100 * self.kv_read_share,
        )

    def export(self, labels: dict[str, str]) -> None:
        """Update the Prometheus metrics, with SGLang's labels."""
        if self._prometheus is None:
            # SGLang sets PROMETHEUS_MULTIPROC_DIR before prometheus_client may be imported.
            from prometheus_client import Counter, Gauge

            accepted = Counter(
                "sparsespec:accepted_drafts",
                "Verifications by the number of drafts they accepted.",
                labelnames=[*labels, "count"],
            )
            share = Gauge(
                "sparsespec:kv_read_share",
                "KV tokens read while drafting, relative to full attention.",
                labelnames=list(labels),
                multiprocess_mode="mostrecent",
            )
            self._prometheus = (accepted, share)
        accepted, share = self._prometheus
        for n, total in enumerate(self.histogram):
            accepted.labels(**labels, count=str(n)).inc(total - self._exported[n])
            self._exported[n] = total
        share.labels(**labels).set(self.kv_read_share)
