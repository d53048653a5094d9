"""Kernels of PillarAttn; see :mod:`interface`."""

from __future__ import annotations

import torch

from sglang_sparsespec.attention_backend.kernels.flashinfer_kernels import FlashInferKernels
from sglang_sparsespec.attention_backend.kernels.interface import KernelShape, PillarKernels
from sglang_sparsespec.attention_backend.kernels.reference import ReferenceKernels
from sglang_sparsespec.attention_backend.kernels.triton_kernels import TritonKernels
from sglang_sparsespec.attention_backend.page_table import SelectionTable


def make_kernels(
    name: str, shape: KernelShape, table: SelectionTable, req_to_token: torch.Tensor, early_start: bool = True
) -> PillarKernels:
    """The implementation called ``name``: torch, triton, flashinfer or auto.

    ``auto`` is torch on CPU and triton on CUDA for every shape: in the newest kernel tables of H100 and H200 (in
    ``benchmarks/results``) Triton's draft attention is at least as fast in every row, since FlashInfer's can only start once
    another kernel has written out the lists.

    Args:
        req_to_token: int32 [rows, context], the slot of each position; the kernels run on its device.
        early_start: see ``TritonKernels``.

    Raises:
        ValueError: another name, or a shape that the implementation does not have.
    """
    if name == "auto":
        name = "torch" if req_to_token.device.type == "cpu" else "triton"
    if name == "torch":
        return ReferenceKernels(table, req_to_token)
    if name == "triton":
        return TritonKernels(shape, table, req_to_token, early_start=early_start)
    if name == "flashinfer":
        return FlashInferKernels(shape, table, req_to_token, early_start=early_start)
    raise ValueError(f"There are no kernels called {name!r}; expected torch, triton, flashinfer or auto.")
