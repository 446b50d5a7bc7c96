"""The least that runs a rule: one matrix, given gradients, no projector, no store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scrimp.optim.pieces import Conditioner, Reset, Rule, Target

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
NEVER = Reset()


def gradients(
    shape: Sequence[int], steps: int, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """Return gradients of sizes that vary from step to step and from row to row."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(shape[:1], generator=generator, dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    return [
        (torch.randn(*shape, generator=generator, dtype=torch.float64) * (0.1 + rows) * (1 + step % 3)).to(
            dtype
        )
        for step in range(steps)
    ]


class Driver:
    """Holds a matrix and what its pieces keep.

    Attributes:
        w: The matrix.
        slots: The rule's.
        kept: The conditioner's.
    """

    def __init__(
        self,
        rule: Rule,
        w: Tensor,
        *,
        target: Target | None = None,
        conditioner: Conditioner | None = None,
        reset: Reset = NEVER,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        shape = tuple(w.shape)
        self.target = target or Target(name="w", shape=shape, role="linear")
        self.rule, self.conditioner, self.reset = rule, conditioner, reset
        self.options = {**OPTIONS, **(options or {})}
        self.w, self.updates, self.age = w.clone(), 0, 0
        own = conditioner.slots(shape, self.target) if conditioner else ()
        self.slots = {s.name: w.new_zeros(s.shape) for s in rule.slots(shape, self.target)}
        self.kept = {s.name: w.new_zeros(s.shape) for s in own}

    def step(self, g: Tensor) -> Tensor:
        """Update the matrix by one gradient and return it."""
        self.updates += 1
        self.age += 1
        if self.reset.every and self.updates % self.reset.every == 0:
            self.slots = {name: torch.zeros_like(old) for name, old in self.slots.items()}
            self.age = 1 if self.reset.restart else self.age
        s = self._scalars(self.rule.scalars(self.options, self.age))
        if self.conditioner is not None:
            own = self._scalars(self.conditioner.scalars(self.options, self.updates))
            g, self.kept = self.conditioner.condition(g, self.slots, self.kept, own)
        step = self.rule.step(g, self.slots, s, self.w)
        keep = 1 - step.decay * self.options["weight_decay"]
        moved = step.size * step.direction
        self.w = keep * self.w - moved if self.rule.decay_first else keep * (self.w - moved)
        self.slots = step.slots
        return self.w

    def run(self, given: Sequence[Tensor]) -> Tensor:
        """Update the matrix by every gradient in turn and return it."""
        for g in given:
            self.step(g)
        return self.w

    def _scalars(self, numbers: Mapping[str, float]) -> dict[str, Tensor]:
        every = {"lr": self.options["lr"], **numbers}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in every.items()}


def relative(a: Tensor, b: Tensor) -> float:
    """Return how far `a` is from `b`, by norms."""
    return float((a - b).norm() / b.norm())


def oracle(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter, given: Sequence[Tensor]) -> Tensor:
    """Return what somebody else's optimizer makes of a parameter."""
    for g in given:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()
