"""The CPU kernels of `together.cpp`: all jobs' small products of a layer in one call.

Each product is one thread's: two that share one of a few rows wait for each other longer than they multiply.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from scrimp.base.cpp import load

if TYPE_CHECKING:
    from scrimp.tuning.together import Low

_SOURCE = Path(__file__).with_name("together.cpp")
_DTYPES = (torch.float32, torch.float64)


@functools.cache
def _loaded() -> bool:
    return load(_SOURCE, slower="steps of runs that are trained together are")


def takes(x: Tensor, y: Tensor, factors: Sequence[Tensor]) -> bool:
    """Tell whether the kernels are there and read these tensors as they are.

    A mode that watches single operations, such as a checkpoint that keeps some of their results, must see
    the equations: it could not tell that the kernel changes y.
    """
    if x.device.type != "cpu" or x.dtype not in _DTYPES or _get_current_dispatch_mode() is not None:
        return False
    is_one = all(tensor.dtype == x.dtype for tensor in (y, *factors))
    return is_one and x.is_contiguous() and y.is_contiguous() and _loaded()


def add_rows(y: Tensor, x: Tensor, lows: Sequence[Low], factors: Sequence[Tensor]) -> list[Tensor]:
    """Add every adapter's change to its rows of y; return s = scale x A^T of each, (its rows, rank).

    Args:
        y: (rows, ..., out), changed in place.
        x: (rows, ..., in).
        lows: Whose the rows are.
        factors: A (rank, in) and B (out, rank) of each.
    """
    edges, scales = _edges(x, lows), [low.scale for low in lows]
    small = _small(x, edges, factors)
    torch.ops.scrimp_together.add_rows.default(
        y.flatten(0, -2), x.flatten(0, -2), edges, scales, factors, small
    )
    return small


def rows_backward(
    gy: Tensor,
    x: Tensor,
    gx: Tensor | None,
    lows: Sequence[Low],
    factors: Sequence[Tensor],
    small: Sequence[Tensor],
) -> list[Tensor]:
    """Set the adapters' rows of gx; return the gradients of their factors.

    Args:
        gy: (rows, ..., out), the gradient of y.
        x: (rows, ..., in).
        gx: Shaped as x; None where nobody asks for it.
        lows: As in `add_rows`, and so are the others.
        factors: A and B of each.
        small: What `add_rows` returned.
    """
    edges, scales = _edges(x, lows), [low.scale for low in lows]
    # A job without rows has a gradient too.
    found = [torch.zeros_like(factor) for factor in factors]
    torch.ops.scrimp_together.rows_backward.default(
        gy.flatten(0, -2),
        x.flatten(0, -2),
        edges,
        scales,
        factors,
        small,
        _small(x, edges, factors),
        found,
        None if gx is None else gx.flatten(0, -2),
    )
    return found


def _edges(x: Tensor, lows: Sequence[Low]) -> list[int]:
    """Return the first row of each adapter and the one after its last, in turn, of x as a matrix."""
    length = x[0, ..., 0].numel()
    return [edge * length for edge in itertools.chain.from_iterable(low[:2] for low in lows)]


def _small(x: Tensor, edges: Sequence[int], factors: Sequence[Tensor]) -> list[Tensor]:
    sizes = (last - first for first, last in zip(edges[::2], edges[1::2], strict=True))
    return [x.new_empty(size, len(a)) for size, a in zip(sizes, factors[::2], strict=True)]
