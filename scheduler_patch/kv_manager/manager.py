"""Which requests leave the device and which return.

SGLang retracts requests that no longer fit, throws their KV away and computes it again. Here
they are offloaded and restored. A request keeps its row of the request pool all the while, and
with the row what is indexed by it: the PillarAttn selection (logical positions, so the slots
may change) and the phase. On return the request decodes on from its last token; nothing is
computed again.

An offloaded request goes through these states:

1. LEAVING: it is taken out of the batch, while the round in flight still contains it.
2. STORED: that round's result has been settled. Its device memory can be evicted as soon as it
   has been copied.
3. LOADING: its nodes are locked on the device, and those that were evicted are loaded. Then the
   request joins the batch.

The policy is first come, first served. The newest running request leaves, the oldest returns
first, and no waiting request is admitted before all have returned. Thresholds are rounds of
growth at the largest rate, one verify window per request and round. Restoring needs more of them
than offloading, so that a request that returns does not leave at once.
"""

from __future__ import annotations

import enum
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.overlap_utils import RelayPayload
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ScheduleBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from sglang_sparsespec.metrics import KVManagerMetrics
from sglang_sparsespec.scheduler_patch.kv_manager.host_tier import HostTier
from sglang_sparsespec.scheduler_patch.prefill_interleave import tokens_of_chunks_to_come
from sglang_sparsespec.sglang_compat import kv_of, release
from sglang_sparsespec.spec_input import SparseSpecDraftInput

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

#: Rounds of growth below which requests are offloaded: one for the round in flight, one until
#: the leaving request is settled, and two for its copy.
OFFLOAD_ROUNDS = 4
#: Rounds of growth that must fit after a request was restored or admitted.
RESTORE_ROUNDS = 8
#: For tests, like SGLang's ``SGLANG_TEST_RETRACT_INTERVAL``: every so many iterations a request is
#: offloaded, one after another, whether the device is full or not, and evicted from it.
FORCE_INTERVAL = int(os.environ.get("SPARSESPEC_TEST_OFFLOAD_INTERVAL", "0"))


class State(enum.Enum):
    """Where an offloaded request is."""

    LEAVING = "leaving"
    STORED = "stored"
    LOADING = "loading"


@dataclass(eq=False)
class Offloaded:
    """One request that is not in the batch.

    Attributes:
        node: the tier's node of its last committed token; None while LEAVING.
        gain: device tokens that its leaving frees, until they are free.
    """

    req: Req
    gain: int
    state: State = State.LEAVING
    node: Any = None


class KVManager:
    """Offloads and restores requests of one scheduler.

    Args:
        scheduler: SGLang's scheduler.
        tier: where requests are stored.
        window: tokens that a request may grow by in one round.
    """

    def __init__(self, scheduler: Scheduler, tier: HostTier, window: int) -> None:
        self.scheduler = scheduler
        self.tier = tier
        self.window = window
        self.metrics = KVManagerMetrics(tier.bytes_per_token)
        self.offloaded: list[Offloaded] = []
        self._arrival: WeakKeyDictionary[Req, int] = WeakKeyDictionary()
        self._arrivals = 0
        self._iterations = 0  # these two: for tests, see FORCE_INTERVAL
        self._departures: WeakKeyDictionary[Req, int] = WeakKeyDictionary()

    # ------------------------------------------------------------------- scheduling

    @property
    def holds_admission(self) -> bool:
        """Whether waiting requests must stay where they are: older ones are offloaded.

        It also keeps prefills from using nodes of the tree that are being loaded.
        """
        return bool(self.offloaded) or self.tier.is_loading()

    @property
    def utilisation(self) -> float:
        """Share of the device's KV pool that requests hold which are not offloaded."""
        return 1 - self.tier.free_tokens / self.scheduler.max_total_num_tokens

    def step(self, running: ScheduleBatch) -> ScheduleBatch:
        """One scheduler iteration: settle, offload, restore. Returns the new running batch.

        What is restored runs at least one round before it can be offloaded again.
        """
        self._register(running)
        self._settle()
        self._offload(running)
        running = self._restore(running)
        self._wait_if_full(running)
        if running.is_empty():
            # SGLang resets it when requests end only: with all of them gone, none would be admitted again.
            running.batch_is_full = False
        return running

    def _register(self, running: ScheduleBatch) -> None:
        """Number new requests in the order in which they were admitted (the same on all ranks)."""
        for req in running.reqs:
            if req not in self._arrival:
                self._arrival[req] = self._arrivals
                self._arrivals += 1

    def _growth(self, num_requests: int, rounds: int) -> int:
        return num_requests * self.window * rounds

    # -------------------------------------------------------------------- offloading

    def _offload(self, running: ScheduleBatch) -> None:
        """Take requests out of the batch until the others can grow."""
        alive = [req for req in running.reqs if not req.finished()]
        leaving = self._newest(alive) or (self._forced(alive) if FORCE_INTERVAL else [])
        if leaving:
            gone = {id(entry.req) for entry in leaving}
            running.filter_batch(keep_indices=[i for i, req in enumerate(running.reqs) if id(req) not in gone])
            self.offloaded = sorted(self.offloaded + leaving, key=lambda entry: self._arrival[entry.req])

    def _newest(self, alive: list[Req]) -> list[Offloaded]:
        """The newest requests, until the next ``OFFLOAD_ROUNDS`` rounds of the others fit."""
        expected = self.tier.free_tokens + sum(entry.gain for entry in self.offloaded)
        leaving: list[Offloaded] = []
        if expected >= self._growth(len(alive), OFFLOAD_ROUNDS):
            return leaving
        for req in sorted(alive, key=self._arrival.__getitem__, reverse=True):
            staying = len(alive) - len(leaving)
            if staying == 1 or expected >= self._growth(staying, OFFLOAD_ROUNDS):
                break
            if can_be_stored(req):
                leaving.append(Offloaded(req, self.tier.exclusive_tokens(req)))
                expected += leaving[-1].gain
        return leaving

    def _forced(self, alive: list[Req]) -> list[Offloaded]:
        """The request that has left least often, every ``FORCE_INTERVAL`` iterations (tests)."""
        self._iterations += 1
        if self._iterations % FORCE_INTERVAL:
            return []
        storable = [req for req in alive if can_be_stored(req)]
        if not storable:
            return []
        req = min(storable, key=lambda req: (self._departures.get(req, 0), self._arrival[req]))
        self._departures[req] = self._departures.get(req, 0) + 1
        return [Offloaded(req, self.tier.exclusive_tokens(req))]

    def _wait_if_full(self, running: ScheduleBatch) -> None:
        """Wait for copies if the next round does not fit without their memory."""
        alive = [i for i, req in enumerate(running.reqs) if not req.finished()]
        if self.tier.is_writing() and self.tier.free_tokens < running.new_tokens_required_next_decode(alive):
            self.metrics.transfer_waits += 1
            self.tier.wait_for_writes()

    def _settle(self) -> None:
        """Store requests whose last round has been settled; note finished copies."""
        in_flight = {id(req) for batch, _ in getattr(self.scheduler, "result_queue", ()) for req in batch.reqs}
        for entry in list(self.offloaded):
            if entry.state is State.LEAVING and id(entry.req) not in in_flight:
                self._settle_leaving(entry)
            elif entry.state is State.STORED and entry.gain and self.tier.is_written(entry.node):
                entry.gain = 0
                if FORCE_INTERVAL:
                    self.tier.evict_all()

    def _settle_leaving(self, entry: Offloaded) -> None:
        req = entry.req
        if req.finished():  # by its last round, which has released it
            self.offloaded.remove(entry)
            return
        if req.to_finish is not None:  # aborted; without overlap no result is left to end it
            self._abort(entry)
            return
        entry.node, copied = self.tier.store(req)
        self.metrics.tokens_to_host += copied
        if entry.node is None and self.tier.host_is_busy:
            return  # until the next iteration
        if entry.node is None:
            self.metrics.host_full += 1
            logger.warning(
                "The host KV tier is full: request %s is retracted and will be computed again; "
                "raise --sparsespec-host-kv-gb.",
                req.rid,
            )
            self._retract(entry)
            return
        self.scheduler.draft_worker.lose_drafts([req])
        entry.state = State.STORED
        self.metrics.requests_offloaded += 1

    # --------------------------------------------------------------------- restoring

    def _restore(self, running: ScheduleBatch) -> ScheduleBatch:
        """Bring back the oldest requests that fit."""
        returning: list[Req] = []
        alive = sum(not req.finished() for req in running.reqs)
        while self.offloaded and self._bring_back(self.offloaded[0], alive + len(returning)):
            returning.append(self.offloaded.pop(0).req)
        if not returning:
            return running
        batch = self._decode_batch(returning)
        running.filter_batch()
        if running.is_empty():
            return batch
        running.merge_batch(batch)
        running.batch_is_full = False  # SGLang resets it when requests end only
        return running

    def _bring_back(self, entry: Offloaded, num_running: int) -> bool:
        """Advance ``entry`` towards the batch; whether it can join it now."""
        idle = num_running == 0 and self.scheduler.chunked_req is None
        if entry.state is State.STORED and not self._begin_return(entry, num_running, idle):
            return False
        if entry.state is State.LOADING:
            if idle:  # nothing to overlap with
                self.tier.wait_for_loads()
            # Not even one that is on the device: it may share nodes with one that is not yet.
            if self.tier.is_loading():
                return False
            self.tier.attach(entry.req, entry.node)
            self.metrics.requests_restored += 1
            return True
        return False

    def _begin_return(self, entry: Offloaded, num_running: int, idle: bool) -> bool:
        """Lock the request's nodes on the device, loading what is missing; False if it must wait."""
        tokens = self.tier.tokens_to_load(entry.node)
        if tokens and self.tier.is_loading():
            return False  # SGLang has three events for loads under way, and its prefills need some, too
        needed = self.tier.tokens_to_lock(entry.node) + self._growth(num_running + 1, RESTORE_ROUNDS)
        needed += tokens_of_chunks_to_come(self.scheduler)
        if not idle and self.tier.free_tokens < needed:
            return False
        if tokens == 0:
            self.tier.lock(entry.node)
        elif self.tier.start_load(entry.node):
            self.metrics.tokens_from_host += tokens
        else:
            if idle:
                logger.warning("Request %s does not fit beside the cached prefixes in use.", entry.req.rid)
                self._retract(entry)
            return False
        entry.gain = 0
        entry.state = State.LOADING
        return True

    def _decode_batch(self, reqs: list[Req]) -> ScheduleBatch:
        """A batch of ``reqs`` as they were before they left, to be merged into the running one."""
        scheduler = self.scheduler
        batch = ScheduleBatch.init_new(
            reqs,
            scheduler.req_to_token_pool,
            scheduler.token_to_kv_pool_allocator,
            scheduler.tree_cache,
            scheduler.model_config,
            scheduler.enable_overlap,
            scheduler.spec_algorithm,
        )
        batch.req_pool_indices_cpu = torch.tensor([kv_of(req).req_pool_idx for req in reqs], dtype=torch.int64)
        batch.seq_lens_cpu = torch.tensor([kv_of(req).kv_committed_len for req in reqs], dtype=torch.int64)
        batch.req_pool_indices = batch.req_pool_indices_cpu.to(batch.device, non_blocking=True)
        batch.seq_lens = batch.seq_lens_cpu.to(batch.device, non_blocking=True)
        batch.orig_seq_lens = batch.seq_lens.to(torch.int32)
        batch.multimodal_inputs = [req.multimodal_inputs for req in reqs]
        if batch.return_logprob:
            batch.top_logprobs_nums = [req.logprob.top_logprobs_num for req in reqs]
            batch.token_ids_logprobs = [req.logprob.token_ids_logprob for req in reqs]
        batch.sampling_info = SamplingBatchInfo.from_schedule_batch(batch, scheduler.model_config.vocab_size)
        bonus = torch.tensor([req.output_ids[-1] for req in reqs], dtype=torch.int64)
        batch.spec_info = SparseSpecDraftInput(bonus.to(batch.device, non_blocking=True), batch.seq_lens)
        if scheduler.enable_overlap:
            relay = scheduler.future_map
            batch.spec_info.future_indices = batch.req_pool_indices
            if relay.publish_ready is not None:
                # ``publish`` records this event anew: who waits for it must wait for the round in flight as well.
                relay.publish_ready.wait()
            relay.publish(batch.req_pool_indices, batch.seq_lens)
            relay.stash(batch.req_pool_indices, RelayPayload.from_draft_input(batch.spec_info))
        return batch

    # ------------------------------------------------------------------------ ending

    def abort(self, rid: str, abort_all: bool) -> None:
        """Abort offloaded requests, with ``AbortReq``'s meaning of ``rid`` (a prefix)."""
        for entry in list(self.offloaded):
            if not (abort_all or entry.req.rid.startswith(rid)):
                continue
            if entry.state is State.LEAVING:
                entry.req.to_finish = FINISH_ABORT()  # its round in flight ends it
            else:
                self._abort(entry)

    def _abort(self, entry: Offloaded) -> None:
        self._release(entry)
        self.scheduler.ipc_channels.send_to_tokenizer.send_output(AbortReq(rid=entry.req.rid), entry.req)

    def _retract(self, entry: Offloaded) -> None:
        """SGLang's way: free everything and queue the request for a new prefill."""
        self._release(entry)
        entry.req.reset_for_retract()
        self.scheduler._add_request_to_queue(entry.req, is_retracted=True)

    def _release(self, entry: Offloaded) -> None:
        self.offloaded.remove(entry)
        if entry.node is None:
            release(entry.req, self.tier.tree)
        else:
            self.tier.forget(entry.req, entry.node, locked=entry.state is State.LOADING)

    def retract_all(self) -> None:
        """Give up all stored KV (its weights are about to change); requests are computed again."""
        for entry in list(self.offloaded):
            if entry.req.finished():
                self.offloaded.remove(entry)
            else:
                self._retract(entry)


def can_be_stored(req: Req) -> bool:
    """Whether the radix tree can hold ``req``'s KV under its token ids."""
    tokens = len(req.origin_input_ids) + len(req.output_ids) - 1
    return (
        req.session is None
        and req.input_embeds is None
        and req.positional_embed_overrides is None
        and not req.skip_radix_cache_insert
        and kv_of(req).kv_committed_len <= tokens
    )
