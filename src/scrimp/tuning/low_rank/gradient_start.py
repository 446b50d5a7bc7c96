"""Initialisations from the gradient of the frozen weights, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import Probe
from scrimp.tuning.deltas.delta import Delta
from scrimp.tuning.deltas.low_rank import CoreStart, Start
from scrimp.tuning.low_rank.gradient_statistics import each_gradient


@dataclass(frozen=True, slots=True)
class GradientStart:
    """Begins every delta where its layer's gradient says.

    It acts before step 0 alone: a resumed run has the deltas from its checkpoint. A layer without a gradient
    (an expert that no token reached) stays as it was made.

    Attributes:
        start: Makes factors of a layer's name, its number among all, and its mean gradient (out, in) float32.
        passes: How many micro-batches the mean is of.
    """

    start: Callable[[str, int, Tensor], Start | CoreStart]
    passes: int = 1

    def before_step(
        self,
        step: int,
        deltas: Mapping[str, Delta],
        optimizer: torch.optim.Optimizer,
        probe: Probe | None,
    ) -> None:
        """Measure and begin, before step 0; do nothing in a simulation.

        Raises:
            ScrimpError: A gradient is not finite.
        """
        if step != 0 or probe is None:
            return
        numbers = {name: number for number, name in enumerate(deltas)}
        found: dict[str, Start | CoreStart] = {}

        def take(name: str, gradient: Tensor) -> None:
            if not bool(gradient.isfinite().all()):  # a decomposition waits anyway
                raise ScrimpError(
                    f"the gradient of {name} that its adapter is to begin from is not finite: the model or "
                    "the first batch holds numbers that its dtype cannot; use bf16 or fp32"
                )
            found[name] = self.start(name, numbers[name], gradient)

        each_gradient(deltas, probe, take, passes=self.passes)
        # Only now: the backward pass computes with the factors as they were.
        for name, start in found.items():
            delta: Any = deltas[name]
            delta.begin(start)
