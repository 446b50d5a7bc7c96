"""State in bfloat16: half the bytes of float32, eight bits of mantissa, and a trap.

Rounded to nearest, a second moment stalls. `0.999 v` lies within half a place of v for every bfloat16 v and
rounds back to v: it never falls. `0.001 g^2` vanishes when it is below half a place: under a constant unit
gradient v stops at 0.5 instead of 1 (0.25 where the sum is rounded once, as here). v is then a slowly
saturating maximum. Papers whose weights and moments are all bfloat16 (GaLore and its line) ran like that:
`BF16Nearest` is there to reproduce them. Rounded stochastically, v is right in expectation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scrimp.base.counter_random import round_to_bf16
from scrimp.optim.pieces import Slot
from scrimp.optim.stores.full import Full

_LARGEST = torch.finfo(torch.bfloat16).max


@dataclass(frozen=True, slots=True)
class BF16Nearest:
    """Keeps bfloat16, rounded to nearest. Stalls with beta2 above 0.996: only to reproduce papers.

    Attributes:
        exact: What keeps slots that are declared exact.
    """

    exact: Full = field(default_factory=Full)

    def prepare(self, device: torch.device) -> None:
        """Do nothing: it needs no more than torch."""

    def layout(self, slot: Slot) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the one entry."""
        return self.exact.layout(slot) if slot.exact else {"": (slot.shape, torch.bfloat16)}

    def decode(self, entries: Mapping[str, Tensor], slot: Slot, dtype: torch.dtype) -> Tensor:
        """Return the entry."""
        return entries[""].to(dtype)

    def encode(self, value: Tensor, slot: Slot, noise: Tensor) -> dict[str, Tensor]:
        """Return the nearest bfloat16; values beyond the largest become the largest."""
        if slot.exact:
            return self.exact.encode(value, slot, noise)
        return {"": self._round(value.clamp(-_LARGEST, _LARGEST).float(), noise)}

    def block(self, slot: Slot) -> int:
        """Return 1: each element stands alone."""
        return 1

    def _round(self, value: Tensor, noise: Tensor) -> Tensor:
        return value.to(torch.bfloat16)


@dataclass(frozen=True, slots=True)
class BF16Stochastic(BF16Nearest):
    """Keeps bfloat16, rounded up with the probability of what is cut off: right in expectation."""

    def _round(self, value: Tensor, noise: Tensor) -> Tensor:
        return round_to_bf16(value, noise)
