"""The dynamic code of 8-bit optimizers, as arithmetic: no table, no search.

Its D decades below 1 hold 1, 2, 4, ... values each (twice as many where there is no sign), evenly spaced;
add 0 and 1. Number the positive values by size: the j-th of decade i has *rank* 2^i + j, so that a rank in
base 2 holds the decade in its leading place and j in the others. Within a decade the rank is a line in |x|,
each line flatter than the one before. The whole is therefore the smallest of D lines, and its inverse the
largest of their inverses:

    u(x) = min_i 2^i (8 + 10^(D-i) |x|) / 9          x(u) = max_i 10^(i-D) (9 u / 2^i - 8)

Rank r stands for x(r + 1/2), the middle of its cell, and floor(u) is the nearest rank, but for three cells:

- Of two neighbours in different decades the upper begins not where its decade does, but 0.2 later in u.
- 0 ends half way to the smallest value.
- 1 begins half way from the largest value below it. There is no -1: -absmax is stored as -0.993 absmax.

Without a sign, u and the ranks are twice as large. What lies half way between two codes, to a few last places
of float32, may go either way. In compiled code a binary search takes five times as long.

References:
    8-bit Optimizers via Block-wise Quantization, Dettmers et al., ICLR 2022, arXiv 2110.02861.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def encode(x: Tensor, *, decades: int, signed: bool) -> Tensor:
    """Return the nearest codes, uint8: places in the sorted map.

    Args:
        x: float32 in [-1, 1], or in [0, 1] without sign.
        decades: 7 for 8 bits, 3 for 4.
        signed: Which map.
    """
    first, one, lines = ranks(decades, signed)
    size = x.abs() if signed else x
    u = functools.reduce(torch.minimum, [slope * size + start for slope, start in lines])
    rank, late = u.to(torch.int32), (u - 0.2).to(torch.int32)
    begins_decade = (rank & (rank - 1)) == 0
    rank = torch.where(begins_decade, late, rank).clamp_min(first).to(torch.float32)
    smallest, largest = _value(first, lines), _value(one - 1, lines)
    rank = torch.where(size < smallest / 2, float(first - 1), rank)
    rank = torch.where(x >= (1 + largest) / 2, float(one), rank)
    code = one - 1 + torch.copysign(rank, x) if signed else rank - 1
    return code.to(torch.uint8)


def decode(codes: Tensor, *, decades: int, signed: bool) -> Tensor:
    """Return the values of `codes`, float32 in [-1, 1]; the arguments are those of `encode`."""
    first, one, lines = ranks(decades, signed)
    place = codes.to(torch.float32) - (one - 1 if signed else -1)
    rank = place.abs() if signed else place
    x = functools.reduce(
        torch.maximum, [(rank + 0.5) * (1 / slope) - start / slope for slope, start in lines]
    )
    x = torch.where(rank < first, 0.0, x.clamp_max(1.0))
    return torch.copysign(x, place) if signed else x


def ranks(decades: int, signed: bool) -> tuple[int, int, list[tuple[float, float]]]:
    """Return the rank of the smallest value, that of 1, and each decade's line: slope and start."""
    first = 1 if signed else 2
    lines = [(first * 2**i * 10 ** (decades - i) / 9, first * 2**i * 8 / 9) for i in range(decades)]
    return first, first << decades, lines


def _value(rank: int, lines: list[tuple[float, float]]) -> float:
    return max((rank + 0.5 - start) / slope for slope, start in lines)
