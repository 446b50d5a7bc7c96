"""State in float8 (E4M3: 4 bits of exponent, 3 of mantissa), with COAT's expansion of the dynamic range.

Plain: q = fp8(448 x / a), with a the largest magnitude of a block and 448 the format's. A block of moments
spans less than the format's 17 binades, so the expansion stretches it over all of them by a power k:

    q = sign(x) fp8(448 (|x| / a)^k)     x ~ sign(q) a (|q| / 448)^(1/k)     k = log(448^2 / 2) / log(a / z)

with z the smallest magnitude in the block that is not zero and k rounded down to a sixteenth. COAT writes it
with a centre c = sqrt(a z) and the scale (a / c)^k / 448, three numbers a block; c drops out of both
formulas, so two do. Its failures are guarded against: z is at least 2^-17 a (one tiny element drove k to 1/8
and the error to 18%), k is at most 16, and 1 where all magnitudes are equal (k was infinite, the block lost).

Relative error of normal values 1.4% (plain 2.6%), of values within a factor of two 0.2%. Raw squares span
more than the format does (k < 1): 2.4%, as without expansion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.optim.stores.blockwise import Blockwise, unit

_TOP = 448.0  # E4M3's largest
_SPAN = math.log2(_TOP * _TOP / 2)
_NARROWEST = 2.0**-17
_STEEPEST = 16.0


@dataclass(frozen=True, slots=True)
class FP8(Blockwise):
    """8 bits a number, and 8 bytes a block (4 without expansion): 1.06 bytes an element.

    Attributes:
        expansion: Whether the range is expanded.

    References:
        COAT: Compressing Optimizer States and Activation for Memory-Efficient FP8 Training, Xi et al.,
        ICLR 2025, arXiv 2410.19313.
    """

    block_size: int = 128
    expansion: bool = True

    @property
    def numbers(self) -> tuple[str, ...]:
        """A block's largest magnitude, and its exponent k."""
        return ("scale", "exponent") if self.expansion else ("scale",)

    def quantize(self, rows: Tensor, signed: bool) -> tuple[Tensor, ...]:
        """Return the bytes of float8 numbers, and each block's numbers."""
        x, scale = unit(rows)
        if not self.expansion:
            return _bytes(_TOP * x), scale
        size = x.abs()
        least = torch.where(size > 0, size, 1.0).amin(1, keepdim=True).clamp_min(_NARROWEST)
        sixteenths = (-16 * _SPAN / least.log2()).floor()
        exponent = torch.where(least < 1, (sixteenths / 16).clamp_max(_STEEPEST), 1.0)
        return _bytes(torch.copysign(_TOP * size**exponent, x)), scale, exponent

    def dequantize(self, codes: Tensor, numbers: tuple[Tensor, ...], signed: bool) -> Tensor:
        """Return the values."""
        x = codes.view(torch.float8_e4m3fn).to(torch.float32) / _TOP
        if self.expansion:
            x = torch.copysign(x.abs() ** (1 / numbers[1]), x)
        return x * numbers[0]


def _bytes(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).view(torch.uint8)
