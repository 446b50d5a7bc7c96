"""FlyLoRA: every token uses the ranks that answer it most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from scrimp.base.errors import ScrimpError
from scrimp.base.seeds import derive
from scrimp.tuning.deltas.delta import Delta
from scrimp.tuning.deltas.routed import Balance, RoutedRanks, Variant, sparse_projection
from scrimp.tuning.deltas.tuning import DeltaTuning
from scrimp.tuning.option_checks import check_choice
from scrimp.tuning.targets import ALL_LINEAR, Place, check_rank


def FlyLora(
    *,
    rank: int = 32,
    active: int = 8,
    alpha: float = 64.0,
    balance: float = 1e-3,
    variant: Variant = "paper",
    targets: tuple[str, ...] = (ALL_LINEAR,),
    seed: int = 0,
) -> DeltaTuning:
    """Return FlyLoRA: a frozen sparse random A, of whose ranks every token uses the strongest few, and B.

        z = A x;   y += (alpha / r) B (mask z);   mask: the k largest |z + d|
        d += u sign(mean(c) - c)                  c: how often each rank was selected in the step

    Memory: 16 r m bytes a layer for B, 4 r n for A, and of the input nothing is kept but (tokens, r). No
    weight can hold the change, so it is neither merged nor exported as a LoRA.

    The released code for peft selects by z + d, passes no gradient to x in its plain path (here it does, as
    in its quantised path), and moves d at every forward pass, in evaluation too.

    Args:
        rank: r.
        active: k, the ranks that a token uses.
        alpha: The scale is alpha / r.
        balance: u, by how much d moves before each step.
        variant: "paper", or "released" to select by the signed z + d.
        targets: Which layers.
        seed: Of A.

    Raises:
        ScrimpError: A number or the variant is not allowed, or the rank does not fit a target.

    References:
        FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise Mixture-of-Experts,
        NeurIPS 2025, arXiv 2510.08396.
    """
    if not 1 <= active <= rank:
        raise ScrimpError(f"tune flylora: active {active} must be from 1 to the rank ({rank})")
    if balance < 0:
        raise ScrimpError(f"tune flylora: balance {balance} must not be negative")
    check_choice("flylora", "variant", variant, get_args(Variant))

    def make(places: Sequence[Place]) -> list[Delta]:
        check_rank(places, rank, tune="flylora")
        return [_delta(place) for place in places]

    def _delta(place: Place) -> RoutedRanks:
        out_features, in_features = place.module.weight.shape
        entries = in_features // (rank // active)  # at least one: the rank fits
        a = sparse_projection(derive(seed, "flylora", place.number), rank, in_features, entries)
        return RoutedRanks(a, out_features=out_features, active=active, scale=alpha / rank, variant=variant)

    settings = {"rank": rank, "active": active, "alpha": alpha, "variant": variant, "seed": seed}
    return DeltaTuning(
        name="flylora",
        make=make,
        targets=targets,
        events=(Balance(rate=balance),),
        saves="own",
        is_mergeable=False,
        settings=settings,
    )
