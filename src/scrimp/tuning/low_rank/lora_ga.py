"""LoRA that begins along the gradient: LoRA-GA as its authors wrote it, and LoRA-One.

    G = U S V^T, the mean gradient of the frozen weight            s: the LoRA's scale, m: out features

    LoRA-GA     A = c V^T[0:r]    B = c U[:, r:2r]    c = m^(1/4) / sqrt(gamma)         on W - s B0 A0
    LoRA-One    A = c (S/S_1)^(1/2) V^T[0:r]    B = -c U[:, 0:r] (S/S_1)^(1/2)    c = 1 / sqrt(gamma)    on W

LoRA-GA leaves the model's function as it is, and its first step moves W along the best approximation of -G of
rank 2r; singular values play no part. LoRA-One begins displaced, by the best descent step of rank r.

peft 0.21's `init_lora_weights="lora_ga"` is another method: it multiplies B by the singular values and scales
B alone, so that B is as small as the gradient. LoRA-GA's `norm_clip` is left out: it bounds what is taken
from a half-precision weight, and here nothing is (`deltas.low_rank`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.base.seeds import derive
from scrimp.tuning.deltas.delta import dense
from scrimp.tuning.deltas.low_rank import LowRank, Start, lora_start
from scrimp.tuning.deltas.parts import draw_subset
from scrimp.tuning.deltas.tuning import DeltaTuning
from scrimp.tuning.low_rank.gradient_start import GradientStart
from scrimp.tuning.low_rank.spectra import Triplets, leading_triplets
from scrimp.tuning.option_checks import check_choice, check_positive
from scrimp.tuning.targets import Place, check_rank

Direction = Literal["ArB2r", "A2rBr", "ArBr", "random"]
Scale = Literal["stable", "gd", "unit", "weightS"]


class Pick(NamedTuple):
    """Which singular vectors, counted from the largest, become A's rows and B's columns."""

    a: list[int]
    b: list[int]


def LoraGA(
    *,
    rank: int = 8,
    alpha: float = 16,
    rank_stabilised: bool = True,
    direction: Direction = "ArB2r",
    scale: Scale = "stable",
    gamma: float = 16,
    passes: int = 1,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("all-linear",),
    seed: int = 0,
) -> DeltaTuning:
    """LoRA-GA: the first step of LoRA follows full tuning's as closely as rank 2r allows.

    Args:
        rank: r; 2r must fit every target.
        alpha: Over sqrt(r), or r, the scale s.
        rank_stabilised: Whether s is alpha / sqrt(r), as the authors', or alpha / r.
        direction: Which singular vectors A and B get: the first r and the next r, the other way round, the
            odd and the even ones, or two random halves.
        scale: Of both factors: m^(1/4) / sqrt(gamma); 1 / s; 1; or the mean of sqrt(sigma_i(W) / s), i < r.
        gamma: The larger, the smaller the factors; the authors also report 64.
        passes: Micro-batches in G (the authors': 8 of one sequence, or 64 of two).
        dropout: LoRA's.
        targets: Which layers.
        seed: Of the draws.

    Memory:
        LoRA's, and another 4 r (in + out) bytes for what is subtracted. At the start, one fp32 gradient at a
        time; with several passes, 4 bytes a weight of all targets on the host.

    References:
        LoRA-GA: Low-Rank Adaptation with Gradient Approximation, Wang et al., NeurIPS 2024, arXiv 2407.05000.

    Raises:
        ScrimpError: An option is out of its range.
    """
    name = "lora-ga"
    check_choice(name, "direction", direction, get_args(Direction))
    check_choice(name, "scale", scale, get_args(Scale))
    s = _lora_scale(name, rank, alpha, rank_stabilised, passes, dropout, gamma)
    weight_scales: dict[str, Tensor] = {}

    def make(places: Sequence[Place]) -> list[LowRank]:
        _check_double_rank(places, rank)
        if scale == "weightS":
            weight_scales.update({p.name: _weight_scale(p, rank, s, seed) for p in places})
        return _plain(places, rank, s, dropout, name, seed, subtracts_start=True)

    def start(layer: str, number: int, gradient: Tensor) -> Start:
        triplets = leading_triplets(gradient, 2 * rank, seed=derive(seed, name, "svd", number))
        pick = picked(direction, rank, seed=derive(seed, name, "pick", number))
        factor: float | Tensor = {
            "stable": gradient.shape[0] ** 0.25 / math.sqrt(gamma),
            "gd": 1 / s,
            "unit": 1.0,
        }.get(scale, 1.0)
        if scale == "weightS":
            factor = weight_scales[layer]
        return Start(factor * triplets.vt[pick.a], factor * triplets.u[:, pick.b])

    return DeltaTuning(
        name=name, make=make, targets=targets, events=(GradientStart(start, passes),), settings={"scale": s}
    )


def LoraOne(
    *,
    rank: int = 8,
    alpha: float = 16,
    rank_stabilised: bool = True,
    scale: Literal["paper", "stable"] = "paper",
    gamma: float = 128,
    passes: int = 1,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("all-linear",),
    seed: int = 0,
) -> DeltaTuning:
    """LoRA-One: LoRA that begins at the best rank-r step down the gradient.

    s B A = -(s / gamma) (U_r S_r V_r^T) / S_1 is added to W and stays in the adapter, an ordinary LoRA.

    Args:
        rank: r.
        alpha: Over sqrt(r), or r, the scale s.
        rank_stabilised: Whether s is alpha / sqrt(r), as the authors', or alpha / r.
        scale: Of both factors: 1 / sqrt(gamma), or the released script's m^(1/4) / sqrt(gamma) (gamma 64).
        gamma: The larger, the smaller the first step.
        passes: Micro-batches in G.
        dropout: LoRA's.
        targets: Which layers.
        seed: Of the draws.

    Memory:
        LoRA's; at the start as LoRA-GA's.

    The paper also preconditions both gradients, as `scaled` LoRA optimizers do; that is theirs to do.

    References:
        LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models, Provably and
        Efficiently, Zhang et al., ICML 2025, arXiv 2502.01235.

    Raises:
        ScrimpError: An option is out of its range.
    """
    name = "lora-one"
    check_choice(name, "scale", scale, ("paper", "stable"))
    s = _lora_scale(name, rank, alpha, rank_stabilised, passes, dropout, gamma)

    def make(places: Sequence[Place]) -> list[LowRank]:
        check_rank(places, rank, tune=name)
        return _plain(places, rank, s, dropout, name, seed, subtracts_start=False)

    def start(layer: str, number: int, gradient: Tensor) -> Start:
        triplets = leading_triplets(gradient, rank, seed=derive(seed, name, "svd", number))
        height = gradient.shape[0] ** 0.25 if scale == "stable" else 1.0
        return descent(triplets, height / math.sqrt(gamma))

    return DeltaTuning(
        name=name, make=make, targets=targets, events=(GradientStart(start, passes),), settings={"scale": s}
    )


def picked(direction: Direction, rank: int, *, seed: int) -> Pick:
    """Return which of the first 2r singular vectors A and B get.

    Args:
        direction: As in `LoraGA`.
        rank: r.
        seed: Of the random halves.
    """
    if direction == "random":
        drawn = draw_subset(seed, 2 * rank, 2 * rank).tolist()
        return Pick(drawn[:rank], drawn[rank:])
    first, second = list(range(rank)), list(range(rank, 2 * rank))
    even, odd = list(range(0, 2 * rank, 2)), list(range(1, 2 * rank, 2))
    return {"ArB2r": Pick(first, second), "A2rBr": Pick(second, first), "ArBr": Pick(odd, even)}[direction]


def descent(triplets: Triplets, factor: float) -> Start:
    """Return LoRA-One's factors, whose product is -factor^2 G_r / S_1; zero where G is."""
    u, s, vt = triplets
    root = (s / s[0].clamp_min(torch.finfo(s.dtype).tiny)).sqrt()
    return Start(factor * root[:, None] * vt, -factor * u * root)


def _lora_scale(
    name: str, rank: int, alpha: float, stabilised: bool, passes: int, dropout: float, gamma: float
) -> float:
    check_positive(name, {"rank": rank, "alpha": alpha, "passes": passes, "gamma": gamma})
    if not 0 <= dropout < 1:
        raise ScrimpError(f"tune {name}: dropout {dropout} must be at least 0 and below 1")
    return alpha / math.sqrt(rank) if stabilised else alpha / rank


def _plain(
    places: Sequence[Place],
    rank: int,
    scale: float,
    dropout: float,
    name: str,
    seed: int,
    *,
    subtracts_start: bool,
) -> list[LowRank]:
    """Return LoRAs as they stand until the gradient is known: their product is zero."""
    starts = [lora_start(p.module, rank, seed=derive(seed, name, "A", p.number)) for p in places]
    return [LowRank(start, scale=scale, dropout=dropout, subtracts_start=subtracts_start) for start in starts]


def _check_double_rank(places: Sequence[Place], rank: int) -> None:
    small = min(places, key=lambda place: min(place.module.weight.shape))
    there = min(small.module.weight.shape)
    if 2 * rank > there:
        raise ScrimpError(
            f"tune lora-ga: rank {rank} takes {2 * rank} singular vectors, and {small.name} has {there}: the "
            f"largest rank is {there // 2}; lower --tune.rank or leave the layer out of --tune.targets"
        )


def _weight_scale(place: Place, rank: int, scale: float, seed: int) -> Tensor:
    found = leading_triplets(
        dense(place.module.weight), rank, seed=derive(seed, "lora-ga", "weight", place.number)
    )
    return (found.s / scale).sqrt().mean()
