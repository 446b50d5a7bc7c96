"""When ranks grow, and what keeps their vectors apart: the events of IncreLoRA and TriAdaptLoRA.

They read a few numbers from the device where something is measured or grows, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from scrimp.base.protocols import Probe
from scrimp.tuning.deltas.delta import Delta
from scrimp.tuning.deltas.growing import Growing, RankOnes, Triangular

_GROWTHS = 15  # that give out all ranks, as in the authors' script for RTE
_TILE = 1 << 20  # entries of a weight's gradient that exist at a time
D = TypeVar("D", bound=Growing)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGrowth:
    """Grows the layers whose change the loss is most sensitive to (IncreLoRA).

        I = sum |D G| / sqrt(out in)      D: the change, G: the loss's gradient by it
        score = mean(I) mean(|I - mean(I)|)     both smoothed

    The authors measure at every step, with D and G as matrices. Here an extra pass over some of the step's
    tokens measures exactly that in tiles, every few steps.

    Attributes:
        rank: The first one.
        target: The mean rank at the end.
        warmup: The step after which ranks grow.
        interval: Steps between two growths.
        every: Steps between two measurements.
        top: How many layers grow at a time; None is 2, or so many that 15 times suffice.
        increase: By how much.
        beta1: Smooths I.
        beta2: Smooths its deviation.
    """

    rank: int
    target: int
    warmup: int
    interval: int
    every: int
    top: int | None
    increase: int
    beta1: float
    beta2: float

    def before_step(
        self,
        step: int,
        deltas: Mapping[str, Delta],
        optimizer: torch.optim.Optimizer,
        probe: Probe | None,
    ) -> None:
        """Measure or grow where it is due; do nothing in a simulation."""
        growing = [delta for delta in deltas.values() if isinstance(delta, RankOnes)]
        if probe is None or step == 0 or step % self.every:
            return
        left = self.target * len(growing) - sum(delta.rank for delta in growing)
        if left <= 0:
            return
        for delta, score in zip(growing, sensitivities(growing, probe), strict=True):
            delta.observe(score, beta1=self.beta1, beta2=self.beta2)
        if step > self.warmup and step % self.interval == 0:
            self._grow(growing, left)

    def _grow(self, growing: list[RankOnes], left: int) -> None:
        scores = torch.stack([delta.importance * delta.uncertainty for delta in growing])
        left = share(ranked(growing, scores)[: self.layers(len(growing))], self.increase, left)
        if left == 0 or not any(delta.room for delta in growing):
            for delta in growing:
                delta.stop()

    def layers(self, count: int) -> int:
        """Return how many of `count` layers grow at a time."""
        if self.top is not None:
            return self.top
        return max(2, math.ceil(count * (self.target - self.rank) / (self.increase * _GROWTHS)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdGrowth:
    """Grows the layers whose core changed most since the last time (TriAdaptLoRA).

    With N the ranks that are still to be given out, from step `first` to `last`:

        linear         max(1, floor(N (step - first) / (last - first))) layers grow
        exponential    max(1, floor(exp(mu ln N)))

    Attributes:
        target: The mean rank at the end.
        first: The first step at which ranks may grow.
        last: The last one.
        every: Steps between.
        growth: Which threshold.
        mu: The exponent.
        increase: By how much a layer grows.
    """

    target: int
    first: int
    last: int
    every: int
    growth: Literal["linear", "exponential"]
    mu: float
    increase: int

    def before_step(
        self,
        step: int,
        deltas: Mapping[str, Delta],
        optimizer: torch.optim.Optimizer,
        probe: Probe | None,
    ) -> None:
        """Grow where it is due; do nothing in a simulation."""
        growing = [delta for delta in deltas.values() if isinstance(delta, Triangular)]
        is_due = self.first <= step <= self.last and (step - self.first) % self.every == 0
        if probe is None or not is_due:
            return
        left = self.target * len(growing) - sum(delta.rank for delta in growing)
        if left <= 0:
            return
        changes = torch.stack([(delta.norm() - delta.norm_before).abs() for delta in growing])
        share(ranked(growing, changes)[: self.layers(step, left)], self.increase, left)
        for delta in growing:
            delta.norm_before.copy_(delta.norm())

    def layers(self, step: int, left: int) -> int:
        """Return how many layers grow at a step when so many ranks are left to give out."""
        if self.growth == "linear":
            return max(1, left * (step - self.first) // (self.last - self.first))
        return max(1, int(math.exp(self.mu * math.log(left))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Orthogonality:
    """Adds weight * mean(|A A^T - I|_F, |B^T B - I|_F) over all layers to the loss: to its gradient.

    The gradient is left in `.grad` for the backward pass to add to, once a step however many micro-batches
    there are. The authors' codes take the mean over blocks, each alone; here what is there counts as a
    whole.

    Attributes:
        weight: Of the penalty.
    """

    weight: float

    @torch.no_grad()
    def before_step(
        self,
        step: int,
        deltas: Mapping[str, Delta],
        optimizer: torch.optim.Optimizer,
        probe: Probe | None,
    ) -> None:
        """Set the gradients; a second call sets the same."""
        growing = [delta for delta in deltas.values() if isinstance(delta, Growing)]
        weight = self.weight / (2 * len(growing))
        for delta in growing:
            there = delta.present().float()
            # What was dropped may still move by its momentum, and must not count.
            a, b = delta.a * there[:, None], delta.b * there
            delta.a.grad = weight * _penalty_gradient(a, there)
            delta.b.grad = weight * _penalty_gradient(b.T, there).T.contiguous()


def _penalty_gradient(rows: Tensor, there: Tensor) -> Tensor:
    """Return the gradient of |P P^T - I|_F by P (largest, n); I has ones where rows are there."""
    apart = rows @ rows.T - torch.diag(there)
    gradient: Tensor = 2 / apart.norm().clamp(min=1e-12) * (apart @ rows)
    return gradient


def ranked(growing: list[D], scores: Tensor) -> list[D]:
    """Return the layers that have room, the highest score first; equal ones in their order."""
    order = sorted(zip(scores.tolist(), growing, strict=True), key=lambda pair: -pair[0])
    return [delta for _, delta in order if delta.room]


def share(growing: Iterable[Growing], increase: int, left: int) -> int:
    """Grow each by `increase`, less where it lacks room or nothing is left; return what is left."""
    for delta in growing:
        count = min(increase, left, delta.room)
        if count:
            delta.grow(count)
        left -= count
    return left


def sensitivities(growing: list[RankOnes], probe: Probe) -> list[Tensor]:
    """Return sum |D G| / sqrt(out in) of each layer, 0-d: the change times the loss's gradient by it.

    The gradient is made of a layer's input and its output's gradient, a few rows at a time. No `.grad` is
    touched. A layer that runs more than once adds up what each run has.

    Args:
        growing: The layers.
        probe: Returns the loss.
    """
    scores = {delta: torch.zeros((), device=delta.a.device) for delta in growing}

    def watch(delta: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(_scoring(delta, inputs[0].detach(), scores))

    with ExitStack() as hooks, torch.compiler.set_stance("force_eager"), torch.enable_grad():
        for delta in growing:
            hooks.enter_context(delta.register_forward_hook(watch))
        torch.autograd.grad(probe(), [delta.e for delta in growing], allow_unused=True)
    return list(scores.values())


def _scoring(delta: RankOnes, x: Tensor, scores: dict[RankOnes, Tensor]) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def score(gradient: Tensor) -> None:
        a, b = delta.product()
        tokens, g = x.flatten(0, -2).float(), gradient.flatten(0, -2).float()
        rows = max(1, _TILE // a.shape[1])
        tiles = [slice(first, first + rows) for first in range(0, b.shape[0], rows)]
        parts = [((b[tile] @ a) * (g[:, tile].T @ tokens)).abs().sum() for tile in tiles]
        scores[delta] += torch.stack(parts).sum() / math.sqrt(a.shape[1] * b.shape[0])

    return score
