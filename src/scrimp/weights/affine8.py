"""Eight-bit codes around the minimum of each group: w = scale code + offset.

    offset = min(w),  scale = (max(w) - min(w)) / 255,  x = (w - offset) / scale       of each group
    code = floor(x + 1/2), or stochastically floor(x) + Bernoulli(x - floor(x)), whose mean is x

A group is up to `group` consecutive elements of a row. Oddities:

- Groups never cross rows, so that rows can be coded anew one block at a time. Where `group` does not divide
  a row, its last group is shorter; where it does (4096 and 11008 of llama-7b by 256), groups are those of
  Q-GaLore, which cuts the flattened matrix.
- Scale and offset are kept in the weight's dtype. In bf16 the offset is rounded down and the scale up:
  the code's range still holds the group, so that nothing is clamped and the mean stays exact, and coding
  what was decoded never widens a range.
- `variant="released"` is Q-GaLore's: an integer zero point, clamped to the code. It holds zero exactly, but
  a group wholly on one side of it breaks (in 4 bits, values between 1 and 2 all come back as 1), and where
  the zero point was rounded up the largest value is clamped: the mean is not kept.

Source: Q-GaLore, Zhang et al. 2024, arXiv 2407.08296; its code, `_quantize_stochastic_round`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scrimp.base.counter_random import uniform

Variant = Literal["paper", "released"]

LEVELS = 255  # of a code above the lowest
SMALLEST_RANGE = 1e-5  # of a group in Q-GaLore's code
_CUT = 0xFFFF  # what bf16 leaves out of a float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine8:
    """What rows (n, in) are kept as.

        codes   (n, in) uint8
        scale   (n, ceil(in / group)) in `dtype`
        offset  the same

    Memory: n in + 2 n ceil(in / group) itemsize bytes.
    Error: |w - decode(encode(w))| <= scale / 2, or scale where rounded stochastically.

    Attributes:
        group: Elements that share a scale.
        dtype: bfloat16 or float32: of the weight to those who use it, and of scale and offset.
        variant: "paper", around the minimum; "released", as above.
    """

    group: int = 256
    dtype: torch.dtype = torch.bfloat16
    variant: Variant = "paper"

    def layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of every entry."""
        groups = (rows, -(-columns // self.group))
        return {"codes": ((rows, columns), torch.uint8),
                "scale": (groups, self.dtype), "offset": (groups, self.dtype)}  # fmt: skip

    def nbytes(self, rows: int, columns: int) -> int:
        """Return the bytes of all entries."""
        return rows * columns + 2 * rows * -(-columns // self.group) * self.dtype.itemsize

    def decode(self, entries: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the values, (n, in) in `dtype`; the arithmetic is float32 at least. Pure."""
        return dequantize(entries["codes"], entries["scale"], entries["offset"], self.group, dtype)

    def encode(self, value: Tensor, noise: Tensor | None, start: int = 0) -> dict[str, Tensor]:
        """Return the entries for values. Pure.

        Args:
            value: (n, in); taken as float32.
            noise: A 0-d int64 seed for stochastic rounding; None rounds to nearest.
            start: Index of the first element in the matrix that `value` is a block of.
        """
        codes, scale, offset = quantize(
            value, noise, start, self.group, dtype=self.dtype, variant=self.variant
        )
        return {"codes": codes, "scale": scale, "offset": offset}


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Return scale code + offset, (n, in) in `dtype`, rounded once.

    Args:
        codes: (n, in) uint8.
        scale: (n, ceil(in / group)).
        offset: The same.
        group: Elements that share a scale.
        dtype: Of the result; the arithmetic is float32, or float64 for float64.
    """
    exact = torch.promote_types(dtype, torch.float32)
    value = _grouped(codes, group).to(exact)
    value.mul_(scale.to(exact)[..., None]).add_(offset.to(exact)[..., None])
    return value.to(dtype).flatten(-2)[..., : codes.shape[-1]]


def quantize(
    value: Tensor,
    noise: Tensor | None,
    start: int,
    group: int,
    *,
    dtype: torch.dtype = torch.float32,
    variant: Variant = "paper",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scale and offset of values, with fresh scales.

    Args:
        value: (n, in); taken as float32.
        noise: A 0-d int64 seed for stochastic rounding; None rounds to nearest.
        start: Index of the first element in the matrix that `value` is a block of.
        group: Elements that share a scale.
        dtype: Of scale and offset, float32 or bfloat16.
        variant: As in `Affine8`.
    """
    value = value.float()
    grouped = _grouped(value, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    grid = _grid if variant == "paper" else _released_grid
    scale, offset = grid(low, high, dtype)
    if variant == "paper":
        x = (grouped - offset.float()[..., None]) / scale.float()[..., None]
    else:
        x = grouped / scale.float()[..., None]
    x = x.flatten(-2)[..., : value.shape[-1]]
    code = x.round() if noise is None else _round_stochastically(x, noise, start)
    if variant == "released":
        zero = offset[..., None].expand(grouped.shape).flatten(-2)[..., : value.shape[-1]]
        code, offset = code + zero, (-offset * scale.float()).to(dtype)
    return code.clamp(0, LEVELS).to(torch.uint8), scale, offset


def _grid(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return scale and offset such that the code's range holds all from `low` to `high`."""
    offset = _round_down(low, dtype)
    scale = -_round_down(-(high - offset.float()) / LEVELS, dtype)
    # A constant group has code 0 everywhere, whatever it is divided by.
    return torch.where(scale > 0, scale, torch.ones_like(scale)), offset


def _released_grid(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return Q-GaLore's scale and its zero point, an integer from 0 to 255 in float32."""
    scale = ((high - low).clamp(min=SMALLEST_RANGE) / LEVELS).to(dtype)
    return scale, (-(low / scale.float()).round()).clamp(0, LEVELS)


def _round_down(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 towards minus infinity."""
    if dtype != torch.bfloat16:
        return value.to(dtype)
    raw = value.view(torch.int32)
    raw = torch.where(value < 0, raw + _CUT, raw) & ~_CUT
    return raw.view(torch.float32).to(dtype)


def _round_stochastically(x: Tensor, noise: Tensor, start: int) -> Tensor:
    """Return floor(x) + Bernoulli(x - floor(x)); what is whole stays."""
    draws = uniform(noise, x.numel(), device=x.device, start=start).view(x.shape)
    below = x.floor()
    return below + (draws < x - below)


def _grouped(x: Tensor, group: int) -> Tensor:
    """Return (..., in) as (..., groups, group), the last group filled up with the last element."""
    # A range has a fixed length in compiled code, which is eight times slower where a variable divides.
    group = len(range(group))
    columns = x.shape[-1]
    if missing := -columns % group:
        # Not by `cat` with an expanded column, which torch 2.13 compiles to wrong code for a CPU.
        x = x[..., torch.arange(columns + missing, device=x.device).clamp(max=columns - 1)]
    grouped: Tensor = x.unflatten(-1, (-1, group))
    return grouped
