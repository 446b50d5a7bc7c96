"""How likely each decoder layer is to be drawn: equally, by its outliers, or by its importance.

Draws are without replacement and pure functions of a seed: each layer gets an exponential number with its
weight as the rate, and the smallest win (Efraimidis and Spirakis, 2006), which is drawing one after another
in proportion to what is left, as numpy's `choice` and torch's `multinomial` do.

Only what cannot be computed again is state: measured outlier ratios and learnt importances, a list of one
float a layer, which JSON keeps exactly.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import Probe
from scrimp.base.seeds import derive
from scrimp.tuning.layers import Layers
from scrimp.tuning.measure import damped_loss, outlier_ratios

ATTEMPTS = 100  # draws after which fewer candidates than asked for will do


def draw(weights: Sequence[float], count: int, seed: int) -> tuple[int, ...]:
    """Draw `count` indices without replacement, in proportion to `weights`, and return them sorted.

    What has no weight is drawn, evenly, only where nothing else is left.
    """

    def finish(index: int) -> tuple[float, float]:
        exponential = -math.log((derive(seed, index) + 1) * 2.0**-63)
        return (exponential / weights[index] if weights[index] > 0 else math.inf, exponential)

    return tuple(sorted(sorted(range(len(weights)), key=finish)[:count]))


class Chances(Protocol):
    """The weights that layers are drawn by."""

    def renew(self, layers: Layers, step: int, probe: Probe | None) -> None:
        """Measure, before 0-based `step`, what is due; called before every step."""

    def weights(self, count: int) -> Sequence[float]:
        """Return each of `count` layers' weight, at least 0."""

    def state(self) -> dict[str, list[float]]:
        """Return what a checkpoint must hold."""

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take what `state` returned."""


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every layer is as likely as another (LISA)."""

    def renew(self, layers: Layers, step: int, probe: Probe | None) -> None:
        """Do nothing."""

    def weights(self, count: int) -> Sequence[float]:
        """Return ones."""
        return [1.0] * count

    def state(self) -> dict[str, list[float]]:
        """Return nothing."""
        return {}

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Do nothing."""


@dataclass(slots=True, kw_only=True)
class OutlierRatio:
    """A layer is as likely as it has outliers (OwLore), measured once, before the first step.

    Attributes:
        threshold: How many times the layer's mean an entry must exceed.
        ratios: The ratios, once measured.
    """

    threshold: float = 13.0
    ratios: list[float] = field(default_factory=list)

    def renew(self, layers: Layers, step: int, probe: Probe | None) -> None:
        """Measure the ratios, unless they are known; without a probe, by the weights alone."""
        if not self.ratios:
            self.ratios = outlier_ratios(layers, probe, threshold=self.threshold)

    def weights(self, count: int) -> Sequence[float]:
        """Return the ratios."""
        return self.ratios

    def state(self) -> dict[str, list[float]]:
        """Return the ratios."""
        return {"ratios": list(self.ratios)}

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take the ratios."""
        self.ratios = list(state["ratios"])


@dataclass(slots=True, kw_only=True)
class Importance:
    """A layer is as likely as it has shown to matter (IST): p = sigmoid(I), learnt by reinforcement.

    Every `every` steps, `candidates` sets of layers are drawn with weights sigmoid(-I). In each, the layers'
    response is damped (`damped`) and the loss L_k read; with rewards r_k = exp(-L_k) less their mean,

        I_l = I_l - rate * p_l (1 - p_l) * (sum of r_k over the sets that l was in)

    so that whoever's damping hurts more than others' gains.

    Attributes:
        every: Steps between updates.
        suppressed: The share of the layers in a set.
        candidates: Sets an update.
        rate: Learning rate of I.
        factor: What is left of a damped response.
        seed: Of the sets.
        importance: I; all zero at first.
    """

    every: int = 10
    suppressed: float = 0.5
    candidates: int = 3
    rate: float = 10.0
    factor: float = 0.25
    seed: int = 0
    importance: list[float] = field(default_factory=list)

    def renew(self, layers: Layers, step: int, probe: Probe | None) -> None:
        """Update the importances where it is due.

        Raises:
            ScrimpError: It is due, and there is no probe.
        """
        self.importance = self.importance or [0.0] * len(layers.modules)
        if step == 0 or step % self.every != 0:
            return
        if probe is None:
            raise ScrimpError("tune ist: it learns from losses: give before_step a probe that returns one")
        sets = self._draw_sets(step)
        losses = [damped_loss(layers, damp, self.factor, probe) for damp in sets]
        self._learn(sets, losses)

    def _draw_sets(self, step: int) -> list[tuple[int, ...]]:
        weights = [_sigmoid(-value) for value in self.importance]
        count = max(1, int(self.suppressed * len(weights)))
        found: dict[tuple[int, ...], None] = {}  # equal sets would tell nothing
        for attempt in range(ATTEMPTS):
            if len(found) < self.candidates:
                found[draw(weights, count, derive(self.seed, "suppressed", step, attempt))] = None
        return list(found)

    def _learn(self, sets: Sequence[Collection[int]], losses: Sequence[float]) -> None:
        # A loss that is not a number counts as an infinite one.
        rewards = [0.0 if math.isnan(loss) else math.exp(-loss) for loss in losses]
        mean = sum(rewards) / len(rewards)
        for layer, value in enumerate(self.importance):
            gained = sum(r - mean for chosen, r in zip(sets, rewards, strict=True) if layer in chosen)
            p = _sigmoid(value)
            self.importance[layer] = value - self.rate * p * (1 - p) * gained

    def weights(self, count: int) -> Sequence[float]:
        """Return sigmoid(I)."""
        return [_sigmoid(value) for value in self.importance]

    def state(self) -> dict[str, list[float]]:
        """Return the importances."""
        return {"importance": list(self.importance)}

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take the importances."""
        self.importance = list(state["importance"])


def _sigmoid(value: float) -> float:
    return 0.5 * (1 + math.tanh(0.5 * value))
