"""The attention kernels that the benchmark times: this project's, and those of SGLang's backends.

A provider prepares the calls for one problem. Each call is one layer's attention for one batch; successive calls walk
through disjoint batches and different selections, as the layers of a model do, so that none finds its data in the L2
cache. Provider names of one kind are alternatives for the same job.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _kernel_problem import TAIL, WINDOW, Problem, decode_bytes, relative_error, verify_bytes

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-2
FLASHINFER_WORKSPACE = 512 << 20
COPY_ELEMENTS = 1 << 30


class NotReady(RuntimeError):
    """A FlashInfer module is still compiling; try this provider again later."""


class NotCompiled(RuntimeError):
    """A FlashInfer module does not compile here."""


@dataclass
class Prepared:
    """Calls to time and how to check them.

    Attributes:
        calls: each launches one layer's work; the first one is checked.
        check: relative errors of what the first call wrote, by name.
        bytes: KV bytes that one call must read.
        extra: further fields of the record.
    """

    calls: list[Callable[[], Any]]
    check: Callable[[], dict[str, float]]
    bytes: int
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Provider:
    """One way to do one job.

    Attributes:
        kind: ``copy``, ``decode``, ``draft``, ``verify``, ``select`` or ``verify+select``.
        needs: FlashInfer modules that must be compiled.
        gpu: whether it runs on a GPU only.
        groups: query heads per KV head that it was compiled for; None: any.
    """

    kind: str
    name: str
    make: Callable[[Problem], Prepared]
    needs: tuple[str, ...] = ()
    gpu: bool = True
    groups: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        """Unique name, used in records."""
        return f"{self.kind}/{self.name}"


# ------------------------------------------------------------ FlashInfer modules


def flashinfer_specs(head_dim: int = 128) -> dict[str, Callable[[], Any]]:
    """FlashInfer modules for bf16 and ``head_dim``, by name: functions that return their build specification."""
    import torch
    from flashinfer.jit import gen_batch_decode_module, gen_batch_prefill_module

    bf16, index = torch.bfloat16, torch.int32
    common = (bf16, bf16, bf16, index, head_dim, head_dim, 0, False, False)
    return {
        "fa2": lambda: gen_batch_prefill_module("fa2", *common, False),
        "decode": lambda: gen_batch_decode_module(*common),
        "fa3": lambda: gen_batch_prefill_module("fa3", *common, False),
    }


def build_flashinfer(name: str, folder: Path) -> None:
    """Compile one module (nothing to do if it is cached) and leave a mark in ``folder``."""
    begin = time.monotonic()
    try:
        spec = flashinfer_specs()[name]()
        if not spec.is_aot:
            spec.build(verbose=False)
        text = f"ok {time.monotonic() - begin:.0f} s"
    except BaseException as error:  # noqa: BLE001 - the mark tells the process that waits
        text = f"failed {type(error).__name__}: {str(error)[-400:]}"
    partial = folder / f"{name}.partial"
    partial.write_text(text)
    partial.rename(folder / f"{name}.mark")


def require_flashinfer(names: tuple[str, ...], folder: Path | None, wait_s: float) -> None:
    """Wait for modules that other processes compile.

    Raises:
        NotReady: one is still compiling after ``wait_s``.
        NotCompiled: one failed to compile.
    """
    until = time.monotonic() + wait_s
    for name in names:
        if folder is None:
            continue
        mark = folder / f"{name}.mark"
        while not mark.exists():
            if time.monotonic() > until:
                raise NotReady(f"FlashInfer's {name} module is still compiling")
            time.sleep(0.2)
        text = mark.read_text()
        if not text.startswith("ok"):
            raise NotCompiled(f"FlashInfer's {name} module did not compile: {text}")


_workspace: list[Any] = []


def workspace(device: torch.device) -> torch.Tensor:
    """FlashInfer's float workspace, shared: its wrappers run one after another here."""
    import torch

    if not _workspace:
        _workspace.append(torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device))
    return _workspace[0]


def nan_like(p: Problem, *shape: int, dtype: Any = None) -> torch.Tensor:
    """Poisoned output: what a kernel leaves unwritten fails its check."""
    import torch

    return torch.full(shape, float("nan"), dtype=dtype or p.dtype, device=p.device)


# ------------------------------------------------------------------------ copy


def copy_same_bytes(p: Problem) -> Prepared:
    """Copies that move as many bytes (half read, half written) as a draft step reads."""
    half = p.draft_bytes // 2 // p.k.element_size()
    source = p.k.view(-1)[: max(half, COPY_ELEMENTS)]
    target = p.v.view(-1)[: source.numel()].clone()
    places = max(1, min(source.numel() // half, 32))

    def call(i: int) -> Callable[[], Any]:
        a, b = source[i * half : (i + 1) * half], target[i * half : (i + 1) * half]
        return lambda: b.copy_(a)

    def check() -> dict[str, float]:
        return {"out": float((target[:half].float() - source[:half].float()).abs().max())}

    return Prepared([call(i) for i in range(places)], check, p.draft_bytes)


# ---------------------------------------------------------------------- decode


def worst(p: Problem, out: torch.Tensor, references: list[torch.Tensor]) -> float:
    """Largest relative error of the sampled requests; ``out`` has all requests along its first axis."""
    errors = [relative_error(out[b], ref) for b, ref in zip(p.sample(), references, strict=True)]
    # max() would lose a NaN.
    return float("nan") if any(e != e for e in errors) else max(errors)


def _decode_out(p: Problem) -> tuple[torch.Tensor, Callable[[], dict[str, float]]]:
    shape = p.unit.shape
    out = nan_like(p, p.unit.batch, shape.num_q_heads, shape.head_dim)
    return out, lambda: {"out": worst(p, out, p.reference("decode"))}


def draft_errors(p: Problem, out: torch.Tensor, lse: torch.Tensor | None) -> dict[str, float]:
    """Errors of a draft step's outputs and log-sum-exps against the reference."""
    reference = p.reference("draft")
    errors = {"out": worst(p, out, [ref for ref, _ in reference])}
    if lse is not None:
        errors["lse"] = worst(p, lse, [ref for _, ref in reference])
    return errors


def flashinfer_decode(tensor_cores: bool) -> Callable[[Problem], Prepared]:
    """FlashInfer's paged decoding, planned for exactly this batch (a server's captured plan is no faster)."""

    def make(p: Problem) -> Prepared:
        import torch
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        shape, batch = p.unit.shape, p.unit.batch
        out, check = _decode_out(p)
        pages = (p.k.unsqueeze(1), p.v.unsqueeze(1))
        calls: list[Callable[[], Any]] = []
        for s in range(p.sets):
            wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace(p.device), "NHD", use_tensor_cores=tensor_cores)
            wrapper.plan(
                p.indptr(),
                p.indices(s),
                torch.ones(batch, dtype=torch.int32),
                shape.num_q_heads,
                shape.num_kv_heads,
                shape.head_dim,
                1,
                q_data_type=p.dtype,
                kv_data_type=p.dtype,
                sm_scale=p.scaling,
            )
            calls.append(partial(wrapper.run, p.q1, pages, out=out))
        return Prepared(calls, check, decode_bytes(p.unit))

    return make


def sglang_triton_decode(p: Problem) -> Prepared:
    """SGLang's Triton backend's decoding, with the split counts that backend would choose."""
    import torch
    import triton
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

    shape, batch = p.unit.shape, p.unit.batch
    out, check = _decode_out(p)
    most_splits = 8  # SGLang's default, --triton-attention-num-kv-splits
    on_gpu = p.device.type == "cuda"
    cores = torch.cuda.get_device_properties(p.device).multi_processor_count if on_gpu else 4
    logits = torch.zeros((batch, shape.num_q_heads, most_splits, shape.head_dim), device=p.device)
    lse = torch.zeros((batch, shape.num_q_heads, most_splits), device=p.device)
    splits = torch.zeros(batch, dtype=torch.int32, device=p.device)
    get_num_kv_splits_triton[(1,)](
        splits,
        p.lens,
        batch,
        1,
        shape.num_q_heads,
        shape.num_kv_heads,
        most_splits,
        cores,
        MAX_NUM_SEQ=256 if batch < 256 else triton.next_power_of_2(batch),
    )
    indptr = p.indptr().to(p.device)
    calls: list[Callable[[], Any]] = []
    for s in range(p.sets):
        indices = p.indices(s).to(torch.int64)

        def call(indices: torch.Tensor = indices) -> None:
            decode_attention_fwd(
                p.q1, p.k, p.v, out, indptr, indices, logits, lse, splits, most_splits, p.scaling, 1.0, 1.0,
                use_pdl=on_gpu,
            )

        calls.append(call)
    return Prepared(calls, check, decode_bytes(p.unit), {"splits": int(splits[0])})


def fa3(window: int) -> Callable[[Problem], Prepared]:
    """FlashAttention 3 as SGLang's ``fa3`` backend calls it, for ``window`` rows per request."""

    def make(p: Problem) -> Prepared:
        import torch
        from sgl_kernel.flash_attn import flash_attn_with_kvcache

        shape, batch = p.unit.shape, p.unit.batch
        verify = window > 1
        beyond = window if verify else 0
        q = p.qw if verify else p.q1
        pages = (p.k.unsqueeze(1), p.v.unsqueeze(1))
        lengths = (p.lens + beyond).to(torch.int32)
        cu_q = (torch.arange(batch + 1, device=p.device) * window).to(torch.int32)
        cu_k = p.indptr(beyond).to(p.device)
        results: list[Any] = []
        calls: list[Callable[[], Any]] = []
        for s in range(p.sets):
            table = p.req_to_token[p.requests[s], : p.unit.context + beyond].contiguous()

            def call(table: torch.Tensor = table) -> None:
                results[:] = [
                    flash_attn_with_kvcache(
                        q=q,
                        k_cache=pages[0],
                        v_cache=pages[1],
                        page_table=table,
                        cache_seqlens=lengths,
                        cu_seqlens_q=cu_q,
                        cu_seqlens_k_new=cu_k,
                        max_seqlen_q=window,
                        softmax_scale=p.scaling,
                        causal=True,
                    )
                ]

            calls.append(call)

        def check() -> dict[str, float]:
            out = results[0].view(batch, window, shape.num_q_heads, shape.head_dim)
            if verify:
                return {"out": worst(p, out, [ref for ref, *_ in p.reference("verify")])}
            return {"out": worst(p, out[:, 0], p.reference("decode"))}

        return Prepared(calls, check, verify_bytes(p.unit) if verify else decode_bytes(p.unit))

    return make


# ----------------------------------------------------------------------- draft


def pillar_draft(config: Callable[[], Any] | None = None) -> Callable[[Problem], Prepared]:
    """The plugin's draft attention, with log-sum-exps, as a draft step calls it."""

    def make(p: Problem) -> Prepared:
        import torch

        shape, batch = p.unit.shape, p.unit.batch
        kernels = p.make_kernels(**({"draft_config": config()} if config else {}))
        out = nan_like(p, batch, shape.num_q_heads, shape.head_dim)
        lse = nan_like(p, batch, shape.num_q_heads, dtype=torch.float32)

        def check() -> dict[str, float]:
            errors = draft_errors(p, out, lse)
            if config is not None:
                errors["against_default"] = against_default(p, "draft", pillar_draft(), out)
            return errors

        def call(selection: int, s: int) -> Callable[[], Any]:
            return lambda: kernels.draft_attention(
                p.q1,
                p.k,
                p.v,
                p.positions[selection],
                p.num_selected,
                p.tail_start,
                p.req_to_token,
                p.requests[s],
                p.draft_lens,
                p.scaling,
                out,
                lse,
            )

        calls = [call(i, s) for i in range(p.positions.shape[0]) for s in range(p.sets)]
        extra = {"index_bytes": p.index_bytes, "splits": kernels.draft_splits(batch), "outputs": [out]}
        return Prepared(calls, check, p.draft_bytes, extra)

    return make


def flashinfer_draft(with_lists: bool) -> Callable[[Problem], Prepared]:
    """FlashInfer's decoding over per-head page lists; ``with_lists`` counts building the lists in."""

    def make(p: Problem) -> Prepared:
        from sglang_sparsespec.attention_backend.flashinfer_draft import FlashInferDraft

        shape, batch = p.unit.shape, p.unit.batch
        entries = [count + TAIL for count in p.selected]
        draft = FlashInferDraft(
            shape.num_kv_heads * sum(entries),
            shape.num_q_heads,
            shape.num_kv_heads,
            shape.head_dim,
            p.dtype,
            p.device,
            workspace(p.device),
        )
        draft.plan(entries, p.scaling)
        out = nan_like(p, batch, shape.num_q_heads, shape.head_dim)

        def lists(selection: int, s: int) -> None:
            draft.set_layer(
                p.positions[selection], p.num_selected, p.tail_start, p.req_to_token, p.requests[s], p.draft_lens
            )

        def call(selection: int, s: int) -> Callable[[], Any]:
            def run() -> None:
                lists(selection, s)
                draft.run(p.q1, p.k, p.v, out)

            return run

        if with_lists:
            calls = [call(i, s) for i in range(p.positions.shape[0]) for s in range(p.sets)]
        else:
            # One list, run again and again: at most batches of tens of MB, so the L2 cache helps it.
            lists(0, 0)
            calls = [lambda: draft.run(p.q1, p.k, p.v, out)]
        extra = {"index_bytes": p.index_bytes, "cached": not with_lists}
        return Prepared(calls, lambda: draft_errors(p, out, None), p.draft_bytes, extra)

    return make


# ---------------------------------------------------------------------- verify


def _verify_buffers(p: Problem, scored: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    import torch

    from sglang_sparsespec.attention_backend.interface import score_row

    shape, batch = p.unit.shape, p.unit.batch
    out = nan_like(p, batch * WINDOW, shape.num_q_heads, shape.head_dim)
    scores = None
    if scored:
        row = score_row(p.req_to_token.shape[1])
        scores = nan_like(p, batch, shape.num_kv_heads, row, dtype=torch.float16)
    return out, scores


def verify_errors(p: Problem, out: torch.Tensor, scores: torch.Tensor | None, exact: bool) -> dict[str, float]:
    """Errors of attention and scores against the reference."""
    reference = p.reference("verify")
    errors = {"out": worst(p, out.view(p.unit.batch, WINDOW, *out.shape[1:]), [ref for ref, *_ in reference])}
    if scores is not None:
        found = [
            relative_error(scores[b, :, : p.lengths[b]], ref_exact if exact else ref_hinted)
            for b, (_, ref_exact, ref_hinted) in zip(p.sample(), reference, strict=True)
        ]
        errors["scores"] = float("nan") if any(e != e for e in found) else max(found)
    return errors


def against_default(
    p: Problem, kind: str, make: Callable[[Problem], Prepared], out: torch.Tensor
) -> float:
    """||out - default|| / ||default|| over the whole batch, the default being that kind's default launch."""
    import torch

    def compute() -> torch.Tensor:
        prepared = make(p)
        prepared.calls[0]()
        if p.device.type == "cuda":
            torch.cuda.synchronize()
        return prepared.extra["outputs"][0].clone()

    default = p.cached(f"default/{kind}", compute)
    return float((out.float() - default.float()).norm() / default.float().norm())


def pillar_verify(
    scored: bool, exact: bool = False, config: Callable[[], Any] | None = None
) -> Callable[[Problem], Prepared]:
    """The plugin's verification; ``exact`` gives no hint, so that a pass over K finds the log-sum-exps first."""

    def make(p: Problem) -> Prepared:
        kernels = p.make_kernels(**({"verify_config": config()} if config else {}))
        out, scores = _verify_buffers(p, scored)
        hint = None if exact else p.hint

        def call(s: int) -> Callable[[], Any]:
            return lambda: kernels.verify_attention(
                p.qw, p.k, p.v, p.req_to_token, p.requests[s], p.lens, WINDOW, p.scaling, out, scores, hint
            )

        def check() -> dict[str, float]:
            errors = verify_errors(p, out, scores, exact)
            if config is not None:
                errors["against_default"] = against_default(p, "verify", pillar_verify(True), out)
            return errors

        programs = kernels.verify_programs * p.unit.shape.num_kv_heads
        extra = {"programs": programs, "outputs": [out, scores]}
        return Prepared([call(s) for s in range(p.sets)], check, verify_bytes(p.unit), extra)

    return make


def flashinfer_verify(backend: str, rescore: bool = False) -> Callable[[Problem], Prepared]:
    """FlashInfer's paged prefill for the window rows; ``rescore`` adds exact scores by a second pass over K."""

    def make(p: Problem) -> Prepared:
        import torch
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        from sglang_sparsespec.attention_backend.triton_prefill_scores import window_scores

        shape, batch = p.unit.shape, p.unit.batch
        out, scores = _verify_buffers(p, rescore)
        lse = nan_like(p, batch * WINDOW, shape.num_q_heads, dtype=torch.float32)
        lse2 = lse.view(1, batch, WINDOW, shape.num_q_heads)
        pages = (p.k.unsqueeze(1), p.v.unsqueeze(1))
        kernels = p.make_kernels()
        splits, config = kernels.scores_splits(batch), kernels.scores_config
        calls: list[Callable[[], Any]] = []
        for s in range(p.sets):
            wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace(p.device), "NHD", backend=backend)
            wrapper.plan(
                torch.arange(batch + 1, dtype=torch.int32) * WINDOW,
                p.indptr(WINDOW),
                p.indices(s, WINDOW),
                torch.ones(batch, dtype=torch.int32),
                shape.num_q_heads,
                shape.num_kv_heads,
                shape.head_dim,
                1,
                causal=True,
                sm_scale=p.scaling,
                q_data_type=p.dtype,
                kv_data_type=p.dtype,
            )

            def call(w: Any = wrapper, s: int = s) -> None:
                if scores is None:
                    w.run(p.qw, pages, out=out)
                    return
                w.run(p.qw, pages, out=out, lse=lse, return_lse=True)
                # FlashInfer's log-sum-exps are to base 2.
                window_scores(
                    p.qw, p.k, p.req_to_token, p.requests[s], p.lens, None, WINDOW, p.scaling, lse2, scores, splits, config
                )

            calls.append(call)
        return Prepared(
            calls, lambda: verify_errors(p, out, scores, exact=True), verify_bytes(p.unit)
        )

    return make


def sglang_triton_verify(p: Problem) -> Prepared:
    """SGLang's Triton backend's verification of a chain: its extend kernel over prefix and window."""
    import torch
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    shape, batch = p.unit.shape, p.unit.batch
    out, _ = _verify_buffers(p, False)
    qo_indptr = (torch.arange(batch + 1, device=p.device) * WINDOW).to(torch.int32)
    kv_indptr = p.indptr().to(p.device)
    mask_indptr = p.indptr(WINDOW).to(p.device, torch.int64) * WINDOW
    window = p.lens[:, None] + torch.arange(WINDOW, device=p.device)
    calls: list[Callable[[], Any]] = []
    for s in range(p.sets):
        prefix = p.indices(s).to(torch.int64)
        slots = p.req_to_token[p.requests[s]].gather(1, window).reshape(-1).long()
        k, v = p.k[slots].contiguous(), p.v[slots].contiguous()
        assert k.shape == (batch * WINDOW, shape.num_kv_heads, shape.head_dim)

        def call(prefix: torch.Tensor = prefix, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            extend_attention_fwd(
                p.qw, k, v, out, p.k, p.v, qo_indptr, kv_indptr, prefix, None, True, mask_indptr, WINDOW, 1.0, 1.0,
                p.scaling,
            )

        calls.append(call)
    return Prepared(calls, lambda: verify_errors(p, out, None, False), verify_bytes(p.unit))


# ---------------------------------------------------------------------- select


def selection_errors(p: Problem, scores: torch.Tensor, positions: torch.Tensor) -> dict[str, float]:
    """How far the selected scores' sum is from torch's top-k; 1 if a list is not ascending."""
    wrong = 0.0
    for b in p.sample():
        count, length = p.selected[b], p.lengths[b]
        chosen = positions[p.requests[0][b], :, :count].long()
        if not bool((chosen[:, 1:] > chosen[:, :-1]).all()) or int(chosen.min()) < 0 or int(chosen.max()) >= length:
            return {"out": 1.0}
        own = scores[b, :, :length].float()
        best = own.topk(count, dim=-1).values.sum(-1)
        got = own.gather(1, chosen).sum(-1)
        wrong = max(wrong, float(((best - got).abs() / best.abs()).max()))
    return {"out": wrong}


def pillar_select(config: Callable[[], Any] | None = None, lookahead: int = 0) -> Callable[[Problem], Prepared]:
    """The plugin's selection from the scores that its verification wrote; the scores are in the L2 cache if they fit."""

    def make(p: Problem) -> Prepared:
        import torch

        from sglang_sparsespec.attention_backend.torch_kernels import look_ahead

        verify = p.cached("scored", lambda: pillar_verify(True)(p))
        verify.calls[0]()
        scores = verify.extra["outputs"][1]
        assert scores is not None
        kernels = p.make_kernels(**({"select_config": config()} if config else {}))
        positions = torch.full_like(p.positions[0], 1 << 30)
        # With look-ahead the kernel may work on the scores in place, which others use too.
        own = scores.clone() if lookahead else scores

        def run() -> None:
            kernels.select(own, p.lens, p.requests[0], p.counts, positions, lookahead)

        def check() -> dict[str, float]:
            if not lookahead:
                return selection_errors(p, scores, positions)
            own.copy_(scores)
            run()
            return selection_errors(p, look_ahead(scores, lookahead), positions)

        bytes_each = sum(p.lengths) * p.unit.shape.num_kv_heads * scores.element_size()
        return Prepared([run], check, bytes_each)

    return make


def torch_select(p: Problem) -> Prepared:
    """torch's top-k and sort of as many scores, for comparison; it takes no ragged lengths, so all are full."""
    verify = p.cached("scored", lambda: pillar_verify(True)(p))
    verify.calls[0]()
    scores = verify.extra["outputs"][1]
    assert scores is not None
    view = scores[:, :, : p.unit.context].nan_to_num(0.0)

    def run() -> None:
        view.topk(max(p.selected), dim=-1, sorted=False).indices.sort(dim=-1)

    bytes_each = p.unit.batch * p.unit.shape.num_kv_heads * p.unit.context * scores.element_size()
    return Prepared([run], lambda: {"out": 0.0}, bytes_each)


def verify_and_select(p: Problem) -> Prepared:
    """Verification with scores and the selection after it, as a layer runs them."""
    import torch

    verify = pillar_verify(True)(p)
    _, scores = verify.extra["outputs"]
    kernels = p.make_kernels()
    positions = torch.full_like(p.positions[0], 1 << 30)

    def call(s: int) -> Callable[[], Any]:
        def run() -> None:
            verify.calls[s]()
            kernels.select(scores, p.lens, p.requests[s], p.counts, positions)

        return run

    def check() -> dict[str, float]:
        return {**verify.check(), "selection": selection_errors(p, scores, positions)["out"]}

    return Prepared([call(s) for s in range(p.sets)], check, verify.bytes)


def default_providers() -> list[Provider]:
    """What the benchmark times for every unit, in this order."""
    return [
        Provider("copy", "torch", copy_same_bytes, gpu=True),
        Provider("draft", "pillar", pillar_draft(), gpu=False),
        Provider("verify", "pillar", pillar_verify(True), gpu=False),
        Provider("verify", "pillar, no scores", pillar_verify(False), gpu=False),
        Provider("verify", "pillar, exact scores", pillar_verify(True, exact=True), gpu=False),
        Provider("select", "pillar", pillar_select(), gpu=False),
        Provider("select", "pillar, look-ahead 8", pillar_select(lookahead=8), gpu=False),
        Provider("select", "torch", torch_select, gpu=False),
        Provider("verify+select", "pillar", verify_and_select, gpu=False),
        Provider("decode", "flashinfer, tensor cores", flashinfer_decode(True), needs=("fa2",)),
        Provider("decode", "flashinfer, CUDA cores", flashinfer_decode(False), needs=("decode",), groups=(1, 2, 3, 4, 8)),
        Provider("decode", "sglang triton", sglang_triton_decode, gpu=False),
        Provider("decode", "fa3", fa3(1)),
        Provider("draft", "flashinfer", flashinfer_draft(True), needs=("fa2",)),
        Provider("draft", "flashinfer, lists given", flashinfer_draft(False), needs=("fa2",)),
        Provider("verify", "flashinfer fa2", flashinfer_verify("fa2"), needs=("fa2",)),
        Provider("verify", "flashinfer fa2 + score pass", flashinfer_verify("fa2", True), needs=("fa2",)),
        Provider("verify", "flashinfer fa3", flashinfer_verify("fa3"), needs=("fa3",)),
        Provider("verify", "sglang triton", sglang_triton_verify, gpu=False),
        Provider("verify", "fa3", fa3(WINDOW)),
    ]


# Kernels of SGLang's backends, which the goals are measured against.
BASELINES = {
    "decode": ("flashinfer, tensor cores", "flashinfer, CUDA cores", "sglang triton", "fa3"),
    "verify": ("flashinfer fa2", "flashinfer fa3", "sglang triton", "fa3"),
}
