"""What the CPU's kernel of the dynamic 8-bit code has to know, taken from the reference in `dynamic_map`."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.optim.stores import dynamic_map

DECADES = 7
_ONE = 0x3F800000  # 1.0
_BINADES = 24  # from 1 down to below the smallest threshold


def tables(signed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return bins and values of `dynamic8.h`, ends and lines of `dynamic8_lines.h`."""
    values = dynamic_map.decode(torch.arange(256, dtype=torch.uint8), decades=DECADES, signed=signed)
    edges = _thresholds(signed)
    return _bins(edges), values, _ends(edges, signed), _lines(signed)


def _bins(edges: Tensor) -> Tensor:
    """Return an entry for each bin, int32."""
    top = _ONE >> 16
    bins = torch.arange(top - 128 * _BINADES, top + 1)
    below = torch.searchsorted(edges, bins << 16, right=True)
    inside = torch.searchsorted(edges, (bins << 16) + 0xFFFF, right=True) > below
    edge = edges[below.clamp_max(edges.numel() - 1)]
    upper = torch.where(inside, (edge & 0xFFFF) - 1, 0xFFFF)
    return (upper << 16 | below).to(torch.int32)


def _ends(edges: Tensor, signed: bool) -> Tensor:
    """Return an entry for each of the last 32 exponents, int32."""
    first, one, lines = dynamic_map.ranks(DECADES, signed)
    begins = torch.tensor([first << decade for decade in range(len(lines))] + [one])
    begins = edges[begins - first]
    exponents = torch.arange(96, 128) << 23
    below = torch.searchsorted(begins, exponents, right=True)
    inside = torch.searchsorted(begins, exponents | 0x7FFFFF, right=True) > below
    begin = begins[below.clamp_max(len(lines))]
    mantissa = torch.where(inside, (begin & 0x7FFFFF) - 1, 0x7FFFFF)
    return (mantissa << 9 | below).to(torch.int32)


def _lines(signed: bool) -> Tensor:
    """Return slopes, starts and last ranks by line, steps and shifts by exponent, float32, (5, 16)."""
    first, one, lines = dynamic_map.ranks(DECADES, signed)
    slopes, starts, lasts, steps, shifts = table = torch.zeros(5, 16)
    starts[0] = lasts[0] = first - 1
    for decade, (slope, start) in enumerate(lines):
        slopes[decade + 1], starts[decade + 1], lasts[decade + 1] = slope, start, (first << decade + 1) - 1
        exponent = (126 + (first << decade).bit_length()) % 16
        steps[exponent], shifts[exponent] = 1 / slope, start / slope
    starts[len(lines) + 1] = lasts[len(lines) + 1] = one
    shifts[(126 + one.bit_length()) % 16] = -1
    return table


def _thresholds(signed: bool) -> Tensor:
    """Return the bits of the least float of each positive rank, by bisection of the reference."""
    zero = 2**DECADES - 1 if signed else 0
    codes = torch.arange(zero + 1, 256)
    low, high = torch.zeros_like(codes), torch.full_like(codes, _ONE)
    for _ in range(31):
        middle = (low + high) // 2
        x = middle.to(torch.int32).view(torch.float32)
        reached = dynamic_map.encode(x, decades=DECADES, signed=signed) >= codes
        low, high = torch.where(reached, low, middle + 1), torch.where(reached, middle, high)
    return high
