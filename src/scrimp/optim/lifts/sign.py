"""Project the step back and move the rest without state: by its sign, or by itself (FRUGAL).

    E = G - up(R)        W -= scale * (size * up(N) + lr * residual_scale * sign(E))

With singular vectors E is dense and every coordinate gets +-lr on top of the step; with rows, columns or
elements it is exactly zero where the state is (sign(0) = 0), so that exactly the rest moves. E is formed in
float32 at least: in bfloat16 it would be mostly round-off inside the subspace, which its sign blows up to
steps of full size. The rest goes by the plain learning rate, the projected part by the rule's step size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from scrimp.optim.lifts.norms import wide
from scrimp.optim.pieces import Scalars, Slot, Step, Target, Update


@dataclass(frozen=True, slots=True)
class SignResidual:
    """FRUGAL's lift.

    Attributes:
        scale: Factor of the whole update.
        residual_scale: Further factor of the rest's.
        residual: "sign" for sign-SGD on the rest, "sgd" for SGD.

    References:
        FRUGAL, Zmushko et al., ICML 2025, arXiv 2411.07837.
    """

    scale: float = 1.0
    residual_scale: float = 1.0
    residual: Literal["sign", "sgd"] = "sign"

    @property
    def needs_gradient(self) -> bool:
        """The residual is part of G."""
        return True

    def slots(self, target: Target) -> tuple[Slot, ...]:
        """Return nothing."""
        return ()

    def prepare(self, g: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
        """Return `g`, wide enough for a residual of which only the sign is used."""
        return g.to(wide(g.dtype)) if self.residual == "sign" else g

    def update(
        self,
        g: Tensor,
        r: Tensor,
        step: Step,
        up: Callable[[Tensor], Tensor],
        slots: Mapping[str, Tensor],
        s: Scalars,
    ) -> Update:
        """Return the step, and the rest's."""
        rate = s["lr"] * (self.scale * self.residual_scale)
        small = step.size * self.scale * step.direction
        if self.residual == "sgd":
            # lr E = lr G - up(lr R): linear, so the residual need not be formed.
            return Update(small - rate * r, rate, None, {})
        return Update(small, None, rate * (g - up(r)).sign(), {})
