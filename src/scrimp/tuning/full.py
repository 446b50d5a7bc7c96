"""Full tuning: every parameter trains at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from scrimp.base.protocols import Probe


class Full:
    """Select every parameter; tied ones count once."""

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return every parameter of `model` by name, set to require a gradient."""
        model.requires_grad_(True)
        return dict(model.named_parameters())

    def before_step(self, step: int, optimizer: torch.optim.Optimizer, probe: Probe | None = None) -> None:
        """Do nothing: all is awake."""

    def state(self) -> dict[str, list[float]]:
        """Return nothing."""
        return {}

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Do nothing."""


def full() -> Full:
    """Build full tuning."""
    return Full()
