"""Dense weights: every matrix is an ordinary `nn.Linear`, as transformers made it."""

from __future__ import annotations

from torch import nn


class Dense:
    """The identity among parametrisations."""

    def apply(self, model: nn.Module) -> None:
        """Leave `model` as it is: its matrices are dense already."""

    def materialize(self, model: nn.Module) -> None:
        """Leave `model` as it is: nothing was swapped."""


def dense() -> Dense:
    """Build the dense parametrisation."""
    return Dense()
