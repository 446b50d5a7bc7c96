"""Full precision: a slot as it is, in the dtype of the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.optim.pieces import Slot


@dataclass(frozen=True, slots=True)
class Full:
    """Keeps fp32 (fp64 for fp64 weights), whatever the weights' dtype: the default.

    Attributes:
        dtype: float32 or float64.
    """

    dtype: torch.dtype = torch.float32

    def prepare(self, device: torch.device) -> None:
        """Do nothing: it needs no more than torch."""

    def layout(self, slot: Slot) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the one entry."""
        return {"": (slot.shape, self.dtype)}

    def decode(self, entries: Mapping[str, Tensor], slot: Slot, dtype: torch.dtype) -> Tensor:
        """Return the entry."""
        return entries[""].to(dtype)

    def encode(self, value: Tensor, slot: Slot, noise: Tensor) -> dict[str, Tensor]:
        """Return the value."""
        return {"": value.to(self.dtype)}

    def block(self, slot: Slot) -> int:
        """Return 1: each element stands alone."""
        return 1
