"""What the quantised stores share: small and exact slots, blocks, the ragged last one, two codes a byte.

A slot is flattened and cut into blocks of `block_size`; each block is a row of codes and a few float32
numbers. A quantised store adds the arithmetic of one row. The last block is filled up with its own last
value for that, which changes neither extremes nor scales, and stored without the filling.

Bytes are `ceil(numel * bits / 8) + 4 * numbers * ceil(numel / block_size)`. All-zero entries decode to zero.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.optim.pieces import Slot, Store
from scrimp.optim.stores.full import Full

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]

_LARGEST, _TINY = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Blockwise(ABC):
    """A store of codes and of `numbers` per block.

    Attributes:
        block_size: Elements that share their numbers.
        min_size: Slots with fewer elements are not quantised.
        exact: What keeps those, and slots that are declared exact.
    """

    block_size: int = 256
    min_size: int = 0
    exact: Full = field(default_factory=Full)

    bits: ClassVar[int] = 8  # or 4

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.block_size % 2:
            raise ScrimpError(f"block_size must be an even number of at least 2, got {self.block_size!r}.")

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of what is kept per block."""
        return ("scale",)

    @abstractmethod
    def quantize(self, rows: Tensor, signed: bool) -> tuple[Tensor, ...]:
        """Return the codes, uint8 shaped like the float32 `rows`, and each of `numbers`, (blocks, 1)."""

    @abstractmethod
    def dequantize(self, codes: Tensor, numbers: tuple[Tensor, ...], signed: bool) -> Tensor:
        """Return the rows that `quantize` was given, up to its error."""

    def of(self, slot: Slot) -> Store:
        """Return the store that holds `slot`, which then takes any block of it, however small."""
        if slot.exact or math.prod(slot.shape) < self.min_size:
            return self.exact
        return replace(self, min_size=0)

    def prepare(self, device: torch.device) -> None:  # noqa: B027 - most need nothing
        """Do nothing: it needs no more than torch."""

    def layout(self, slot: Slot) -> Layout:
        """Return codes and numbers, all flat."""
        if not self._quantizes(slot):
            return self.exact.layout(slot)
        count = math.prod(slot.shape)
        blocks = -(-count // self.block_size)
        entries: Layout = {"codes": ((-(-count * self.bits // 8),), torch.uint8)}
        return entries | dict.fromkeys(self.numbers, ((blocks,), torch.float32))

    def decode(self, entries: Mapping[str, Tensor], slot: Slot, dtype: torch.dtype) -> Tensor:
        """Return the value in `dtype`; the arithmetic is float32."""
        if not self._quantizes(slot):
            return self.exact.decode(entries, slot, dtype)
        count = math.prod(slot.shape)
        codes = entries["codes"] if self.bits == 8 else _unpack(entries["codes"])[:count]
        numbers = tuple(entries[name][:, None] for name in self.numbers)
        rows = self.dequantize(_rows(codes, self.block_size), numbers, slot.signed)
        return _flat(rows, count).view(slot.shape).to(dtype)

    def encode(self, value: Tensor, slot: Slot, noise: Tensor) -> dict[str, Tensor]:
        """Return codes and numbers of a value, rounded to nearest."""
        if not self._quantizes(slot):
            return self.exact.encode(value, slot, noise)
        count = math.prod(slot.shape)
        if value.dtype == torch.float64:
            value = value.clamp(-_LARGEST, _LARGEST)
        codes, *numbers = self.quantize(_rows(value.flatten().float(), self.block_size), slot.signed)
        codes = _flat(codes, count)
        entries = {"codes": codes if self.bits == 8 else _pack(codes)}
        return entries | {name: x.flatten() for name, x in zip(self.numbers, numbers, strict=True)}

    def block(self, slot: Slot) -> int:
        """Return the block size, or 1 for a slot that is not quantised."""
        return self.block_size if self._quantizes(slot) else 1

    def _quantizes(self, slot: Slot) -> bool:
        return not slot.exact and math.prod(slot.shape) >= self.min_size


def unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows scaled to [-1, 1] and their largest magnitudes, (blocks, 1); a row of zeros stays so."""
    scale = rows.abs().amax(1, keepdim=True)
    return rows * scale.clamp_min(_TINY).reciprocal(), scale


def _rows(flat: Tensor, size: int) -> Tensor:
    missing = -flat.numel() % size
    if missing:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.view(-1, size)


def _flat(rows: Tensor, count: int) -> Tensor:
    flat = rows.view(-1)
    return flat if count % rows.shape[1] == 0 else flat[:count]


def _pack(codes: Tensor) -> Tensor:
    # The first of a pair in the high half: torchao's order.
    pairs = _rows(codes, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()
