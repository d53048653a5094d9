"""The batch that SGLang's models run decode steps on."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode


def decode_forward_batch(
    input_ids: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    spec_algorithm: Any,
    spec_info: Any = None,
    logits_buffer: torch.Tensor | None = None,
) -> ForwardBatch:
    """A DECODE batch of one token per entry; all tensors but the last are int64 [tokens].

    Args:
        rows: of ``req_to_token``.
        positions: of the current tokens.
        seq_lens: lengths that include the current token.
        out_cache_loc: KV slots of the current tokens.
        logits_buffer: float32 [tokens, vocab] that the logits are written to, if given.
    """
    forward_batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=len(rows),
        input_ids=input_ids,
        req_pool_indices=rows,
        seq_lens=seq_lens,
        seq_lens_sum=None,
        out_cache_loc=out_cache_loc,
        positions=positions,
        return_logprob=False,
        spec_algorithm=spec_algorithm,
        spec_info=spec_info,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        global_forward_mode=ForwardMode.DECODE,
    )
    forward_batch.next_token_logits_buffer = logits_buffer
    return forward_batch
