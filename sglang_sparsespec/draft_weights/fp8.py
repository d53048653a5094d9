"""FP8 (E4M3) with one scale per row: weights per output channel, activations per token; and the reference of a product."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
#: Rows that are quantised at a time: the float32 copy of a part of a weight stays small.
CHUNK = 8192


@dataclass(frozen=True)
class Quantised:
    """A matrix in FP8.

    Attributes:
        values: float8_e4m3fn [R, K].
        scales: float32 [R, 1]; an entry is its value times the scale of its row.
    """

    values: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device) -> Quantised:
        """Memory for a matrix."""
        return cls(
            torch.empty((rows, columns), dtype=FP8, device=device),
            torch.empty((rows, 1), dtype=torch.float32, device=device),
        )

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Quantised:
        """``matrix`` [R, K] in FP8."""
        made = cls.empty(matrix.shape[0], matrix.shape[1], matrix.device)
        made.take(matrix)
        return made

    def take(self, matrix: torch.Tensor) -> None:
        """Quantise ``matrix`` [R, K] into the same memory, which CUDA graphs read."""
        for first in range(0, len(matrix), CHUNK):
            part = matrix[first : first + CHUNK].float()
            # A row of zeros may have any scale.
            scales = (part.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
            self.scales[first : first + CHUNK] = scales
            self.values[first : first + CHUNK] = (part / scales).to(FP8)

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return self.values.nbytes + self.scales.nbytes

    def dequantised(self) -> torch.Tensor:
        """What the values stand for: float32 [R, K]."""
        return self.values.float() * self.scales


def reference_linear(x: torch.Tensor, weight: Quantised, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias with activations in FP8 too: [M, N] of x [M, K]. Any device, slow."""
    out = Quantised.of(x).dequantised() @ weight.dequantised().T
    return (out if bias is None else out + bias).to(x.dtype)
