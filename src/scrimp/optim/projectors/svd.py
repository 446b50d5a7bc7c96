"""The leading right singular vectors of the gradient, and three ways to find them.

    G = U S V^T,   B = V[:, :r]                               captured energy ||G B||_F^2

"svd" decomposes. "power" works on A = G^T G. Where r + 16 is more than a third of d it takes all
eigenvectors, since an iteration would take as long. Elsewhere it turns a block X of r + 16 columns towards
the wanted ones:

    X <- orth(A X)                          X random signs; Householder's QR
    X <- near((A - c) X), twice             c in [0, m], m the mean of the eigenvalues that X leaves over
    X <- X W                                X^T A X = W diag(t) W^T, t descending
    X <- near((A - c) X), four times        c in [0, t_last], never above the (r + 16)th eigenvalue of A
    X <- orth(X)
    B = X W, its first r columns            W anew, of this X

The c are roots of Chebyshev polynomials, which damp all that lies below m or t_last: the seven products
capture of a flat spectrum what 11 to 15 plain ones do. "randomized" (Halko, Martinsson and Tropp) iterates
twice, without a filter. Both start at random signs; the old basis was hardly a better start (on a drifting
signal in noise 0.9991 of the energy that the SVD captures, against 0.9990), and without it a basis depends on
the gradient alone.

near(X) multiplies by the inverse of a Cholesky factor of X^T X, its columns first scaled to length 1 and its
diagonal raised by some roundings, so that it exists. What is all but lost to rounding stays short, and grows
in the next product. It costs a third of Householder's QR, whose columns are orthonormal also where the matrix
is deficient: that one comes first, where a few huge directions hide the others in every column, and last. The
turn in between sorts by length, so that huge columns lend nothing to small ones. Forming G^T G (not done
where r is small beside d) costs accuracy: in float32 it knows singular values down to some 3e-4 of the
largest.

The number of products is fixed and no value decides what is done, so a refresh takes bounded time. A zero or
rank-one gradient gives a basis like any other. Non-finite elements count as 0 and the gradient is scaled by a
power of two near its largest element, so nothing overflows.

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
    require_rank,
)
from scrimp.optim.projectors.refresh import Lazy, rotation

Method = Literal["svd", "power", "randomized"]
_OVERSAMPLING = 16
_EXACT = 1 / 3  # of d: a wider block costs as much as all eigenvectors
_ROOTS = 2, 4  # of the two filters
_RAISED = 4  # a quarter of it let Cholesky fail on real gradients
_PRODUCTS = {"randomized": 3, "power": 2 + sum(_ROOTS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class SingularVectors(MatrixBasis):
    """The basis of leading singular vectors.

    Memory: d * r numbers. A refresh holds a finite copy of G, mostly d x d numbers of G^T G, and about six
    blocks of d x (r + 16); all eigenvectors take 3 x d x d more, "svd" holds U and V.

    Attributes:
        rank: How many; a float is a share of the shortened side.
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
        Martinsson and Tropp, SIAM Review 2011, arXiv 0909.4061. Self-consistent-field calculations using
        Chebyshev-filtered subspace iteration, Zhou et al., J. Comput. Phys. 2006. Shifted Cholesky QR, Fukaya
        et al., SIAM J. Sci. Comput. 2020, arXiv 1809.11085.
    """

    rank: float
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
        require_rank(self.rank)
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
        rank = self.rank_of(target.shape[-1])
        stored = math.prod(target.shape[:-2]) * target.shape[-1] * rank
        return check_rank(target, rank, stored=stored, kept=math.prod(self.down_shape(target, 0)))

    def slots(self, target: Target) -> tuple[Slot, ...]:
        """Return the basis, (..., d, r)."""
        d = target.shape[-1]
        return (Slot(name="basis", shape=(*target.shape[:-2], d, self.rank_of(d))),)

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
        new = right_vectors(working(g, self.released), self.rank_of(g.shape[-1]), self.method, seed=seed)
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
    """Return right singular vectors of `g` (..., k, d), k at least d, by eigenvectors of G^T G."""
    (k, d), width = g.shape[-2:], min(rank + _OVERSAMPLING, g.shape[-1])
    if method == "power" and width > _EXACT * d:
        return _turn(g.mT @ g, rank)[1]
    times = _PRODUCTS[method]
    thin = times * 2 * k * width < k * d + times * d * width  # fewer operations than with G^T G
    square = g if thin else g.mT @ g

    def apply(columns: Tensor) -> Tensor:
        return torch.matmul(g.mT, g @ columns) if thin else torch.matmul(square, columns)

    columns = torch.linalg.qr(apply(_signs((*g.shape[:-2], d, width), seed, g)))[0]
    columns = apply(columns) if method == "randomized" else _filtered(columns, apply, _energy(g))
    columns = torch.linalg.qr(columns)[0]
    return torch.matmul(columns, _turn(columns.mT @ apply(columns), rank)[1])


def _filtered(columns: Tensor, apply: Callable[[Tensor], Tensor], energy: Tensor) -> Tensor:
    """Damp what lies below the wanted spectrum, as it is estimated once and again."""
    image, rest = apply(columns), columns.shape[-2] - columns.shape[-1]
    mean = (energy - (columns * image).sum((-2, -1), keepdim=True)) / rest
    columns = _near_orthonormal(_damped(columns, image, mean, _ROOTS[0], apply))
    image = apply(columns)
    values, turn = _turn(columns.mT @ image, columns.shape[-1])
    least = values[..., -1:, None]
    return _damped(torch.matmul(columns, turn), torch.matmul(image, turn), least, _ROOTS[1], apply)


def _damped(
    columns: Tensor, image: Tensor, edge: Tensor, roots: int, apply: Callable[[Tensor], Tensor]
) -> Tensor:
    """Multiply `columns` by the Chebyshev polynomial over [0, edge]; `image` is their first product."""
    for number in range(roots):
        if number:
            columns = _near_orthonormal(columns)
            image = apply(columns)
        root = edge.clamp_min(0) * (1 + math.cos((2 * number + 1) * math.pi / (2 * roots))) / 2
        columns = torch.addcmul(image, root, columns, value=-1)
    return columns


def _turn(square: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest eigenvalues, descending, and eigenvectors of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(square, UPLO="U")  # MKL's is a tenth faster than with "L"
    return values[..., -count:].flip(-1), vectors[..., -count:].flip(-1)


def _near_orthonormal(columns: Tensor) -> Tensor:
    """Return columns of the same span, near to orthonormal where they are not all but dependent."""
    square = columns.mT @ columns
    limits = torch.finfo(square.dtype)
    unit = torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
    lengths = square.diagonal(dim1=-2, dim2=-1).clamp_min(limits.tiny).rsqrt().unsqueeze(-1)
    cosines = square * lengths * lengths.mT + _RAISED * limits.eps * math.sqrt(square.shape[-1]) * unit
    lower, failed = torch.linalg.cholesky_ex(cosines)
    lower = torch.where(failed[..., None, None] > 0, unit, lower)
    inverse = torch.linalg.solve_triangular(lower, unit, upper=False)
    return torch.matmul(columns, lengths * inverse.mT)


def _energy(g: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True)
    return norm.square()


def _partners(g: Tensor, right: Tensor) -> Tensor:
    # The columns of G V fall in length and are at right angles already: QR completes them where they vanish.
    left, triangle = torch.linalg.qr(g @ right)
    negative = triangle.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) < 0
    return torch.where(negative, -left, left)


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
