"""Project the step back and keep what the subspace missed for the next step (error feedback).

    A = G + E        R = down(A)        E <- A - take * up(R)        W -= size * scale * up(N)

`take=1` is the error feedback of DCT-AdamW: what was projected is spent, the rest waits. `take=1 - mu` makes
E the momentum M of Dion and Trion: M += G, and mu of what was projected stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from scrimp.optim.pieces import Scalars, Slot, Step, Target, Update


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """`ProjectBack` with a memory of full size: mn numbers, in the rule's store.

    Attributes:
        scale: Factor of the update.
        take: The share of the projected part that is spent in a step.

    References:
        FFT-based low-rank optimizers (DCT-AdamW, Trion), arXiv 2505.17967.
        Dion, Ahn et al., 2025, arXiv 2504.05295.
    """

    scale: float = 1.0
    take: float = 1.0

    @property
    def needs_gradient(self) -> bool:
        """What is kept is part of G."""
        return True

    def slots(self, target: Target) -> tuple[Slot, ...]:
        """Return what was not spent yet, shaped like the gradient."""
        return (Slot(name="error", shape=target.shape),)

    def prepare(self, g: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
        """Return the gradient and what was kept."""
        return g + slots["error"]

    def update(
        self,
        g: Tensor,
        r: Tensor,
        step: Step,
        up: Callable[[Tensor], Tensor],
        slots: Mapping[str, Tensor],
        s: Scalars,
    ) -> Update:
        """Return the step, scaled, and what is kept of `g`."""
        return Update(step.size * self.scale * step.direction, None, None, {"error": g - self.take * up(r)})
