"""PillarAttn in plain torch: the oracle of the other kernels, and the implementation on CPU.

It is written for readability: most of it goes request by request. It reads lengths on the host, so on CUDA it synchronises
and cannot be captured; there it serves to check the other kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_sparsespec.attention_backend.kernels.interface import LayerKV
from sglang_sparsespec.attention_backend.page_table import SelectionTable
from sglang_sparsespec.attention_backend.sliding_window import WindowView


def attention_inputs(
    *,
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    kv: LayerKV,
    slots: torch.Tensor,
) -> torch.Tensor:
    """What ``triton_inputs.attention_inputs`` does, of which it has the arguments."""
    heads = qkv.unflatten(1, (-1, kv.k.shape[2]))
    num_kv_heads = kv.k.shape[1]
    v = heads[:, -num_kv_heads:]
    rotated = []
    for part, weight in zip(
        heads[:, :-num_kv_heads].float().split((heads.shape[1] - 2 * num_kv_heads, num_kv_heads), 1),
        norms or (None, None),
        strict=True,
    ):
        if weight is not None:
            part = torch.nn.functional.rms_norm(part, part.shape[-1:], weight.float(), eps)
        cos, sin = cos_sin[positions].float().unsqueeze(1).chunk(2, dim=-1)
        low, high = part.chunk(2, dim=-1)
        rotated.append(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))
    q, k = rotated
    kv.k[slots], kv.v[slots] = k.to(kv.k.dtype), v.to(kv.v.dtype)
    heads[:, : q.shape[1]] = q.to(qkv.dtype)
    return heads[:, : q.shape[1]]


def softmax_probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax probabilities and log-sum-exp in float32.

    Args:
        q: [queries, Hq, D].
        k: [tokens, Hkv, D].
        mask: bool [queries, tokens], True where visible; None: everything is.
        sinks, soft_cap: as in ``interface.LayerKV``.

    Returns:
        probabilities [Hkv, g, queries, tokens] and lse [Hkv, g, queries].
    """
    queries, num_q_heads, dim = q.shape
    num_kv_heads = k.shape[1]
    grouped = q.float().view(queries, num_kv_heads, num_q_heads // num_kv_heads, dim)
    logits = capped(torch.einsum("rhgd,thd->hgrt", grouped, k.float()) * scaling, soft_cap)
    if mask is not None:
        logits.masked_fill_(~mask, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float().view(num_kv_heads, -1, 1))
    return torch.exp(logits - lse.unsqueeze(-1)), lse


def capped(logits: torch.Tensor, soft_cap: float) -> torch.Tensor:
    """``logits`` under the soft cap of ``interface.LayerKV``."""
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits


def weighted_values(probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[Hkv, g, queries, tokens] x [tokens, Hkv, D] -> float32 [queries, Hq, D]."""
    out = torch.einsum("hgrt,thd->rhgd", probabilities, v.float())
    return out.reshape(out.shape[0], -1, v.shape[-1])


def _attend_to_all(q: torch.Tensor, kv: LayerKV, slots: torch.Tensor, visible: torch.Tensor, out: torch.Tensor) -> None:
    """One query per request over its tokens, for all requests at once.

    Args:
        q, out: [B, Hq, D].
        slots, visible: int and bool [B, tokens]; a request of which nothing is visible gets zeros.
    """
    slots = torch.where(visible, slots, 0)  # SGLang's padding slot: what others hold may be no numbers
    k, v = kv.k[slots].to(q.dtype).transpose(1, 2), kv.v[slots].to(q.dtype).transpose(1, 2)
    # Padding sees everything instead of nothing, and is emptied below: softmax has no answer for nothing.
    nothing = ~visible.any(dim=1).view(-1, 1, 1)
    mask = visible[:, None, None, :] | nothing.unsqueeze(-1)
    attention = torch.nn.functional.scaled_dot_product_attention(
        q.unsqueeze(2), k, v, attn_mask=mask, scale=kv.scaling, enable_gqa=True
    )
    out.copy_(attention.squeeze(2).masked_fill(nothing, 0.0))


@dataclass(frozen=True)
class ReferenceDraft:
    """See :class:`interface.DraftAttention`."""

    table: SelectionTable
    req_to_token: torch.Tensor
    rows: torch.Tensor
    seq_lens: torch.Tensor

    def run(self, q: torch.Tensor, kv: LayerKV, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        # All requests at once, lists padded to the longest: on CPU a loop over requests would cost more than the
        # attention itself.
        rows = self.rows.long()
        batch, num_q_heads, dim = q.shape
        num_kv_heads = kv.k.shape[1]
        counts = self.table.num_selected[rows].long().unsqueeze(1)
        start = self.table.tail_start[rows].long().unsqueeze(1)
        lengths = self.seq_lens.long().unsqueeze(1)
        attended = torch.where(lengths > 0, counts + lengths - start, 0)
        width = int(attended.max())
        if width == 0:
            out.zero_()
            return
        index = torch.arange(width, device=q.device).unsqueeze(0)
        plain = lse is None and kv.sinks is None and not kv.soft_cap
        if plain and width == int(lengths.max()) and not counts.any() and not start.any():
            # Everything is attended to (the policy ``full``), so all heads read the same slots.
            _attend_to_all(q, kv, self.req_to_token[rows, :width].long(), index < lengths, out)
            return
        selected = self.table.positions[kv.index][rows, :, :width].long()
        selected = torch.nn.functional.pad(selected, (0, width - selected.shape[-1]))
        tail = (start + index - counts).clamp(min=0)
        position = torch.where((index < counts).unsqueeze(1), selected, tail.unsqueeze(1))
        # Padding reads position 0; its probability is zero.
        visible = (index < attended).unsqueeze(1)
        position = torch.where(visible, position, 0)
        slots = self.req_to_token[rows[:, None, None], position].long()  # [B, Hkv, width]
        heads = torch.arange(num_kv_heads, device=q.device).view(1, -1, 1)
        grouped = q.float().view(batch, num_kv_heads, num_q_heads // num_kv_heads, dim)
        logits = capped(grouped @ kv.k[slots, heads].float().transpose(-1, -2) * kv.scaling, kv.soft_cap)
        logits.masked_fill_(~visible.unsqueeze(2), float("-inf"))
        log_sums = torch.logsumexp(logits, dim=-1)
        if kv.sinks is not None:
            log_sums = torch.logaddexp(log_sums, kv.sinks.float().view(num_kv_heads, -1))
        # Padding sees nothing: NaN probabilities there become zeros.
        probabilities = torch.exp(logits - log_sums.unsqueeze(-1)).nan_to_num(0.0)
        attention = probabilities @ kv.v[slots, heads].float()
        out.copy_(attention.reshape(batch, num_q_heads, dim))
        if lse is not None:
            lse.copy_(log_sums.reshape(batch, num_q_heads))


@dataclass(frozen=True)
class ReferenceVerify:
    """See :class:`interface.VerifyAttention`. It needs no hints and ignores them.

    Attributes:
        reach: tokens before a query's own that it sees; None: all.
    """

    req_to_token: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor
    window: int
    reach: int | None = None

    def run(
        self,
        q: torch.Tensor,
        kv: LayerKV,
        out: torch.Tensor,
        scores: torch.Tensor | None = None,
        lse_hint: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> None:
        window = self.window
        if window == 1 and scores is None and lse is None and kv.sinks is None and not kv.soft_cap:
            # One token each: all requests at once, since on CPU a loop over them would cost more than the attention itself.
            totals = self.lengths.long().unsqueeze(1) + 1
            width = int(totals.max())
            index = torch.arange(width, device=q.device).unsqueeze(0)
            visible = index < totals
            if self.reach is not None:
                visible &= index >= totals - 1 - self.reach
            _attend_to_all(q, kv, self.req_to_token[self.rows.long(), :width].long(), visible, out)
            return
        for b, (row, length) in enumerate(zip(self.rows.tolist(), self.lengths.tolist(), strict=True)):
            queries = slice(b * window, (b + 1) * window)
            slots = self.req_to_token[row, : length + window].long()
            query_position = torch.arange(length, length + window, device=q.device).unsqueeze(1)
            position = torch.arange(length + window, device=q.device).unsqueeze(0)
            mask = position <= query_position
            if self.reach is not None:
                mask &= position >= query_position - self.reach
            softmax = (kv.k[slots], kv.scaling, mask, kv.sinks, kv.soft_cap)
            probabilities, log_sums = softmax_probabilities(q[queries], *softmax)
            if lse is not None:
                lse[b] = log_sums.permute(2, 0, 1).flatten(1)
            out[queries] = weighted_values(probabilities, kv.v[slots]).to(out.dtype)
            if scores is not None:
                scores[b, :, :length] = probabilities[..., :length].mean(dim=(1, 2)).to(scores.dtype)


@dataclass(frozen=True)
class ReferencePrefillScores:
    """See :class:`interface.PrefillScores`."""

    req_to_token: torch.Tensor
    rows: torch.Tensor
    seq_lens: torch.Tensor
    starts: torch.Tensor
    extend_lens: torch.Tensor
    window: int

    def run(self, q: torch.Tensor, kv: LayerKV, scores: torch.Tensor) -> None:
        batch = (self.rows, self.seq_lens, self.starts, self.extend_lens)
        for b, (row, total, first, extend) in enumerate(zip(*(column.tolist() for column in batch), strict=True)):
            num_queries = min(self.window, extend)
            length = total - num_queries
            if length <= 0:
                continue
            last = first + extend
            slots = self.req_to_token[row, :total].long()
            query_position = torch.arange(length, total, device=q.device).unsqueeze(1)
            mask = torch.arange(total, device=q.device).unsqueeze(0) <= query_position
            queries = q[last - num_queries : last]
            softmax = (kv.k[slots], kv.scaling, mask, kv.sinks, kv.soft_cap)
            probabilities, _ = softmax_probabilities(queries, *softmax)
            scores[b, :, :length] = probabilities[..., :length].mean(dim=(1, 2)).to(scores.dtype)


@dataclass(frozen=True)
class ReferenceSelection:
    """See :class:`interface.Selection`."""

    table: SelectionTable
    rows: torch.Tensor
    lengths: torch.Tensor
    counts: torch.Tensor

    def run(self, scores: torch.Tensor, layer_index: int) -> None:
        positions, remembered = self.table.positions[layer_index], self.table.scores[layer_index]
        memory = self.table.memory
        batch = (self.rows, self.lengths, self.counts)
        for b, (row, length, count) in enumerate(zip(*(column.tolist() for column in batch), strict=True)):
            if count == 0:
                continue
            total = scores[b, :, :length]
            if memory and (known := int(self.table.num_remembered[row])):
                before = positions[row, :, :known].long()
                # Where rounds were lost, some may lie beyond.
                added = torch.where(before < length, memory * remembered[row, :, :known].to(total.dtype), 0.0)
                total = total.scatter_add(1, before.clamp(max=length - 1), added)
            best = total.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
            positions[row, :, :count] = best.to(positions.dtype)
            if memory:
                remembered[row, :, :count] = total.gather(1, best).to(remembered.dtype)


class ReferenceKernels:
    """Reference implementation of :class:`interface.PillarKernels`, for shapes of any size.

    Args:
        table: selections that drafts read and selection writes.
        req_to_token: int32 [rows, context], the slot of each position.
    """

    name = "torch"
    score_dtype = torch.float32
    uses_lse_hints = False

    def __init__(self, table: SelectionTable, req_to_token: torch.Tensor) -> None:
        self.table = table
        self.req_to_token = req_to_token

    def plan_draft(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> ReferenceDraft:
        """See :meth:`interface.PillarKernels.plan_draft`."""
        return ReferenceDraft(self.table, self.req_to_token, rows, seq_lens)

    def plan_verify(self, rows: torch.Tensor, lengths: torch.Tensor, window: int) -> ReferenceVerify:
        """See :meth:`interface.PillarKernels.plan_verify`."""
        return ReferenceVerify(self.req_to_token, rows, lengths, window)

    def plan_sliding(self, view: WindowView, window: int) -> ReferenceVerify:
        """See :meth:`interface.PillarKernels.plan_sliding`."""
        rows = torch.arange(len(view.lengths), device=view.lengths.device)
        return ReferenceVerify(view.slots, rows, view.lengths, window, view.reach)

    def plan_prefill_scores(
        self,
        rows: torch.Tensor,
        seq_lens: torch.Tensor,
        starts: torch.Tensor,
        extend_lens: torch.Tensor,
        window: int,
    ) -> ReferencePrefillScores:
        """See :meth:`interface.PillarKernels.plan_prefill_scores`."""
        return ReferencePrefillScores(self.req_to_token, rows, seq_lens, starts, extend_lens, window)

    def plan_selection(self, rows: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor) -> ReferenceSelection:
        """See :meth:`interface.PillarKernels.plan_selection`."""
        return ReferenceSelection(self.table, rows, lengths, counts)
