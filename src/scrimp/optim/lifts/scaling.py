"""Scale the raw gradient by how much the rule scaled its sketch (APOLLO, APOLLO-Mini).

    phi = ||N_i|| / (||R_i|| + 1e-8)    for each channel, or ||N|| / (||R|| + 1e-8) for the matrix
    U = phi * G,  limited in growth (`norms`),    W -= size * scale * U

The subspace serves to estimate learning rates; nothing is projected back, and W has no momentum. The
authors' code takes the root of what it is given: their `scale=128` is a factor of 11.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from scrimp.optim.lifts.norms import (
    channel_norms,
    limit_growth,
    limiter_slots,
    matrix_ratio,
    norm_ratio,
)
from scrimp.optim.pieces import Scalars, Slot, Step, Target, Update


@dataclass(frozen=True, slots=True)
class ScaleGradient:
    """APOLLO's lift.

    Attributes:
        scale: Factor of the update, alpha.
        per: One factor a channel, or one a tensor (Mini).
        gamma: The largest growth of the update's norm in a step; None does not limit it.
        front: Whether the scale acts before the limiter. For a constant scale this is the same but for
            rounding, as the limiter is a ratio.

    References:
        APOLLO, Zhu et al., MLSys 2025, arXiv 2412.05270.
    """

    scale: float = 1.0
    per: Literal["channel", "tensor"] = "channel"
    gamma: float | None = 1.01
    front: bool = False

    @property
    def needs_gradient(self) -> bool:
        """It is G that is scaled."""
        return True

    def slots(self, target: Target) -> tuple[Slot, ...]:
        """Return the last update's norm."""
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
        """Return the factor of G."""
        ratio = norm_ratio if self.per == "channel" else matrix_ratio
        before, after = (self.scale, 1.0) if self.front else (1.0, self.scale)
        phi, kept = limit_growth(before * ratio(step.direction, r), channel_norms(g), slots, self.gamma)
        return Update(None, step.size * after * phi, None, kept)
