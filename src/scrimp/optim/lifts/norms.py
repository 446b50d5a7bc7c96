"""Norms of channels and matrices, their ratio, and the norm-growth limiter that Fira and APOLLO share.

A channel is a row of the oriented matrix (..., k, d): the projection shortens d to r and keeps k, so that
G (..., k, d), R and N (..., k, r) have the same channels.

    ratio     phi = ||N_i|| / (||R_i|| + 1e-8)        (..., k, 1), or one for the matrix, (..., 1, 1)
    limiter   q = max(s / (p + 1e-8), gamma) / gamma  s: the norm of this update, p: of the last one, limited
              the update becomes 1/q of itself, p = s / q

The limiter is one-sided: an update may shrink freely and grows by gamma - 1 a step at most (after a quiet
phase a hundredfold recovery takes 460 steps at 1.01). The authors' code throttles a matrix whose first
gradient was zero to 1e-8 and lets it grow by 1e-8 a step, which never ends; here p == 0 means unset.

References:
    Fira, Chen et al., NeurIPS 2025, arXiv 2410.01623.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scrimp.optim.pieces import Slot, Target

_TINY = 1e-8
_LIMITED = "limited_norm"  # p


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums and differences of `dtype`: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def channel_norms(x: Tensor) -> Tensor:
    """Return the norm of each row of (..., k, d) as (..., k, 1), in float32 at least."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
    return norms


def matrix_norm(channels: Tensor) -> Tensor:
    """Return the Frobenius norm of each matrix (..., 1, 1) from its rows' norms (..., k, 1)."""
    norm: Tensor = torch.linalg.vector_norm(channels, dim=-2, keepdim=True)
    return norm


def norm_ratio(direction: Tensor, r: Tensor) -> Tensor:
    """Return how much longer the rule made each channel: (..., k, 1) from two (..., k, r)."""
    return channel_norms(direction) / (channel_norms(r) + _TINY)


def matrix_ratio(direction: Tensor, r: Tensor) -> Tensor:
    """Return how much longer the rule made each matrix: (..., 1, 1) from two (..., k, r)."""
    return matrix_norm(channel_norms(direction)) / (matrix_norm(channel_norms(r)) + _TINY)


def limiter_slots(target: Target, gamma: float | None) -> tuple[Slot, ...]:
    """Return the limiter's slot: one number a matrix; none without a limiter."""
    if gamma is None:
        return ()
    return (Slot(name=_LIMITED, shape=(*target.shape[:-2], 1, 1), signed=False, exact=True),)


def limit_growth(
    phi: Tensor, norms: Tensor, slots: Mapping[str, Tensor], gamma: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return `phi` divided by the limiter's q, and the limiter's slot renewed.

    Args:
        phi: What multiplies the channels, (..., k, 1) or (..., 1, 1).
        norms: The channels' norms before that, (..., k, 1).
        slots: The limiter's: p, 0 where there was none.
        gamma: The largest growth of the update's norm in a step; None does not limit it.
    """
    if gamma is None:
        return phi, {}
    norm, last = matrix_norm(phi * norms), slots[_LIMITED]
    growth = norm / (last + _TINY)
    q = torch.where(last > 0, growth.clamp(min=gamma) / gamma, torch.ones_like(norm))
    return phi / q, {_LIMITED: norm / q}
