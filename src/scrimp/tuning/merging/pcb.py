"""PCB-merging: each task's entry counts by its size within the task and its agreement with the others.

For task vectors tau_1 ... tau_N of d entries, with norm(x) = (x - min x) / (max x - min x) per task:

    a_i    = |tau_i| clamped to its order statistics 0.0001 d and 0.9999 d - 1
    beta_i = exp(N norm(a_i)^2) tanh(tau_i * sum_j tau_j)       size within the task, agreement between them
    s_i    = norm(max(beta_i, its order statistic (1 - density) d))          the rest is dropped: s = 0
    tau    = sum_i lambda_i sign(tau_i) a_i s_i / max(sum_i s_i, 1e-12)

All statistics are of a task's whole vector. They are exact, and found without holding it: the k-th smallest
float is found in two passes, by histograms of the upper and of the lower half of its bits.

Oddities:

- The equations are those of the authors' `pcb-merging.py`. Their vision script clamps at 1 %, and takes
  as agreement sum_j tanh(tau_i * tau_j) with each tau scaled to a largest magnitude of 1.
- We compute exp(N (norm(a)^2 - 1)): norm takes out the constant factor, and exp(N) overflows from N = 89 on.
- Where all magnitudes of a task are equal (as in a change that is zero), norm is 0; the authors' code divides
  0 by 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError

_CLAMPED = 0.0001
_HALF = 1 << 16


class Limits(NamedTuple):
    """What the merge needs to know of whole task vectors, (N,) float32 each.

    Attributes:
        low: The least magnitude after clamping.
        high: The largest.
        floor: The score at which an entry is dropped.
        top: The highest score.
    """

    low: Tensor
    high: Tensor
    floor: Tensor
    top: Tensor


def limits(pieces: Callable[[], Iterable[Tensor]], density: float) -> Limits:
    """Return the limits of N task vectors that come in pieces.

    Args:
        pieces: Starts a pass over the pieces, (N, ...) float32 each; four passes are made.
        density: The share of each vector that is kept, the authors' `pcb_ratio`.

    Raises:
        ScrimpError: The vectors are too short for the density.

    Memory:
        One piece and its scores at a time, and 1 MiB a task.
    """

    def kept(size: int) -> tuple[int, int]:
        cut = int(size * (1 - density))
        if cut >= size - 1:
            raise ScrimpError(
                f"pcb cannot rank fewer than two entries, and a density of {density} keeps no more; "
                "choose a higher one"
            )
        return cut, size - 1

    def clamped(size: int) -> tuple[int, int]:
        return int(size * _CLAMPED), int(size * (1 - _CLAMPED) - 1)

    low, high = order_statistics(lambda: (piece.abs() for piece in pieces()), clamped).unbind(1)
    scores = order_statistics(lambda: (_score(piece, low, high) for piece in pieces()), kept)
    return Limits(low, high, *scores.unbind(1))


def merge(tasks: Tensor, limits: Limits, weights: Tensor) -> Tensor:
    """Return the merged change of one piece.

    Args:
        tasks: (N, *shape) float32.
        limits: Of the whole vectors.
        weights: lambda, (N,) float32. The authors' example has 1.2, or searches 0.8 to 1.3 by validation.

    Returns:
        (*shape) float32.

    References:
        Parameter Competition Balancing for Model Merging, Du et al., NeurIPS 2024, arXiv 2410.02396.
    """
    low, high, floor, top = (_per_task(limit, tasks) for limit in limits)
    size = tasks.abs().clamp(low, high)
    share = _norm(_score(tasks, limits.low, limits.high).maximum(floor), floor, top)
    total = (_per_task(weights, tasks) * tasks.sign() * size * share).sum(0)
    return total / share.sum(0).clamp(min=1e-12)


def _score(tasks: Tensor, low: Tensor, high: Tensor) -> Tensor:
    low, high = _per_task(low, tasks), _per_task(high, tasks)
    size = _norm(tasks.abs().clamp(low, high), low, high)
    return (len(tasks) * (size.square() - 1)).exp() * (tasks * tasks.sum(0)).tanh()


def _norm(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    width = high - low
    return (x - low) / width.masked_fill(width == 0, 1)


def _per_task(value: Tensor, tasks: Tensor) -> Tensor:
    return value.view(-1, *(1,) * (tasks.ndim - 1))


def order_statistics(pieces: Callable[[], Iterable[Tensor]], ranks: Callable[[int], Sequence[int]]) -> Tensor:
    """Return the k-th smallest entries of N vectors that come in pieces, exactly.

    Args:
        pieces: Starts a pass over the pieces, (N, ...) float32 without NaN; two passes are made.
        ranks: Returns the ks wanted, from 0, of vectors of a given length.

    Returns:
        (N, number of ks) float32.
    """
    upper = _histogram(key >> 16 for key in map(_sortable, pieces()))
    wanted = upper.new_tensor(ranks(int(upper[0].sum()))).expand(len(upper), -1).contiguous()
    ends = upper.cumsum(1)
    bucket = torch.searchsorted(ends, wanted, right=True)
    rest = wanted - (ends - upper).gather(1, bucket)
    head = (bucket - _HALF // 2).int()
    lower = _histogram(_lower(key, head) for key in map(_sortable, pieces()))
    tail = torch.searchsorted(lower.cumsum(1), rest.view(-1, 1), right=True).view_as(head).int()
    return _float(head * _HALF + tail)


def _lower(key: Tensor, head: Tensor) -> Tensor:
    """Return the lower halves of the keys (N, entries) with each upper half of (N, K), (N K, entries)."""
    key, head = key.unsqueeze(1), head.unsqueeze(2)
    # The others go to the last slot, past every lower half.
    return torch.where(key >> 16 == head, key & (_HALF - 1), _HALF).flatten(0, 1) - _HALF // 2


def _sortable(x: Tensor) -> Tensor:
    """Return int32 that compare as the floats do, (N, entries)."""
    bits = x.float().flatten(1).contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _float(key: Tensor) -> Tensor:
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _histogram(pieces: Iterable[Tensor]) -> Tensor:
    """Count numbers from -2^15 to 2^15 by row; (N, 2^16 + 1) int64."""
    total: Tensor | None = None
    for piece in pieces:
        slots = _HALF + 1
        row = torch.arange(len(piece), device=piece.device).unsqueeze(1) * slots
        flat = (piece + _HALF // 2 + row).flatten()
        counts = torch.bincount(flat, minlength=len(piece) * slots).view(len(piece), slots)
        total = counts if total is None else total.add_(counts)
    if total is None:
        raise ScrimpError("there is nothing to merge: the adapters hold no weights")
    return total
