"""SPARSESPEC as an SGLang speculative algorithm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from sglang_sparsespec import ALGORITHM

if TYPE_CHECKING:
    from sglang.srt.managers.overlap_utils import FutureMap
    from sglang.srt.server_args import ServerArgs


class SparseSpecAlgorithm(CustomSpecAlgo):
    """Registered algorithm object.

    ``CustomSpecAlgo`` of SGLang 0.5.17 lacks three methods that the scheduler calls on
    every speculative algorithm (``create_future_map`` and
    ``carries_draft_hidden_states`` at start-up, ``need_topk`` at the first relayed
    token); they are defined here.
    """

    def create_future_map(
        self,
        device: Any,
        req_to_token_pool: Any,
        needs_cpu_seq_lens: bool = True,
        needs_confidence_relay: bool = False,
    ) -> FutureMap:
        from sglang.srt.managers.overlap_utils import FutureMap

        if str(device).startswith("cpu"):
            from sglang_sparsespec.scheduler_patch.cpu_relay import CpuFutureMap

            return CpuFutureMap(device, self, req_to_token_pool, needs_cpu_seq_lens, needs_confidence_relay)
        return FutureMap(device, self, req_to_token_pool, needs_cpu_seq_lens, needs_confidence_relay)

    def carries_draft_hidden_states(self) -> bool:
        return False

    def need_topk(self) -> bool:
        return False

    def has_draft_kv(self) -> bool:
        # Drafts use the target's KV slots; with page size 1 and one chain this only
        # selects the smaller of two equal reserves (allocation_sizing.py).
        return False

    def handle_server_args(self, server_args: ServerArgs) -> None:
        from sglang_sparsespec.config import resolve_server_args

        resolve_server_args(server_args)


def register_algorithm() -> None:
    """Register SPARSESPEC with SGLang.

    Raises:
        ValueError: the name is already registered.
        TypeError: SGLang's algorithm interface changed.
    """

    def make_worker(server_args: ServerArgs) -> type:
        from sglang_sparsespec.worker import SparseSpecWorker

        return SparseSpecWorker

    def validate(server_args: ServerArgs) -> None:
        from sglang_sparsespec.config import validate_server_args

        validate_server_args(server_args)

    SpeculativeAlgorithm.register(
        ALGORITHM,
        supports_overlap=True,
        validate_server_args=validate,
        spec_class=SparseSpecAlgorithm,
    )(make_worker)
