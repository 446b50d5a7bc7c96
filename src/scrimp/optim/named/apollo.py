"""APOLLO: learning rates from a random sketch of the gradient, which itself is the update.

    R = G B, B random        N, size = Adam(R)        W -= size * scale * limited(||N|| / ||R|| * G)

The subspace carries no update, so that any fixed random matrix will do; it is drawn again from its seed when
needed, where the authors' code keeps it.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, Unpack

from scrimp.optim.lifts.scaling import ScaleGradient
from scrimp.optim.named.common import Betas, Common
from scrimp.optim.named.subspace import (
    LowRank,
    Projected,
    Variant,
    adam_options,
    check_channels,
    check_variant,
    singular_vectors,
)
from scrimp.optim.pieces import Options, Projector
from scrimp.optim.projectors.orientation import require
from scrimp.optim.projectors.random import Random
from scrimp.optim.rules.adam import Adam


class Apollo(LowRank):
    """APOLLO: the gradient itself, scaled by what Adam does to a random sketch of it.

    Args:
        params: A model (the matrices inside its layers are projected), parameters, or groups.
        lr: Learning rate.
        rank: Of the sketch; None projects only groups that name theirs.
        refresh_every: Steps between random draws.
        scale: Factor of the update; the root of what the authors' code calls so.
        side: Which side is shortened: "std" the smaller, "reverse_std", "left" or "right".
        scale_type: One factor a "channel", or one a "tensor".
        proj: Sketch by a "random" matrix or by singular vectors, "svd".
        scale_front: Whether the scale acts before the limiter; the same but for rounding.
        gamma: The largest growth of the update's norm in a step; None does not limit it.
        hold: Keeps the random matrix between draws, outside the state: memory for time.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment, before the bias correction.
        weight_decay: Decoupled decay, after the update.
        variant: "released" draws from torch's generator, with the authors' chain of seeds: 1 for the first
            projected matrix, 2 for the next, plus `seed`, which must be how many other parameters they count
            before it. It takes ranks above the smaller side.
        common: See `scrimp.optim.named`.

    Memory:
        For a matrix (m, n): 2 max(m, n) r + 2 numbers (the authors' also keep the sketch's min(m, n) r).

    Raises:
        ScrimpError: `side` is "full", which keeps no channel of the gradient.

    References:
        APOLLO: SGD-like Memory, AdamW-level Performance, Zhu et al., MLSys 2025, arXiv 2412.05270.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-2,
        rank: int | None = 256,
        refresh_every: int = 200,
        scale: float = 1.0,
        side: str = "std",
        scale_type: Literal["channel", "tensor"] = "channel",
        proj: Literal["random", "svd"] = "random",
        scale_front: bool = False,
        gamma: float | None = 1.01,
        hold: bool = False,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        variant: Variant = "paper",
        **common: Unpack[Common],
    ) -> None:
        check_variant(variant)
        project = functools.partial(_apollo, gamma, scale_front, hold, variant, common.get("seed", 0))
        options = adam_options(lr, betas, eps, weight_decay)
        projected = {
            "rank": rank,
            "refresh_every": refresh_every,
            "scale": scale,
            "side": side,
            "scale_type": scale_type,
            "proj": proj,
        }
        super().__init__(
            params,
            Adam(convention="hf"),
            project,
            options,
            projected,
            common,
            authors={"scale": math.sqrt},
        )


class ApolloMini(Apollo):
    """APOLLO-Mini: `Apollo` with a sketch of rank 1 and one factor a matrix; the memory of SGD.

    Args:
        params: A model (the matrices inside its layers are projected), parameters, or groups.
        lr: Learning rate.
        refresh_every: Steps between random draws.
        scale: Factor of the update, 11.3; the root of what the authors' code calls so.
        weight_decay: Decoupled decay, after the update.
        variant: As in `Apollo`.
        common: See `scrimp.optim.named`.

    Memory:
        For a matrix (m, n): 2 max(m, n) + 2 numbers.

    References:
        APOLLO: SGD-like Memory, AdamW-level Performance, Zhu et al., MLSys 2025, arXiv 2412.05270.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-2,
        refresh_every: int = 200,
        scale: float = 128**0.5,
        weight_decay: float = 0.0,
        variant: Variant = "paper",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            rank=1,
            refresh_every=refresh_every,
            scale=scale,
            scale_type="tensor",
            scale_front=True,
            weight_decay=weight_decay,
            variant=variant,
            **common,
        )


def _apollo(
    gamma: float | None, scale_front: bool, hold: bool, variant: Variant, seed: int, options: Options
) -> Projected:
    check_channels(options)
    require("scale_type", options["scale_type"], ("channel", "tensor"))
    lift = ScaleGradient(options["scale"], options["scale_type"], gamma, scale_front)
    return Projected(_sketch(options, variant, seed, hold=hold), lift)


def _sketch(options: Options, variant: Variant, seed: int, *, hold: bool) -> Projector:
    """Return what the sketch is made with: a random matrix or singular vectors."""
    require("proj", options["proj"], ("random", "svd"))
    if options["proj"] == "svd":
        return singular_vectors(options, variant, seed)
    released = variant == "released"
    return Random(
        rank=options["rank"],
        every=options["refresh_every"],
        side=options["side"],
        seed=seed + released,  # the authors number parameters from 1
        hold=hold,
        released=released,
    )
