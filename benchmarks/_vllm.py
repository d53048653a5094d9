"""vLLM (0.26.0) as an engine of ``throughput.py``, in a Python that need not have SGLang."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from _common import OutOfTime, Progress, Served

#: What is read of vLLM's metrics, and its names there.
COUNTERS = {
    "generated": "vllm:generation_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
    "preemptions": "vllm:num_preemptions",
    "running": "vllm:num_requests_running",
}
#: Between two looks at how far an engine is.
SAMPLE_SECONDS = 0.5


class VllmEngine:
    """``vllm.LLM`` with the methods of ``sglang.Engine`` that ``throughput.py`` calls.

    Attributes:
        figures: accept length and retractions of the last :meth:`serve` or :meth:`generate`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        # The record's stamp has initialised CUDA in this process already, after which a fork cannot use it.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM

        self.llm = LLM(**settings)
        self.figures: dict[str, Any] = {}

    def generate(self, input_ids: Sequence[list[int]], sampling_params: dict[str, Any]) -> list[dict[str, Any]]:
        """Outputs of all prompts, sent at once."""
        return self.serve(input_ids, sampling_params, len(input_ids), float("inf")).outputs

    def serve(
        self, prompts: Sequence[list[int]], sampling: dict[str, Any], at_once: int, deadline: float = float("inf")
    ) -> Served:
        """Answer all prompts (token ids), ``at_once`` of them at a time, in the order given.

        Args:
            sampling: ``temperature``, ``max_new_tokens`` and ``ignore_eos``, as for SGLang.
            deadline: ``time.time()``.

        Raises:
            OutOfTime: the deadline came first; the requests are aborted.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=sampling["temperature"],
            max_tokens=sampling["max_new_tokens"],
            ignore_eos=sampling["ignore_eos"],
        )
        before = self.counts()
        started = time.time()
        progress = [Progress(started, before["generated"], 0)]
        sent: list[str] = []
        finished: list[Any] = []
        turns = drains = None
        full = False
        while len(finished) < len(prompts):
            while len(sent) < len(prompts) and len(sent) - len(finished) < at_once:
                sent += self.llm.enqueue([{"prompt_token_ids": prompts[len(sent)]}], params, use_tqdm=False)
            if (now := time.time()) > deadline:
                self.llm.llm_engine.abort_request(sent, internal=True)
                raise OutOfTime
            if not full or now - progress[-1].t >= SAMPLE_SECONDS:
                counts = self.counts()
                progress.append(Progress(now, counts["generated"], round(counts["running"])))
                full = full or progress[-1].running >= at_once
            finished += [output for output in self.llm.llm_engine.step() if output.finished]
            if turns is None and finished:
                turns = time.time()
            if drains is None and len(prompts) - len(finished) < min(at_once, len(prompts)):
                drains = time.time()
        ended = time.time()
        after = self.counts()
        progress.append(Progress(ended, after["generated"], 0))
        self.figures = figures_between(before, after)
        # vLLM numbers requests in the order in which they come.
        finished.sort(key=lambda output: int(output.request_id))
        outputs = [_as_sglang(output) for output in finished]
        return Served(outputs, progress, started, turns or ended, drains or ended, ended)

    def counts(self) -> dict[str, float]:
        """Sums over the engine's life, and the requests that run; 0 of what it does not count, as without speculation."""
        found = dict.fromkeys(COUNTERS, 0.0)
        names = {theirs: ours for ours, theirs in COUNTERS.items()}
        for metric in self.llm.get_metrics():
            if metric.name in names:
                found[names[metric.name]] += metric.value
        return found

    def flush_cache(self) -> SimpleNamespace:
        """Drop cached prefixes; ``success`` as in SGLang's answer."""
        return SimpleNamespace(success=self.llm.reset_prefix_cache())

    def get_server_info(self) -> dict[str, Any]:
        """Nothing is known of the engine's inside."""
        return {"internal_states": [{}]}

    def shutdown(self) -> None:
        """End the engine's processes."""
        self.llm.llm_engine.engine_core.shutdown()


def figures_between(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """Accept length and retractions between two :meth:`VllmEngine.counts`.

    The accept length is tokens over a request's forwards, as SGLang has it: every forward gives a token beside the drafts
    that it accepts, those without drafts too. (vLLM's own log leaves these out.) It is None where nothing was accepted.
    """
    generated, accepted = (after[name] - before[name] for name in ("generated", "accepted"))
    return {
        "accept_length": round(generated / (generated - accepted), 3) if accepted else None,
        "retractions": round(after["preemptions"] - before["preemptions"]),
    }


def _as_sglang(output: Any) -> dict[str, Any]:
    (only,) = output.outputs
    ids = list(only.token_ids)
    return {"output_ids": ids, "meta_info": {"completion_tokens": len(ids)}}
