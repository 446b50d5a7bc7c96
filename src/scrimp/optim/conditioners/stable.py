"""Stable-SPAM: clip by a tracked maximum, then steady the gradient's norm.

    M = theta M + (1 - theta) max|G|      where |G| > L = M / (1 - theta^t):  G = G L / max|G|
    n = ||G||,  a = gamma1 a + (1 - gamma1) n,  b = gamma2 b + (1 - gamma2) n^2        (Adam on the norm)
    G = G / n * (a / (1 - gamma1^t)) / (sqrt(b / (1 - gamma2^t)) + eps)

A zero gradient keeps its zero. t counts all updates here. In the released code a reset of the moments sets
it back to 1 although M, a and b go on, so that M / (1 - theta^t) is far too large (500 times, two updates
after): spikes pass for hundreds of updates after every reset. "released" counts that way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scrimp.optim.annealing import annealed
from scrimp.optim.conditioners.matrices import matrices
from scrimp.optim.pieces import Options, Scalars, Slot, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class StableClip:
    """Stable-SPAM's two normalisations, for any rule; 12 bytes a matrix in fp32.

    Attributes:
        gammas: Decay rates of the norm's two moments.
        theta: Decay rate of the tracked maximum.
        every: Updates between resets of the moments, as in `Reset`; only "released" reads it.
        variant: "paper" counts all updates, "released" those since the last reset.
        anneal_steps: Updates over which gamma1 falls to its half; None keeps it.

    References:
        Stable-SPAM, Huang et al., 2025, arXiv 2502.17055.
    """

    gammas: tuple[float, float] = (0.7, 0.9)
    theta: float = 0.999
    every: int = 1000
    variant: Literal["paper", "released"] = "paper"
    anneal_steps: int | None = None

    @property
    def elementwise(self) -> bool:
        """A matrix is treated as one."""
        return False

    def slots(self, shape: tuple[int, ...], target: Target) -> tuple[Slot, ...]:
        """Return the maximum and the norm's moments, (matrices, 1)."""
        own = (matrices(shape, target), 1)
        names = ("max_avg", "norm_avg", "norm_avg_sq")
        return tuple(Slot(name=name, shape=own, signed=False, exact=True) for name in names)

    def scalars(self, options: Options, step: int) -> dict[str, float]:
        """Return the decay rates, their bias corrections and eps."""
        t = step
        if self.variant == "released" and self.every and step > self.every:
            t = (step - 1) % self.every + 2  # a reset leaves 1 behind, and only after it was used
        gamma1 = annealed(self.gammas[0], step, self.anneal_steps)
        decays = {"theta": self.theta, "gamma1": gamma1, "gamma2": self.gammas[1]}
        corrections = {f"{name}_c": 1 - decay**t for name, decay in decays.items()}
        return {**decays, **corrections, "norm_eps": options["eps"]}

    def condition(
        self, r: Tensor, rule: Mapping[str, Tensor], slots: Mapping[str, Tensor], s: Scalars
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the clipped and normalised gradient, and the new statistics."""
        tracked = slots["max_avg"]
        g = r.reshape(tracked.shape[0], -1)
        top = g.abs().amax(-1, keepdim=True)
        tracked = s["theta"] * tracked + (1 - s["theta"]) * top
        limit = tracked / s["theta_c"]
        g = torch.where(g.abs() > limit, g * (limit / top), g)
        norm: Tensor = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
        first = s["gamma1"] * slots["norm_avg"] + (1 - s["gamma1"]) * norm
        second = s["gamma2"] * slots["norm_avg_sq"] + (1 - s["gamma2"]) * norm * norm
        wanted = (first / s["gamma1_c"]) / ((second / s["gamma2_c"]).sqrt() + s["norm_eps"])
        g = g * torch.where(norm == 0, 1.0, wanted / norm)
        return g.reshape(r.shape), {"max_avg": tracked, "norm_avg": first, "norm_avg_sq": second}
