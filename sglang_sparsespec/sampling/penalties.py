"""Penalties of requests: frequency, presence, repetition, and end tokens before ``min_new_tokens``.

SGLang's penalizers count a request's output on the host. With the overlap scheduler the host is one step late, and one step
of a speculative round has many rows of logits. Here a request's output is counted on the device, by row of ``req_to_token``,
as soon as a token is committed; and every row of logits sees the tokens before it, drafts included. Drafts are counted for
one call only, so a rejected one leaves no trace.

What is done to a logit is SGLang's (``sglang.srt.sampling.penaltylib``), in its order: additive penalties, then
repetition. Biases, grammars, processors and filters come after.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from sglang_sparsespec.sampling import triton_penalties
from sglang_sparsespec.sglang_compat import end_tokens_of, kv_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang.srt.managers.schedule_batch import Req

logger = logging.getLogger(__name__)

#: Frequency, presence and repetition of a request without penalties.
NEUTRAL = (0.0, 0.0, 1.0)


class Penalties:
    """The penalties of all requests of a worker.

    Device memory is taken when the first request with a penalty comes. What is kept of a row is that of the request that was
    prefilled into it last, so it survives everything that keeps the row: other batches, and a time on the host.

    Args:
        num_rows: rows of ``req_to_token``.
        use_triton: penalise by a kernel (CUDA).

    Attributes:
        is_active: whether a request of the batch that runs has a penalty; if not, no other method needs to be called.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device | str, use_triton: bool) -> None:
        self.is_active = False
        self._num_rows, self._vocab_size, self._device, self._use_triton = num_rows, vocab_size, device, use_triton
        # Rows of requests whose output is counted, and min_new_tokens by row; on the host.
        self._counted: set[int] = set()
        self._min_new_tokens: dict[int, int] = {}
        self._counts_matter = self._ends_matter = False
        # On the device, by row; see _reserve.
        self._counts = torch.empty((0, vocab_size), dtype=torch.int32, device=device)
        self._strengths = torch.empty((0, 3), device=device)
        self._ends_from = torch.empty(0, dtype=torch.int64, device=device)
        self._end_tokens = torch.empty((0, 0), dtype=torch.int64, device=device)

    # ---------------------------------------------------------------------- what is kept

    def begin_prefill(self, reqs: Sequence[Req]) -> None:
        """The rows of ``reqs``, which are about to be prefilled, are theirs now, with the output that they have already."""
        changed = []
        for req in reqs:
            row, params = _row_of(req), req.sampling_params
            counted = _strengths_of(params) != NEUTRAL
            if counted or params.min_new_tokens > 0 or row in self._counted or row in self._min_new_tokens:
                changed.append(req)
                self._counted.discard(row)
                self._min_new_tokens.pop(row, None)
                if counted:
                    self._counted.add(row)
                if params.min_new_tokens > 0:
                    self._min_new_tokens[row] = params.min_new_tokens
        if changed:
            self._keep(changed)
        self.begin_round(reqs)

    def begin_round(self, reqs: Sequence[Req]) -> None:
        """The batch of ``reqs`` runs from now on."""
        self._counts_matter = bool(self._counted) and any(_row_of(req) in self._counted for req in reqs)
        # The host knows of no more output than there is.
        self._ends_matter = bool(self._min_new_tokens) and any(
            len(req.output_ids) < self._min_new_tokens.get(_row_of(req), 0) for req in reqs
        )
        self.is_active = self._counts_matter or self._ends_matter

    def _keep(self, reqs: Sequence[Req]) -> None:
        """Write the parameters and the output of ``reqs`` to their rows."""
        ends = [_end_tokens_of(req, self._vocab_size) if req.sampling_params.min_new_tokens > 0 else [] for req in reqs]
        self._reserve(any(_row_of(req) in self._counted for req in reqs), max(map(len, ends)))
        rows = self._upload([_row_of(req) for req in reqs])
        self._strengths[rows] = self._upload([_strengths_of(req.sampling_params) for req in reqs], torch.float32)
        # A token at this position or later has as much output before it as min_new_tokens asks for.
        first = [len(req.origin_input_ids) + req.sampling_params.min_new_tokens - 1 for req in reqs]
        self._ends_from[rows] = self._upload([min(position, 2**62) for position in first])
        width = self._end_tokens.shape[1]
        if width:
            self._end_tokens[rows] = self._upload([tokens + [-1] * (width - len(tokens)) for tokens in ends])
        counted = [req for req in reqs if _row_of(req) in self._counted]
        if not counted:
            return
        self._counts[self._upload([_row_of(req) for req in counted])] = 0
        output = [_row_of(req) * self._vocab_size + token for req in counted for token in req.output_ids]
        if output:  # of requests that were retracted
            places = self._upload(output)
            self._counts.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))

    def _reserve(self, counts: bool, end_tokens: int) -> None:
        """Make room, if there is none, for parameters, for counts if asked for, and for so many end tokens a row."""
        rows, device = self._num_rows, self._device
        if not len(self._strengths):
            self._strengths = torch.tensor(NEUTRAL, device=device).repeat(rows, 1)
            self._ends_from = torch.zeros(rows, dtype=torch.int64, device=device)
            self._end_tokens = torch.empty((rows, 0), dtype=torch.int64, device=device)
        if counts and not len(self._counts):
            self._counts = torch.zeros((rows, self._vocab_size), dtype=torch.int32, device=device)
            logger.info("Output tokens of requests with penalties are counted in %.2f GB.", self._counts.nbytes / 1e9)
        missing = end_tokens - self._end_tokens.shape[1]
        if missing > 0:
            self._end_tokens = torch.nn.functional.pad(self._end_tokens, (0, missing), value=-1)

    def _upload(self, values: list[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        pinned = torch.device(self._device).type == "cuda"
        return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(self._device, non_blocking=True)

    def commit(self, rows: torch.Tensor, tokens: torch.Tensor, accept_lens: torch.Tensor) -> None:
        """Count committed tokens.

        Args:
            rows: int64 [requests], all different.
            tokens: int64 [requests, n], of which the first ``accept_lens`` (int [requests]) are committed.
        """
        if not self._counts_matter:
            return
        # Rows that are not counted are begun anew by the prefill of the next request that is.
        places = rows.unsqueeze(1) * self._vocab_size + tokens
        committed = torch.arange(tokens.shape[1], device=tokens.device) < accept_lens.unsqueeze(1)
        self._counts.view(-1).index_add_(0, places.flatten(), committed.flatten().to(torch.int32))

    # --------------------------------------------------------------------- what is done

    def apply(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        candidates: torch.Tensor | None = None,
        drafts_seen: torch.Tensor | None = None,
    ) -> None:
        """Penalise logits in place: every row by the output of its request, and by the drafts before it.

        Args:
            logits: float32 [requests * n, vocab], n adjacent rows for each request; unit stride along the vocabulary.
            rows: int64 [requests], of ``req_to_token``.
            positions: int64 [requests * n], of the tokens that were fed.
            candidates: int64 [requests, W], a window's last committed token and its drafts; None: no row sees a draft.
            drafts_seen: int64 [requests], how many drafts the first of a request's rows sees, each further row one more.
                None: 0.
        """
        if not self.is_active:
            return
        shaped = logits.unflatten(0, (len(rows), -1))
        if self._ends_matter:
            self._mask_ends(shaped, rows, positions)
        if not self._counts_matter:
            return
        if candidates is None:
            assert shaped.shape[1] == 1
            candidates = torch.zeros_like(rows).unsqueeze(1)
        if drafts_seen is None:
            drafts_seen = torch.zeros_like(rows)
        if self._use_triton:
            triton_penalties.penalise(shaped, rows, candidates, drafts_seen, self._counts, self._strengths)
        else:
            self._penalise(shaped, rows, candidates, drafts_seen)

    def _mask_ends(self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> None:
        """Mask end tokens ([requests, n, vocab]) where there is too little output."""
        tokens = self._end_tokens[rows].unsqueeze(1).expand(-1, logits.shape[1], -1)
        too_early = positions.view(len(rows), -1) < self._ends_from[rows].unsqueeze(1)
        masked = torch.where(too_early.unsqueeze(2) & (tokens >= 0), -torch.inf, 0.0)
        logits.scatter_add_(2, tokens.clamp(min=0), masked.to(logits.dtype))

    def _penalise(
        self, logits: torch.Tensor, rows: torch.Tensor, candidates: torch.Tensor, drafts_seen: torch.Tensor
    ) -> None:
        """In torch: ``triton_penalties.penalise``."""
        strengths = self._strengths[rows]
        chosen = (strengths != strengths.new_tensor(NEUTRAL)).any(dim=1).nonzero().squeeze(1)
        frequency, presence, repetition = strengths[chosen].split(1, dim=1)
        counts, candidates, drafts_seen = self._counts[rows[chosen]], candidates[chosen], drafts_seen[chosen].unsqueeze(1)
        for place in range(1, candidates.shape[1]):
            counts.scatter_add_(1, candidates[:, place : place + 1], (drafts_seen >= place).to(torch.int32))
        for index in range(logits.shape[1]):
            if index:
                draft = candidates.gather(1, drafts_seen + index)
                counts.scatter_add_(1, draft, torch.ones_like(draft, dtype=torch.int32))
            logit = logits[chosen, index] - (counts * frequency + (counts > 0) * presence)
            scale = torch.where(counts > 0, repetition, 1.0)
            logits[chosen, index] = torch.where(logit < 0, logit * scale, logit / scale)

    def compile_kernels(self, window: int) -> None:
        """Compile the kernels of prompts, drafts and windows (CUDA); takes some seconds if they are new.

        Args:
            window: W.
        """
        with torch.device(self._device):
            rows, candidates = torch.zeros(1, dtype=torch.int64), torch.zeros((1, window), dtype=torch.int64)
            counts, strengths = torch.zeros((1, self._vocab_size), dtype=torch.int32), torch.tensor([NEUTRAL])
            logits = torch.zeros((1, window, self._vocab_size))
        for num_rows, width in ((1, 1), (1, window), (window, window)):
            triton_penalties.penalise(logits[:, :num_rows], rows, candidates[:, :width], rows, counts, strengths)


class PenalisedPrompts:
    """A prefill batch's penalties, as SGLang's sampler applies them (``SamplingBatchInfo.penalizer_orchestrator``).

    Args:
        rows, lengths: int64 [requests], of ``req_to_token``, and of the prompts.
    """

    is_required = True

    def __init__(self, penalties: Penalties, rows: torch.Tensor, lengths: torch.Tensor) -> None:
        self._penalties, self._rows, self._positions = penalties, rows, lengths - 1

    def apply(self, logits: torch.Tensor) -> None:
        """Penalise the logits [requests, vocab] of the prompts' last tokens, in place."""
        self._penalties.apply(logits, self._rows, self._positions)


def _row_of(req: Req) -> Any:
    """Of ``req_to_token``; None for a request that has ended."""
    kv = kv_of(req)
    return kv.req_pool_idx if kv is not None else None


def _strengths_of(params: Any) -> tuple[float, float, float]:
    """Frequency, presence and repetition penalty."""
    return float(params.frequency_penalty), float(params.presence_penalty), float(params.repetition_penalty)


def _end_tokens_of(req: Req, vocab_size: int) -> list[int]:
    """The tokens of the vocabulary that end a request."""
    return sorted(token for token in end_tokens_of(req) if 0 <= token < vocab_size)
