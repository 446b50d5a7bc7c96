"""GaLore and its kin: Adam in a subspace of the gradient, and the step projected back.

    R = project(G)        N, size = Adam(R)        W -= size * scale * back(N)

`variant="released"` is what produced the published figures: an exact SVD in float32 with the signs that come
out of it. `variant="paper"` finds the same subspace by a seeded range finder, several times faster, and turns
each vector towards its predecessor, so that the moments keep their meaning. Parameters that are not projected
get the same Adam without a scale.
"""

from __future__ import annotations

import functools
from typing import Any, Unpack

from scrimp.optim.conditioners.natural_gradient import NaturalGradient
from scrimp.optim.lifts.back import ProjectBack
from scrimp.optim.named.common import Betas, Common
from scrimp.optim.named.subspace import (
    LowRank,
    Projected,
    Variant,
    adam_options,
    check_variant,
    singular_vectors,
)
from scrimp.optim.pieces import Options
from scrimp.optim.projectors.refresh import Lazy
from scrimp.optim.rules.adam import Adam
from scrimp.optim.stores.int_groups import Group4


class GaLore(LowRank):
    """GaLore: Adam in the leading singular subspace of the gradient.

    Args:
        params: A model (the matrices inside its layers are projected), parameters, or groups.
        lr: Learning rate.
        rank: Of the subspace; None projects only groups that name theirs.
        refresh_every: Steps between choices of the subspace.
        scale: Factor of the projected update, alpha.
        side: Which side is shortened: "std" the smaller, "reverse_std", "left", "right", or "full" for both.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment, before the bias correction.
        weight_decay: Decoupled decay, after the update.
        variant: How the subspace is found, as above.
        common: See `scrimp.optim.named`.

    Memory:
        For a matrix (m, n): min(m, n) r + 2 max(m, n) r numbers.

    References:
        GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, Zhao et al., ICML 2024,
        arXiv 2403.03507.
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
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        variant: Variant = "released",
        **common: Unpack[Common],
    ) -> None:
        check_variant(variant)
        project = functools.partial(_galore, variant, common.get("seed", 0))
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


class GaLore8bit(LowRank):
    """8-bit GaLore: GaLore with block-wise quantised moments, over bitsandbytes' form of Adam (torch's).

    The basis is not quantised. The authors' class has a default weight decay of 0.01, their scripts 0; it
    decays before the update here, after it in their projected groups.

    Args:
        params: As in `GaLore`.
        lr: Learning rate.
        rank: Of the subspace.
        refresh_every: Steps between choices of the subspace.
        scale: Factor of the projected update.
        side: Which side is shortened.
        betas: Decay rates of the two moments.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decoupled decay.
        variant: How the subspace is found.
        common: See `scrimp.optim.named`.

    Memory:
        For a matrix (m, n): 4 min(m, n) r + 2.03 max(m, n) r bytes.

    References:
        GaLore, Zhao et al., ICML 2024, arXiv 2403.03507, section 4.3.
    """

    own_store = "8bit"

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-2,
        rank: int | None = 128,
        refresh_every: int = 200,
        scale: float = 0.25,
        side: str = "std",
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        variant: Variant = "released",
        **common: Unpack[Common],
    ) -> None:
        check_variant(variant)
        project = functools.partial(_galore, variant, common.get("seed", 0))
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


class QGaLore(LowRank):
    """Q-GaLore's optimizer half: 8-bit GaLore with a 4-bit basis that is chosen anew lazily.

    Its other half are int8 weights with stochastic rounding (`scrimp.weights`). The period of a matrix
    doubles where the first singular vector of the last five refreshes has stayed put. The released code
    compares it with its sign, which is arbitrary, and clamps the zero of the 4-bit code (`variant="paper"`
    does neither).

    Args:
        params: As in `GaLore`.
        lr: Learning rate.
        rank: Of the subspace.
        refresh_every: Steps between choices of the subspace at first.
        scale: Factor of the projected update.
        threshold: The mean cosine from which the period doubles; above 1 never.
        betas: Decay rates of the two moments, those of the authors' scripts.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decoupled decay.
        variant: As above, and how the subspace is found.
        common: See `scrimp.optim.named`.

    Memory:
        For a matrix (m, n): 0.53 min(m, n) r + 2.03 max(m, n) r bytes.

    References:
        Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients, Zhang et al.,
        2024, arXiv 2407.08296.
    """

    own_store = "8bit"

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-2,
        rank: int | None = 128,
        refresh_every: int = 200,
        scale: float = 0.25,
        threshold: float = 0.4,
        betas: Betas = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        variant: Variant = "released",
        **common: Unpack[Common],
    ) -> None:
        check_variant(variant)
        project = functools.partial(_q_galore, threshold, variant, common.get("seed", 0))
        options = adam_options(lr, betas, eps, weight_decay)
        projected = {"rank": rank, "refresh_every": refresh_every, "scale": scale}
        super().__init__(
            params,
            Adam(),
            project,
            options,
            projected,
            common,
        )


class NaturalGaLore(LowRank):
    """Natural GaLore: GaLore on the natural gradient of the subspace.

    Args:
        params: As in `GaLore`.
        lr: Learning rate.
        rank: Of the subspace; on both sides in the released form.
        refresh_every: Steps between choices of the subspace.
        scale: Factor of the projected update.
        history: How many projected gradients the Fisher matrix is estimated from.
        damping: Its lambda.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment, before the bias correction.
        weight_decay: Decoupled decay, after the update.
        variant: "paper" projects one side, "released" both (a Tucker form, which keeps the history small).
        common: See `scrimp.optim.named`.

    Memory:
        For a matrix (m, n), numbers: released (m + n) r + (2 + history) r^2; paper min(m, n) r +
        (2 + history) max(m, n) r, eleven times GaLore's moments (the paper's table leaves the history out).

    References:
        Natural GaLore: Accelerating GaLore for Memory-Efficient LLM Training and Fine-Tuning, Das, 2024,
        arXiv 2410.16029.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-2,
        rank: int | None = 128,
        refresh_every: int = 200,
        scale: float = 0.25,
        history: int = 20,
        damping: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        variant: Variant = "released",
        **common: Unpack[Common],
    ) -> None:
        check_variant(variant)
        fisher = NaturalGradient(history=history, damping=damping)
        project = functools.partial(_natural_galore, fisher, variant, common.get("seed", 0))
        options = adam_options(lr, betas, eps, weight_decay)
        projected = {"rank": rank, "refresh_every": refresh_every, "scale": scale}
        super().__init__(
            params,
            Adam(convention="hf"),
            project,
            options,
            projected,
            common,
        )


def _galore(variant: Variant, seed: int, options: Options) -> Projected:
    return Projected(singular_vectors(options, variant, seed), ProjectBack(options["scale"]))


def _q_galore(threshold: float, variant: Variant, seed: int, options: Options) -> Projected:
    released = variant == "released"
    lazy = Lazy(threshold=threshold, signed=released)
    basis = singular_vectors({**options, "side": "std"}, variant, seed, lazy)
    return Projected(basis, ProjectBack(options["scale"]), basis_store=Group4(released=released))


def _natural_galore(fisher: NaturalGradient, variant: Variant, seed: int, options: Options) -> Projected:
    side = "full" if variant == "released" else "std"
    return _galore(variant, seed, {**options, "side": side})._replace(conditioner=fisher)
