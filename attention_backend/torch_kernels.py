"""PillarAttn in plain torch: the oracle, and the implementation on CPU.

Written for readability: all but draft attention go request by request. It reads lengths on the
host, so on CUDA it synchronises and cannot be captured; use it there to check the fast kernels.
"""

from __future__ import annotations

import torch

from sglang_sparsespec.attention_backend.interface import LOOKAHEAD_WEIGHT


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, scaling: float, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax probabilities and log-sum-exp in float32.

    Args:
        q: [rows, Hq, D]. k: [tokens, Hkv, D]. mask: bool [rows, tokens], True where visible.

    Returns:
        probabilities [Hkv, g, rows, tokens] and lse [Hkv, g, rows].
    """
    rows, num_q_heads, dim = q.shape
    num_kv_heads = k.shape[1]
    grouped = q.float().view(rows, num_kv_heads, num_q_heads // num_kv_heads, dim)
    logits = torch.einsum("rhgd,thd->hgrt", grouped, k.float()) * scaling
    if mask is not None:
        logits.masked_fill_(~mask, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    return torch.exp(logits - lse.unsqueeze(-1)), lse


def _attend_to_all(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scaling: float, out: torch.Tensor
) -> None:
    """One query per request over its tokens.

    Args:
        q, out: [B, Hq, D]. k, v: [B, tokens, Hkv, D]. visible: bool [B, tokens]; a row without any gives zeros.
    """
    mask = visible[:, None, None, :]
    k, v = k.to(q.dtype).transpose(1, 2), v.to(q.dtype).transpose(1, 2)
    # Padding rows see everything instead of nothing, and are emptied below: softmax has no answer for nothing.
    nothing = ~visible.any(dim=1).view(-1, 1, 1)
    attention = torch.nn.functional.scaled_dot_product_attention(
        q.unsqueeze(2), k, v, attn_mask=mask | nothing.unsqueeze(-1), scale=scaling, enable_gqa=True
    )
    out.copy_(attention.squeeze(2).masked_fill(nothing, 0.0))


def _weighted_values(probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[Hkv, g, rows, tokens] x [tokens, Hkv, D] -> [rows, Hq, D]."""
    out = torch.einsum("hgrt,thd->rhgd", probabilities, v.float())
    return out.reshape(out.shape[0], -1, v.shape[-1])


def look_ahead(scores: torch.Tensor, lookahead: int, weight: float = LOOKAHEAD_WEIGHT) -> torch.Tensor:
    """Scores by which selection with look-ahead ranks: max(score[p], weight * max(score[p - lookahead .. p - 1])).

    Args:
        scores: [..., length], not negative.
        lookahead: positions, at least 0.
        weight: 0 to 1.
    """
    # With a weight of at most 1 the position itself may be in the window.
    before = torch.nn.functional.pad(scores, (lookahead, 0)).unfold(-1, lookahead + 1, 1)
    return torch.maximum(scores, (before.amax(dim=-1).float() * weight).to(scores.dtype))


class TorchPillarKernels:
    """Reference implementation of :class:`interface.PillarKernels`."""

    def draft_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        positions: torch.Tensor,
        num_selected: torch.Tensor,
        tail_start: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        scaling: float,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """See :meth:`interface.PillarKernels.draft_attention`."""
        # All requests at once, lists padded to the longest: on CPU a loop over requests would cost
        # more than the attention itself.
        rows = req_pool_indices.long()
        batch, num_q_heads, dim = q.shape
        num_kv_heads = k_cache.shape[1]
        counts = num_selected[rows].long().unsqueeze(1)
        lengths = seq_lens.long().unsqueeze(1)
        start = tail_start[rows].long().unsqueeze(1)
        attended = torch.where(lengths > 0, counts + lengths - start, 0)
        width = int(attended.max())
        if width == 0:
            out.zero_()
            return
        index = torch.arange(width, device=q.device).unsqueeze(0)
        if lse is None and width == int(lengths.max()) and not counts.any() and not start.any():
            # Everything is attended to, in plain rounds: all heads read the same slots.
            slots = req_to_token[rows, :width].long()
            _attend_to_all(q, k_cache[slots], v_cache[slots], index < lengths, scaling, out)
            return
        selected = positions[rows, :, :width].long()
        selected = torch.nn.functional.pad(selected, (0, width - selected.shape[-1]))
        tail = (start + index - counts).clamp(min=0)
        position = torch.where((index < counts).unsqueeze(1), selected, tail.unsqueeze(1))
        # Padding reads position 0; its probability is zero.
        visible = (index < attended).unsqueeze(1)
        position = torch.where(visible, position, 0)
        slots = req_to_token[rows[:, None, None], position].long()  # [B, Hkv, width]
        heads = torch.arange(num_kv_heads, device=q.device).view(1, -1, 1)
        grouped = q.float().view(batch, num_kv_heads, num_q_heads // num_kv_heads, dim)
        logits = grouped @ k_cache[slots, heads].float().transpose(-1, -2) * scaling
        logits.masked_fill_(~visible.unsqueeze(2), float("-inf"))
        # Padding rows see nothing: NaN probabilities there become zeros.
        probabilities = torch.softmax(logits, dim=-1).nan_to_num(0.0)
        attention = probabilities @ v_cache[slots, heads].float()
        out.copy_(attention.reshape(batch, num_q_heads, dim))
        if lse is not None:
            lse.copy_(torch.logsumexp(logits, dim=-1).reshape(batch, num_q_heads))

    def verify_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        window: int,
        scaling: float,
        out: torch.Tensor,
        scores: torch.Tensor | None = None,
        lse_hint: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> None:
        """See :meth:`interface.PillarKernels.verify_attention`; ignores ``lse_hint`` (exact)."""
        for b, (row, length) in enumerate(
            zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)
        ):
            rows = slice(b * window, (b + 1) * window)
            slots = req_to_token[row, : length + window].long()
            query_position = torch.arange(length, length + window, device=q.device).unsqueeze(1)
            mask = torch.arange(length + window, device=q.device).unsqueeze(0) <= query_position
            probabilities, log_sums = _probabilities(q[rows], k_cache[slots], scaling, mask)
            if lse is not None:
                lse[b] = log_sums.permute(2, 0, 1).flatten(1)
            out[rows] = _weighted_values(probabilities, v_cache[slots]).to(out.dtype)
            if scores is not None:
                scores[b, :, :length] = probabilities[..., :length].mean(dim=(1, 2)).to(scores.dtype)

    def prefill_scores(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_start_loc: torch.Tensor,
        extend_lens: torch.Tensor,
        window: int,
        scaling: float,
        scores: torch.Tensor,
    ) -> None:
        """See :meth:`interface.PillarKernels.prefill_scores`."""
        for b, (row, total, first, extend) in enumerate(
            zip(
                req_pool_indices.tolist(),
                seq_lens.tolist(),
                extend_start_loc.tolist(),
                extend_lens.tolist(),
                strict=True,
            )
        ):
            num_queries = min(window, extend)
            length = total - num_queries
            if length <= 0:
                continue
            last = first + extend
            slots = req_to_token[row, :total].long()
            query_position = torch.arange(length, total, device=q.device).unsqueeze(1)
            mask = torch.arange(total, device=q.device).unsqueeze(0) <= query_position
            probabilities, _ = _probabilities(q[last - num_queries : last], k_cache[slots], scaling, mask)
            scores[b, :, :length] = probabilities[..., :length].mean(dim=(1, 2)).to(scores.dtype)

    def select(
        self,
        scores: torch.Tensor,
        lengths: torch.Tensor,
        req_pool_indices: torch.Tensor,
        counts: torch.Tensor,
        positions: torch.Tensor,
        lookahead: int = 0,
    ) -> None:
        """See :meth:`interface.PillarKernels.select`."""
        for b, (row, length, count) in enumerate(
            zip(req_pool_indices.tolist(), lengths.tolist(), counts.tolist(), strict=True)
        ):
            if count == 0:
                continue
            ranked = scores[b, :, :length]
            if lookahead:
                ranked = look_ahead(ranked, lookahead)
            best = ranked.topk(count, dim=-1, sorted=False).indices
            positions[row, :, :count] = best.sort(dim=-1).values.to(positions.dtype)
