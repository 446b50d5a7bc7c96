"""Project the step back and add the rest of the gradient, scaled as the rule scaled its part (Fira).

    phi = ||N_i|| / (||R_i|| + 1e-8)                         for each channel i
    paper       S = phi * (G - up(R)),           W -= size * scale * (up(N) + S / q)
    released    S = phi * (G - scale * up(R)),   W -= size * (scale * up(N) + S / q)

with the norm-growth limiter's q (`norms`). In the released code the projection back includes the scale, so
that S is not multiplied by it and keeps 1 - scale of the gradient inside the subspace: at scale 1/4 its
updates are almost four times as long as the paper's. The published figures are the released code's. Both are
the same at scale 1.

Two products with the basis instead of three: phi scales along the axis that the projection keeps, hence
commutes with `up`, and with a the share of up(R) that is taken out of G,

    a up(N) + S / q = up(a (N - phi / q * R)) + phi / q * G                  released, a = scale
    ||S||^2 = sum_i phi_i^2 (||G_i||^2 - (2 a - a^2) ||R_i||^2)              for an orthonormal basis

so the residual itself is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scrimp.optim.lifts.norms import (
    channel_norms,
    limit_growth,
    limiter_slots,
    norm_ratio,
    wide,
)
from scrimp.optim.pieces import Scalars, Slot, Step, Target, Update


@dataclass(frozen=True, slots=True)
class ScaledResidual:
    """Fira's lift.

    Attributes:
        scale: Factor of the update.
        gamma: The largest growth of the residual's norm in a step; None does not limit it.
        variant: What the scale multiplies, as above.
        orthonormal: Whether the basis is; False measures the residual's norm on the residual itself, which
            takes a third product. In float32 the shorter way differs from it by rounding (6e-7). In float64
            that product is always taken: the released basis is orthonormal in float32 only.

    References:
        Fira, Chen et al., NeurIPS 2025, arXiv 2410.01623.
    """

    scale: float = 1.0
    gamma: float | None = 1.01
    variant: Literal["paper", "released"] = "released"
    orthonormal: bool = True

    @property
    def needs_gradient(self) -> bool:
        """The residual is part of G."""
        return True

    def slots(self, target: Target) -> tuple[Slot, ...]:
        """Return the last residual's norm."""
        return limiter_slots(target, self.gamma)

    def prepare(self, g: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
        """Return `g`."""
        return g

    def update(
        self,
        g: Tensor,
        r: Tensor,
        step: Step,
        up: Callable[[Tensor], Tensor],
        slots: Mapping[str, Tensor],
        s: Scalars,
    ) -> Update:
        """Return the step and the scaled residual, as a factor of G and a correction in the subspace."""
        phi, kept = limit_growth(
            norm_ratio(step.direction, r), self._residual_norms(g, r, up), slots, self.gamma
        )
        small = step.size * self.scale * (step.direction - phi * r)
        weight = self.scale if self.variant == "paper" else 1.0
        return Update(small, step.size * weight * phi, None, kept)

    def _residual_norms(self, g: Tensor, r: Tensor, up: Callable[[Tensor], Tensor]) -> Tensor:
        """Return each channel's ||G - a up(R)||, (..., k, 1)."""
        taken = self.scale if self.variant == "released" else 1.0
        if not self.orthonormal or g.dtype == torch.float64:
            return channel_norms(g.to(wide(g.dtype)) - taken * up(r))
        inside = (2 * taken - taken**2) * channel_norms(r).square()
        return (channel_norms(g).square() - inside).clamp(min=0).sqrt()
