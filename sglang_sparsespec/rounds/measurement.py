"""Measures the table of times (:mod:`round_times`) at start-up, on made-up requests in the empty KV pool.

What is timed is what rounds run: the captured graphs of draft and plain steps, and SGLang's own of the verification.
Where nothing is captured the same forwards run eagerly. Afterwards everything is as it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from statistics import median

import torch
from sglang.srt.distributed import get_tp_group
from sglang.srt.utils import DynamicGradMode

from sglang_sparsespec.rounds.base import RoundContext
from sglang_sparsespec.rounds.decode_steps import DecodeSteps
from sglang_sparsespec.rounds.forward_batch import verify_forward_batch
from sglang_sparsespec.rounds.graphs import decode_batch_sizes
from sglang_sparsespec.rounds.round_timer import RoundTimer
from sglang_sparsespec.rounds.round_times import PointTimes, RoundTimes

logger = logging.getLogger(__name__)

#: Requests and committed tokens of each: coarse points first, because the time may not suffice for all of them. A batch
#: size that is not captured stands for the next larger one that is.
GPU_BATCHES, GPU_CONTEXTS = (1, 1 << 30, 16, 64, 4, 128, 32, 8, 2), (512, 16384, 2048)
CPU_POINTS = ((1, 64), (1, 1024), (8, 64))
#: Seconds that measuring may take, and forwards of each sort that are timed at a point.
GPU_SECONDS, GPU_REPEATS = 5.0, 4
CPU_SECONDS, CPU_REPEATS = 1.0, 1
#: Keys that the pool is filled with, again and again.
BLOCK = 1024
#: Clock cycles of the device, some 5 ms, in which the host launches what is timed after them.
PAUSE_CYCLES = 10_000_000


def grid(
    sizes: list[int], on_gpu: bool, most_requests: int, pool_tokens: int, longest: int, margin: int
) -> list[tuple[int, int]]:
    """The points to measure, (batch, context) each, all different.

    Args:
        sizes: batch sizes that are captured, ascending; empty if none is.
        pool_tokens: KV slots that there are for all requests together.
        longest: context.
        margin: slots that a request needs beyond its context.
    """
    most = min(most_requests, sizes[-1] if sizes else 32)
    if on_gpu:
        batches = [next((size for size in sizes if size >= batch), min(batch, most)) for batch in GPU_BATCHES]
        points = [(batch, context) for batch in batches for context in GPU_CONTEXTS]
    else:
        points = list(CPU_POINTS)
    found: dict[tuple[int, int], None] = {}
    for batch, context in points:
        batch = min(batch, most)
        context = min(context, longest - margin, pool_tokens // max(batch, 1) - margin)
        if batch >= 1 and context >= 1:
            found[batch, context] = None
    return list(found)


def measure_rounds(context: RoundContext, draft: DecodeSteps, plain: DecodeSteps) -> RoundTimes | None:
    """The table of times, that of the first tensor-parallel rank; None if the pool is too small for any point.

    The KV pool must be empty, and have its final size.
    """
    with DynamicGradMode():  # as SGLang's event loops run rounds
        return Measurement(context, draft, plain).run()


class Measurement:
    """Times a draft step, a plain step and a verification at the points of :func:`grid`.

    Request i is row i + 1 of ``req_to_token``, with the KV slots after those of request i - 1, in order, as prefill gives
    them. Keys are random numbers: equal ones would have equal scores, which no selection is made for, and selected
    positions would lie side by side.

    Args:
        draft, plain: the steps of the rounds.
    """

    def __init__(self, context: RoundContext, draft: DecodeSteps, plain: DecodeSteps) -> None:
        self._context, self._draft, self._plain = context, draft, plain
        self._on_gpu = context.device.type == "cuda"
        self._repeats = GPU_REPEATS if self._on_gpu else CPU_REPEATS
        self._timer = RoundTimer(self._on_gpu)
        self._req_to_token: torch.Tensor = context.backend.req_to_token_pool.req_to_token
        # Steps go on from position to position while they are repeated.
        self._margin = max(context.window, self._repeats + 1)
        model_runner = context.model_runner
        self._sizes = decode_batch_sizes(model_runner) if context.capture else []
        self._grid = grid(
            self._sizes,
            self._on_gpu,
            most_requests=self._req_to_token.shape[0] - 1,
            pool_tokens=model_runner.max_total_num_tokens,
            longest=min(model_runner.model_config.context_len, self._req_to_token.shape[1]),
            margin=self._margin,
        )
        self._written = [torch.empty(0, dtype=torch.int32, device=context.device)]
        # Requests' seeds and samples are to be the same with and without measuring, so the global one is left alone.
        self._generator = torch.Generator(context.device).manual_seed(0)

    def run(self) -> RoundTimes | None:
        """See :func:`measure_rounds`."""
        if not self._grid:
            logger.warning("The KV pool is too small to time rounds in it.")
            return None
        backend, begin = self._context.backend, time.perf_counter()
        used = max(batch * (context + self._margin) for batch, context in self._grid)
        points: list[PointTimes] = []
        try:
            if self._on_gpu:
                self._fill_keys(used)
            backend.begin_lockstep_round(self._context.window - 1)
            if self._context.adapters is not None:
                self._context.adapters.use_none()
            dearest = 0.0
            for batch, context in self._grid:
                begun = time.perf_counter()
                largest = max((point.batch for point in points), default=batch)
                # On a CPU time grows with the batch from the first request on.
                estimate = dearest if self._on_gpu else dearest * max(1.0, batch / largest)
                if not self._affords(begun - begin + estimate):
                    break
                points.append(self._point(batch, context))
                dearest = max(dearest, time.perf_counter() - begun)
        finally:
            self._clean(used)
        group = get_tp_group()
        if group.world_size > 1:
            points = group.broadcast_object(points, src=0)
        times = RoundTimes(points, self._sizes)
        if group.rank_in_group == 0:
            logger.info(
                "SPARSESPEC times: %d points in %.1f s. Milliseconds of a draft step, a plain step and a verification: %s.",
                len(points), time.perf_counter() - begin, describe(times),
            )  # fmt: skip
        return times

    def _affords(self, seconds: float) -> bool:
        """Whether so many seconds may be spent; the same on all ranks, because forwards have collectives."""
        group = get_tp_group()
        affords = seconds <= (GPU_SECONDS if self._on_gpu else CPU_SECONDS)
        return affords if group.world_size == 1 else group.broadcast_object(affords, src=0)

    def _fill_keys(self, used: int) -> None:
        """Random keys in the first ``used`` slots after slot 0, which is SGLang's padding.

        Layers with a sliding window may have a pool with fewer slots. What comes behind them shares them.
        """
        table = self._sliding_slots
        if table is not None:
            backend = self._context.backend
            fewest = min(len(backend.token_to_kv_pool.get_key_buffer(layer)) for layer in backend.layer_ids) - 1
            table[1 : used + 1] = torch.arange(used, device=table.device) % fewest + 1
        for keys, _ in self._kv_buffers():
            most = min(used, len(keys) - 1)
            numbers = torch.randn((BLOCK, *keys.shape[1:]), generator=self._generator, device=keys.device)
            # As bytes: not every operation takes 8-bit floats.
            block, target = numbers.to(keys.dtype).view(torch.uint8), keys[1 : most + 1].view(torch.uint8)
            blocks, rest = divmod(most, BLOCK)
            target[: most - rest].view(blocks, *block.shape).copy_(block)
            target[most - rest :].copy_(block[:rest])

    @property
    def _sliding_slots(self) -> torch.Tensor | None:
        """SGLang's table of the slots of layers with a sliding window; None if they have no pool of their own."""
        sliding = self._context.backend.sliding
        return sliding.slot_table if sliding is not None else None

    def _kv_buffers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [slots, Hkv, D] of each layer."""
        backend = self._context.backend
        return [backend.token_to_kv_pool.get_kv_buffer(layer) for layer in backend.layer_ids]

    def _point(self, batch: int, length: int) -> PointTimes:
        context, window, device = self._context, self._context.window, self._context.device
        stride = length + self._margin
        slots = torch.arange(1, batch * stride + 1, dtype=torch.int32, device=device)
        self._req_to_token[1 : batch + 1, :stride] = slots.view(batch, stride)
        self._written.append(slots.view(batch, stride)[:, length:].flatten())
        rows = torch.arange(1, batch + 1, device=device)
        lengths = torch.full((batch,), length, dtype=torch.int64, device=device)
        positions = lengths.unsqueeze(1) + torch.arange(window, device=device)
        window_slots = self._req_to_token[rows.unsqueeze(1), positions].long()
        # Different tokens, since a mixture of experts sends equal ones to the same experts.
        vocab_size = context.model_runner.model_config.vocab_size
        tokens = torch.randint(vocab_size, (batch, window), generator=self._generator, device=device)

        def verify() -> None:
            forward_batch = verify_forward_batch(
                tokens, rows, lengths, positions, window_slots, context.model_runner.spec_algorithm
            )
            context.model_runner.forward(forward_batch)

        if context.backend.hints is not None:
            # A verification is faster after the drafts of its own window: their log-sum-exps are its hints.
            verify()  # selects what they attend to
            steps = self._draft.synthetic(tokens[:, 0].clone(), rows, lengths)
            for _ in range(window - 1):
                steps.step()
            tokens.copy_(steps.window())
            steps.end()
        verify_s = self._seconds(verify)
        first = tokens[:, 0].clone()
        draft_s, plain_s = (self._step_seconds(kind, first, rows, lengths) for kind in (self._draft, self._plain))
        return PointTimes(batch, length, draft=draft_s, verify=verify_s, plain=plain_s)

    def _step_seconds(
        self, kind: DecodeSteps, tokens: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor
    ) -> float:
        steps = kind.synthetic(tokens, rows, lengths)
        seconds = self._seconds(steps.step)
        steps.end()
        return seconds

    def _seconds(self, run: Callable[[], None]) -> float:
        """Median time of one of several runs, launched without waiting, after one that does not count."""
        run()
        if self._context.capture:
            # Behind a pause replays follow each other on the device, as they do in a round, however slow the host is.
            torch.cuda._sleep(PAUSE_CYCLES)
        marks = [self._timer.now()]
        for _ in range(self._repeats):
            run()
            marks.append(self._timer.now())
        self._synchronize()
        return median(self._timer.seconds(begin, end) for begin, end in zip(marks[:-1], marks[1:], strict=True))

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def _clean(self, used: int) -> None:
        """Rows, slots, selections, hints and counters as they were at start-up."""
        backend = self._context.backend
        rows = slice(1, 1 + max(batch for batch, _ in self._grid))
        self._req_to_token[rows].zero_()
        written = torch.cat(self._written).long()
        if (table := self._sliding_slots) is not None:
            table[1 : used + 1] = 0
        for keys, values in self._kv_buffers():
            for buffer in (keys, values):
                buffer.view(torch.uint8)[written[written < len(buffer)]] = 0
            if self._on_gpu:
                keys[1 : used + 1].view(torch.uint8).zero_()
        backend.table.num_selected[rows].zero_()
        backend.table.tail_start[rows].zero_()
        if backend.hints is not None:
            backend.hints.clear()
        backend.kv_read.zero_()
        # Rounds run on another stream than start-up.
        self._synchronize()


def describe(times: RoundTimes) -> str:
    """The corners of the table, for the log."""
    batches = [point.batch for point in times.points]
    corners = [point for point in times.points if point.batch in (min(batches), max(batches))]
    return "; ".join(
        f"{point.batch} x {point.context}: "
        + " / ".join(f"{1000 * seconds:.2f}" for seconds in (point.draft, point.plain, point.verify))
        for point in corners
    )
