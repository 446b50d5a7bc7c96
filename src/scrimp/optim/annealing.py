"""The fall of decay rates along a half cosine, as Stable-SPAM has it for runs of known length."""

from __future__ import annotations

import math

FLOOR = 0.5  # the authors' eta_min


def annealed(rate: float, step: int, total: int | None) -> float:
    """Return a decay rate at the 1-based `step`: half of itself from `total` on; whole where that is None."""
    if total is None:
        return rate
    fall = 0.5 * (1 + math.cos(math.pi * min(step / (total + 1), 1.0)))
    return rate * (FLOOR + (1 - FLOOR) * fall)
