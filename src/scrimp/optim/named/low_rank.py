"""Low-rank methods that do more with the gradient than to project the step back.

    Fira          the rest of the gradient, scaled as the rule scaled its part        lifts.residual
    FRUGAL        the sign of the rest                                                lifts.sign
    DCT-AdamW     the rest waits for the next step, if it is kept                     lifts.feedback

`variant` says whether the paper's algorithm runs or what its authors released; parameters that are not
projected get the same Adam, whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, Unpack, get_args

from scrimp.optim.lifts.back import ProjectBack
from scrimp.optim.lifts.feedback import ErrorFeedback
from scrimp.optim.lifts.residual import ScaledResidual
from scrimp.optim.lifts.sign import SignResidual
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
from scrimp.optim.pieces import Lift, Options, Projector
from scrimp.optim.projectors.blocks import Blocks, Order
from scrimp.optim.projectors.coordinates import Coordinates
from scrimp.optim.projectors.dct import Cosine
from scrimp.optim.projectors.orientation import require
from scrimp.optim.projectors.random import Random
from scrimp.optim.projectors.svd import SingularVectors
from scrimp.optim.rules.adam import Adam

Part = Literal["blocks", "columns", "rows", "elements", "svd", "random"]


class Fira(LowRank):
    """Fira: GaLore, and the rest of the gradient scaled channel by channel.

    Args:
        params: A model (the matrices inside its layers are projected), parameters, or groups.
        lr: Learning rate.
        rank: Of the subspace; None projects only groups that name theirs.
        refresh_every: Steps between choices of the subspace.
        scale: Factor of the update, alpha; released, of its projected part alone.
        side: Which side is shortened: "std" the smaller, "reverse_std", "left" or "right".
        gamma: The largest growth of the rest's norm in a step; None does not limit it.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment, before the bias correction.
        weight_decay: Decoupled decay, after the update.
        variant: What the scale multiplies, and how the subspace is found (see `GaLore`).
        common: See `scrimp.optim.named`.

    Memory:
        For a matrix (m, n): min(m, n) r + 2 max(m, n) r + 1 numbers.

    Raises:
        ScrimpError: `side` is "full", which keeps no channel of the gradient.

    References:
        Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?, Chen et al., NeurIPS 2025,
        arXiv 2410.01623.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-2,
        rank: int | None = 128,
        refresh_every: int = 200,
        scale: float = 0.25,
        side: str = "std",
        gamma: float | None = 1.01,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        variant: Variant = "released",
        **common: Unpack[Common],
    ) -> None:
        check_variant(variant)
        project = functools.partial(_fira, gamma, variant, common.get("seed", 0))
        options = adam_options(lr, betas, eps, weight_decay)
        projected = {"rank": rank, "refresh_every": refresh_every, "scale": scale, "side": side}
        super().__init__(
            params,
            Adam(convention="hf"),
            project,
            options,
            projected,
            common,
        )


class Frugal(LowRank):
    """FRUGAL: Adam on a part of the gradient, sign-SGD without state on the rest.

    Moments and bias correction begin anew with each choice of the part.

    Args:
        params: As in `Fira`.
        lr: Learning rate.
        density: The part that keeps state, rho; None projects only groups that name theirs.
        refresh_every: Steps between choices of the part.
        scale: Factor of the update of projected matrices (the authors' `proj_params_lr_scale`).
        projector: What the part consists of: "blocks" are whole matrices, what the scripts call frugal;
            "columns", "rows" or "elements" of each; its leading singular vectors ("svd"), or "random"
            directions at right angles, as many as are that part of its smaller side, at least one.
        order: In which blocks take turns: "random", "ascending", "descending" or "mirror".
        residual: What the rest gets: its "sign", itself ("sgd") or "none".
        residual_scale: Further factor of the rest's update (`inactive_lr_scale`); 0.1 for fine-tuning.
        betas: Decay rates of the two moments.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decoupled decay; the authors' class has 0.01, their scripts 0.
        common: See `scrimp.optim.named`.

    Memory:
        For a matrix (m, n): density 2 m n numbers on average, none in blocks that sleep; "svd" keeps its
        vectors besides.

    References:
        FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training, Zmushko et
        al., ICML 2025, arXiv 2411.07837.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        density: float | None = 0.25,
        refresh_every: int = 200,
        scale: float = 1.0,
        projector: Part = "blocks",
        order: Order = "random",
        residual: Literal["sign", "sgd", "none"] = "sign",
        residual_scale: float = 1.0,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        require("projector", projector, get_args(Part))
        require("residual", residual, ("sign", "sgd", "none"))

        seed = common.get("seed", 0)
        lift: Callable[[float], Lift] = ProjectBack
        if residual != "none":
            lift = functools.partial(SignResidual, residual_scale=residual_scale, residual=residual)
        project = functools.partial(_frugal, projector, order, seed, lift)
        options = adam_options(lr, betas, eps, weight_decay)
        projected = {"density": density, "refresh_every": refresh_every, "scale": scale}
        super().__init__(
            params,
            Adam(),
            project,
            options,
            projected,
            common,
        )


class DCTAdamW(LowRank):
    """DCT-AdamW: AdamW in those columns of a fixed cosine basis that fit the gradient best.

    Args:
        params: As in `Fira`.
        lr: Learning rate.
        rank: How many columns.
        refresh_every: Steps between choices.
        scale: Factor of the projected update.
        side: Which side is shortened.
        rotate: Lets the moments follow their columns; else place i of the old choice becomes place i of the
            new one.
        error_feedback: Keeps what was not projected for the next step: m n numbers more.
        betas: Decay rates of the two moments.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decoupled decay, before the update.
        common: See `scrimp.optim.named`.

    Memory:
        For a matrix (m, n): 2 max(m, n) r numbers and r indices; one basis for each smaller side.

    References:
        SVD-free low-rank adaptive gradient optimization for large language models, Modoranu et al., ICLR
        2026, arXiv 2505.17967.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        rank: int | None = 128,
        refresh_every: int = 1,
        scale: float = 1.0,
        side: str = "std",
        rotate: bool = True,
        error_feedback: bool = False,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **common: Unpack[Common],
    ) -> None:
        basis = functools.partial(Cosine, on_refresh="rotate" if rotate else "keep")
        project = functools.partial(_dct, basis, ErrorFeedback if error_feedback else ProjectBack)
        options = adam_options(lr, betas, eps, weight_decay)
        projected = {"rank": rank, "refresh_every": refresh_every, "scale": scale, "side": side}
        super().__init__(
            params,
            Adam(),
            project,
            options,
            projected,
            common,
        )


def _fira(gamma: float | None, variant: Variant, seed: int, options: Options) -> Projected:
    check_channels(options)
    lift = ScaledResidual(options["scale"], gamma, variant)
    return Projected(singular_vectors(options, variant, seed), lift)


def _frugal(
    kind: Part, order: Order, seed: int, lift: Callable[[float], Lift], options: Options
) -> Projected:
    density, every = options["density"], options["refresh_every"]
    part: Projector
    match kind:
        case "blocks":
            part = Blocks(density=density, order=order, every=every, seed=seed)
        case "svd":
            part = SingularVectors(rank=float(density), every=every, seed=seed, on_refresh="reset")
        case "random":
            rank = float(density)
            part = Random(rank=rank, every=every, seed=seed, orthonormal=True, on_refresh="reset")
        case "columns" | "rows" | "elements":
            part = Coordinates(density=density, kind=kind, every=every, seed=seed)
    return Projected(part, lift(options["scale"]))


def _dct(basis: Callable[..., Projector], lift: Callable[[float], Lift], options: Options) -> Projected:
    columns = basis(rank=options["rank"], every=options["refresh_every"], side=options["side"])
    return Projected(columns, lift(options["scale"]))
