"""Clipping by the global gradient norm, without waiting for a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MARGIN = 1e-6  # which torch adds to the norm before it divides by it


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients in place so that their global norm is at most `limit`.

    Args:
        parameters: Those without a gradient are left out.
        limit: The largest norm; 0 does not clip.

    Returns:
        The norm before, a scalar on the gradients' device.
    """
    everything = list(parameters)
    given = [p for p in everything if p.grad is not None]
    if everything and not given:
        return torch.zeros((), device=everything[0].device)
    norm = torch.nn.utils.get_total_norm([p.grad for p in given if p.grad is not None])
    # Scaling by one changes nothing; a GPU does it all the same rather than tell the host.
    is_short = norm.device.type == "cpu" and bool(norm + MARGIN <= limit)
    if limit > 0 and not is_short:
        torch.nn.utils.clip_grads_with_norm_(given, limit, norm)
    return norm


@dataclass(frozen=True, slots=True)
class AtStep:
    """Updates at the end of the step, all at once.

    Attributes:
        optimizer: Whose.
        parameters: Whose gradients count for the norm.
        limit: The largest global norm; 0 does not clip.
    """

    optimizer: torch.optim.Optimizer
    parameters: Sequence[nn.Parameter]
    limit: float

    def clip(self) -> Tensor:
        """Clip the gradients, and return their norm before."""
        return clip_gradients(self.parameters, self.limit)

    def apply(self) -> None:
        """Update every parameter that has a gradient."""
        self.optimizer.step()

    def discard(self) -> None:
        """Do nothing: the gradients go with the next step."""
