"""Backpropagation: exact gradients, summed over the micro-batches of a step.

Each micro-batch's loss is already divided by the targets of the whole step, so the sum over
micro-batches is the gradient of the large batch, whatever the lengths of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scrimp.base.protocols import Batch, LossFunction


class Backprop:
    """The exact gradient by reverse-mode differentiation."""

    def step(self, loss: LossFunction, batch: Sequence[Batch]) -> Tensor:
        """Add each micro-batch's gradient into `.grad`, and return the step's loss, detached."""
        losses = []
        for micro in batch:
            value = loss(micro)
            value.backward()
            losses.append(value.detach())
        return torch.stack(losses).sum()


def backprop() -> Backprop:
    """Build the backpropagation estimator."""
    return Backprop()
