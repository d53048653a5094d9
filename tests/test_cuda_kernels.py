"""The Triton kernels against the torch oracle.

On a machine without a GPU the kernels run in Triton's interpreter, in one child process (``TRITON_INTERPRET`` must be set
before Triton is imported, and would slow down or break other tests of this process).  The child runs every CPU case and
reports one JSON line per case; each case is then one test here.  The same checks run on CUDA with bf16 and larger sizes
under the ``gpu`` mark.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import traceback
import zlib
from dataclasses import dataclass
from unittest import mock

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
gpu_only = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_CUDA, reason="no CUDA GPU: the interpreter cases below cover the same code on the CPU"),
]


@dataclass(frozen=True)
class Case:
    """One random problem.

    lens: committed lengths L, 0 for a padding row; budget: entries selected at most; splits: programs wanted per
    multiprocessor for draft attention and scores; programs: per KV head, for verification; block_n: 0 for the default
    launch; wide: caches that need 64-bit offsets (on CPU: that are taken to).
    """

    kernel: str
    g: int
    d: int
    lens: tuple[int, ...]
    hkv: int = 2
    window: int = 3
    budget: int = 12
    splits: float = 1.0
    programs: int = 4
    score_dtype: str = "float32"
    block_n: int = 16
    values: str = "normal"
    wide: bool = False

    @property
    def name(self) -> str:
        lens = "-".join(str(x) for x in self.lens) if len(self.lens) < 6 else f"b{len(self.lens)}"
        return (
            f"{self.kernel}-g{self.g}-d{self.d}-w{self.window}-{lens}-s{self.splits:g}-p{self.programs}"
            f"-{self.score_dtype}-{self.values}{'-wide' if self.wide else ''}"
        )


RAGGED = (37, 0, 5, 64)

CPU_CASES = [
    Case("draft", g=1, d=64, lens=RAGGED, splits=0.01),
    Case("draft", g=4, d=128, lens=RAGGED, splits=100),
    Case("draft", g=6, d=64, lens=(40, 0, 9), splits=100, hkv=1),
    Case("draft", g=16, d=64, lens=(33, 2), splits=0.01, hkv=1),
    Case("draft", g=4, d=64, lens=(300,), budget=120, splits=100, block_n=32),
    # No selected positions at all: every entry is of the tail.
    Case("draft", g=2, d=64, lens=(20, 0, 7), budget=0, splits=100, hkv=1),
    Case("draft", g=2, d=64, lens=(20, 9), splits=100, hkv=1, wide=True),
    # Tails of hundreds of tokens, in one part and in many.
    Case("full", g=2, d=64, lens=(300, 0, 20), budget=0, splits=0.01, hkv=1),
    Case("full", g=4, d=64, lens=(300, 0, 20), budget=0, splits=100, hkv=1),
    # The same with a table that is made for short lists.
    Case("plain", g=4, d=64, lens=(300, 0, 20), splits=100, hkv=1),
    Case("plain_step", g=4, d=64, lens=(300, 0, 20), hkv=1),
    Case("plain_step", g=6, d=64, lens=(40, 7), hkv=2),
    Case("own_query", g=4, d=64, lens=(37, 0, 90, 5), splits=100),
    Case("own_query", g=2, d=64, lens=(37, 90), splits=0.01, hkv=1, score_dtype="float16"),
    Case("verify", g=1, d=64, lens=RAGGED, programs=1),
    Case("verify", g=4, d=128, lens=(37, 0, 5), programs=4),
    Case("verify", g=4, d=64, lens=RAGGED, programs=7),
    Case("verify", g=6, d=64, lens=(150, 1), window=9, programs=5, hkv=1),
    Case("verify", g=16, d=64, lens=(33, 2), window=9, programs=3, hkv=1),
    Case("verify", g=4, d=64, lens=(50, 3), programs=50, score_dtype="float16", hkv=1),
    Case("verify", g=4, d=64, lens=(50, 3), programs=9, score_dtype="bfloat16", hkv=1),
    # Twenty requests: more than one power of two, several of them whole in one program.
    Case("verify", g=2, d=64, lens=tuple(range(0, 60, 3)), programs=6, hkv=1),
    Case("verify", g=2, d=64, lens=(20, 9), programs=3, hkv=1, wide=True),
    Case("exact", g=4, d=64, lens=(37, 0, 5), splits=100),
    Case("exact", g=1, d=128, lens=(33,), splits=0.01, hkv=1),
    Case("prefill", g=4, d=64, lens=(37, 2, 70), splits=100),
    Case("prefill", g=6, d=128, lens=(20, 1), splits=0.01, hkv=1),
    Case("prefill", g=2, d=64, lens=(20, 9), splits=100, hkv=1, wide=True),
    Case("rescored", g=4, d=64, lens=(37, 0, 5), splits=3),
    Case("rescored", g=6, d=128, lens=(20, 70), window=9, splits=0.01, hkv=1),
    Case("select", g=1, d=64, lens=(37, 0, 5, 600), budget=40),
    Case("select", g=1, d=64, lens=(300, 41), budget=40, values="ties"),
    Case("select", g=1, d=64, lens=(530, 20), budget=100, score_dtype="bfloat16", values="prob"),
    Case("select", g=1, d=64, lens=(300, 12), budget=100, score_dtype="float16", values="signed"),
    Case("select", g=1, d=64, lens=(257, 300), budget=1, score_dtype="bfloat16", values="ties"),
    Case("indices", g=4, d=64, lens=(37, 0, 5, 64), budget=20),
    Case("growth", g=2, d=64, lens=(37, 0, 5), splits=100, hkv=1),
]

LONG = (1000, 0, 17, 4096, 8191, 333, 2049)
GPU_CASES = [
    *[
        Case("draft", g=g, d=d, lens=LONG, budget=300, window=9, splits=s, hkv=h, block_n=0)
        for g, d, h, s in [(1, 128, 8, 6), (4, 128, 8, 6), (6, 128, 2, 6), (7, 64, 2, 6), (16, 128, 1, 6), (4, 128, 8, 0.01)]
    ],
    Case("draft", g=4, d=128, lens=(8192,) * 64, budget=410, window=9, splits=6, hkv=8, block_n=0),
    Case("draft", g=4, d=128, lens=(32768,), budget=1639, window=9, splits=6, hkv=8, block_n=0),
    Case("draft", g=4, d=128, lens=(131072, 5), budget=6554, window=9, splits=6, hkv=2, block_n=0),
    Case("draft", g=4, d=128, lens=(1000, 17), budget=300, window=9, splits=6, hkv=8, block_n=0, wide=True),
    Case("full", g=4, d=128, lens=LONG, budget=0, window=9, splits=4, hkv=8, block_n=0),
    Case("full", g=6, d=128, lens=(131072, 5), budget=0, window=9, splits=4, hkv=2, block_n=0),
    Case("plain", g=4, d=128, lens=LONG, budget=300, window=9, splits=4, hkv=8, block_n=0),
    Case("plain_step", g=4, d=128, lens=LONG, hkv=8, window=9, block_n=0),
    Case("plain_step", g=6, d=128, lens=(131072, 5), hkv=2, window=9, block_n=0),
    Case("plain", g=6, d=128, lens=(131072, 5), budget=128, window=9, splits=4, hkv=2, block_n=0),
    Case("own_query", g=4, d=128, lens=LONG, budget=300, window=9, splits=4, hkv=8, block_n=0, score_dtype="float16"),
    *[
        Case("verify", g=g, d=d, lens=LONG, window=w, programs=n, hkv=h, block_n=0, score_dtype=t)
        for g, d, h, w, n, t in [
            (1, 128, 4, 9, 66, "float32"),
            (2, 64, 4, 9, 66, "float16"),
            (4, 128, 8, 9, 33, "float16"),
            (4, 128, 8, 9, 1, "float32"),
            (4, 128, 2, 1, 132, "float32"),
            (6, 128, 2, 9, 132, "float16"),
            (7, 64, 2, 9, 132, "bfloat16"),
            (8, 128, 4, 9, 66, "float32"),
            (16, 128, 1, 9, 264, "float32"),
            (4, 128, 8, 17, 33, "float32"),
        ]
    ],
    Case("verify", g=4, d=128, lens=(8192,) * 40, window=9, programs=33, hkv=8, score_dtype="float16", block_n=0),
    Case("verify", g=4, d=128, lens=(131072, 5), window=9, programs=132, hkv=2, score_dtype="float16", block_n=0),
    Case("verify", g=4, d=128, lens=(1000, 17), window=9, programs=33, hkv=8, block_n=0, wide=True),
    Case("exact", g=4, d=128, lens=LONG, window=9, splits=4, programs=33, hkv=8, block_n=0),
    Case("exact", g=6, d=128, lens=LONG, window=9, splits=0.01, programs=132, hkv=2, block_n=0),
    Case("prefill", g=4, d=128, lens=(1000, 3, 17, 4096), window=9, splits=4, hkv=8, block_n=0),
    Case("prefill", g=7, d=64, lens=(1000, 3, 17, 4096), window=9, splits=0.01, hkv=2, block_n=0),
    Case("prefill", g=4, d=128, lens=(1000, 17), window=9, splits=4, hkv=8, block_n=0, wide=True),
    Case("rescored", g=4, d=128, lens=LONG, window=9, splits=4, hkv=8, block_n=0),
    Case("rescored", g=6, d=128, lens=LONG, window=9, splits=8, hkv=2, block_n=0),
    *[
        Case("select", g=1, d=64, lens=LONG, budget=300, hkv=8, score_dtype=t, values=v)
        for t, v in [
            ("float32", "prob"),
            ("bfloat16", "prob"),
            ("bfloat16", "ties"),
            ("float16", "signed"),
            ("float32", "ties"),
        ]
    ],
    Case("select", g=1, d=64, lens=(32768,) * 16, budget=1639, hkv=8, score_dtype="bfloat16", values="prob"),
    Case("indices", g=4, d=128, lens=LONG, budget=300, hkv=8),
    Case("growth", g=4, d=128, lens=LONG, budget=300, window=9, splits=4, hkv=8, block_n=0),
]


def spread(cache: torch.Tensor) -> torch.Tensor:
    """``cache`` [slots, Hkv, D] with its slots so far apart that offsets need 64 bits."""
    # A multiple of 16, as the strides of a server's caches are.
    stride = 16 * -(-(2**31) // (16 * cache.shape[0]))
    big = torch.empty(stride * cache.shape[0], dtype=cache.dtype, device=cache.device)
    view = big.view(cache.shape[0], stride)[:, : cache[0].numel()].unflatten(1, cache.shape[1:])
    view.copy_(cache)
    return view


def as_in_fused_qkv(q: torch.Tensor) -> torch.Tensor:
    """``q`` [tokens, Hq, D] as models hand it over: a slice of a wider projection, its tokens lying apart."""
    tokens, hq, d = q.shape
    fused = torch.full((tokens, (hq + 3) * d), float("nan"), dtype=q.dtype, device=q.device)
    view = fused[:, : hq * d].view(tokens, hq, d)
    view.copy_(q)
    return view


class Problem:
    """Random inputs of a case: every KV slot that no request owns is NaN, unused list entries are poison."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.case, self.device, self.dtype = case, device, dtype
        batch, w, hkv, d = len(case.lens), case.window, case.hkv, case.d
        self.batch, self.hq, self.scaling = batch, hkv * case.g, d**-0.5
        self.lens = torch.tensor(case.lens, dtype=torch.int64)
        context = max(case.lens) + 2 * w
        num_rows = batch + 3
        self.rows = torch.randperm(num_rows - 1, generator=gen)[:batch] + 1
        self.rows[self.lens == 0] = 0  # SGLang pads with row 0
        slots = num_rows * context + 1
        perm = torch.randperm(slots - 1, generator=gen) + 1
        req_to_token = perm[: num_rows * context].view(num_rows, context).to(torch.int32)
        req_to_token[0] = 0
        shape = (slots, hkv, d)
        k, v = torch.randn(shape, generator=gen), torch.randn(shape, generator=gen)
        owned = torch.zeros(slots, dtype=torch.bool)
        owned[0] = True
        for row, length in zip(self.rows.tolist(), case.lens, strict=True):
            owned[req_to_token[row, : length + w].long()] = True
        k[~owned] = float("nan")
        v[~owned] = float("nan")
        # A draft step may be anywhere in the round: 1 to W tokens after L (further only after a fully accepted round).
        extra = torch.randint(1, w + 1, (batch,), generator=gen)
        self.draft_lens = torch.where(self.lens > 0, self.lens + extra, 0)
        capacity = max(case.budget, 1)
        positions = torch.full((num_rows, hkv, capacity), 1 << 30, dtype=torch.int32)
        self.counts = torch.clamp(self.lens, max=case.budget)
        num_selected = torch.zeros(num_rows, dtype=torch.int32)
        tail_start = torch.zeros(num_rows, dtype=torch.int32)
        for b, row in enumerate(self.rows.tolist()):
            n, length = int(self.counts[b]), int(self.lens[b])
            for h in range(hkv):
                chosen = torch.randperm(length, generator=gen)[:n].sort().values
                positions[row, h, :n] = chosen.to(torch.int32)
            num_selected[row], tail_start[row] = n, length
        self.k, self.v = k.to(device, dtype), v.to(device, dtype)
        if case.wide and device == "cuda":
            self.k, self.v = spread(self.k), spread(self.v)
        self.positions, self.num_selected = positions.to(device), num_selected.to(device)
        self.tail_start, self.req_to_token = tail_start.to(device), req_to_token.to(device)
        # SGLang passes int64 lengths and row indices; int32 must work too (seed picks).
        index = torch.int32 if seed % 2 else torch.int64
        self.rows, self.lens = self.rows.to(device, index), self.lens.to(device, index)
        self.draft_lens, self.counts = self.draft_lens.to(device, index), self.counts.to(device, torch.int32)
        self.q1 = as_in_fused_qkv(torch.randn(batch, self.hq, d, generator=gen).to(device, dtype))
        # Larger queries make peaked rows, so that scores differ.
        self.qw = as_in_fused_qkv((2 * torch.randn(batch * w, self.hq, d, generator=gen)).to(device, dtype))
        self.gen = gen

    def poison(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=self.device)


def make_kernels(case: Case, p: Problem, max_batch: int | None = None):
    from sglang_sparsespec.attention_backend.cuda_kernels import CudaPillarKernels
    from sglang_sparsespec.attention_backend.triton_draft import DraftConfig
    from sglang_sparsespec.attention_backend.triton_prefill_scores import ScoresConfig
    from sglang_sparsespec.attention_backend.triton_select import SelectConfig
    from sglang_sparsespec.attention_backend.triton_verify import VerifyConfig

    small = case.block_n > 0  # interpreter sizes
    draft = DraftConfig(block_n=16, min_chunk=16) if small else DraftConfig()
    verify = VerifyConfig(block_n=case.block_n, min_blocks=1) if small else VerifyConfig()
    scores = ScoresConfig(block_n=case.block_n, min_chunk=16) if small else ScoresConfig()
    draft.target = scores.target = case.splits
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count if p.device == "cuda" else 4
    # A little more than the quotient, so that rounding does not take one away.
    verify.programs_per_sm = (case.programs * case.hkv + 0.01) / num_sms
    select = SelectConfig(block=256, num_warps=4) if small else SelectConfig()
    kernels = CudaPillarKernels(
        max_batch=max_batch or p.batch,
        num_q_heads=p.hq,
        num_kv_heads=case.hkv,
        head_dim=case.d,
        window=case.window,
        capacity=p.positions.shape[2],
        max_context=p.req_to_token.shape[1],
        device=p.device,
        longest_list=p.req_to_token.shape[1] if case.kernel == "full" else None,
        draft_config=draft,
        verify_config=verify,
        select_config=select,
        scores_config=scores,
    )
    assert kernels.verify_programs == case.programs
    return kernels


def poison_scratch(kernels) -> None:
    """What a kernel reads of its scratch without having written it must show."""
    kernels._part_o.fill_(float("nan"))
    kernels._part_lse.fill_(float("nan"))


def rel_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref||; NaN stays NaN and fails every comparison."""
    out, ref = out.double().cpu(), ref.double().cpu()
    return float((out - ref).norm() / ref.norm().clamp(min=1e-30))


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-2


def upcast(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return p.k.float(), p.v.float()


def check_draft(case: Case, p: Problem, kernels) -> None:
    from sglang_sparsespec.attention_backend.torch_kernels import TorchPillarKernels

    args = (p.positions, p.num_selected, p.tail_start, p.req_to_token, p.rows, p.draft_lens, p.scaling)
    ref = torch.zeros(p.q1.shape, device=p.device)
    ref_lse = torch.zeros(p.batch, p.hq, device=p.device)
    TorchPillarKernels().draft_attention(p.q1.float(), *upcast(p), *args, ref, ref_lse)
    real = p.draft_lens > 0
    for with_lse in (True, False):
        out = p.poison(*p.q1.shape, dtype=p.dtype)
        lse = p.poison(p.batch, p.hq, dtype=torch.float32) if with_lse else None
        poison_scratch(kernels)
        kernels.draft_attention(p.q1, p.k, p.v, *args, out, lse)
        assert not kernels._arrived.any(), "a launch left its counters set for the next one"
        assert rel_error(out, ref) < tolerance(p.dtype)
        assert (out[~real] == 0).all(), "a padding row is not zero"
        per_row = (out.float() - ref).flatten(1).norm(dim=1)[real] / ref.flatten(1).norm(dim=1)[real]
        assert per_row.max() < 2 * tolerance(p.dtype)
        if lse is not None:
            assert (lse[real] - ref_lse[real]).abs().max() < (1e-4 if p.dtype == torch.float32 else 2e-2)


def check_full(case: Case, p: Problem, kernels) -> None:
    """The policy ``full``: a table of one entry, and a tail that begins at position 0."""
    p.num_selected.zero_()
    p.tail_start.zero_()
    assert p.positions.shape[2] == 1
    assert case.splits < 1 or kernels.draft_splits(p.batch) > 1, "the lists are as long as the request"
    check_draft(case, p, kernels)


def check_plain(case: Case, p: Problem, kernels) -> None:
    """A step of a plain round (``SparseSpecAttnBackend.attend_to_all``): lists longer than the kernels were told."""
    p.num_selected.zero_()
    p.tail_start.zero_()
    assert kernels.longest_list < int(p.draft_lens.max())
    check_draft(case, p, kernels)


def check_plain_step(case: Case, p: Problem, kernels) -> None:
    """A step of a plain round (``SparseSpecAttnBackend.plain_steps``): a window of one, hinted by the last step."""
    from sglang_sparsespec.attention_backend.torch_kernels import TorchPillarKernels

    args = (p.k, p.v, p.req_to_token, p.rows, p.lens, 1, p.scaling)
    ref, exact = torch.empty_like(p.q1, dtype=torch.float32), torch.empty(p.batch, 1, p.q1.shape[1], device=p.device)
    TorchPillarKernels().verify_attention(
        p.q1.float(), p.k.float(), p.v.float(), *args[2:], ref, None, None, exact
    )
    noise = torch.empty_like(exact).uniform_(-2, 2)
    # A useful hint, another request's, none at all.
    for hint in (exact + noise, exact.flip(0), torch.zeros_like(exact), torch.full_like(exact, float("nan"))):
        lse, out = hint.clone(), p.poison(*p.q1.shape, dtype=p.dtype)
        poison_scratch(kernels)
        kernels.verify_attention(p.q1, *args, out, None, lse, lse)
        assert rel_error(out, ref) < tolerance(p.dtype)
        assert (lse - exact).abs().max() < 0.02


def check_own_query(case: Case, p: Problem, kernels) -> None:
    """The policy ``oracle``: the best tokens before the tail for the query of a draft step."""
    from sglang_sparsespec.attention_backend.torch_kernels import _probabilities

    q = 2 * p.q1
    scores = p.poison(p.batch, case.hkv, p.req_to_token.shape[1], dtype=getattr(torch, case.score_dtype))
    poison_scratch(kernels)
    starts, live = torch.arange(p.batch, device=p.device), (p.draft_lens > 0).to(torch.int32)
    kernels.prefill_scores(q, p.k, p.req_to_token, p.rows, p.draft_lens, starts, live, 1, p.scaling, scores)
    chosen = torch.full_like(p.positions, -7)
    kernels.select(scores, p.tail_start[p.rows.long()], p.rows, p.num_selected[p.rows.long()], chosen)
    for b, (row, length) in enumerate(zip(p.rows.tolist(), p.draft_lens.tolist(), strict=True)):
        n, tail = int(p.num_selected[row]), int(p.tail_start[row])
        if length == 0:
            assert (chosen[row] == -7).all(), "a padding row was selected for"
            continue
        slots = p.req_to_token[row, :length].long()
        exact = _probabilities(q[b : b + 1].float(), p.k[slots].float(), p.scaling, None)[0].mean(dim=(1, 2))[:, :tail]
        for h in range(case.hkv):
            got = chosen[row, h, :n].long()
            assert got.unique().numel() == n and int(got.max()) < tail
            reached = float(exact[h][got].sum() / exact[h].topk(n).values.sum())
            assert reached > 1 - 2 * tolerance(p.dtype), f"request {b}, head {h}: {reached} of the best scores"
            if p.dtype == torch.float32 and case.score_dtype == "float32":
                assert set(got.tolist()) == set(exact[h].topk(n).indices.tolist())


def reference_scores(p: Problem, hint: torch.Tensor | None) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Window attention in float32: outputs, per-request scores [Hkv, L], and the rows' true LSE [B, W, Hq]."""
    from sglang_sparsespec.attention_backend.torch_kernels import _probabilities, _weighted_values

    w = p.case.window
    outs, scores = [], []
    lses = torch.zeros(p.batch, w, p.hq, device=p.device)
    for b, (row, length) in enumerate(zip(p.rows.tolist(), p.lens.tolist(), strict=True)):
        slots = p.req_to_token[row, : length + w].long()
        pos = torch.arange(length + w, device=p.device)
        mask = pos[None, :] <= pos[length:, None]
        prob, lse = _probabilities(p.qw[b * w : (b + 1) * w].float(), p.k[slots].float(), p.scaling, mask)
        outs.append(_weighted_values(prob, p.v[slots].float()))
        lses[b] = lse.permute(2, 0, 1).reshape(w, p.hq)
        if hint is not None:
            hint_b = hint[b].view(w, p.case.hkv, p.case.g).permute(1, 2, 0)
            prob = prob * torch.exp(lse - hint_b).unsqueeze(-1)
        scores.append(prob[..., :length].mean(dim=(1, 2)))
    return torch.cat(outs), scores, lses


def compare_scores(p: Problem, scores: torch.Tensor, ref: list[torch.Tensor]) -> None:
    # The interpreter truncates to bfloat16.
    rounding = {torch.float32: 0.0, torch.float16: 1e-3, torch.bfloat16: 8e-3}[scores.dtype]
    limit = max(tolerance(p.dtype), rounding)
    for b, length in enumerate(p.lens.tolist()):
        if length:
            assert rel_error(scores[b, :, :length], ref[b]) < limit, f"request {b}"


def check_verify(case: Case, p: Problem, kernels) -> None:
    ref, exact, lse = reference_scores(p, None)
    # A hint as draft steps give it: near the truth, usually below it.
    hint = lse + 0.3 * torch.randn(lse.shape, generator=p.gen).to(p.device) - 0.2
    _, hinted, _ = reference_scores(p, hint)
    compare_scores(p, verify(p, kernels, ref, hint), hinted)
    compare_scores(p, verify(p, kernels, ref, lse), exact)
    verify(p, kernels, ref, hint, with_scores=False)
    # Hints far off, none at all, or wrong for a single row must not disturb the attention itself, and only the rows'
    # own share of the scores.
    for useless in (-1e4, 1e4, float("nan")):
        scores = verify(p, kernels, ref, torch.full_like(hint, useless))
        if useless == useless:
            assert all(torch.isfinite(scores[b, :, :n]).all() for b, n in enumerate(p.lens.tolist()))
    single = hint.clone()
    single[0, 0, 0] = 1e4
    verify(p, kernels, ref, single)


def verify(p: Problem, kernels, ref: torch.Tensor, hint: torch.Tensor | None, with_scores: bool = True) -> torch.Tensor:
    """Run verification, compare its output with ``ref``, and return the scores."""
    w, max_len = p.case.window, p.req_to_token.shape[1] + 5
    scores = p.poison(p.batch, p.case.hkv, max_len, dtype=getattr(torch, p.case.score_dtype))
    out = p.poison(*p.qw.shape, dtype=p.dtype)
    args = (p.qw, p.k, p.v, p.req_to_token, p.rows, p.lens, w, p.scaling, out)
    poison_scratch(kernels)
    kernels.verify_attention(*args, scores if with_scores else None, hint)
    assert rel_error(out, ref) < tolerance(p.dtype)
    per_row = (out.float() - ref).flatten(1).norm(dim=1) / ref.flatten(1).norm(dim=1)
    assert per_row.max() < 2 * tolerance(p.dtype)
    check_written(p, scores, with_scores)
    return scores


def check_written(p: Problem, scores: torch.Tensor, any_written: bool = True) -> None:
    for b, length in enumerate(p.lens.tolist()):
        beyond = scores[b, :, length if any_written else 0 :]
        assert torch.isnan(beyond).all(), "scores beyond the window start were written"


def check_exact(case: Case, p: Problem, kernels) -> None:
    """Without a hint."""
    ref, exact, _ = reference_scores(p, None)
    compare_scores(p, verify(p, kernels, ref, None), exact)
    verify(p, kernels, ref, None, with_scores=False)


def check_rescored(case: Case, p: Problem, kernels) -> None:
    """Scores from log-sum-exps of another kernel's."""
    from sglang_sparsespec.attention_backend.triton_prefill_scores import window_scores

    _, exact, lse = reference_scores(p, None)
    scores = p.poison(p.batch, case.hkv, p.req_to_token.shape[1], dtype=getattr(torch, case.score_dtype))
    lse2 = (lse / math.log(2)).unsqueeze(0).contiguous()
    args = (p.qw, p.k, p.req_to_token, p.rows, p.lens, None, case.window, p.scaling, lse2, scores)
    window_scores(*args, kernels.scores_splits(p.batch), kernels.scores_config)
    compare_scores(p, scores, exact)
    check_written(p, scores)


def check_growth(case: Case, p: Problem, kernels) -> None:
    """An eager batch larger than the scratch was made for."""
    kernels = make_kernels(case, p, max_batch=1)
    check_draft(case, p, kernels)
    assert kernels._arrived.numel() == p.batch * case.hkv
    kernels = make_kernels(case, p, max_batch=1)
    check_exact(case, p, kernels)


def check_prefill(case: Case, p: Problem, kernels) -> None:
    from sglang_sparsespec.attention_backend.torch_kernels import TorchPillarKernels

    # Prompts of `lens` tokens, of which a random part is already cached (chunked prefill).
    total = p.lens.clone()
    extend = torch.tensor([1 + int(torch.randint(0, n, (1,), generator=p.gen)) for n in case.lens], device=p.device)
    extend[0] = total[0]
    starts = extend.cumsum(0) - extend
    q = (2 * torch.randn(int(extend.sum()), p.hq, case.d, generator=p.gen)).to(p.device, p.dtype)
    shape = (p.batch, case.hkv, p.req_to_token.shape[1])
    ref = p.poison(*shape, dtype=torch.float32)
    args = (p.req_to_token, p.rows, total, starts, extend, case.window, p.scaling)
    TorchPillarKernels().prefill_scores(q.float(), p.k.float(), *args, ref)
    out = p.poison(*shape, dtype=torch.float32)
    poison_scratch(kernels)
    kernels.prefill_scores(q, p.k, *args, out)
    written = ~torch.isnan(ref)
    assert torch.equal(torch.isnan(out), ~written), "another set of positions was written"
    assert written.any()
    assert rel_error(out[written], ref[written]) < tolerance(p.dtype)


def check_select(case: Case, p: Problem, kernels) -> None:
    max_len = max(case.lens) + 7
    shape = (p.batch, case.hkv, max_len)
    if case.values == "ties":
        values = torch.randint(0, 3, shape, generator=p.gen).float()
    elif case.values == "prob":
        values = torch.softmax(4 * torch.randn(shape, generator=p.gen), dim=-1)
    else:
        values = torch.randn(shape, generator=p.gen)
    scores = values.to(p.device, getattr(torch, case.score_dtype))
    for b, length in enumerate(case.lens):
        scores[b, :, length:] = float("nan")  # undefined beyond the length
    out = torch.full_like(p.positions, -7)
    kernels.select(scores, p.lens, p.rows, p.counts, out)
    written = torch.zeros_like(out, dtype=torch.bool)
    for b, row in enumerate(p.rows.tolist()):
        n, length = int(p.counts[b]), case.lens[b]
        if n == 0:
            continue
        written[row, :, :n] = True
        for h in range(case.hkv):
            got = out[row, h, :n].long()
            assert int(got.min()) >= 0 and int(got.max()) < length
            assert bool((got[1:] > got[:-1]).all()), "not strictly ascending"
            line = scores[b, h, :length].float()
            left = torch.ones(length, dtype=torch.bool, device=p.device)
            left[got] = False
            if left.any():
                assert float(line[got].min()) >= float(line[left].max()), "a better position was left out"
                threshold = line[got].min()
                ties = torch.nonzero(line == threshold).flatten()
                assert torch.equal(got[line[got] == threshold], ties[: int((line[got] == threshold).sum())])
    assert (out[~written] == -7).all(), "wrote outside the counted entries"


def check_indices(case: Case, p: Problem, kernels) -> None:
    from sglang_sparsespec.attention_backend.flashinfer_draft import _page_indices_kernel

    entries = torch.where(p.draft_lens > 0, p.counts + p.draft_lens - p.lens, 0).cpu()
    counts = entries.repeat_interleave(case.hkv)
    indptr = torch.zeros(counts.numel() + 1, dtype=torch.int32)
    indptr[1:] = counts.cumsum(0)
    out = torch.full((int(indptr[-1]) + 3,), -7, dtype=torch.int32, device=p.device)
    _page_indices_kernel[(case.hkv, p.batch)](
        p.positions,
        p.num_selected,
        p.tail_start,
        p.req_to_token,
        p.rows,
        p.draft_lens,
        indptr.to(p.device),
        out,
        p.positions.stride(0),
        p.positions.stride(1),
        p.req_to_token.stride(0),
        HKV=case.hkv,
        BLOCK=16,
    )
    ref = []
    for b, row in enumerate(p.rows.tolist()):
        if int(p.draft_lens[b]) == 0:
            continue
        tail = torch.arange(int(p.lens[b]), int(p.draft_lens[b]), device=p.device)
        for h in range(case.hkv):
            pos = torch.cat([p.positions[row, h, : int(p.counts[b])].long(), tail])
            ref.append(p.req_to_token[row][pos] * case.hkv + h)
    assert torch.equal(out[:-3], torch.cat(ref).to(torch.int32))
    assert (out[-3:] == -7).all()


CHECKS = {
    "draft": check_draft,
    "full": check_full,
    "plain": check_plain,
    "plain_step": check_plain_step,
    "own_query": check_own_query,
    "verify": check_verify,
    "exact": check_exact,
    "prefill": check_prefill,
    "rescored": check_rescored,
    "select": check_select,
    "indices": check_indices,
    "growth": check_growth,
}


def run_case(case: Case, device: str, dtype: torch.dtype, seed: int) -> None:
    from sglang_sparsespec.attention_backend import triton_common

    p = Problem(case, device, dtype, seed)
    narrow = 1 if case.wide and device == "cpu" else triton_common.NARROW_ELEMENTS
    with mock.patch.object(triton_common, "NARROW_ELEMENTS", narrow):
        assert triton_common.is_wide(p.k, p.v) == case.wide
        CHECKS[case.kernel](case, p, make_kernels(case, p))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """Results of all CPU cases from the interpreter child: name -> '' or the traceback."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, os.path.abspath(__file__)], env=env, capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and lines, done.stderr[-4000:]
    return {item["name"]: item["error"] for item in map(json.loads, lines)}


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda c: c.name)
def test_interpreter(case: Case, interpreted: dict[str, str]) -> None:
    error = interpreted[case.name]
    assert not error, error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [pytest.param(c, marks=gpu_only, id=c.name) for c in GPU_CASES])
def test_gpu(case: Case, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and (len(case.lens) > 8 or case.kernel == "select"):
        pytest.skip("bf16 covers it")
    run_case(case, "cuda", dtype, seed=zlib.crc32(case.name.encode()) % 1000)


FP8_CASES = [
    Case(kernel, 4, 128, (700, 3, 129, 2048), window=9, budget=100, programs=132, block_n=0)
    for kernel in ("draft", "verify", "prefill")
]


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("case", [pytest.param(c, marks=gpu_only, id=c.kernel) for c in FP8_CASES])
def test_gpu_fp8_caches_are_read_as_what_they_hold(case: Case, cache_dtype: torch.dtype) -> None:
    p = Problem(case, "cuda", torch.bfloat16)
    p.k, p.v = p.k.to(cache_dtype), p.v.to(cache_dtype)
    CHECKS[case.kernel](case, p, make_kernels(case, p))


@pytest.mark.parametrize("kernel", [pytest.param(k, marks=gpu_only) for k in ("draft", "verify", "hinted")])
def test_gpu_graph_replay(kernel: str) -> None:
    """A captured launch must follow lengths that change between replays."""
    from sglang_sparsespec.attention_backend.torch_kernels import TorchPillarKernels

    case = Case(kernel, g=4, d=128, lens=(1000, 2000, 700), hkv=8, window=9, budget=200, splits=6, programs=33, block_n=0)
    p = Problem(case, "cuda", torch.bfloat16)
    kernels = make_kernels(case, p)
    if kernel == "draft":
        q, lens = p.q1, p.draft_lens.clone()
        out = p.poison(*q.shape, dtype=q.dtype)
        args = (p.positions, p.num_selected, p.tail_start, p.req_to_token, p.rows, lens, p.scaling)

        def call(k, dtype: torch.dtype, target: torch.Tensor) -> None:
            k.draft_attention(q.to(dtype), p.k.to(dtype), p.v.to(dtype), *args, target)
    else:
        q, lens = p.qw, p.lens.clone()
        out = p.poison(*q.shape, dtype=q.dtype)
        args = (p.req_to_token, p.rows, lens, case.window, p.scaling)
        hint = torch.full((p.batch, case.window, p.hq), 7.0, device="cuda") if kernel == "hinted" else None

        def call(k, dtype: torch.dtype, target: torch.Tensor) -> None:
            k.verify_attention(q.to(dtype), p.k.to(dtype), p.v.to(dtype), *args, target, None, hint)

    call(kernels, q.dtype, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(kernels, q.dtype, out)
    for step in (0, 1):
        if step:
            lens -= torch.tensor([0, 1, 2], device="cuda") if kernel == "draft" else 650
            lens.clamp_(min=int(p.tail_start[p.rows.long()].min()) + 1 if kernel == "draft" else 1)
        if kernel == "draft":
            lens.copy_(torch.maximum(lens, p.lens + 1))
        out.fill_(float("nan"))
        graph.replay()
        ref = torch.zeros(q.shape, device="cuda")
        call(TorchPillarKernels(), torch.float32, ref)
        assert rel_error(out, ref) < 1e-2


def draft_call(p: Problem, kernels, out: torch.Tensor, batch: int):
    """Draft attention of the first ``batch`` requests."""
    args = (p.rows[:batch], p.draft_lens[:batch], p.scaling, out[:batch])
    return lambda: kernels.draft_attention(
        p.q1[:batch], p.k, p.v, p.positions, p.num_selected, p.tail_start, p.req_to_token, *args
    )


@pytest.mark.parametrize("replays", [pytest.param(200, marks=gpu_only)])
def test_gpu_draft_gives_the_same_bits_on_every_replay(replays: int) -> None:
    """Parts are merged in a fixed order, whichever program comes last; a race would show as a moving result."""
    case = Case("draft", g=4, d=128, lens=(1000, 2000, 700, 8000), hkv=8, window=9, budget=400, splits=12, block_n=0)
    p = Problem(case, "cuda", torch.bfloat16)
    kernels = make_kernels(case, p)
    assert kernels.draft_splits(p.batch) > 1
    out = p.poison(*p.q1.shape, dtype=torch.bfloat16)
    call = draft_call(p, kernels, out, p.batch)
    call()
    first = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(replays):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, first)


@pytest.mark.parametrize("max_batch", [pytest.param(2, marks=gpu_only)])
def test_gpu_graphs_outlive_the_scratch_they_were_captured_with(max_batch: int) -> None:
    case = Case("draft", g=4, d=128, lens=(1000, 2000, 700, 8000), hkv=8, window=9, budget=400, splits=12, block_n=0)
    p = Problem(case, "cuda", torch.bfloat16)
    kernels = make_kernels(case, p, max_batch=max_batch)
    out = p.poison(*p.q1.shape, dtype=torch.bfloat16)
    call = draft_call(p, kernels, out, max_batch)
    call()
    sizes = [(buffer.shape, buffer.dtype) for buffer in kernels._scratch()]
    first = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    with pytest.raises(ValueError, match="exceeds max_batch 2"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        draft_call(p, kernels, out, p.batch)()
    draft_call(p, kernels, out, p.batch)()
    assert kernels.max_batch == p.batch
    # Whoever gets the old scratch's memory, had it been freed, finds it in use.
    others = [torch.full(size, 3, dtype=dtype, device="cuda") for size, dtype in sizes for _ in range(4)]
    for _ in range(2):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out[:max_batch], first[:max_batch])
    assert all((other == 3).all() for other in others)


@pytest.mark.parametrize("g", [pytest.param(g, marks=gpu_only) for g in (4, 6)])
def test_gpu_flashinfer_draft(g: int) -> None:
    pytest.importorskip("flashinfer")
    from sglang_sparsespec.attention_backend.flashinfer_draft import FlashInferDraft
    from sglang_sparsespec.attention_backend.torch_kernels import TorchPillarKernels

    case = Case("draft", g=g, d=128, lens=(1000, 2000, 700), hkv=2, window=9, budget=200)
    p = Problem(case, "cuda", torch.bfloat16)
    table = (p.positions, p.num_selected, p.tail_start, p.req_to_token, p.rows, p.draft_lens)
    ref = torch.zeros(p.q1.shape, device="cuda")
    TorchPillarKernels().draft_attention(p.q1.float(), *upcast(p), *table, p.scaling, ref)
    draft = FlashInferDraft(4096, p.hq, case.hkv, case.d, torch.bfloat16, "cuda")
    draft.plan((p.counts.cpu() + p.draft_lens.cpu() - p.lens.cpu()).tolist(), p.scaling)
    draft.set_layer(*table)
    out = p.poison(*p.q1.shape, dtype=torch.bfloat16)
    draft.run(p.q1.contiguous(), p.k, p.v, out)
    assert rel_error(out, ref) < 1e-2


def test_limits_are_named() -> None:
    """Shapes the kernels cannot run are refused with a sentence, before any launch."""
    from sglang_sparsespec.attention_backend.cuda_kernels import CudaPillarKernels

    common = {"max_batch": 1, "capacity": 8, "max_context": 64, "device": "cpu"}
    with pytest.raises(ValueError, match="head_dim 80"):
        CudaPillarKernels(num_q_heads=4, num_kv_heads=2, head_dim=80, window=9, **common)
    with pytest.raises(ValueError, match="packed rows"):
        CudaPillarKernels(num_q_heads=64, num_kv_heads=2, head_dim=64, window=9, **common)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for index, cpu_case in enumerate(CPU_CASES):
        message = ""
        try:
            run_case(cpu_case, "cpu", torch.float32, seed=index)
        except Exception:  # noqa: BLE001 - reported to the parent, case by case
            message = traceback.format_exc(limit=-6)[-3000:]
        print(json.dumps({"name": cpu_case.name, "error": message}), flush=True)
