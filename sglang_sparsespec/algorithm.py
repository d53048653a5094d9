"""SPARSESPEC as SGLang sees it: a speculative algorithm and an attention backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt import server_args as sglang_args
from sglang.srt.layers.attention import attention_registry
from sglang.srt.managers.overlap_utils import FutureMap
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from sglang_sparsespec import ALGORITHM, ATTENTION_BACKEND
from sglang_sparsespec.attention_backend.backend import SparseSpecAttnBackend
from sglang_sparsespec.settings import settings_of
from sglang_sparsespec.support import resolve_server_args, validate_server_args
from sglang_sparsespec.worker import SparseSpecWorker

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


class SparseSpecAlgorithm(CustomSpecAlgo):
    """The registered algorithm object.

    ``CustomSpecAlgo`` lacks three methods that the scheduler calls on every speculative algorithm
    (``create_future_map`` and ``carries_draft_hidden_states`` at start-up, ``need_topk`` at the first relayed token). They
    are defined here.
    """

    def create_future_map(
        self,
        device: Any,
        req_to_token_pool: Any,
        needs_cpu_seq_lens: bool = True,
        needs_confidence_relay: bool = False,
    ) -> FutureMap:
        """SGLang's relay of a round's results to the next round."""
        return FutureMap(device, self, req_to_token_pool, needs_cpu_seq_lens, needs_confidence_relay)

    def carries_draft_hidden_states(self) -> bool:
        """Drafts need no hidden states of the round before."""
        return False

    def need_topk(self) -> bool:
        """Drafts are one chain."""
        return False

    def has_draft_kv(self) -> bool:
        """Drafts use the target's KV slots.

        With page size 1 and one chain this only selects the smaller of two equal reserves
        (``sglang.srt.mem_cache.allocation_sizing``).
        """
        return False

    def handle_server_args(self, server_args: Any) -> None:
        """Fill in what the algorithm needs."""
        resolve_server_args(server_args)


def register_algorithm() -> None:
    """Register SPARSESPEC with SGLang.

    Raises:
        ValueError: the name is already registered.
        TypeError: SGLang's algorithm interface changed.
    """
    SpeculativeAlgorithm.register(
        ALGORITHM,
        supports_overlap=True,
        validate_server_args=validate_server_args,
        spec_class=SparseSpecAlgorithm,
    )(lambda server_args: SparseSpecWorker)


def register_attention_backend() -> None:
    """Register ``sparsespec`` with SGLang's attention registry and as a value of its flags."""
    attention_registry.register_attention_backend(ATTENTION_BACKEND)(create_attention_backend)
    sglang_args.add_attention_backend_choices([ATTENTION_BACKEND])
    # Seeded sampling (--enable-deterministic-inference) works with this backend, and its results do not depend on what the
    # radix cache held.
    sglang_args.add_deterministic_attention_backend_choices([ATTENTION_BACKEND])
    sglang_args.add_radix_supported_deterministic_attention_backend_choices([ATTENTION_BACKEND])


def create_attention_backend(model_runner: ModelRunner) -> SparseSpecAttnBackend:
    """The plugin's attention backend, around the one that runs prefill.

    Raises:
        ValueError: the server runs another algorithm, or none.
    """
    if not isinstance(model_runner.spec_algorithm, SparseSpecAlgorithm):
        raise ValueError(
            f"--attention-backend {ATTENTION_BACKEND} works only with --speculative-algorithm {ALGORITHM}; give both or "
            "neither."
        )
    name = settings_of(model_runner.server_args).base_attention_backend
    assert name is not None  # resolve_server_args filled it in
    return SparseSpecAttnBackend(model_runner, attention_registry.ATTENTION_BACKENDS[name](model_runner))
