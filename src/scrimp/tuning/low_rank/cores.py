"""Adapters that train little more than a core between two frozen factors: LoRA-XS, LoRA-SB and SVFit.

    method      A (r, in)        B (out, r)    R, which trains        the model at the start
    lora-xs     S_r V_r^T of W   U_r of W      (r, r), about zero     as it was, to 1e-5
    lora-sb     V_r^T of D       U_r of D      (r, r), diag(S_r)/s    moved by D_r, D = -eta sign(G)
    svfit       V_r^T of W       U_r of W      (r,), zero             as it was

A factor that is frozen costs memory for itself, 4 bytes a number, and none for gradients, optimizer state
or the layer's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from scrimp.base.seeds import derive
from scrimp.tuning.deltas.delta import dense
from scrimp.tuning.deltas.low_rank import CoreShape, CoreStart, LowRankCore
from scrimp.tuning.deltas.parts import draw_normal
from scrimp.tuning.deltas.tuning import DeltaTuning
from scrimp.tuning.low_rank.gradient_start import GradientStart
from scrimp.tuning.low_rank.spectra import Triplets, leading_triplets
from scrimp.tuning.option_checks import check_choice, check_positive
from scrimp.tuning.targets import Place, check_rank

# The authors' arithmetic run: learning rate 1e-4 over the warm-up's 2 % of 50,000 samples in batches of 32.
ETA = 1e-4 / (0.02 * 50_000 / 32)


def LoraXS(
    *,
    rank: int = 64,
    alpha: float | None = None,
    std: float = 1e-5,
    targets: tuple[str, ...] = ("all-linear",),
    seed: int = 0,
) -> DeltaTuning:
    """LoRA-XS: an r x r matrix between the frozen singular vectors of the weight.

    W + s B R A with B = U_r, A = S_r V_r^T of W, which stays whole.

    Args:
        rank: r.
        alpha: s = alpha / r; None is r, so that s is 1.
        std: Of R's normal start.
        targets: Which layers.
        seed: Of R and of the decomposition's subspace.

    Memory:
        4 r (in + out) bytes of frozen factors and 16 r^2 of R (itself, gradient, AdamW's moments) a matrix;
        activations r a token.

    References:
        LoRA-XS, Balazy et al., arXiv 2405.17604; as the authors' and LoRA-SB's code has it.

    Raises:
        ScrimpError: An option is out of its range.
    """
    name = "lora-xs"
    alpha = rank if alpha is None else alpha
    check_positive(name, {"rank": rank, "alpha": alpha, "std": std})

    def core_start(place: Place, t: Triplets) -> CoreStart:
        core = torch.empty(rank, rank, device=t.s.device)
        if not core.is_meta:
            core.copy_(draw_normal(derive(seed, name, "R", place.number), (rank, rank), std=std))
        return CoreStart(t.s[:, None] * t.vt, t.u, core)

    make = _from_weights(name, rank, seed, core_start, scale=alpha / rank, shape="full")
    return DeltaTuning(name=name, make=make, targets=targets, settings={"scale": alpha / rank})


def LoraSB(
    *,
    rank: int = 96,
    alpha: float | None = None,
    eta: float = ETA,
    variant: Literal["paper", "released"] = "paper",
    passes: int = 1,
    targets: tuple[str, ...] = ("all-linear",),
    seed: int = 0,
) -> DeltaTuning:
    """LoRA-SB: LoRA-XS between the singular vectors of the first update that full tuning would make.

    D = -eta sign(G), about AdamW's first update; B = U_r, A = V_r^T and R = diag(S_r) / s of D. The model
    begins moved by D's best approximation of rank r. B and A are orthonormal, so the gradient of R is G's
    projection, and s = 1 needs no further scaling.

    The released code leaves the 1/s out, so that the model begins moved by s D_r, and sums G in bf16, where
    the sign of small elements is noise.

    Args:
        rank: r.
        alpha: s = alpha / r; None is r, so that s is 1.
        eta: The size of the first update: learning rate / (steps of warm-up), as the authors have it. The
            default is that of their arithmetic run.
        variant: "released" has R = diag(S_r), as the code; the same where s is 1.
        passes: Micro-batches in G (the authors': 50 sequences in all).
        targets: Which layers.
        seed: Of the decomposition's subspace.

    Memory:
        LoRA-XS's; at the start, one fp32 gradient at a time, or with several passes 4 bytes a weight of all
        targets on the host.

    References:
        Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
        Fine-Tuning, Ponkshe et al., arXiv 2411.19557.

    Raises:
        ScrimpError: An option is out of its range.
    """
    name = "lora-sb"
    alpha = rank if alpha is None else alpha
    check_positive(name, {"rank": rank, "alpha": alpha, "eta": eta, "passes": passes})
    check_choice(name, "variant", variant, ("paper", "released"))
    scale = alpha / rank
    divisor = scale if variant == "paper" else 1.0

    def make(places: Sequence[Place]) -> list[LowRankCore]:
        check_rank(places, rank, tune=name)
        return [LowRankCore(_nothing(place, rank), scale=scale) for place in places]

    def start(layer: str, number: int, gradient: Tensor) -> CoreStart:
        update = gradient.sign_().mul_(-eta)
        # A matrix of signs has a spectrum that hardly falls, so the subspace takes more iterations.
        found = leading_triplets(update, rank, seed=derive(seed, name, number), iterations=10)
        return CoreStart(found.vt, found.u, torch.diag(found.s) / divisor)

    return DeltaTuning(
        name=name,
        make=make,
        targets=targets,
        events=(GradientStart(start, passes),),
        settings={"scale": scale},
    )


def SVFit(*, rank: int = 128, targets: tuple[str, ...] = ("all-linear",), seed: int = 0) -> DeltaTuning:
    """SVFit: the leading singular values of the weight train, and nothing else.

    W + U_r diag(d) V_r^T, where d, zero at first, is what sigma changes by. It is the paper's U_r diag(sigma)
    V_r^T + W_rest, except that weight decay pulls sigma to where it began and not to zero, and that the base
    needs no residual.

    Args:
        rank: r; the paper takes as many as hold 99 % of the weight, which is most of them.
        targets: Which layers.
        seed: Of the decomposition's subspace.

    Memory:
        4 r (in + out) bytes of frozen factors and 16 r of singular values (with AdamW) a matrix; activations
        r a token.

    References:
        SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values, Sun et al.,
        arXiv 2409.05926.

    Raises:
        ScrimpError: An option is out of its range.
    """
    name = "svfit"
    check_positive(name, {"rank": rank})

    def core_start(place: Place, t: Triplets) -> CoreStart:
        return CoreStart(t.vt, t.u, torch.zeros_like(t.s))

    make = _from_weights(name, rank, seed, core_start, scale=1.0, shape="diagonal")
    return DeltaTuning(name=name, make=make, targets=targets)


def _from_weights(
    name: str,
    rank: int,
    seed: int,
    core_start: Callable[[Place, Triplets], CoreStart],
    *,
    scale: float,
    shape: CoreShape,
) -> Callable[[Sequence[Place]], list[LowRankCore]]:
    def make(places: Sequence[Place]) -> list[LowRankCore]:
        check_rank(places, rank, tune=name)
        return [
            LowRankCore(core_start(p, decomposed(p, rank, name, seed)), scale=scale, shape=shape)
            for p in places
        ]

    return make


def decomposed(place: Place, rank: int, name: str, seed: int) -> Triplets:
    """Return the leading singular triplets of a target's weight."""
    weight = place.module.weight
    plain = torch.empty(weight.shape, device="meta") if weight.is_meta else dense(weight)
    return leading_triplets(plain, rank, seed=derive(seed, name, "svd", place.number))


def _nothing(place: Place, rank: int) -> CoreStart:
    """Return zeros, until the gradient is known."""
    layer = place.module
    shapes = (rank, layer.in_features), (layer.out_features, rank), (rank, rank)
    return CoreStart(*(torch.zeros(shape, device=layer.weight.device) for shape in shapes))
