"""What the low-rank methods share: the rest of the parameters, GaLore's projector, the options' names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from scrimp.base.errors import ScrimpError
from scrimp.optim.group_options import Authors
from scrimp.optim.named.common import Betas, Common, Named, Pieces
from scrimp.optim.pieces import Conditioner, Lift, Options, Projector, Rule, Store
from scrimp.optim.projectors.orientation import require
from scrimp.optim.projectors.refresh import Lazy
from scrimp.optim.projectors.svd import SingularVectors
from scrimp.optim.projectors.two_sided import TwoSided

Variant = Literal["paper", "released"]


class Projected(NamedTuple):
    """What distinguishes a projected matrix from the rest of the parameters."""

    projector: Projector
    lift: Lift
    basis_store: Store | None = None
    conditioner: Conditioner | None = None


class LowRank(Named):
    """Runs a rule in the subspace of some matrices, and whole on all other parameters.

    Args:
        params: A model, parameters, or groups.
        rule: The optimizer proper, of both.
        project: Makes the pieces of a projected group, by its options.
        options: Those of every group.
        projected: Those of projected groups; the first, where it has a value, marks such a group.
        common: The common options that were given.
        authors: See `Optimizer`.
    """

    def __init__(
        self,
        params: Any,
        rule: Rule,
        project: Callable[[Options], Projected],
        options: Mapping[str, Any],
        projected: Mapping[str, Any],
        common: Common,
        authors: Authors | None = None,
    ) -> None:
        pieces = functools.partial(_pieces, rule, project, next(iter(projected)))
        super().__init__(params, pieces, options, common, projected=projected, authors=authors)


def _pieces(rule: Rule, project: Callable[[Options], Projected], mark: str, options: Options) -> Pieces:
    return Pieces(rule) if options[mark] is None else Pieces(rule, *project(options))


def adam_options(lr: float, betas: Betas, eps: float, weight_decay: float) -> dict[str, Any]:
    """Return the options that every group of an Adam has."""
    return {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}


def check_variant(variant: str) -> None:
    """Raise a ScrimpError for a variant that there is not."""
    require("variant", variant, ("paper", "released"))


def singular_vectors(options: Options, variant: Variant, seed: int, lazy: Lazy | None = None) -> Projector:
    """Return the projector of GaLore, Fira and APOLLO's SVD form, by a group's rank, period and side."""
    released = variant == "released"
    rank, every = options["rank"], options["refresh_every"]
    method: Literal["svd", "power"] = "svd" if released else "power"
    if options["side"] == "full":
        return TwoSided(
            rank=rank, every=every, method=method, align=not released, seed=seed, released=released
        )
    return SingularVectors(
        rank=rank,
        every=every,
        side=options["side"],
        method=method,
        lazy=lazy,
        align=not released,
        seed=seed,
        released=released,
    )


def check_channels(options: Options) -> None:
    """Raise a ScrimpError where no channel of the gradient is kept whole."""
    if options["side"] == "full":
        raise ScrimpError(
            "side 'full' shortens both sides, and this method scales the channels of the side that is kept: "
            "choose std, reverse_std, left or right"
        )
