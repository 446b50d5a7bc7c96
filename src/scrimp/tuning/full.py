"""Full tuning: every parameter trains at every step."""

from __future__ import annotations

from torch import nn


class Full:
    """Select every parameter; tied ones count once."""

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return every parameter of `model` by name, set to require a gradient."""
        model.requires_grad_(True)
        return dict(model.named_parameters())


def full() -> Full:
    """Build full tuning."""
    return Full()
