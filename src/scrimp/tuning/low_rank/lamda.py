"""LaMDA: a core between the leading singular vectors of the weight, and an output factor that freezes early.

    y = x (W - s B0 R0 A)^T + s x (B R A)^T       B0 = U_r, R0 = diag(S_r) / s, A = V_r^T of W

A is frozen from the start, R trains throughout, and B until a share `freeze` of the run is over: after a
share f of the run, its first floor(r f / freeze) columns are frozen. B is kept in pieces of columns. A piece
freezes when its last column is due, and its gradient and optimizer state are freed; with r pieces that is the
paper's rule to the column. Afterwards R alone trains, as in LoRA-XS.

LaMDA++ spends the same ranks in all unevenly: each layer gets the smallest rank at which its leading singular
values hold a share tau of its squared norm, within half and twice the mean; tau is the largest that the
budget allows.

What the released code does otherwise: only the first few columns ever freeze (a factor r is missing), by
gradients set to zero, which moments and weight decay undo; A and B are LoRA's own or LoftQ's, from no
decomposition of W. The rule by which LaMDA++ turns a spectrum into ranks is ours, in the paper's sense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import Probe
from scrimp.tuning.deltas.delta import Delta, dense
from scrimp.tuning.deltas.low_rank import CoreStart, LowRankCore
from scrimp.tuning.deltas.tuning import DeltaTuning
from scrimp.tuning.layers import wake
from scrimp.tuning.low_rank.cores import decomposed
from scrimp.tuning.low_rank.spectra import Triplets
from scrimp.tuning.option_checks import check_positive
from scrimp.tuning.targets import Place, check_rank


@dataclass(frozen=True, slots=True)
class FreezeColumns:
    """Puts the pieces of every B to sleep, first to last.

    Attributes:
        until: The step before which the last piece trained.
    """

    until: float

    def asleep(self, step: int, delta: LowRankCore) -> int:
        """Return how many of a B's pieces are frozen before a step."""
        rank = delta.core.shape[0]
        columns = int(rank * min(1.0, step / self.until)) if self.until else rank
        ends = accumulate(part.shape[1] for part in delta.parts)
        return sum(end <= columns for end in ends)

    def before_step(
        self,
        step: int,
        deltas: Mapping[str, Delta],
        optimizer: torch.optim.Optimizer,
        probe: Probe | None,
    ) -> None:
        """Freeze what is due."""
        for delta in deltas.values():
            assert isinstance(delta, LowRankCore)
            parts = [part for part in delta.parts if isinstance(part, torch.nn.Parameter)]
            asleep = self.asleep(step, delta)
            if any(part.requires_grad for part in parts[:asleep]):
                wake(parts, set(parts[asleep:]), optimizer, forget="asleep")


def LaMDA(
    *,
    rank: int = 32,
    alpha: float | None = None,
    freeze: float = 0.3,
    steps: int = 1000,
    pieces: int = 8,
    targets: tuple[str, ...] = ("all-linear",),
    seed: int = 0,
) -> DeltaTuning:
    """LaMDA: see the module.

    Args:
        rank: r.
        alpha: s = alpha / r; None is r, so that s is 1.
        freeze: The share of the run over which B freezes.
        steps: Of the run.
        pieces: In which B freezes, where it has as many columns.
        targets: Which layers.
        seed: Of the decomposition's subspace.

    Memory:
        4 r (in + 2 out) bytes of factors and of what is subtracted and 16 r^2 of R (with AdamW) a matrix;
        while B trains, 12 r out more, which shrinks piece by piece; activations r a token, not the input.

    References:
        LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation, Azizi et al.,
        EMNLP Findings 2024, arXiv 2406.12832.

    Raises:
        ScrimpError: An option is out of its range.
    """
    return _lamda("lamda", rank, alpha, freeze, steps, pieces, targets, seed, _equal_ranks)


def LaMDAPlusPlus(
    *,
    rank: int = 32,
    alpha: float | None = None,
    freeze: float = 0.3,
    steps: int = 1000,
    pieces: int = 8,
    targets: tuple[str, ...] = ("all-linear",),
    seed: int = 0,
) -> DeltaTuning:
    """LaMDA++: LaMDA with ranks by the weights' spectra; see the module.

    Args:
        rank: The mean of the ranks, which lie between its half and its double.
        alpha: s = alpha / rank for every layer; None makes s 1.
        freeze: The share of the run over which B freezes.
        steps: Of the run.
        pieces: In which B freezes, where the smallest has as many columns.
        targets: Which layers.
        seed: Of the decomposition's subspace.

    Memory:
        LaMDA's at most for layers of one shape; while the model is built, as if every rank were double.

    References:
        LaMDA++, of the same paper, arXiv 2406.12832.

    Raises:
        ScrimpError: An option is out of its range.
    """
    return _lamda("lamda-plus-plus", rank, alpha, freeze, steps, pieces, targets, seed, _spectral_ranks)


Decompose = Callable[[Sequence[Place], int, str, int], list[Triplets]]


def _lamda(
    name: str,
    rank: int,
    alpha: float | None,
    freeze: float,
    steps: int,
    pieces: int,
    targets: tuple[str, ...],
    seed: int,
    decompose: Decompose,
) -> DeltaTuning:
    alpha = rank if alpha is None else alpha
    check_positive(name, {"rank": rank, "alpha": alpha, "steps": steps, "pieces": pieces})
    scale = alpha / rank
    least = rank if decompose is _equal_ranks else max(1, rank // 2)
    if not 0 <= freeze <= 1:
        raise ScrimpError(f"tune {name}: freeze {freeze} must be a share of the run, from 0 to 1")

    def make(places: Sequence[Place]) -> list[LowRankCore]:
        check_rank(places, rank, tune=name)
        return [_delta(found, scale, min(pieces, least)) for found in decompose(places, rank, name, seed)]

    event = FreezeColumns(freeze * steps)
    return DeltaTuning(name=name, make=make, targets=targets, events=(event,), settings={"scale": scale})


def _delta(found: Triplets, scale: float, pieces: int) -> LowRankCore:
    start = CoreStart(found.vt, found.u, torch.diag(found.s) / scale)
    return LowRankCore(start, scale=scale, trains=("core", "lora_B"), pieces=pieces, subtracts_start=True)


def _equal_ranks(places: Sequence[Place], rank: int, name: str, seed: int) -> list[Triplets]:
    return [decomposed(place, rank, name, seed) for place in places]


def _spectral_ranks(places: Sequence[Place], rank: int, name: str, seed: int) -> list[Triplets]:
    if places[0].module.weight.is_meta:  # no spectra: what is planned is the mean
        return _equal_ranks(places, rank, name, seed)
    found = [decomposed(p, min(2 * rank, *p.module.weight.shape), name, seed) for p in places]
    norms = [dense(place.module.weight).square().sum() for place in places]
    shares = [(t.s.square().cumsum(0) / norm).cpu() for t, norm in zip(found, norms, strict=True)]
    ranks = spectral_ranks(shares, rank)
    return [
        Triplets(t.u[:, :r].clone(), t.s[:r].clone(), t.vt[:r].clone())
        for t, r in zip(found, ranks, strict=True)
    ]


def spectral_ranks(shares: Sequence[Tensor], mean: int) -> list[int]:
    """Return for each layer the smallest rank that holds a share tau, with the largest tau that fits.

    Args:
        shares: (at most 2 mean,) a layer: what the first 1, 2, ... singular values hold of the squared norm.
        mean: The largest mean of the ranks; none is below its half.
    """
    least = max(1, mean // 2)
    tried = torch.cat([each[least - 1 :] for each in shares]).sort().values

    def ranks(tau: Tensor) -> list[int]:
        return [max(least, min(len(each), int((each < tau).sum()) + 1)) for each in shares]

    low, high = 0, len(tried) - 1  # the smallest of them is within the budget
    while low < high:
        middle = (low + high + 1) // 2
        fits = sum(ranks(tried[middle])) <= mean * len(shares)
        low, high = (middle, high) if fits else (low, middle - 1)
    return ranks(tried[low])
