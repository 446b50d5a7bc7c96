"""Project the step back and drop the rest of the gradient (GaLore)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from scrimp.optim.pieces import Scalars, Slot, Step, Target, Update


@dataclass(frozen=True, slots=True)
class ProjectBack:
    """W -= size * scale * up(N).

    Nothing outside the subspace moves, and G itself is never read: micro-batches may be summed as R. The
    scale multiplies the update alone, not the weight decay.

    Attributes:
        scale: GaLore's alpha.

    References:
        GaLore, Zhao et al., ICML 2024, arXiv 2403.03507.
    """

    scale: float = 1.0

    @property
    def needs_gradient(self) -> bool:
        """It does with R."""
        return False

    def slots(self, target: Target) -> tuple[Slot, ...]:
        """Return nothing."""
        return ()

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
        """Return the step, scaled."""
        return Update(step.size * self.scale * step.direction, None, None, {})
