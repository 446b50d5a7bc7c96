"""What several deltas are made of: reproducible draws, and the product of two factors with an input."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from scrimp.base import counter_random

CPU = torch.device("cpu")


def draw_normal(seed: int, shape: tuple[int, ...], *, std: float) -> Tensor:
    """Return normal numbers, (shape) float32 on the CPU: a function of the seed alone."""
    with CPU:  # also where a model is built on another device, such as meta
        return counter_random.normal(seed, math.prod(shape), device=CPU).view(shape) * std


def draw_uniform(seed: int, shape: tuple[int, ...], *, bound: float) -> Tensor:
    """Return numbers from (-bound, bound], (shape) float32 on the CPU: a function of the seed alone."""
    with CPU:
        unit = counter_random.uniform(seed, math.prod(shape), device=CPU).view(shape)
    return (2 * unit - 1) * bound


def draw_subset(seed: int, count: int, size: int) -> Tensor:
    """Return `size` of the numbers below `count`, none twice, in random order; int64 on the CPU."""
    with CPU:
        return counter_random.bits(seed, count, device=CPU).argsort(stable=True)[:size]


def add_product(y: Tensor, x: Tensor, a: Tensor, b: Tensor, *, scale: Tensor | float = 1.0) -> Tensor:
    """Return y + B (scale * A x), in y's dtype.

    Args:
        y: (..., out).
        x: (..., in); cast to the factors' dtype, as peft does.
        a: (r, in).
        b: (out, r).
        scale: Of all ranks, or (r,) of each.
    """
    z = functional.linear(x.to(a.dtype), a) * scale
    return y + functional.linear(z, b).to(y.dtype)
