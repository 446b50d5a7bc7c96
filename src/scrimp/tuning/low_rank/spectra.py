"""The leading singular triplets of a matrix: exactly where it is small, else from a random subspace.

    Y = (M M^T)^q M Omega,  Q = orth(Y),  svd(Q^T M)          Omega: (in, 2r + 8) normal, q power iterations

The draws are a pure function of a seed (torch's `svd_lowrank` would take them from the global generator).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scrimp.base.counter_random import normal


class Triplets(NamedTuple):
    """M ~ U diag(s) V^T, the largest first.

    Attributes:
        u: (out, r) float32, orthonormal columns.
        s: (r,) float32.
        vt: (r, in) float32, orthonormal rows.
    """

    u: Tensor
    s: Tensor
    vt: Tensor


@torch.no_grad()
def leading_triplets(matrix: Tensor, rank: int, *, seed: int, iterations: int = 4) -> Triplets:
    """Return the `rank` leading singular triplets.

    Args:
        matrix: (out, in) float32.
        rank: How many; at most the smaller side.
        seed: Of the random subspace.
        iterations: q; a spectrum that falls slowly needs more.
    """
    width = 2 * rank + 8
    if matrix.is_meta:
        u, s, vt = (
            matrix.new_empty(shape) for shape in ((matrix.shape[0], rank), (rank,), (rank, matrix.shape[1]))
        )
        return Triplets(u, s, vt)
    if 3 * width >= min(matrix.shape):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        basis = _range(matrix, width, seed, iterations)
        small, s, vt = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
        u = basis @ small
    return Triplets(u[:, :rank].clone(), s[:rank].clone(), vt[:rank].clone())


def _range(matrix: Tensor, width: int, seed: int, iterations: int) -> Tensor:
    """Return an orthonormal basis, (out, width), of where most of a matrix lies."""
    count = matrix.shape[1] * width
    drawn = normal(seed, count, device=matrix.device).view(matrix.shape[1], width)
    basis: Tensor = torch.linalg.qr(matrix @ drawn).Q
    for _ in range(iterations):
        other = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ other).Q
    return basis
