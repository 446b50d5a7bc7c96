"""Which side of a matrix a projector shortens, and what projectors have in common.

A parameter W (m, n) is seen *oriented*, (k, d): the basis B (d, r) shortens d to r, and the state lies in
(k, r). Projecting from the left is projecting the transpose from the right, so `side` only decides whether
W is seen as its transpose (a view):

    side          sees (k, d) as
    std           (max, min): the smaller basis, the larger moments; a square W stays as it is
    reverse_std   (min, max): a square W is transposed
    right         (m, n): G B
    left          (n, m): B^T G

    R = G B          (..., k, r)
    up(R) = R B^T    (..., k, d)
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.optim.pieces import Entries, Slot, Target

Side = Literal["std", "reverse_std", "left", "right"]
OnRefresh = Literal["keep", "rotate", "reset"]
SIDES: tuple[Side, ...] = ("std", "reverse_std", "left", "right")


def is_transposed(side: Side, shape: tuple[int, ...]) -> bool:
    """Tell whether a parameter of `shape` (..., m, n) is treated as its transpose; ties of "std" are not."""
    if side in ("left", "right"):
        return side == "left"
    wide = shape[-2] < shape[-1]
    return wide if side == "std" else not wide


def is_transposed_view(g: Tensor) -> bool:
    """Tell whether a matrix is a transposed view of one that lies row by row.

    What reproduces a package to its last bit asks it of a gradient: a decomposition of G and one of its
    transpose differ in signs, and a draw of (r, n) numbers is another than one of (n, r).
    """
    return g.stride(-2) < g.stride(-1)


def require(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise a ScrimpError unless `value` is one of those allowed."""
    if value not in allowed:
        raise ScrimpError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}.")


def require_count(name: str, value: object) -> None:
    """Raise a ScrimpError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ScrimpError(f"{name} is {value!r}; it must be a whole number of at least 1.")


def require_rank(value: object) -> None:
    """Raise a ScrimpError unless `value` is a whole number of at least 1, or a share: a float up to 1."""
    if not (isinstance(value, float) and 0 <= value <= 1):
        require_count("rank", value)


def require_fraction(name: str, value: object) -> None:
    """Raise a ScrimpError unless `value` is a number from 0 to 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ScrimpError(f"{name} is {value!r}; it must be a number from 0 to 1.")


def check_rank(target: Target, rank: int, *, stored: int, kept: int) -> str | None:
    """Return why a projection does not pay, or None.

    Args:
        target: The matrix.
        rank: Of the projection.
        stored: Numbers of its basis that are kept.
        kept: Numbers of one moment in the subspace.

    Raises:
        ScrimpError: The rank is above the smaller side.
    """
    if len(target.shape) < 2:
        return "it is no matrix"
    largest = min(target.shape[-2:])
    if rank > largest:
        sides = " x ".join(map(str, target.shape))
        raise ScrimpError(
            f"rank {rank} does not fit {target.name} ({sides}): the largest allowed is {largest}; "
            "lower the rank or leave the matrix out of the projected group."
        )
    return check_size(target, stored + 2 * kept)


def check_size(target: Target, state: int) -> str | None:
    """Return why a state of so many numbers does not pay, or None."""
    whole = 2 * math.prod(target.shape)
    return None if state < whole else f"its state would hold {state} numbers, Adam's holds {whole}"


class Subspace:
    """What most projectors answer: refreshed every so many steps, sees W as it is, keeps nothing."""

    __slots__ = ()
    every: int

    def transposes(self, shape: tuple[int, ...]) -> bool:
        """Return False."""
        return False

    def slots(self, target: Target) -> tuple[Slot, ...]:
        """Return nothing."""
        return ()

    def tensors(self, target: Target) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return nothing."""
        return {}

    @property
    def counters(self) -> tuple[str, ...]:
        """Return nothing."""
        return ()

    @property
    def is_drawn(self) -> bool:
        """Return False."""
        return False

    def check_count(self, count: int) -> None:
        """Do nothing: any number of matrices will do."""

    def due(self, entries: Entries, step: int) -> bool:
        """Tell whether `step` is a multiple of the period."""
        return step % self.every == 0


class MatrixBasis(Subspace):
    """What projectors answer whose basis is a matrix, (..., d, r)."""

    __slots__ = ()
    rank: float
    side: Side

    def rank_of(self, d: int) -> int:
        """Return the rank for a side of `d`: the rank itself where it is an `int`, else that share of `d`."""
        return self.rank if isinstance(self.rank, int) else max(1, round(self.rank * d))

    def transposes(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a parameter is treated as its transpose."""
        return is_transposed(self.side, shape)

    def down_shape(self, target: Target, step: int) -> tuple[int, ...]:
        """Return (..., k, r)."""
        return (*target.shape[:-1], self.rank_of(target.shape[-1]))

    @property
    def mixes(self) -> bool:
        """Every column of the basis meets every element of a row."""
        return True

    def down(self, g: Tensor, basis: Any) -> Tensor:
        """Return G B."""
        return torch.matmul(g, basis)

    def up(self, r: Tensor, basis: Any, like: Tensor) -> Tensor:
        """Return R B^T."""
        return torch.matmul(r.to(basis.dtype), basis.mT).to(like.dtype)

    def subtract(self, w: Tensor, r: Tensor, basis: Any) -> None:
        """Subtract R B^T within the matrix product."""
        subtract_product(w, r, basis.mT)


def subtract_product(w: Tensor, left: Tensor, right: Tensor) -> None:
    """Subtract `left @ right` from `w` in place, without a temporary of its size.

    Args:
        w: (..., k, d), of any strides: a transposed view costs nothing.
        left: (..., k, r).
        right: (..., r, d).
    """
    left, right = left.to(w.dtype), right.to(w.dtype)
    if is_transposed_view(w):  # bfloat16 batches fall back to a loop, a thousand times slower
        w, left, right = w.mT, right.mT, left.mT
    if w.ndim == 2:
        w.addmm_(left, right, beta=1, alpha=-1)
    else:
        left, right = (x.reshape(-1, *x.shape[-2:]) for x in (left, right))
        w.view(-1, *w.shape[-2:]).baddbmm_(left, right, beta=1, alpha=-1)
