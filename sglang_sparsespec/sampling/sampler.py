"""The sampler of a round: draws drafts, keeps what they were drawn from, and accepts them.

Logits are float32: SGLang's ``LogitsProcessor`` converts what the head computed, into a static buffer where there is one.
On CUDA batches are drafted and accepted from them (``triton_sampling``), and no probability is written. Exceptions are
batches that are all greedy, which need the argmax alone, and seeded ones (``--enable-deterministic-inference``), since
SGLang's seeded sampler is a function of probabilities. These, and the CPU, take the path of ``reference``.

How a request is drawn depends on nothing but its own parameters, so a window's drafts may be drawn in several rounds, beside
other requests each time. What decides for all requests together does not change that: seeds are the server's choice, a
batch that is all greedy has no request that samples, and a greedy request's acceptance reads nothing that was kept.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.sampling import reference, triton_sampling
from sglang_sparsespec.sampling.parameters import RowParameters, has_filters
from sglang_sparsespec.sglang_compat import in_force

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

logger = logging.getLogger(__name__)

#: Smallest buffer of what drafts were drawn from that is worth a line in the log, bytes.
WORTH_LOGGING = 100_000_000


class Sampler:
    """Draws drafts and accepts them, for one kind of round.

    What a draft was drawn from is kept in entry slot * ``num_places`` + place: its logits where Triton draws, else its
    distribution. The buffer is made for the slots of the round that first needs it, and at least doubles when a round names
    more. Then it is freed first, and what it held is lost; so windows that outlive a round need rounds that all name the
    same number of slots.

    Args:
        num_places: entries per slot, at least the drafts of a window.
        logits_dtype: of kept logits, see :func:`draft_logits_dtype`.
        use_triton: draw from logits (CUDA).

    Attributes:
        is_all_greedy: whether no request of the round samples.
    """

    def __init__(self, num_places: int, logits_dtype: torch.dtype, device: torch.device | str, use_triton: bool) -> None:
        self.is_all_greedy = True
        self._num_places = num_places
        self._kept_dtype = logits_dtype if use_triton else torch.float32
        self._device = device
        self._use_triton = use_triton
        self._num_slots = 0
        self._kept = torch.empty((0, 0), dtype=self._kept_dtype, device=device)
        self._lse = torch.empty(0, device=device)
        self._own_slots = torch.empty(0, dtype=torch.int64, device=device)
        self._whole_windows = self._own_slots

    def begin_round(self, info: SamplingBatchInfo, reqs: Sequence[Req], num_slots: int, num_draws: int) -> None:
        """Sample with the parameters of a batch from now on.

        Args:
            reqs: the requests of the batch.
            num_slots: slots that the round may name: 0 to num_slots - 1.
            num_draws: calls of :meth:`draw` and :meth:`accept` that follow, at most.
        """
        self._info = info
        self.is_all_greedy = info.is_all_greedy
        self._num_slots = max(self._num_slots, num_slots)
        self._from_logits = self._use_triton and not info.is_all_greedy and info.sampling_seed is None
        if self._from_logits:
            self._has_filters = has_filters(info, reqs)
            self._seeds = triton_sampling.round_seeds(num_draws, self._device)
            self._next_seed = 0

    def draw(
        self,
        logits: torch.Tensor,
        entries: torch.Tensor,
        positions: torch.Tensor,
        requests: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draw a draft token for each row of logits: int64 [rows].

        Args:
            logits: [rows, vocab].
            entries: int64 [rows], all different; what was kept there before is forgotten.
            positions: int64 [rows], of the tokens that were fed.
            requests: int64 [rows], the batch's request that each row belongs to; None: row i is request i.
        """
        if self._from_logits:
            kept = self._reserve(logits.shape[1])
            return triton_sampling.draft(
                logits, self._rows(requests), self._seeds, self._take_seed(), kept, self._lse, entries
            )
        tokens, probs = reference.sample_draft(logits, RowParameters.of(self._info, requests=requests), positions)
        if probs is not None:
            self._reserve(logits.shape[1])[entries] = probs
        return tokens

    def accept(
        self,
        candidates: torch.Tensor,
        logits: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor | None = None,
        requests: torch.Tensor | None = None,
        num_drafted: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Accept the drafts of verified windows.

        Args:
            candidates: int64 [batch, W], the last committed token and k drafts, of which draft i was drawn in place i.
            logits: [batch * W, vocab] of the verification, after biases and masks.
            positions: int64 [batch * W].
            slots: int64 [batch], where the windows' drafts are kept; None: window i is in slot i.
            requests: int64 [batch], the batch's requests that these are; None: window i is of request i.
            num_drafted: int [batch], how many drafts were made; None: all k.

        Returns:
            as :func:`reference.accept_matching`: tokens int64 [batch, W] and accept_lens int32 [batch].
        """
        batch, width = candidates.shape
        if self._from_logits:
            kept = self._reserve(logits.shape[1])
            if slots is None:
                slots = self._own_slots[:batch]
            num_drafted = self._whole_windows[:batch] if num_drafted is None else num_drafted.long()
            return triton_sampling.accept(
                candidates, logits, self._rows(requests), self._seeds, self._take_seed(), kept, self._lse, self._num_places,
                slots, num_drafted,
            )  # fmt: skip
        probs = None
        if not self.is_all_greedy and self._info.sampling_seed is None:
            by_slot = self._reserve(logits.shape[1]).view(-1, self._num_places, logits.shape[1])
            probs = (by_slot[:batch] if slots is None else by_slot[slots])[:, : width - 1]
        return reference.accept(candidates, logits, self._info, positions, probs, requests, num_drafted)

    def _rows(self, requests: torch.Tensor | None) -> RowParameters:
        return RowParameters.of(self._info, requests=requests, has_filters=self._has_filters)

    def _take_seed(self) -> int:
        number = self._next_seed
        assert number < len(self._seeds), "more draws than the round was begun for"
        self._next_seed += 1
        return number

    def _reserve(self, vocab: int) -> torch.Tensor:
        """What is kept, [entries, vocab], with room for the round's slots."""
        slots = len(self._own_slots)
        if slots < self._num_slots:
            slots = max(self._num_slots, 2 * slots)
            shape, device = (slots * self._num_places, vocab), self._device
            self._kept = torch.empty(0)  # freed first: the two need not fit together
            self._kept = torch.zeros(shape, dtype=self._kept_dtype, device=device)
            self._lse = torch.zeros(shape[0], dtype=torch.float32, device=device)
            self._own_slots = torch.arange(slots, dtype=torch.int64, device=device)
            # All places of a slot are at least all drafts of a window.
            self._whole_windows = torch.full_like(self._own_slots, self._num_places)
            if self._kept.nbytes >= WORTH_LOGGING:
                logger.info("What sampled drafts are drawn from is kept in %.2f GB.", self._kept.nbytes / 1e9)
        return self._kept


def draft_logits_dtype(model_runner: ModelRunner) -> torch.dtype:
    """The narrowest type that holds the model's logits as they are.

    They are computed in the model's type, unless the head or a soft cap after it works in float32. (A type that rounds
    would be lossless as well: drafts are drawn from what is kept. But fewer would be accepted.)
    """
    config = model_runner.model_config.hf_text_config
    args = in_force(model_runner.server_args)
    in_float32 = args.enable_fp32_lm_head or getattr(config, "final_logit_softcapping", None)
    return torch.float32 if in_float32 else model_runner.dtype


def compile_kernels(vocab_size: int, window: int, kept_dtype: torch.dtype, device: torch.device | str) -> None:
    """Compile the kernels of rounds that sample, without and with filters; takes some seconds if they are new.

    Args:
        window: W.
        kept_dtype: of the drafts' logits, see :func:`draft_logits_dtype`.
        device: with CUDA.
    """
    steps = window - 1
    with torch.device(device):
        # SGLang's logits processor makes float32 of the head's output.
        logits, kept = torch.zeros(window, vocab_size, dtype=torch.float32), torch.zeros(steps, vocab_size, dtype=kept_dtype)
        lse, temperatures = torch.zeros(steps, dtype=torch.float32), torch.ones(1, 1, dtype=torch.float32)
        top_ks = torch.full((1,), vocab_size, dtype=torch.int32)
        top_ps, min_ps = torch.ones(1, dtype=torch.float32), torch.zeros(1, dtype=torch.float32)
        # These are not drawn: requests' seeds are to be the same with and without this.
        seeds, candidates = torch.zeros(2, dtype=torch.int64), torch.zeros(1, window, dtype=torch.int64)
        slots = torch.zeros(1, dtype=torch.int64)
    for rows in (RowParameters(temperatures, top_ks), RowParameters(temperatures, top_ks, top_ps, min_ps)):
        triton_sampling.draft(logits[:1], rows, seeds, 0, kept, lse, entries=slots)
        triton_sampling.accept(candidates, logits, rows, seeds, 1, kept, lse, steps, slots, num_drafted=slots)
