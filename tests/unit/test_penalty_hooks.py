"""Which of SGLang's own ways with penalties and custom logit processors are off, and when."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from penalty_checks import KINDS, VOCAB, Namespace, request
from sglang.srt.layers import sampler
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.sampling.penaltylib import BatchedPenalizerOrchestrator
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang_parts import processor_entry

from sglang_sparsespec import ALGORITHM
from sglang_sparsespec.scheduler_patch.penalties import leave_a_possible_token

pytestmark = pytest.mark.usefixtures("plugin")


@pytest.fixture
def serving(serving_args: Callable[[Any], None], resolve: Callable[..., Any]) -> None:
    """This process serves SPARSESPEC on CPU."""
    serving_args(resolve())


@pytest.fixture
def serving_plain(serving_args: Callable[[Any], None], llama: str) -> None:
    """This process serves on CPU without speculation."""
    serving_args(ServerArgs(model_path=llama, device="cpu"))


def orchestrator() -> BatchedPenalizerOrchestrator:
    batch: Any = Namespace(reqs=[request(1, {"frequency_penalty": 0.5, "min_new_tokens": 3})], device="cpu")
    return BatchedPenalizerOrchestrator(vocab_size=VOCAB, batch=batch, penalizers=set(KINDS))


def test_sglangs_penalizers_are_off(serving: None) -> None:
    """Two batches are merged, of which both have penalties."""
    made = orchestrator()
    assert not made.is_required
    made.merge(orchestrator())
    made.cumulate_output_tokens(torch.tensor([1, 2]))
    logits = torch.zeros(2, VOCAB)
    made.apply(logits)
    assert not made.is_required and not logits.any()


def test_sglangs_penalizers_stay_on_without_the_algorithm(serving_plain: None) -> None:
    assert orchestrator().is_required


def overlaps(algorithm: str | None, mode: ForwardMode, processor: bool, pending: int) -> bool:
    """Whether SGLang launches a batch before the results of the one before."""
    scheduler: Any = object.__new__(Scheduler)
    scheduler.require_mlp_sync = False
    scheduler.result_queue = deque([None] * pending)
    scheduler.server_args = SimpleNamespace(speculative_algorithm=algorithm)
    batch: Any = SimpleNamespace(
        forward_mode=mode,
        spec_algorithm=SpeculativeAlgorithm.from_string(algorithm or "NONE"),
        grammar_needs_sync=lambda: False,
        sampling_info=SimpleNamespace(has_custom_logit_processor=processor),
    )
    return not scheduler.is_disable_overlap_for_batch(batch, last_batch=None)


def test_a_decode_batch_with_a_processor_waits_for_its_output() -> None:
    assert not overlaps(ALGORITHM, ForwardMode.DECODE, processor=True, pending=1)
    assert overlaps(ALGORITHM, ForwardMode.DECODE, processor=True, pending=0)
    assert overlaps(ALGORITHM, ForwardMode.DECODE, processor=False, pending=1)
    assert overlaps(ALGORITHM, ForwardMode.EXTEND, processor=True, pending=1)
    assert overlaps(None, ForwardMode.DECODE, processor=True, pending=1)


def info_with(processors: dict[int, Any], reqs: list[Any]) -> SamplingBatchInfo:
    ones = torch.ones(len(reqs))
    info = SamplingBatchInfo(
        temperatures=ones.unsqueeze(1), top_ps=ones, top_ks=ones, min_ps=ones, is_all_greedy=True, is_any_greedy=True,
        need_top_p_sampling=False, need_top_k_sampling=False, need_min_p_sampling=False, vocab_size=VOCAB,
        has_custom_logit_processor=True, custom_logit_processor=processors, custom_params=[None] * len(reqs), device="cpu",
    )  # fmt: skip
    info.reqs = reqs  # type: ignore[attr-defined]
    return info


def test_a_processor_that_fails_ends_its_own_requests(serving: None) -> None:
    def fail(logits: torch.Tensor, params: Any) -> torch.Tensor:
        logits.zero_()
        raise KeyError("token_ids")

    def double(logits: torch.Tensor, params: Any) -> torch.Tensor:
        return 2 * logits

    reqs = [SimpleNamespace(to_finish=None) for _ in range(3)]
    entries = {1: processor_entry(fail, [True, False, False]), 2: processor_entry(double, [False, False, True])}
    logits = torch.ones(3, VOCAB)
    sampler.apply_custom_logit_processor(logits, info_with(entries, reqs))
    assert logits[:, 0].tolist() == [1, 1, 2]
    assert reqs[1].to_finish is None and reqs[2].to_finish is None
    assert reqs[0].to_finish.status_code == 400 and "KeyError: 'token_ids'" in reqs[0].to_finish.message


def test_a_processor_that_fails_ends_sglangs_scheduler(serving_plain: None) -> None:
    def fail(logits: torch.Tensor, params: Any) -> torch.Tensor:
        raise KeyError("token_ids")

    info = info_with({1: processor_entry(fail, [True])}, [SimpleNamespace()])
    with pytest.raises(KeyError):
        sampler.apply_custom_logit_processor(torch.ones(1, VOCAB), info)


def test_a_row_without_a_possible_token_may_give_any() -> None:
    runner = SimpleNamespace(server_args=SimpleNamespace(speculative_algorithm=ALGORITHM))
    logits = torch.tensor([[1.0, -torch.inf], [-torch.inf, -torch.inf]])
    leave_a_possible_token(None, runner, SimpleNamespace(next_token_logits=logits))
    assert logits.tolist() == [[1.0, -torch.inf], [0.0, 0.0]]
