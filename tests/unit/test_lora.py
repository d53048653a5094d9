"""What SGLang assumes of LoRA with speculation, and what steps of rounds tell its layers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.lora.backend.chunked_backend import ChunkedSgmvLoRABackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang_parts import needs_hook

from sglang_sparsespec.rounds.adapters import Adapters
from sglang_sparsespec.scheduler_patch.lora import refuse_expert_adapters
from sglang_sparsespec.sglang_compat import INIT_STATIC_ADAPTERS

pytestmark = pytest.mark.usefixtures("plugin")


class FakeManager:
    """Notes with which static tensors it was asked to prepare a batch."""

    def __init__(self) -> None:
        self.lora_backend = SimpleNamespace(cuda_graph_batch_info="of verifications")
        setattr(self.lora_backend, INIT_STATIC_ADAPTERS, self.init)
        self.fetched: list[set[str | None]] = []
        self.prepared: list[tuple[str, list[str | None]]] = []

    def init(self, max_bs_in_cuda_graph: int, num_tokens_per_req: int) -> None:
        self.lora_backend.cuda_graph_batch_info = f"{max_bs_in_cuda_graph} x {num_tokens_per_req}"

    def fetch_new_loras(self, lora_ids: set[str | None]) -> None:
        self.fetched.append(lora_ids)

    def prepare_lora_batch(self, batch: Any) -> None:
        assert batch.forward_mode == ForwardMode.DECODE and batch.batch_size == len(batch.lora_ids)
        self.prepared.append((self.lora_backend.cuda_graph_batch_info, batch.lora_ids))


def runner(manager: FakeManager, overlap_loading: bool = False) -> Any:
    args = SimpleNamespace(enable_lora=True, enable_lora_overlap_loading=overlap_loading)
    return SimpleNamespace(lora_manager=manager, server_args=args)


@pytest.mark.parametrize(("most_captured", "used"), [(16, "16 x 1"), (None, "of verifications")])
def test_steps_have_static_tensors_of_their_own(most_captured: int | None, used: str) -> None:
    manager = FakeManager()
    adapters = Adapters.of(runner(manager), most_captured)
    assert adapters is not None
    adapters.use(["a", None, "a"])
    assert manager.prepared == [(used, ["a", None, "a"])] and manager.fetched == [{"a", None}]
    # SGLang's verifications find theirs in place.
    assert manager.lora_backend.cuda_graph_batch_info == "of verifications"


def test_adapters_that_the_scheduler_loads_are_left_to_it() -> None:
    manager = FakeManager()
    adapters = Adapters.of(runner(manager, overlap_loading=True), None)
    assert adapters is not None
    adapters.use(["a"])
    assert manager.fetched == [] and len(manager.prepared) == 1


def test_a_server_without_lora_has_no_adapters() -> None:
    assert Adapters.of(SimpleNamespace(server_args=SimpleNamespace(enable_lora=None)), 16) is None  # type: ignore[arg-type]


@needs_hook("chunk_size_of_verification")
def test_a_verification_is_cut_by_its_tokens(serving_args: Callable[[Any], None], resolve: Callable[..., Any]) -> None:
    serving_args(resolve())
    backend = ChunkedSgmvLoRABackend.__new__(ChunkedSgmvLoRABackend)
    backend.max_chunk_size = 128
    window = SimpleNamespace(draft_token_num=9)
    batch: Any = SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY, batch_size=8, extend_num_tokens=None, spec_info=window
    )
    assert backend._determine_chunk_size(batch) == backend._determine_chunk_size_for_tokens(72) == 32
    with pytest.raises(TypeError):  # without the hook, on the way to the scheduler's end
        ChunkedSgmvLoRABackend._determine_chunk_size.__wrapped__(backend, batch)


@pytest.mark.parametrize("experts", [False, True])
def test_adapters_of_experts_are_refused(experts: bool, resolve: Callable[..., Any]) -> None:
    manager = SimpleNamespace(lora_backend=SimpleNamespace(is_moe_lora=experts))
    model_runner = SimpleNamespace(server_args=resolve(), lora_manager=manager)
    if not experts:
        refuse_expert_adapters(None, model_runner)
        return
    with pytest.raises(ValueError, match="adapters of experts .* merge the adapter"):
        refuse_expert_adapters(None, model_runner)


def test_the_hook_stands_where_sglang_makes_its_adapters() -> None:
    assert hasattr(ModelRunner.init_lora_manager, "__wrapped__")
