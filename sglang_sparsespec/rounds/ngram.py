"""Hierarchical drafts (the policy ``triforce``, after TriForce, arXiv 2404.11912): n-grams propose, sparse attention checks.

TriForce has a small model draft for the target with a retrieved part of its cache, which drafts for the target with all
of it. Here prompt lookup takes the small model's place, as in the comparison of SparseSpec's authors, and PillarAttn that
of chunk retrieval.

A forward of sparse attention takes the current token and g proposals for the tokens after it. Each of its 1 + g queries
draws a draft token from its own distribution; the tokens are drafts as long as the proposals before them were drawn too.
So every draft has exactly the distribution that sparse attention gives it, a proposal only decides how many come out of
one forward, and verification accepts by the same rule as for any other draft.

Nothing is known on the host: a fixed number of forwards is run, and requests end up with different numbers of drafts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sglang_sparsespec.rounds.base import RoundContext
from sglang_sparsespec.rounds.forward_batch import decode_forward_batch
from sglang_sparsespec.sampling.sampler import Sampler
from sglang_sparsespec.sglang_compat import kv_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


class TokenHistory:
    """Token ids of all requests on the device, and proposals by their repetitions (prompt lookup).

    Attributes:
        tokens: int32 [rows, context], by row of ``req_to_token`` and position.
    """

    #: Longest suffix that is looked for; the longest match wins, then the most recent one.
    SUFFIX = 3

    def __init__(self, num_rows: int, context: int, device: torch.device | str) -> None:
        self.tokens = torch.zeros((num_rows, context), dtype=torch.int32, device=device)

    def note_prompts(self, rows: list[int], prompts: list[Any]) -> None:
        """Store the tokens of prefilled requests (sequences of int, cached prefixes included)."""
        for row, prompt in zip(rows, prompts, strict=True):
            ids = torch.tensor(prompt, dtype=torch.int32, pin_memory=self.tokens.is_cuda)
            self.tokens[row, : len(ids)].copy_(ids, non_blocking=True)

    def write(self, rows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> None:
        """Store ``tokens`` at ``positions`` (int64 [batch, n] each; those past the rows' end are dropped)."""
        end = self.tokens.shape[1] - 1
        # The last entry takes what is dropped; no request reads it, its position has no successor.
        self.tokens[rows.unsqueeze(1), positions.clamp(max=end)] = tokens.to(torch.int32)

    def propose(self, rows: torch.Tensor, last: torch.Tensor, count: int) -> torch.Tensor:
        """What followed the latest occurrence of the requests' last tokens.

        Args:
            rows, last: int64 [batch], rows and positions of the last known tokens.
            count: tokens to propose.

        Returns:
            int64 [batch, count]; the last token repeated where it did not occur before.
        """
        history = self.tokens[rows].long()
        context = history.shape[1]
        index = torch.arange(context, device=history.device).unsqueeze(0)
        last = last.unsqueeze(1)
        matches = torch.ones_like(history, dtype=torch.bool)
        length = torch.zeros_like(history)
        for back in range(self.SUFFIX):
            earlier = torch.nn.functional.pad(history[:, : context - back], (back, 0), value=-1)
            wanted = history.gather(1, (last - back).clamp(min=0))
            matches = matches & (earlier == wanted) & (last >= back)
            length = length + matches
        key = torch.where(index < last, length * context + index, -1)
        best = key.argmax(dim=1, keepdim=True)
        found = length.gather(1, best) > 0
        following = torch.where(found, best + 1, last) + torch.arange(count, device=history.device)
        return history.gather(1, torch.minimum(following, last))


class NgramDrafter:
    """Drafts for lock-step rounds in k / 2 forwards of sparse attention, rounded up. Without CUDA graphs."""

    kind = "ngram"

    def __init__(self, context: RoundContext) -> None:
        self.context = context
        self.num_proposals = context.backend.policy.facts.num_proposals
        self.num_forwards = context.window // 2
        self._num_places = context.window + self.num_proposals
        self.sampler = Sampler(self._num_places, context.logits_dtype, context.device, context.use_triton)
        num_rows, longest = context.backend.req_to_token_pool.req_to_token.shape
        self.history = TokenHistory(num_rows, longest, context.device)
        self._query_offsets = torch.arange(self.num_proposals + 1, device=context.device)

    def note_prompts(self, batch: ScheduleBatch) -> None:
        """Take over the tokens of a prefill batch."""
        rows = [kv_of(req).req_pool_idx for req in batch.reqs]
        self.history.note_prompts(rows, [req.get_fill_ids() for req in batch.reqs])

    def draft(self, batch: ScheduleBatch, num_drafts: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft up to k tokens per request, whatever ``num_drafts`` says; see :meth:`lockstep.Drafter.draft`."""
        context = self.context
        rows, lengths = batch.req_pool_indices.long(), batch.seq_lens.long()
        self.sampler.begin_round(
            batch.sampling_info, batch.reqs, num_slots=len(rows), num_draws=self.num_forwards + 1
        )
        candidates = batch.spec_info.bonus_tokens.long().unsqueeze(1).repeat(1, self._num_places + 1)
        drafted = torch.zeros_like(lengths)
        self.history.write(rows, lengths.unsqueeze(1), candidates[:, :1])
        for _ in range(self.num_forwards):
            proposals = self.history.propose(rows, lengths + drafted, self.num_proposals)
            current = candidates.gather(1, drafted.unsqueeze(1))
            tokens = self._check(batch, torch.cat([current, proposals], dim=1), lengths, drafted)
            place = drafted.unsqueeze(1) + self._query_offsets
            candidates.scatter_(1, place + 1, tokens)
            self.history.write(rows, lengths.unsqueeze(1) + place + 1, tokens)
            # Tokens past the first that was not proposed follow a token that is no draft; the next forward, which begins
            # with that first one, writes over them.
            right = (tokens[:, :-1] == proposals).to(torch.int64).cumprod(dim=1).sum(dim=1)
            drafted = (drafted + 1 + right).clamp(max=context.window - 1)
        return candidates[:, : context.window], drafted

    def _check(
        self, batch: ScheduleBatch, inputs: torch.Tensor, lengths: torch.Tensor, drafted: torch.Tensor
    ) -> torch.Tensor:
        """One forward: the draft token after each of ``inputs``.

        Args:
            inputs: int64 [batch, 1 + g], the current token and the proposals.
            lengths, drafted: int64 [batch], committed tokens and drafts made: the current token's place.

        Returns:
            int64 [batch, 1 + g].
        """
        context = self.context
        size, queries = inputs.shape
        place = drafted.unsqueeze(1) + self._query_offsets
        # Queries beyond the window's last draft are padding: SGLang's slot 0, length 0.
        live = (place < context.window - 1).flatten()
        positions = torch.where(live, (lengths.unsqueeze(1) + place).flatten(), 0)
        seq_lens = torch.where(live, positions + 1, 0)
        rows = batch.req_pool_indices.long().repeat_interleave(queries)
        slots = context.backend.req_to_token_pool.req_to_token[rows, positions].long()
        forward_batch = decode_forward_batch(
            inputs.flatten(), rows, positions, seq_lens, torch.where(live, slots, 0), batch.spec_algorithm, batch.spec_info
        )
        context.metrics.note_forward(draft_tokens=size * queries, verify_tokens=0)
        if context.adapters is not None:
            context.adapters.use([req.lora_id for req in batch.reqs for _ in range(queries)])
        context.backend.count_draft_queries(rows, seq_lens)
        logits = context.forward(context.backend.plan_draft(rows, seq_lens), forward_batch)
        # Drafts may be penalised by less than their place asks for: by what is committed.
        context.penalties.apply(logits, rows, positions)
        requests = torch.arange(size, device=place.device).repeat_interleave(queries)
        entries = requests * self._num_places + place.flatten()
        drawn = self.sampler.draw(logits, entries, positions, requests)
        (tokens,) = context.from_first_rank(batch.sampling_info.is_all_greedy, drawn)
        return tokens.view(size, queries)
