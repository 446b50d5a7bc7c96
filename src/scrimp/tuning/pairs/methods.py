"""LoRA with its gradients changed before the optimizer sees them.

What they save, merge and hold in memory is LoRA's, with what each says of itself. The optimizer is the
recipe's; clipping is by the norm of the gradients before they are changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import Adapter
from scrimp.tuning.from_peft.lora import LoRA
from scrimp.tuning.option_checks import check_choice
from scrimp.tuning.pairs.pairs import Paired, PairTransform
from scrimp.tuning.pairs.transforms import Alternating, Equivalent, EquivalentAdam, Preconditioned, RateRatio
from scrimp.tuning.targets import ALL_LINEAR

Targets = tuple[str, ...]
EVERY: Targets = (ALL_LINEAR,)


def LoraPro(
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Targets = EVERY,
    variant: Literal["efficient", "full"] = "efficient",
    damping: float = 1e-6,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    seed: int = 0,
    inner: Callable[..., Adapter] = LoRA,
) -> Paired:
    """LoRA whose gradients move W as close to its own gradient as the rank allows.

        s B g^A + s g^B A  =  P_B G + (I - P_B) G P_A

    Args:
        rank: r.
        alpha: The scale s is alpha / r.
        dropout: Of the inputs of A.
        targets: Which linear layers.
        variant: "efficient" hands the gradients to the recipe's optimizer. "full", with which the paper's
            results were computed, runs Adam on the change of W itself, and wants SGD without momentum after.
        damping: Added to the Gram matrices, relative to their mean eigenvalue.
        betas: Of the full variant's moments.
        eps: Of the full variant.
        seed: Of A.
        inner: Makes what injects the pairs.

    Memory:
        LoRA's; "full" 8 bytes an element of every target more, as much as AdamW on all of it.

    Oddities:
        The released code takes s = 2 whatever the layer has, counts Adam's steps from 2, and keeps second
        moments in bfloat16 after the first step.

    References:
        LoRA-Pro: Are Low-Rank Adapters Properly Optimized?, Wang et al., ICLR 2025, arXiv 2407.18242.
    """
    name = "lora-pro"
    _check_damping(name, damping)
    check_choice(name, "variant", variant, ("efficient", "full"))
    transform: PairTransform = Equivalent(damping=damping)
    if variant == "full":
        _check_adam(name, betas, eps)
        transform = EquivalentAdam(damping=damping, betas=betas, eps=eps, name=name)
    return Paired(
        inner(rank=rank, alpha=alpha, dropout=dropout, targets=targets, seed=seed), transform, name=name
    )


def AltLora(
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.05,
    targets: Targets = EVERY,
    mode: Literal["alternate", "joint"] = "alternate",
    plus: bool = True,
    damping: float = 1e-5,
    seed: int = 0,
    inner: Callable[..., Adapter] = LoRA,
) -> Paired:
    """LoRA by turns: each factor takes the least-squares projection of G on the other, and so does momentum.

        B-step (even)  B <- B - lr g_B (A A^T)^-1 / s^2         s g^B A = G P_A
        A-step (odd)   A <- A - lr (B^T B)^-1 g_A / s^2         s B g^A = P_B G

    With AdamW this is AltLoRA+; with SGD with momentum, and `plus` false, AltLoRA (torch's momentum is a sum:
    its learning rate is 1 - momentum times the paper's, whose bias correction is left out).

    Args:
        rank: r.
        alpha: The scale s is alpha / r.
        dropout: Of the inputs of A.
        targets: Which linear layers.
        mode: "alternate" as the paper has it; "joint" trains both factors at every step from one backward
            pass, as the released code does.
        plus: Whether the optimizer is to keep second moments; a mistake is refused at the first step.
        damping: Added to the Gram matrices, relative to their mean eigenvalue (the paper's is absolute).
        seed: Of A.
        inner: Makes what injects the pairs.

    Memory:
        LoRA's, less one factor's gradient; in B-steps the inputs of the layers are not kept. During an update
        a copy of what it changes. (The paper keeps the last A and B; here momentum moves after the step.)

    Oddities:
        The released code ignores the schedule of the learning rate, leaves 1 / s^2 out, and stores AltLoRA+'s
        momentum in the old subspace. In its joint form B's projection is by the new A, here by the A at which
        the gradient was taken.

    References:
        AltLoRA: Towards Better Gradient Approximation in Low-Rank Adaptation with Alternating Projections,
        Yu et al., 2025, arXiv 2505.12455.
    """
    name = "altlora"
    _check_damping(name, damping)
    check_choice(name, "mode", mode, ("alternate", "joint"))
    transform = Alternating(damping=damping, mode=mode, plus=plus, name=name)
    return Paired(
        inner(rank=rank, alpha=alpha, dropout=dropout, targets=targets, seed=seed), transform, name=name
    )


def LoraFA(
    *,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: Targets = EVERY,
    damping: float = 1e-6,
    seed: int = 0,
    inner: Callable[..., Adapter] = LoRA,
) -> Paired:
    """LoRA whose A stays as it was drawn: B takes the projection of G on A's rows.

        g^B = g_B (A A^T)^-1 / s^2          s g^B A = G P_A

    Args:
        rank: r.
        alpha: The scale s is alpha / r.
        dropout: Of the inputs of A.
        targets: Which linear layers.
        damping: Added to A A^T, relative to its mean eigenvalue.
        seed: Of A.
        inner: Makes what injects the pairs.

    Memory:
        Gradients and optimizer state of B alone; of a layer's input only x A^T is kept.

    Oddities:
        peft's `create_lorafa_optimizer` multiplies by the inverse in bfloat16 wherever that exists.

    References:
        LoRA-FA, Zhang et al., 2023, arXiv 2308.03303.
    """
    name = "lora-fa"
    _check_damping(name, damping)
    transform = Preconditioned(damping=damping, trained="b")
    return Paired(
        inner(rank=rank, alpha=alpha, dropout=dropout, targets=targets, seed=seed), transform, name=name
    )


def LoraPlus(
    *,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: Targets = EVERY,
    ratio: float = 16.0,
    seed: int = 0,
    inner: Callable[..., Adapter] = LoRA,
) -> Paired:
    """LoRA whose B learns `ratio` times as fast as A.

    Args:
        rank: r.
        alpha: The scale s is alpha / r.
        dropout: Of the inputs of A.
        targets: Which linear layers.
        ratio: B's learning rate over A's, which is the recipe's: a rate half of LoRA's suits.
        seed: Of A.
        inner: Makes what injects the pairs.

    Memory:
        LoRA's.

    References:
        LoRA+: Efficient Low Rank Adaptation of Large Models, Hayou et al., ICML 2024, arXiv 2402.12354.
    """
    name = "lora-plus"
    if not 0 < ratio < math.inf:
        raise ScrimpError(f"tune {name}: ratio {ratio!r} must be above 0: B's learning rate over A's")
    return Paired(
        inner(rank=rank, alpha=alpha, dropout=dropout, targets=targets, seed=seed),
        RateRatio(ratio=ratio),
        name=name,
    )


def Riemannian(
    *,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: Targets = EVERY,
    damping: float = 1e-2,
    seed: int = 0,
    inner: Callable[..., Adapter] = LoRA,
) -> Paired:
    """LoRA by gradients in the metric of the product B A, which do not depend on how it is factored.

        g_A <- (B^T B + d I)^-1 g_A          g_B <- g_B (A A^T + d I)^-1

    Args:
        rank: r.
        alpha: The scale s is alpha / r; unlike AltLoRA's, the gradients are not divided by its square.
        dropout: Of the inputs of A.
        targets: Which linear layers.
        damping: d, above 0: B begins at zero. The default is peft's.
        seed: Of A.
        inner: Makes what injects the pairs.

    Memory:
        LoRA's.

    References:
        Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, Zhang and Pilanci, ICML 2024,
        arXiv 2402.02347.
    """
    name = "riemannian-lora"
    _check_damping(name, damping)
    if damping == 0:
        raise ScrimpError(f"tune {name}: damping 0 cannot be: B begins at zero; use 1e-6 or more")
    return Paired(
        inner(rank=rank, alpha=alpha, dropout=dropout, targets=targets, seed=seed),
        Preconditioned(damping=damping, form="scaled"),
        name=name,
    )


def _check_damping(name: str, damping: float) -> None:
    if not 0 <= damping < math.inf:
        raise ScrimpError(f"tune {name}: damping {damping!r} must be a finite number of at least 0")


def _check_adam(name: str, betas: tuple[float, float], eps: float) -> None:
    if not all(0 <= beta < 1 for beta in betas) or not eps >= 0:
        raise ScrimpError(f"tune {name}: betas {betas!r} must be in [0, 1) and eps {eps!r} at least 0")
