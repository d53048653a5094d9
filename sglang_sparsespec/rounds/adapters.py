"""LoRA adapters in the forwards that rounds run beside SGLang's own: draft steps and plain steps.

SGLang's layers read which adapter a token uses from their LoRA backend's ``batch_info``, which it makes for every batch
that it runs: prompts and verifications. Steps of one token per request need another one, and captured steps read static
tensors of their own, as SGLang's captured verifications do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from sglang_sparsespec.sglang_compat import INIT_STATIC_ADAPTERS, in_force

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

#: Where a LoRA backend keeps the static tensors of captured decode batches.
_STATIC = "cuda_graph_batch_info"


class Adapters:
    """Tells the model's LoRA layers which adapter each request of a step uses.

    Args:
        most_captured: requests of the largest captured step; None if steps are not captured.
    """

    def __init__(self, model_runner: ModelRunner, most_captured: int | None) -> None:
        self._manager: Any = model_runner.lora_manager
        # With overlapped loading SGLang's scheduler loads adapters itself.
        self._loads = not in_force(model_runner.server_args).enable_lora_overlap_loading
        self._static: Any = None
        if most_captured is not None:
            backend = self._manager.lora_backend
            of_verifications = getattr(backend, _STATIC)
            getattr(backend, INIT_STATIC_ADAPTERS)(max_bs_in_cuda_graph=most_captured, num_tokens_per_req=1)
            self._static = getattr(backend, _STATIC)
            setattr(backend, _STATIC, of_verifications)

    @classmethod
    def of(cls, model_runner: ModelRunner, most_captured: int | None) -> Adapters | None:
        """None for a server without LoRA."""
        return cls(model_runner, most_captured) if in_force(model_runner.server_args).enable_lora else None

    def use(self, lora_ids: Sequence[str | None]) -> None:
        """From now on token i of a forward uses adapter ``lora_ids[i]``, or none."""
        if self._loads:
            # A prompt of another adapter may have taken an adapter's place since the last round.
            self._manager.fetch_new_loras(set(lora_ids))
        nothing = torch.empty(0, dtype=torch.int64)
        step: Any = ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            batch_size=len(lora_ids),
            input_ids=nothing,
            req_pool_indices=nothing,
            seq_lens=nothing,
            seq_lens_sum=None,
            out_cache_loc=nothing,
            lora_ids=list(lora_ids),
        )
        with self._static_tensors_of_steps():
            self._manager.prepare_lora_batch(step)

    def use_none(self) -> None:
        """Forwards use no adapter until :meth:`use`, or until SGLang runs a batch."""
        self._manager.reset_lora_batch()

    @contextmanager
    def _static_tensors_of_steps(self) -> Iterator[None]:
        if self._static is None:
            yield
            return
        backend = self._manager.lora_backend
        of_verifications = getattr(backend, _STATIC)
        setattr(backend, _STATIC, self._static)
        try:
            yield
        finally:
            setattr(backend, _STATIC, of_verifications)
