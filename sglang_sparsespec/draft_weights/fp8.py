"""FP8 weights (E4M3, one scale per output channel), and the reference of a product with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
#: Output channels that are quantised at a time: the float32 copy of a part of a weight stays small.
CHUNK = 4096


@dataclass(frozen=True)
class QuantisedWeight:
    """A linear layer's weight in FP8.

    Attributes:
        values: float8_e4m3fn [N, K].
        scales: float32 [N, 1]; a weight is its value times the scale of its output channel.
    """

    values: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> QuantisedWeight:
        """Quantise ``weight`` [N, K]."""
        channels = weight.shape[0]
        made = cls(
            torch.empty(weight.shape, dtype=FP8, device=weight.device),
            torch.empty((channels, 1), dtype=torch.float32, device=weight.device),
        )
        made.take(weight)
        return made

    def take(self, weight: torch.Tensor) -> None:
        """Quantise ``weight`` [N, K] into the same memory, which CUDA graphs read."""
        for first in range(0, len(weight), CHUNK):
            part = weight[first : first + CHUNK].float()
            # A channel of zeros has any scale.
            scales = (part.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
            self.scales[first : first + CHUNK] = scales
            self.values[first : first + CHUNK] = (part / scales).to(FP8)

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return self.values.nbytes + self.scales.nbytes

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] that the values stand for, rounded to ``dtype``."""
        return (self.values.float() * self.scales).to(dtype)


def reference_linear(x: torch.Tensor, weight: QuantisedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias, [..., N] of x [..., K]: any device, slow."""
    return torch.nn.functional.linear(x, weight.dequantised(x.dtype), bias)
