"""Whole numbers over the range of a group: the store of projectors' bases.

    s = (max - min) / (2^k - 1)      q = round((x - min) / s)      x ~ min + s q

Q-GaLore released another form, `released=True`, around the code of zero:

    z = clamp(round(-min / s), 0, 2^k - 1)      q = clamp(round(x / s) + z, 0, 2^k - 1)      x ~ s (q - z)

The clamp of z breaks groups that lie on one side of 0: of values in [1, 2], 4 bits leave about 1. A basis of
768x128 orthonormal columns comes back with a relative error of 0.11 (4 bits), no longer orthonormal: P^T P is
off by up to 0.035.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scrimp.optim.stores.blockwise import Blockwise

_LARGEST = torch.finfo(torch.float32).max
_LEAST_RANGE = 1e-5  # Q-GaLore's


@dataclass(frozen=True, slots=True)
class Group8(Blockwise):
    """8 bits a number and 8 bytes a group: 1.03 bytes an element.

    Attributes:
        released: As Q-GaLore's code does it.

    References:
        Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients, Zhang et al.,
        2024, arXiv 2407.08296.
    """

    released: bool = False

    @property
    def numbers(self) -> tuple[str, ...]:
        """The step, and the least value (released: the code of zero)."""
        return ("scale", "offset")

    def quantize(self, rows: Tensor, signed: bool) -> tuple[Tensor, ...]:
        """Return codes, steps and offsets."""
        top = 2**self.bits - 1
        low, high = rows.aminmax(dim=1, keepdim=True)
        if self.released:
            scale = (high - low).clamp_min(_LEAST_RANGE) / top
            zero = (-low / scale).round().clamp(0, top)
            codes = ((rows / scale).round() + zero).clamp(0, top)
            return codes.to(torch.uint8), scale, zero
        scale = high / top - low / top  # the range itself may overflow
        codes = (rows - low) / torch.where(scale > 0, scale, 1.0)
        return codes.round().clamp(0, top).to(torch.uint8), scale, low

    def dequantize(self, codes: Tensor, numbers: tuple[Tensor, ...], signed: bool) -> Tensor:
        """Return the values."""
        scale, offset = numbers
        if self.released:
            return scale * (codes.to(torch.float32) - offset)
        return (offset + scale * codes.to(torch.float32)).clamp(-_LARGEST, _LARGEST)


@dataclass(frozen=True, slots=True)
class Group4(Group8):
    """4 bits a number and 8 bytes a group: 0.53 bytes an element."""

    bits: ClassVar[int] = 4
