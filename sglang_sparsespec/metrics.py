"""Metrics: counters that are told what happened, and their way to the log, ``/server_info`` and Prometheus.

Accept length and rate are SGLang's own metrics. Added here are those of ``DRAFT_METRICS`` and, with a host tier,
``KV_METRICS``. In ``/server_info`` (``internal_states``) a metric is called ``sparsespec_<name>``, in Prometheus
``sparsespec:<name>``, with ``_total`` behind counters.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        kind: "gauge", "counter", or "value" for what only ``/server_info`` shows.
    """

    name: str
    kind: str
    meaning: str


DRAFT_METRICS = (
    Metric("accept_length", "value", "Mean accepted drafts + 1 bonus token per verification."),
    Metric("accept_histogram", "value", "Entry n: verifications that accepted n drafts."),
    Metric("draft_length", "value", "Mean drafts per verification."),
    Metric("draft_length_histogram", "value", "Entry n: rounds that drafted n tokens per request; 0: plain rounds."),
    Metric("kv_tokens_read", "value", "KV tokens that draft queries attended to."),
    Metric("kv_tokens_full", "value", "KV tokens that full attention would have read for them."),
    Metric("kv_read_share", "gauge", "KV tokens read while drafting, relative to full attention."),
    Metric("forward_tokens", "gauge", "Mean tokens of a decode forward."),
    Metric("forward_tokens_variation", "gauge", "Coefficient of variation of the tokens of decode forwards."),
    Metric("verify_share", "gauge", "Tokens of verify windows, relative to all tokens of decode forwards."),
    Metric(
        "lockstep_rounds",
        "counter",
        "Rounds of the unified schedule that ran in lock-step because of what their batch asked for.",
    ),
    Metric("interleaved_rounds", "counter", "Decode rounds that ran before a prefill batch that could have gone on."),
    Metric("plain_rounds", "counter", "Rounds that decoded plainly instead of speculating."),
    Metric("single_steps", "counter", "Of these, rounds of one token because of a custom logit processor in their batch."),
)
#: Prometheus only, with the label ``count``: its values are those of ``accept_histogram``.
ACCEPTED_DRAFTS = Metric("accepted_drafts", "counter", 'Verifications by the number of drafts accepted (`count="n"`).')
#: Prometheus only, with the label ``count``: its values are those of ``draft_length_histogram``.
DRAFT_LENGTHS = Metric("draft_lengths", "counter", 'Rounds by the number of drafts per request (`count="n"`; 0: plain).')
KV_METRICS = (
    Metric("kv_utilisation", "gauge", "Share of the device's KV pool that requests on the device hold, now."),
    Metric("kv_requests_offloaded", "counter", "Requests moved to the host."),
    Metric("kv_requests_restored", "counter", "Requests moved back into the batch."),
    Metric("kv_bytes_to_host", "counter", "Bytes copied to the host."),
    Metric(
        "kv_bytes_from_host",
        "counter",
        "Bytes copied back; what is still on the device when its request returns is not copied.",
    ),
    Metric("kv_requests_retracted", "counter", "Requests that had to be retracted all the same."),
    Metric("kv_tokens_recomputed", "counter", "Tokens that were prefilled again for retracted requests."),
    Metric("kv_host_full", "counter", "Requests that the host had no room for: a larger tier would help."),
    Metric("kv_transfer_waits", "counter", "Rounds that waited for a copy."),
)


def describe() -> list[tuple[str, str, str]]:
    """Name, kind and meaning of every metric, for the documentation."""
    metrics = (*DRAFT_METRICS, ACCEPTED_DRAFTS, DRAFT_LENGTHS, *KV_METRICS)
    return [(metric.name, metric.kind, metric.meaning) for metric in metrics]


class Exporter:
    """Exports totals and gauges to Prometheus.

    Args:
        metrics: those of kind "value" are left out.
    """

    def __init__(self, metrics: tuple[Metric, ...]) -> None:
        self._metrics = metrics
        self._registered: dict[str, Any] = {}
        self._exported: dict[str, float] = {}

    def export(self, labels: dict[str, str], values: Mapping[str, Any]) -> None:
        """Update the metrics with SGLang's ``labels``; ``values`` are those of ``/server_info``."""
        # SGLang sets PROMETHEUS_MULTIPROC_DIR before prometheus_client may be imported.
        from prometheus_client import Counter, Gauge

        if not self._registered:
            for metric in self._metrics:
                name, names = f"sparsespec:{metric.name}", list(labels)
                if metric.kind == "counter":
                    self._registered[metric.name] = Counter(name, metric.meaning, labelnames=names)
                elif metric.kind == "gauge":
                    self._registered[metric.name] = Gauge(
                        name, metric.meaning, labelnames=names, multiprocess_mode="mostrecent"
                    )
        for name, registered in self._registered.items():
            value = values[f"sparsespec_{name}"]
            if isinstance(registered, Gauge):
                registered.labels(**labels).set(value)
            else:
                registered.labels(**labels).inc(value - self._exported.get(name, 0))
                self._exported[name] = value


class HistogramExporter:
    """Exports a histogram to Prometheus, as a counter with the label ``count``."""

    def __init__(self, metric: Metric, entries: int) -> None:
        self._metric = metric
        self._exported = [0] * entries
        self._registered: Any = None

    def export(self, labels: dict[str, str], histogram: Sequence[int]) -> None:
        """Update the counter with SGLang's ``labels``."""
        from prometheus_client import Counter

        if self._registered is None:
            name = f"sparsespec:{self._metric.name}"
            self._registered = Counter(name, self._metric.meaning, labelnames=[*labels, "count"])
        for n, total in enumerate(histogram):
            self._registered.labels(**labels, count=str(n)).inc(total - self._exported[n])
            self._exported[n] = total


class DraftMetrics:
    """Counters of one worker.

    Args:
        kv_read: float64 [2] on the device; KV tokens that draft queries attended to, and those of full attention.

    Attributes:
        histogram: entry n counts the verifications that accepted n drafts.
        draft_lengths: entry n counts the rounds that drafted n tokens per request, 0 the plain ones.
        drafted: drafts made, summed over verifications. (Where requests of a round differ, the most that one of them
            could have.)
    """

    def __init__(self, num_steps: int, kv_read: torch.Tensor) -> None:
        self.histogram = [0] * (num_steps + 1)
        self.draft_lengths = [0] * (num_steps + 1)
        self.drafted = 0
        self._lockstep_rounds = 0
        self._single_steps = 0
        self._interleaved_rounds = 0
        self._forwards = 0
        self._tokens = 0
        self._squares = 0
        self._verify_tokens = 0
        self._kv_read = kv_read
        self._kv_read_cpu = torch.zeros(2, dtype=kv_read.dtype, pin_memory=kv_read.is_cuda)
        self._exporter = Exporter(DRAFT_METRICS)
        self._histogram_exporter = HistogramExporter(ACCEPTED_DRAFTS, num_steps + 1)
        self._draft_lengths_exporter = HistogramExporter(DRAFT_LENGTHS, num_steps + 1)

    # ------------------------------------------------------------------------ events

    def note_forward(self, draft_tokens: int, verify_tokens: int) -> None:
        """A decode forward of so many tokens is about to be launched."""
        tokens = draft_tokens + verify_tokens
        self._forwards += 1
        self._tokens += tokens
        self._squares += tokens * tokens
        self._verify_tokens += verify_tokens

    def note_verifications(self, accepted: list[int], drafted: int) -> None:
        """One verification per request has accepted so many drafts, of ``drafted`` each."""
        for count in accepted:
            self.histogram[count] += 1
        self.drafted += drafted * len(accepted)

    def note_lockstep_round(self) -> None:
        """A round of the unified schedule had to run in lock-step."""
        self._lockstep_rounds += 1

    def note_single_step(self) -> None:
        """A round had to be one step of plain decoding."""
        self._single_steps += 1

    def note_interleaved_round(self) -> None:
        """A decode round ran between prefill batches."""
        self._interleaved_rounds += 1

    def note_round(self, drafts: int) -> None:
        """A decode round has been launched, with so many drafts per request."""
        self.draft_lengths[drafts] += 1

    # ------------------------------------------------------------------------ values

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
        """The values since the start of the server, under the names used in ``/server_info``."""
        verifications = sum(self.histogram)
        accepted = sum(n * count for n, count in enumerate(self.histogram))
        mean = self._tokens / self._forwards if self._forwards else 0.0
        variance = self._squares / self._forwards - mean * mean if self._forwards else 0.0
        values = {
            "accept_length": 1 + accepted / verifications if verifications else 0.0,
            "accept_histogram": list(self.histogram),
            "draft_length": self.drafted / verifications if verifications else 0.0,
            "draft_length_histogram": list(self.draft_lengths),
            "kv_tokens_read": int(self._kv_read_cpu[0]),
            "kv_tokens_full": int(self._kv_read_cpu[1]),
            "kv_read_share": self.kv_read_share,
            "forward_tokens": mean,
            "forward_tokens_variation": math.sqrt(max(variance, 0.0)) / mean if mean else 0.0,
            "verify_share": self._verify_tokens / self._tokens if self._tokens else 0.0,
            "lockstep_rounds": self._lockstep_rounds,
            "interleaved_rounds": self._interleaved_rounds,
            "plain_rounds": self.draft_lengths[0],
            "single_steps": self._single_steps,
        }
        return {f"sparsespec_{name}": value for name, value in values.items()}

    def log(self) -> None:
        """One line beside SGLang's decode line."""
        values = self.as_dict()
        logger.info(
            "SPARSESPEC draft: accepted histogram (0 to k): %s, KV read: %.2f%%, tokens per forward: %.1f "
            "(variation %.0f%%, verifying %.0f%%), rounds by drafts (0: plain): %s",
            self.histogram,
            100 * self.kv_read_share,
            values["sparsespec_forward_tokens"],
            100 * values["sparsespec_forward_tokens_variation"],
            100 * values["sparsespec_verify_share"],
            self.draft_lengths,
        )

    def export(self, labels: dict[str, str]) -> None:
        """Update the Prometheus metrics, with SGLang's labels."""
        self._exporter.export(labels, self.as_dict())
        self._histogram_exporter.export(labels, self.histogram)
        self._draft_lengths_exporter.export(labels, self.draft_lengths)


@dataclass
class KVManagerMetrics:
    """Counters of one scheduler's KV manager, since the start of the server; see ``KV_METRICS``.

    Attributes:
        bytes_per_token: KV bytes of one token on this rank.
        tokens_to_host, tokens_from_host: tokens copied; one that is still on the device when its request returns is not
            copied back.
    """

    bytes_per_token: int
    requests_offloaded: int = 0
    requests_restored: int = 0
    tokens_to_host: int = 0
    tokens_from_host: int = 0
    requests_retracted: int = 0
    tokens_recomputed: int = 0
    host_full: int = 0
    transfer_waits: int = 0
    _exporter: Exporter = field(default_factory=lambda: Exporter(KV_METRICS))

    def as_dict(self, kv_utilisation: float) -> dict[str, Any]:
        """The values under the names used in ``/server_info``."""
        values = {
            "utilisation": kv_utilisation,
            "requests_offloaded": self.requests_offloaded,
            "requests_restored": self.requests_restored,
            "bytes_to_host": self.tokens_to_host * self.bytes_per_token,
            "bytes_from_host": self.tokens_from_host * self.bytes_per_token,
            "requests_retracted": self.requests_retracted,
            "tokens_recomputed": self.tokens_recomputed,
            "host_full": self.host_full,
            "transfer_waits": self.transfer_waits,
        }
        return {f"sparsespec_kv_{name}": value for name, value in values.items()}

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
            self.transfer_waits,
        )

    def export(self, labels: dict[str, str], kv_utilisation: float) -> None:
        """Update the Prometheus metrics, with SGLang's labels."""
        self._exporter.export(labels, self.as_dict(kv_utilisation))
