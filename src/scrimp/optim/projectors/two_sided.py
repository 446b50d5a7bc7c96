"""Both sides at once: R = A^T G B, (r, r). GaLore's `proj_type="full"`, and for a matrix the Tucker form.

A (k, r) and B (d, r) are the leading left and right singular vectors. The moments are the smallest there are,
r * r, and the vectors of A and B are paired, so that R is diagonal at a refresh.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from scrimp.base.seeds import derive
from scrimp.optim.pieces import Carry, Entries, Slot, Target
from scrimp.optim.projectors.orientation import Subspace, check_rank, require, require_count, subtract_product
from scrimp.optim.projectors.svd import Method, align, both_vectors, working


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSided(Subspace):
    """Singular vectors on both sides.

    Memory: (k + d) * r numbers.

    Attributes:
        rank: On either side.
        every: Steps between refreshes.
        method: How the vectors are found.
        on_refresh: What becomes of the moments.
        align: Chooses the signs; else they are as they come.
        seed: Of the random columns.
        released: Decomposes in float32 whatever the gradient's dtype.
    """

    rank: int
    every: int = 200
    method: Method = "power"
    on_refresh: Literal["keep", "reset"] = "keep"
    align: bool = True
    seed: int = 0
    released: bool = False

    def __post_init__(self) -> None:
        """Check the words and the numbers."""
        require_count("rank", self.rank)
        require_count("every", self.every)
        require("method", self.method, ("svd", "power", "randomized"))
        require("on_refresh", self.on_refresh, ("keep", "reset"))

    @property
    def mixes(self) -> bool:
        """Every element reaches every number."""
        return True

    @property
    def refresh_needs_gradient(self) -> bool:
        """The vectors are the gradient's."""
        return True

    def check(self, target: Target) -> str | None:
        """See `check_rank`."""
        batch = math.prod(target.shape[:-2])
        stored = batch * sum(target.shape[-2:]) * self.rank
        return check_rank(target, self.rank, stored=stored, kept=batch * self.rank**2)

    def down_shape(self, target: Target, step: int) -> tuple[int, ...]:
        """Return (..., r, r)."""
        return (*target.shape[:-2], self.rank, self.rank)

    def slots(self, target: Target) -> tuple[Slot, ...]:
        """Return both bases."""
        batch, (k, d) = target.shape[:-2], target.shape[-2:]
        return (
            Slot(name="left", shape=(*batch, k, self.rank)),
            Slot(name="right", shape=(*batch, d, self.rank)),
        )

    def refresh(
        self, g: Tensor, basis: Any, entries: Entries, target: Target, step: int
    ) -> tuple[dict[str, Tensor], Carry | None]:
        """Find the singular vectors of `g`."""
        seed = derive(self.seed, "range", step, target.index)
        old_left, old_right = (None, None) if basis is None else basis
        left, right = both_vectors(working(g, self.released), self.rank, self.method, seed=seed)
        if self.align:
            left, right = align(left, old_left), align(right, old_right)
        if self.released:
            left, right = left.to(g.dtype), right.to(g.dtype)
        return {"left": left.contiguous(), "right": right.contiguous()}, None

    def load(self, slots: Mapping[str, Tensor], entries: Entries, target: Target, like: Tensor) -> Any:
        """Return A and B."""
        return slots["left"].to(like.device, like.dtype), slots["right"].to(like.device, like.dtype)

    def down(self, g: Tensor, basis: Any) -> Tensor:
        """Return A^T G B."""
        left, right = basis
        return torch.matmul(left.mT, g @ right)

    def up(self, r: Tensor, basis: Any, like: Tensor) -> Tensor:
        """Return A R B^T."""
        left, right = basis
        return torch.matmul(left @ r.to(left.dtype), right.mT).to(like.dtype)

    def subtract(self, w: Tensor, r: Tensor, basis: Any) -> None:
        """Subtract A R B^T within the second product."""
        left, right = basis
        subtract_product(w, left @ r, right.mT)
