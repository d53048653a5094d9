"""What the Triton attention kernels share: addresses of KV rows, strides of queries, tiles of query rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: Query rows (window rows times query heads per KV head) that one tile can hold.
MAX_ROWS = 256
#: Query rows of the widest tile that KV is read with at full speed; one of 128 takes 1.7 times as long for the same KV.
FAST_ROWS = 64
#: Caches that span fewer elements are addressed with 32 bits.
NARROW_ELEMENTS = 2**31


@triton.jit
def kv_offsets(slot, stride_slot, offs_d, WIDE: tl.constexpr):
    """Element offsets [BLOCK_N, D] of the cache rows ``slot``, whose words must be as loaded.

    The conversion belongs into the address: if a loop carries converted slots, Triton takes their loads for pipelined
    ones and waits for each of them where it is issued.
    """
    if WIDE:
        return (slot.to(tl.int64) * stride_slot)[:, None] + offs_d[None, :]
    else:
        return (slot * stride_slot)[:, None] + offs_d[None, :]


@triton.jit
def capped(logits2, CAP2: tl.constexpr):
    """Log2 logits under a soft cap of ``CAP2`` (log2 too); 0: as they are."""
    if CAP2 > 0:
        # CAP2 * tanh(logits2 / CAP2), by an exponential that may overflow to infinity.
        return CAP2 - 2.0 * CAP2 / (tl.exp2(logits2 * (2.0 * 1.4426950408889634 / CAP2)) + 1.0)
    else:
        return logits2


@triton.jit
def with_sinks(acc, lse2, sinks2):
    """Outputs [M, D] and log2-sum-exps [M] of rows, once their ``sinks2`` (log2 logits, [M]) are in the softmax too."""
    top = tl.maximum(lse2, sinks2)
    total = top + tl.log2(tl.exp2(lse2 - top) + tl.exp2(sinks2 - top))
    return acc * tl.exp2(lse2 - total)[:, None], total


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Let the next kernel's programs take the places of this one's as they finish (programmatic dependent launch)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernel before this one is done. Every program must, before its first return.

    What is read before may be nothing that a kernel since the last one launched without ``pdl_options`` writes: the
    model's matrix products are such kernels, so lengths, tables and selections are older.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@dataclass(frozen=True)
class Scratch:
    """Memory that the kernels share, since they run one after another.

    Attributes:
        part_o: float32, partial outputs of split lists and windows.
        part_lse: float32, their log2-sum-exps.
        arrived: int32, finished parts of each (request, KV head) of a draft step; zero between launches.
    """

    part_o: torch.Tensor
    part_lse: torch.Tensor
    arrived: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Device memory, in bytes."""
        return self.part_o.nbytes + self.part_lse.nbytes + self.arrived.nbytes


def has_early_start(device: torch.device) -> bool:
    """Whether kernels on ``device`` can start while the one before them still runs (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 9


def pdl_options(pdl: bool) -> dict[str, bool]:
    """Launch options of a kernel whose start may overlap the end of the one before; the interpreter knows none."""
    return {"launch_pdl": True} if pdl else {}


def is_wide(*caches: torch.Tensor) -> bool:
    """Whether offsets into one of the caches [slots, Hkv, D] need 64 bits."""
    return any(cache.shape[0] * cache.stride(0) >= NARROW_ELEMENTS for cache in caches)


def query_stride(q: torch.Tensor) -> int:
    """Elements from one token's queries to the next of ``q`` [tokens, Hq, D].

    Models hand over a slice of the fused QKV projection, so tokens may lie apart; heads may not.

    Raises:
        ValueError: the heads of a token are not contiguous.
    """
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        raise ValueError(f"the heads of a token must be contiguous in q, got strides {q.stride()}")
    return q.stride(0)


def tile_rows(rows: int) -> int:
    """Rows of the tile that holds ``rows`` query rows."""
    return max(16, triton.next_power_of_2(rows))


def query_tile(rows: int, block_n: int, num_warps: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps) for ``rows`` packed query rows; wider tiles need more warps for registers."""
    block_m = tile_rows(rows)
    if block_m <= FAST_ROWS:
        return block_m, block_n, num_warps
    return block_m, min(block_n, 64 if block_m == 128 else 32), 8


def num_splits(pairs: int, max_entries: int, num_sms: int, target: float, min_chunk: int, max_splits: int) -> int:
    """Splits per (request, KV head) so that about ``target`` programs per multiprocessor run.

    Depends on static values only (``pairs`` = B * Hkv, ``max_entries`` that a pair can have), so the launch grid is
    fixed per batch size.
    """
    want = max(1, int(target * num_sms) // max(pairs, 1))
    return max(1, min(want, max_splits, triton.cdiv(max_entries, min_chunk)))
