"""Learning-rate schedules: the rate of every step, as a multiple of a peak.

With s the step (from 0), w the warm-up and n the steps of the run, the first w multiples are
(s + 1) / w, so that no step is wasted on a rate of zero. Afterwards, with p = (s - w) / (n - w):

    constant   1
    linear     1 - (1 - floor) p
    cosine     floor + (1 - floor) (1 + cos(pi p)) / 2
    wsd        1, and over the last `decay` steps linearly down to floor
    power      as wsd, of a peak that falls with the tokens t seen: min(lr, batch * amplitude * t^exponent)

`power` (arXiv 2408.13359) needs no length until it decays, and with floor 1 it never does. During warm-up t
stands at the warm-up's end, so that the rate is continuous there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from scrimp.laws import power_lr

if TYPE_CHECKING:
    from scrimp.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the learning rate of a resolved recipe at `step` (from 0), which depends on nothing else."""
    peak, schedule = recipe.optimizer.lr, recipe.schedule
    assert isinstance(peak, float) and recipe.steps is not None
    warmup = int(schedule.warmup)
    if schedule.name == "power":
        assert recipe.batch is not None and recipe.seq is not None
        peak = power_lr(
            max(step + 1, warmup) * recipe.batch * recipe.seq,
            recipe.batch,
            cap=peak,
            amplitude=schedule.amplitude,
            exponent=schedule.exponent,
        )
    return peak * multiplier(
        schedule.name,
        step,
        steps=recipe.steps,
        warmup=warmup,
        floor=schedule.floor,
        decay=int(schedule.decay),
    )


def multiplier(name: str, step: int, *, steps: int, warmup: int, floor: float, decay: int) -> float:
    """Return the multiple of the peak learning rate at `step`.

    Args:
        name: `constant`, `linear`, `cosine`, `wsd` or `power`.
        step: From 0 to `steps` - 1.
        steps: Optimizer steps of the run.
        warmup: Steps of linear warm-up.
        floor: The multiple that the decaying schedules end at.
        decay: Steps of the decay of `wsd` and `power`.
    """
    if step < warmup:
        return (step + 1) / warmup
    if name == "constant":
        return 1.0
    if name in ("wsd", "power"):
        into = step - (steps - decay)
        return 1.0 if into < 0 else 1.0 - (1.0 - floor) * (into + 1) / decay
    progress = (step - warmup) / max(1, steps - warmup)
    if name == "linear":
        return 1.0 - (1.0 - floor) * progress
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def in_steps(length: float, steps: int) -> int:
    """Turn a length, below 1 a share of the run and otherwise steps, into steps of the run."""
    return min(steps, round(length * steps if length < 1 else length))
