"""The batches that SGLang's models run decode steps and made-up verifications on."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
    enable_num_token_non_padded,
)

from sglang_sparsespec.sglang_compat import NUM_TOKENS
from sglang_sparsespec.spec_input import SparseSpecVerifyInput


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


def verify_forward_batch(
    windows: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    positions: torch.Tensor,
    out_cache_loc: torch.Tensor,
    spec_algorithm: Any,
) -> ForwardBatch:
    """A TARGET_VERIFY batch as SGLang makes one of a round's verification (``ForwardBatch.init_new``).

    Args:
        windows, positions, out_cache_loc: int64 [batch, W], tokens, their positions and KV slots.
        rows, seq_lens: int64 [batch], of ``req_to_token``, and committed lengths.
    """
    batch_size, window = windows.shape
    spec_info = SparseSpecVerifyInput(window, positions.flatten())
    forward_batch = ForwardBatch(
        forward_mode=ForwardMode.TARGET_VERIFY,
        batch_size=batch_size,
        input_ids=windows.flatten(),
        req_pool_indices=rows,
        seq_lens=seq_lens,
        seq_lens_sum=None,
        # SGLang reads lengths on the host on CPU alone.
        seq_lens_cpu=seq_lens if seq_lens.device.type == "cpu" else None,
        out_cache_loc=out_cache_loc.flatten(),
        positions=spec_info.positions,
        return_logprob=False,
        spec_algorithm=spec_algorithm,
        spec_info=spec_info,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        global_forward_mode=ForwardMode.TARGET_VERIFY,
    )
    setattr(forward_batch, f"{NUM_TOKENS}_cpu", windows.numel())
    if enable_num_token_non_padded():
        setattr(forward_batch, NUM_TOKENS, torch.tensor(windows.numel(), dtype=torch.int32, device=windows.device))
    return forward_batch
