"""When a subspace is chosen anew, and what becomes of the moments.

At a refresh the moments lie in coordinates of the old basis. They are kept as they are (GaLore: number i of
the old subspace becomes number i of the new one, whatever it meant), zeroed (FRUGAL), or rotated:

    m <- m (B_old^T B_new)             signed slots
    v <- v (B_old^T B_new)^2           unsigned slots, squared element by element

which is the expectation of the squares if the old coordinates are uncorrelated, and never negative. Where
both bases are columns of one orthonormal matrix the product is a matching of indices, done as one: as a
matrix product in floating point it would leak 1e-6 of v into new columns, of which Adam takes the root.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from scrimp.optim.pieces import Carry, Entries, Slot
from scrimp.optim.projectors.orientation import require, require_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Lazy:
    """Multiplies the period by `factor` wherever the subspace has hardly moved.

    At every refresh but the first the similarity of the old and the new basis is noted. Whenever the last
    `queue` of them have a mean of at least `threshold`, the period grows, from the next step on: the next
    refresh falls on a multiple of the new period. The queue is not emptied then, so the period may grow at
    every refresh that follows. A batch of matrices has one period, its similarity is their mean.

    Attributes:
        threshold: The least mean similarity; above 1 never grows.
        factor: What the period is multiplied by.
        queue: How many similarities are averaged.
        measure: "cosine" compares the first singular vectors, "overlap" is ||P_old^T P_new||_F^2 / r.
        signed: Takes the cosine with its sign, as released: identical subspaces may then have -1.

    References:
        Q-GaLore, Zhang et al., 2024, arXiv 2407.08296, section 3.3.
    """

    threshold: float = 0.4
    factor: float = 2
    queue: int = 5
    measure: Literal["cosine", "overlap"] = "cosine"
    signed: bool = False

    def __post_init__(self) -> None:
        """Check the words and the numbers."""
        require("measure", self.measure, ("cosine", "overlap"))
        require_count("queue", self.queue)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return the last similarities."""
        return {"similarities": ((self.queue,), torch.float64)}

    def observe(self, entries: Entries, old: Tensor | None, new: Tensor, every: int, ok: Tensor) -> None:
        """Note how similar the bases (..., d, r) are, and lengthen the period if `ok`; one host read."""
        if old is None:
            entries["period"], entries["seen"] = every, 0
            return
        past = entries["similarities"]
        past[entries["seen"] % self.queue] = self._similarity(old.to(new.dtype), new)
        entries["seen"] += 1
        mean = torch.where(ok.to(past.device), past.mean(), -torch.inf)
        if entries["seen"] >= self.queue and mean.item() >= self.threshold:
            entries["period"] = int(entries["period"] * self.factor)

    def _similarity(self, old: Tensor, new: Tensor) -> Tensor:
        if self.measure == "overlap":
            return (old.mT @ new).square().sum((-2, -1)).mean() / new.shape[-1]
        cosine = torch.cosine_similarity(old[..., 0], new[..., 0], dim=-1)
        return (cosine if self.signed else cosine.abs()).mean()


def rotation(old: Tensor, new: Tensor) -> Carry:
    """Return how slots move from the basis `old` (..., d, r) to `new`."""
    turn = old.to(new.dtype).mT @ new

    def carry(value: Tensor, slot: Slot) -> Tensor:
        if slot.axis is None:
            return value
        matrix = (turn if slot.signed else turn.square()).to(value.dtype)
        if slot.axis == value.ndim - 1 and value.ndim == matrix.ndim:
            return value @ matrix
        # A vector with one number for every direction of the subspace.
        return (value.unsqueeze(-2) @ matrix).squeeze(-2)

    return carry


def matching(old: Tensor, new: Tensor) -> Carry:
    """Return how slots move between coordinates: a surviving index carries its value, a new one starts at 0.

    Args:
        old: The indices so far, (..., r).
        new: The new ones, (..., r).
    """
    order = old.long().sort(-1)
    at = torch.searchsorted(order.values, new.long().contiguous()).clamp_max(max(old.shape[-1] - 1, 0))
    survives = order.values.gather(-1, at) == new
    source = order.indices.gather(-1, at)

    def carry(value: Tensor, slot: Slot) -> Tensor:
        if slot.axis is None:
            return value
        index, kept = source, survives
        if value.ndim > source.ndim:
            index, kept = source.unsqueeze(-2).expand(value.shape), survives.unsqueeze(-2)
        return value.gather(-1, index) * kept

    return carry
