"""Learning-rate schedules: a multiple of the peak rate for every step.

With s the step (from 0), w the warm-up and n the steps of the run, the first w multiples are
(s + 1) / w, so that no step is wasted on a rate of zero. Afterwards, with p = (s - w) / (n - w):

    constant   1
    linear     1 - (1 - floor) p
    cosine     floor + (1 - floor) (1 + cos(pi p)) / 2
    wsd        1, and over the last `decay` steps linearly down to floor
"""

from __future__ import annotations

import math


def multiplier(name: str, step: int, *, steps: int, warmup: int, floor: float, decay: int) -> float:
    """Return the multiple of the peak learning rate at `step`.

    Args:
        name: `constant`, `linear`, `cosine` or `wsd`.
        step: From 0 to `steps` - 1.
        steps: Optimizer steps of the run.
        warmup: Steps of linear warm-up.
        floor: The multiple that the decaying schedules end at.
        decay: Steps of the decay of `wsd`.
    """
    if step < warmup:
        return (step + 1) / warmup
    if name == "constant":
        return 1.0
    if name == "wsd":
        into = step - (steps - decay)
        return 1.0 if into < 0 else 1.0 - (1.0 - floor) * (into + 1) / decay
    progress = (step - warmup) / max(1, steps - warmup)
    if name == "linear":
        return 1.0 - (1.0 - floor) * progress
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def in_steps(length: float, steps: int) -> int:
    """Turn a length, below 1 a share of the run and otherwise steps, into steps of the run."""
    return min(steps, round(length * steps if length < 1 else length))
