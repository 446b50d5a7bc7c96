"""The CPU kernels of `cpu.cpp`: whole steps in one pass, and the dynamic 8-bit code.

Built on first use, in seconds, and kept; who cannot build them lacks speed alone. Codes and scales are the
reference's to the bit, so that a run may go on where they cannot be built.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from scrimp.base.cpp import load
from scrimp.optim.kernels import dynamic_tables

_SOURCE = Path(__file__).with_name("cpu.cpp")
_IN_PLACE = ("adafactor", "adam", "adam_mini", "adam_projected", "lion", "sgd", "draw")


@functools.cache
def _loaded() -> bool:
    if not load(_SOURCE, slower="optimizer steps are"):
        return False
    with _disable_current_modes():  # the first to ask may be a simulation on fake tensors
        for signed in (False, True):
            torch.ops.scrimp_cpu.set_tables(*dynamic_tables.tables(signed), signed)
        torch.ops.scrimp_cpu.set_normals(*_normals())
    torch.library.register_fake("scrimp_cpu::encode", _encode_shapes)
    torch.library.register_fake("scrimp_cpu::decode", _decode_shapes)
    for name in _IN_PLACE:
        torch.library.register_fake(f"scrimp_cpu::{name}", lambda *given: None)
    return True


_IS_THERE = False


def prepare() -> bool:
    """Build and load the kernels where that has not been done, and tell whether they are there."""
    global _IS_THERE  # noqa: PLW0603 - compiled code reads it, and cannot build
    _IS_THERE = _loaded()
    return _IS_THERE


def available() -> bool:
    """Tell whether `prepare` found or built the kernels."""
    return _IS_THERE


def encode(rows: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes shaped like float32 `rows` on the CPU, and their largest magnitudes, (rows, 1)."""
    codes, scale = torch.ops.scrimp_cpu.encode(rows, signed)
    return codes, scale


def decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """Return the float32 values of `codes` with `scale`, (rows, 1)."""
    values: Tensor = torch.ops.scrimp_cpu.decode(codes, scale, signed)
    return values


def adam(
    weight: Tensor, grad: Tensor, moments: list[Tensor], numbers: Sequence[float], *, whole: bool, hf: bool
) -> None:
    """Update weights and both moments in place by one step of `scrimp.optim.rules.adam`.

    Args:
        weight: float32, contiguous, on the CPU.
        grad: Shaped alike, on the CPU.
        moments: Both in float32; or the codes and scales of the first, in blocks of 256, and of the second.
        numbers: rewarm, lr, weight_decay, size, beta1, beta2, eps, inv_c1 and inv_root_c2.
        whole: Whether a gradient that is not finite changes nothing; else only its elements that are not
            leave theirs as they are. Where moments are codes, it has to be.
        hf: Whether the convention is the Hugging Face one.
    """
    torch.ops.scrimp_cpu.adam.default(weight, grad, moments, whole, numbers, hf)


def adam_mini(weight: Tensor, grad: Tensor, moments: list[Tensor], numbers: Sequence[float]) -> None:
    """Update by `scrimp.optim.rules.adam_mini`; else as `adam`.

    A gradient that is not finite changes nothing. The second moment, (blocks, 1), is one number for as many
    consecutive weights as come to each.
    """
    torch.ops.scrimp_cpu.adam_mini.default(weight, grad, moments, numbers)


def adafactor(
    weight: Tensor, grad: Tensor, moments: list[Tensor], numbers: Sequence[float], *, scales: bool
) -> None:
    """Update a matrix and both factors of its second moment by `scrimp.optim.rules.adafactor`, no momentum.

    A gradient that is not finite changes nothing.

    Args:
        weight: float32, (m, n), contiguous, on the CPU.
        grad: Shaped alike, on the CPU.
        moments: The factors, (m) and (n), float32.
        numbers: rewarm, weight_decay, beta2, rho, and what is added to squares, the least RMS of the weights
            and the largest of the update.
        scales: Whether the step is relative to the RMS of the weights.
    """
    torch.ops.scrimp_cpu.adafactor.default(weight, grad, moments, numbers, scales)


def lion(
    weight: Tensor, grad: Tensor, moments: list[Tensor], numbers: Sequence[float], *, whole: bool
) -> None:
    """Update by `scrimp.optim.rules.lion`; else as `adam`.

    Its numbers are rewarm, lr, weight_decay, size, beta1 and beta2.
    """
    torch.ops.scrimp_cpu.lion.default(weight, grad, moments, whole, numbers)


def sgd(
    weight: Tensor,
    grad: Tensor,
    moments: list[Tensor],
    numbers: Sequence[float],
    *,
    whole: bool,
    nesterov: bool,
) -> None:
    """Update by `scrimp.optim.rules.sgd`; else as `adam`.

    Its numbers are rewarm, lr, weight_decay, size, momentum and intake.
    """
    torch.ops.scrimp_cpu.sgd.default(weight, grad, moments, whole, numbers, nesterov)


def adam_projected(
    weight: Tensor,
    grad: Tensor | None,
    r: Tensor | None,
    basis: Tensor,
    moments: list[Tensor],
    limiter: Tensor | None,
    numbers: Sequence[float],
    lift: Sequence[float],
    *,
    hf: bool,
    per_matrix: bool,
    pulls: bool,
    reads: bool,
    transposed: bool,
) -> None:
    """Update weights, moments and limiter by one step of Adam in a subspace.

    A gradient that is not finite changes nothing.

    Args:
        weight: float32, (m, n), contiguous, on the CPU; oriented it is (k, d), see `transposed`.
        grad: Shaped alike, in any strides; None where `r` is given.
        r: G in the subspace, (k, r), where that is all there is.
        basis: B, (d, r).
        moments: As in `adam`, of R's shape.
        limiter: The norm that the limiter keeps, one number; None does not limit.
        numbers: As in `adam`.
        lift: before, inside, gamma, factor and back of `lifts.h`; the step's size is in the last two.
        hf: As in `adam`.
        per_matrix: Whether phi is one number of the matrix.
        pulls: Whether anything is projected back.
        reads: Whether W changes by G too.
        transposed: Whether the oriented matrix is the transposed one.
    """
    torch.ops.scrimp_cpu.adam_projected.default(
        weight, grad, r, basis, moments, limiter, numbers, lift, hf, per_matrix, pulls, reads, transposed
    )


def draw(seed: int, rows: int, rank: int) -> Tensor:
    """Return `counter_random.normal(seed, rows * rank) / sqrt(rank)` to the bit, float32, (rows, rank)."""
    basis = torch.empty(rows, rank)
    torch.ops.scrimp_cpu.draw.default(basis, seed)
    return basis


def _normals() -> tuple[Tensor, Tensor]:
    """Return all radii of `scrimp.base.counter_random.normal`, and cosine and sine of all angles."""
    halves = torch.arange(1 << 16).float()
    radii = halves.add(0.5).mul_(2.0**-16).log_().mul_(-2).sqrt_()
    angles = halves * (2 * math.pi * 2.0**-16)
    return radii, torch.stack([angles.cos(), angles.sin()], -1)


def _encode_shapes(rows: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape, dtype=torch.uint8), rows.new_empty((rows.shape[0], 1))


def _decode_shapes(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    return scale.new_empty(codes.shape)
