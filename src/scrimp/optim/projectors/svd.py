"""The leading right singular vectors of the gradient, and three ways to find them.

    G = U S V^T,   B = V[:, :r]                               captured energy ||G B||_F^2

"svd" decomposes. The others keep a block S of r + 16 columns, iterate S <- orth(G^T G S) and turn it to
singular vectors by the eigenvectors of the small matrix S^T G^T G S. Both start at random signs; the old
basis was hardly a better start (on a drifting signal in noise 0.9991 of the energy that the SVD captures,
against 0.9990), and without it a basis depends on the gradient alone. "randomized" (Halko, Martinsson and
Tropp) iterates twice. "power" then knows where the unwanted spectrum ends: the least eigenvalue of
S^T G^T G S never exceeds the (r + 16)th of G^T G. Three more iterations, S <- orth((G^T G - c) S) with c at
the roots of a Chebyshev polynomial over that range, do the work of six on a flat spectrum, and of three on
a steep one.

The number of iterations is fixed, so a refresh takes bounded time. Householder's QR of a deficient matrix
still has orthonormal columns: a zero or rank-one gradient gives a basis like any other. Non-finite elements
count as 0 and the gradient is scaled by a power of two near its largest element, so nothing overflows.

Signs are arbitrary, and matter: Adam's moments outlive the basis. Each vector is turned towards its
predecessor of the same number, at first so that its largest entry is positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from scrimp.base.counter_random import bits
from scrimp.base.seeds import derive
from scrimp.optim.pieces import Carry, Entries, Slot, Target
from scrimp.optim.projectors.orientation import (
    SIDES,
    MatrixBasis,
    OnRefresh,
    Side,
    check_rank,
    is_transposed_view,
    require,
    require_count,
)
from scrimp.optim.projectors.refresh import Lazy, rotation

Method = Literal["svd", "power", "randomized"]
_OVERSAMPLING = 16
_PLAIN, _FILTERED = 2, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SingularVectors(MatrixBasis):
    """The basis of leading singular vectors.

    Memory: d * r numbers. A refresh holds a finite copy of G and thin matrices; "svd" holds U and V too.

    Attributes:
        rank: How many.
        every: Steps between refreshes.
        side: See `orientation`.
        method: How they are found.
        lazy: Lengthens the period where the subspace has settled.
        on_refresh: What becomes of the moments.
        align: Chooses the signs; else they are as they come.
        seed: Of the random columns.
        released: Decomposes in float32 whatever the gradient's dtype, with G as it lies.

    References:
        GaLore, Zhao et al., ICML 2024, arXiv 2403.03507. Finding structure with randomness, Halko,
        Martinsson and Tropp, SIAM Review 2011, arXiv 0909.4061.
    """

    rank: int
    every: int = 200
    side: Side = "std"
    method: Method = "power"
    lazy: Lazy | None = None
    on_refresh: OnRefresh = "keep"
    align: bool = True
    seed: int = 0
    released: bool = False

    def __post_init__(self) -> None:
        """Check the words and the numbers."""
        require_count("rank", self.rank)
        require_count("every", self.every)
        require("side", self.side, SIDES)
        require("method", self.method, ("svd", "power", "randomized"))
        require("on_refresh", self.on_refresh, ("keep", "rotate", "reset"))

    @property
    def refresh_needs_gradient(self) -> bool:
        """They are the gradient's."""
        return True

    def check(self, target: Target) -> str | None:
        """See `check_rank`."""
        stored = math.prod(target.shape[:-2]) * target.shape[-1] * self.rank
        return check_rank(target, self.rank, stored=stored, kept=math.prod(self.down_shape(target, 0)))

    def slots(self, target: Target) -> tuple[Slot, ...]:
        """Return the basis, (..., d, r)."""
        return (Slot(name="basis", shape=(*target.shape[:-2], target.shape[-1], self.rank)),)

    @property
    def counters(self) -> tuple[str, ...]:
        """Return what `lazy` counts: the period (0 until the first refresh) and the similarities seen."""
        return () if self.lazy is None else ("period", "seen")

    def tensors(self, target: Target) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return the last similarities, where `lazy` reads them."""
        return {} if self.lazy is None else self.lazy.tensors()

    def due(self, entries: Entries, step: int) -> bool:
        """Tell whether `step` is a multiple of the period."""
        period = 0 if self.lazy is None else entries["period"]
        return step % (period or self.every) == 0

    def refresh(
        self, g: Tensor, basis: Any, entries: Entries, target: Target, step: int
    ) -> tuple[dict[str, Tensor], Carry | None]:
        """Find the singular vectors of `g`."""
        seed = derive(self.seed, "range", step, target.index)
        new = right_vectors(working(g, self.released), self.rank, self.method, seed=seed)
        if self.align:
            new = align(new, basis)
        if self.released:
            new = new.to(g.dtype)
        if self.lazy is not None:
            self.lazy.observe(entries, basis, new, self.every, g.isfinite().all())
        carry = rotation(basis, new) if basis is not None and self.on_refresh == "rotate" else None
        return {"basis": new.contiguous()}, carry

    def load(self, slots: Mapping[str, Tensor], entries: Entries, target: Target, like: Tensor) -> Any:
        """Return the basis."""
        return slots["basis"].to(like.device, like.dtype)


def working(g: Tensor, single: bool) -> Tensor:
    """Return `g` as it is decomposed: in float64 where it has it and is not refused, else in float32."""
    return g if g.dtype == torch.float64 and not single else g.float()


def right_vectors(g: Tensor, rank: int, method: Method, *, seed: int) -> Tensor:
    """Return the leading right singular vectors of `g`, orthonormal, (..., d, r).

    Args:
        g: (..., k, d), float32 or float64; what is not finite counts as 0.
        rank: How many: at most the smaller of k and d.
        method: See the module.
        seed: Of the random columns.
    """
    if method != "svd" and g.shape[-2] < g.shape[-1]:
        return both_vectors(g, rank, method, seed=seed)[1]
    g = _tame(g)
    return _decomposed(g, rank) if method == "svd" else _leading(g, rank, method, seed)


def both_vectors(g: Tensor, rank: int, method: Method, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return the leading left (..., k, r) and right (..., d, r) singular vectors, in pairs."""
    g = _tame(g)
    if method == "svd":
        left, _, right = torch.linalg.svd(g, full_matrices=False)
        return left[..., :rank], right[..., :rank, :].mT
    if g.shape[-2] >= g.shape[-1]:
        right = _leading(g, rank, method, seed)
        return _partners(g, right), right
    left = _leading(g.mT, rank, method, seed)
    return left, _partners(g.mT, left)


def _tame(g: Tensor) -> Tensor:
    finite = g.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    sides = (-2, -1)
    largest = torch.maximum(finite.amax(sides, keepdim=True), -finite.amin(sides, keepdim=True))
    # By a power of two, which rounds nothing.
    return finite.mul_(torch.ones_like(largest).ldexp(-largest.frexp().exponent.clamp(-100, 100)))


def _decomposed(g: Tensor, rank: int) -> Tensor:
    # In the layout it was written in, so that the signs are those of a package that knows no other.
    if is_transposed_view(g):
        vectors: Tensor = torch.linalg.svd(g.mT, full_matrices=False)[0]
        return vectors[..., :rank]
    vectors = torch.linalg.svd(g, full_matrices=False)[2]
    return vectors[..., :rank, :].mT


def _leading(g: Tensor, rank: int, method: Method, seed: int) -> Tensor:
    """Return right singular vectors of `g` (..., k, d), k at least d, by iteration."""
    (k, d), width = g.shape[-2:], min(rank + _OVERSAMPLING, g.shape[-1])
    passes = _PLAIN + _FILTERED
    thin = passes * 2 * k * width < k * d + passes * d * width  # fewer products than with G^T G
    square = g if thin else g.mT @ g

    def apply(columns: Tensor) -> Tensor:
        return torch.matmul(g.mT, g @ columns) if thin else torch.matmul(square, columns)

    columns = _signs((*g.shape[:-2], d, width), seed, g)
    for _ in range(_PLAIN):
        columns = _orthonormal(apply(columns))
    if method == "power":
        columns = _filtered(columns, apply)
    # Eigenvalues ascend; the wanted ones are the last.
    turn = torch.linalg.eigh(columns.mT @ apply(columns)).eigenvectors.flip(-1)[..., :rank]
    return torch.matmul(columns, turn)


def _filtered(columns: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """Damp what lies below the least eigenvalue seen, by a Chebyshev polynomial given as its roots."""
    image = apply(columns)
    least = torch.linalg.eigvalsh(columns.mT @ image)[..., :1, None].clamp_min(0)
    for number in range(_FILTERED):
        root = least * (1 + math.cos((2 * number + 1) * math.pi / (2 * _FILTERED))) / 2
        columns = _orthonormal((apply(columns) if number else image) - root * columns)
    return columns


def _partners(g: Tensor, right: Tensor) -> Tensor:
    # The columns of G V fall in length and are at right angles already: QR completes them where they vanish.
    left, triangle = torch.linalg.qr(g @ right)
    negative = triangle.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) < 0
    return torch.where(negative, -left, left)


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis


def _signs(shape: tuple[int, ...], seed: int, like: Tensor) -> Tensor:
    count = math.prod(shape)
    words = bits(seed, -(-count // 32), device=like.device).unsqueeze(-1)
    drawn = words >> torch.arange(32, dtype=torch.int32, device=like.device)
    return ((drawn & 1) * 2 - 1).view(-1)[:count].view(shape).to(like.dtype)


def align(new: Tensor, old: Tensor | None) -> Tensor:
    """Turn each column of `new` (..., d, r) towards that of `old`, or its largest entry positive."""
    if old is None:
        towards = new.gather(-2, new.abs().argmax(-2, keepdim=True))
    else:
        towards = (new * old.to(new.dtype)).sum(-2, keepdim=True)
    return torch.where(towards < 0, -new, new)
