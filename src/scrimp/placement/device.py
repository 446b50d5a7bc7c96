"""Everything lives on the training device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from scrimp.base.protocols import PagesState


class OneDevice:
    """Keep weights, gradients, state and activations on one device."""

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Move `model` to `device`."""
        return model.to(device)

    def place_state(self, optimizer: PagesState, folder: Path) -> None:
        """Leave the optimizer's state on the device of its parameters."""

    def context(self) -> AbstractContextManager[None]:
        """Move nothing during a step."""
        return nullcontext()


def device() -> OneDevice:
    """Build the placement on one device."""
    return OneDevice()
