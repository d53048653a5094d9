"""What drafting did: acceptance histogram and share of KV read.

Accept length and rate are SGLang's own metrics. Added here, to the log at SGLang's
interval, to ``/server_info`` (``internal_states``) and to Prometheus:

- ``sparsespec:accepted_drafts_total{count="n"}``: verifications that accepted n drafts;
- ``sparsespec:kv_read_share``: KV tokens that draft steps attended to, divided by those
  that full attention would have, since the start of the server;
- ``sparsespec:forward_tokens``, ``sparsespec:forward_tokens_variation``, ``sparsespec:verify_share``:
  mean tokens of a decode forward, their coefficient of variation, and the share of verify windows in them;
- ``sparsespec:lockstep_rounds_total``: rounds of the unified schedule that had to run in lock-step;
- ``sparsespec:interleaved_rounds_total``: decode rounds that ran between prefill batches (``--enable-mixed-chunk``);
- ``sparsespec:plain_rounds_total``: rounds of up to k steps that decoded plainly (``--sparsespec-speculate``);
- ``sparsespec:launch_waits_total``, ``sparsespec:late_launches_total``: launches held back until the round before was
  about to end (``scheduler_patch.late_launch``), and those of them that came after its end.

With a host tier (``--sparsespec-host-kv-gb``) also what the KV manager moved, see
:class:`KVManagerMetrics`.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import torch

from sglang_sparsespec.forward_stats import ForwardStats

if TYPE_CHECKING:
    from sglang_sparsespec.round_choice import Speculation
    from sglang_sparsespec.round_progress import RoundProgress
    from sglang_sparsespec.unified_round import UnifiedRounds

logger = logging.getLogger(__name__)

#: Names of ``/server_info`` without their prefix that are exported as gauges.
GAUGES = {
    "kv_read_share": "KV tokens read while drafting, relative to full attention.",
    "forward_tokens": "Mean tokens of a decode forward.",
    "forward_tokens_variation": "Coefficient of variation of the tokens of decode forwards.",
    "verify_share": "Tokens of verify windows, relative to all tokens of decode forwards.",
}
#: The same for counters.
COUNTERS = {
    "lockstep_rounds": "Rounds of the unified schedule that ran in lock-step because of what their batch asked for.",
    "interleaved_rounds": "Decode rounds that ran before a prefill batch that could have gone on.",
    "plain_rounds": "Rounds that decoded plainly instead of speculating.",
    "launch_waits": "Launches that were held back until the round before was about to end.",
    "late_launches": "Launches held back so long that the round before was over.",
}


class DraftMetrics:
    """Counters of one worker.

    Attributes:
        histogram: histogram[n] verifications accepted n of the k drafts.
        drafted: drafts made, summed over verifications; k each unless the policy drafts fewer. (Where
            requests of a round differ, the most that one of them could have.)
        unified: the worker's staggered rounds, None in lock-step.
        interleaved_rounds: decode rounds that ran between prefill batches (``prefill_interleave``).
    """

    def __init__(
        self,
        num_steps: int,
        kv_read: torch.Tensor,
        forward_stats: ForwardStats,
        speculation: Speculation,
        progress: RoundProgress,
    ) -> None:
        self.unified: UnifiedRounds | None = None
        self.interleaved_rounds = 0
        self._forward_stats = forward_stats
        self._speculation = speculation
        self._progress = progress
        self.histogram = [0] * (num_steps + 1)
        self.drafted = 0
        self._kv_read = kv_read
        pinned = kv_read.is_cuda
        self._kv_read_cpu = torch.zeros(2, dtype=kv_read.dtype, pin_memory=pinned)
        self._prometheus: tuple[Any, dict[str, Any], dict[str, Any]] | None = None
        self._exported_counters = dict.fromkeys(COUNTERS, 0)
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
            **self._forward_stats.as_dict(),
            "sparsespec_lockstep_rounds": self._lockstep_rounds,
            "sparsespec_interleaved_rounds": self.interleaved_rounds,
            "sparsespec_plain_rounds": self._speculation.plain_rounds,
            "sparsespec_launch_waits": self._progress.waits,
            "sparsespec_late_launches": self._progress.late_launches,
        }

    @property
    def _lockstep_rounds(self) -> int:
        return self.unified.fallbacks if self.unified is not None else 0

    def log(self) -> None:
        """One line beside SGLang's decode line."""
        forwards = self._forward_stats.as_dict()
        logger.info(
            "SPARSESPEC draft: accepted histogram (0 to k): %s, KV read: %.2f%%, tokens per forward: %.1f "
            "(variation %.0f%%, verifying %.0f%%), plain rounds: %d",
            self.histogram,
            100 * self.kv_read_share,
            forwards["sparsespec_forward_tokens"],
            100 * forwards["sparsespec_forward_tokens_variation"],
            100 * forwards["sparsespec_verify_share"],
            self._speculation.plain_rounds,
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
            counters = {
                name: Counter(f"sparsespec:{name}", text, labelnames=list(labels)) for name, text in COUNTERS.items()
            }
            gauges = {
                name: Gauge(f"sparsespec:{name}", text, labelnames=list(labels), multiprocess_mode="mostrecent")
                for name, text in GAUGES.items()
            }
            self._prometheus = (accepted, counters, gauges)
        accepted, counters, gauges = self._prometheus
        values = self.as_dict()
        for n, total in enumerate(self.histogram):
            accepted.labels(**labels, count=str(n)).inc(total - self._exported[n])
            self._exported[n] = total
        for name, counter in counters.items():
            total = values[f"sparsespec_{name}"]
            counter.labels(**labels).inc(total - self._exported_counters[name])
            self._exported_counters[name] = total
        for name, gauge in gauges.items():
            gauge.labels(**labels).set(values[f"sparsespec_{name}"])


@dataclasses.dataclass
class KVManagerMetrics:
    """Counters of one scheduler's KV manager, since the start of the server.

    Attributes:
        bytes_per_token: KV bytes of one token on this rank.
        requests_offloaded, requests_restored: moves to the host tier and back into the batch.
        tokens_to_host, tokens_from_host: tokens copied; one that is still on the device when
            its request returns is not copied back.
        requests_retracted: requests that SGLang's retraction, or a full host tier, threw away.
        tokens_recomputed: tokens that were prefilled again for retracted requests.
        host_full: stores that the host tier had no room for.
        waits: rounds that had to wait for a copy.
    """

    bytes_per_token: int
    requests_offloaded: int = 0
    requests_restored: int = 0
    tokens_to_host: int = 0
    tokens_from_host: int = 0
    requests_retracted: int = 0
    tokens_recomputed: int = 0
    host_full: int = 0
    waits: int = 0
    _exported: dict[str, int] = dataclasses.field(default_factory=dict)
    _prometheus: dict[str, Any] = dataclasses.field(default_factory=dict)

    def counters(self) -> dict[str, int]:
        """The counters by name, copies in bytes."""
        return {
            "requests_offloaded": self.requests_offloaded,
            "requests_restored": self.requests_restored,
            "bytes_to_host": self.tokens_to_host * self.bytes_per_token,
            "bytes_from_host": self.tokens_from_host * self.bytes_per_token,
            "requests_retracted": self.requests_retracted,
            "tokens_recomputed": self.tokens_recomputed,
            "host_full": self.host_full,
            "transfer_waits": self.waits,
        }

    def as_dict(self, kv_utilisation: float) -> dict[str, Any]:
        """The values under the names used in ``/server_info``."""
        values = {f"sparsespec_kv_{name}": value for name, value in self.counters().items()}
        return {**values, "sparsespec_kv_utilisation": kv_utilisation}

    def log(self, kv_utilisation: float) -> None:
        """One line beside SGLang's decode line."""
        logger.info(
            "SPARSESPEC KV manager: utilisation %.1f%%, offloaded %d and restored %d requests, "
            "%.2f GB to the host and %.2f GB back, recomputed %d tokens of %d requests, waits %d",
            100 * kv_utilisation,
            self.requests_offloaded,
            self.requests_restored,
            self.tokens_to_host * self.bytes_per_token / 1e9,
            self.tokens_from_host * self.bytes_per_token / 1e9,
            self.tokens_recomputed,
            self.requests_retracted,
            self.waits,
        )

    def export(self, labels: dict[str, str], kv_utilisation: float) -> None:
        """Update the Prometheus metrics (``sparsespec:kv_*``), with SGLang's labels."""
        from prometheus_client import Counter, Gauge

        if not self._prometheus:
            for name in self.counters():
                title = f"KV manager: {name.replace('_', ' ')}."
                self._prometheus[name] = Counter(f"sparsespec:kv_{name}", title, labelnames=list(labels))
            self._prometheus["utilisation"] = Gauge(
                "sparsespec:kv_utilisation",
                "Share of the device's KV pool that running requests hold.",
                labelnames=list(labels),
                multiprocess_mode="mostrecent",
            )
        for name, total in self.counters().items():
            self._prometheus[name].labels(**labels).inc(total - self._exported.get(name, 0))
            self._exported[name] = total
        self._prometheus["utilisation"].labels(**labels).set(kv_utilisation)
