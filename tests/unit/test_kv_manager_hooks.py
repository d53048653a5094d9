"""What the KV manager changes in SGLang's scheduler, with a host tier and without."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kv_worlds import World
from sglang.srt.managers import schedule_policy
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import NewTokenRatioTracker
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_sparsespec.scheduler_patch.kv_manager import manager as manager_module
from sglang_sparsespec.scheduler_patch.kv_manager.hooks import ADMISSION_FACTOR
from sglang_sparsespec.scheduler_patch.kv_manager.manager import KVManager
from sglang_sparsespec.sglang_compat import HAS_UNIFIED_TREE


@pytest.fixture(params=[0.5, 0.0], ids=["host tier", "no host tier"])
def host_kv_gb(request: pytest.FixtureRequest, serving_args: Callable[[Any], None], resolve: Callable[..., Any]) -> float:
    serving_args(resolve(sparsespec_host_kv_gb=request.param))
    return request.param


def test_a_host_tier_keeps_a_part_of_the_longest_output_free_for_each_request(host_kv_gb: float) -> None:
    tracker = NewTokenRatioTracker(init=0.7, min=0.1, decay=0.001, current=0.7)
    assert (tracker.current == tracker.min == 1 / ADMISSION_FACTOR) == (host_kv_gb > 0)


def test_with_a_host_tier_a_fixed_length_is_no_reason_to_keep_more_free(host_kv_gb: float) -> None:
    adder: Any = SimpleNamespace(new_token_ratio=0.25)
    rooms = []
    for ignore_eos in (False, True):
        req = Req("r", "", array("q", [1]), SamplingParams(max_new_tokens=100, ignore_eos=ignore_eos))
        rooms.append(schedule_policy.PrefillAdder._get_running_request_total_token_offset(adder, req))
    assert rooms[0] == 25
    assert rooms[1] == (100 if HAS_UNIFIED_TREE and not host_kv_gb else 25)


def test_a_host_pool_that_cannot_be_had_is_explained_by_its_flag(host_kv_gb: float) -> None:
    with pytest.raises((RuntimeError, ValueError), match="host memory") as error:
        World(host_tokens=10**13)
    assert ("--sparsespec-host-kv-gb" in str(error.value)) == (host_kv_gb > 0)


def test_rounds_that_wait_for_the_relay_of_returning_requests_wait_for_the_round_in_flight_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    relay = SimpleNamespace(
        publish_ready=SimpleNamespace(wait=lambda: calls.append("wait")),
        publish=lambda *args: calls.append("publish"),
        stash=lambda *args: calls.append("stash"),
    )
    parts = dict.fromkeys(("req_to_token_pool", "token_to_kv_pool_allocator", "tree_cache", "spec_algorithm"))
    model = SimpleNamespace(vocab_size=10)
    scheduler: Any = SimpleNamespace(**parts, model_config=model, enable_overlap=True, future_map=relay)
    req = SimpleNamespace(req_pool_idx=3, kv_committed_len=7, output_ids=[5], multimodal_inputs=None)
    req.kv = req
    for name, made in (
        ("ScheduleBatch.init_new", SimpleNamespace(device="cpu", return_logprob=False)),
        ("SamplingBatchInfo.from_schedule_batch", None),
        ("RelayPayload.from_draft_input", None),
    ):
        owner, _, attribute = name.partition(".")
        monkeypatch.setattr(getattr(manager_module, owner), attribute, lambda *args, made=made: made)
    manager: Any = SimpleNamespace(scheduler=scheduler)
    batch = KVManager._decode_batch(manager, [req])  # type: ignore[list-item]
    assert calls == ["wait", "publish", "stash"]
    assert batch.req_pool_indices.tolist() == [3] and batch.seq_lens.tolist() == [7]
    assert torch.equal(batch.spec_info.bonus_tokens, torch.tensor([5]))
