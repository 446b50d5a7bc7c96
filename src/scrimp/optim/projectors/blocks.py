"""Whole matrices in turn: awake, a matrix is its own subspace; asleep, its part is empty and its state gone.

Every matrix decides alone, as a pure function of (seed, refresh number, index, count), and all come to the
same choice: nothing global is saved.

References:
    FRUGAL, Zmushko et al., ICML 2025, arXiv 2411.07837 (its scripts' optimizer `frugal`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.base.seeds import derive
from scrimp.optim.pieces import Carry, Entries, Target
from scrimp.optim.projectors.orientation import Subspace, require, require_count, require_fraction

Order = Literal["random", "ascending", "descending", "mirror"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks(Subspace):
    """`round(count * density)` of all matrices are awake.

    It goes by the steps of each matrix alone: they must all have taken the same number of them.

    Attributes:
        density: The fraction of the matrices that is awake.
        order: "random" draws a permutation at each refresh; the others go round: "ascending" from the first
            upwards, "descending" from the last downwards, "mirror" in pairs from both ends inwards (of an
            odd number the middle one never wakes).
        every: Steps between choices.
        seed: Of the permutations.
    """

    density: float
    order: Order = "random"
    every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the words and the numbers."""
        require_fraction("density", self.density)
        require("order", self.order, ("random", "ascending", "descending", "mirror"))
        require_count("every", self.every)

    @property
    def on_refresh(self) -> Literal["reset"]:
        """The moments begin anew."""
        return "reset"

    @property
    def mixes(self) -> bool:
        """Asleep, nothing is seen."""
        return False

    @property
    def refresh_needs_gradient(self) -> bool:
        """The choice is blind."""
        return False

    def check(self, target: Target) -> str | None:
        """Return None: any shape will do."""
        return None

    def check_count(self, count: int) -> None:
        """Refuse pairs from both ends where an odd number would be awake.

        Raises:
            ScrimpError: It would.
        """
        awake = round(count * self.density)
        if self.order == "mirror" and awake % 2:
            raise ScrimpError(
                f"order 'mirror' takes matrices in pairs, and density {self.density} wakes {awake} of "
                f"{count}; choose a density that wakes an even number, or another order."
            )

    def awake(self, target: Target, step: int) -> bool:
        """Tell whether a matrix is awake at 0-based `step`."""
        number = round(target.count * self.density)
        return target.index in _awake(self.order, self.seed, step // self.every, target.count, number)

    def down_shape(self, target: Target, step: int) -> tuple[int, ...]:
        """Return the shape itself or, asleep, (..., k, 0)."""
        return target.shape if self.awake(target, step) else (*target.shape[:-1], 0)

    @property
    def counters(self) -> tuple[str, ...]:
        """Return whether it is awake, 0 or 1."""
        return ("awake",)

    def refresh(
        self, g: Tensor, basis: Any, entries: Entries, target: Target, step: int
    ) -> tuple[dict[str, Tensor], Carry | None]:
        """Wake up or fall asleep."""
        entries["awake"] = int(self.awake(target, step))
        return {}, None

    def load(self, slots: Mapping[str, Tensor], entries: Entries, target: Target, like: Tensor) -> Any:
        """Return whether it is awake."""
        return bool(entries["awake"])

    def down(self, g: Tensor, basis: Any) -> Tensor:
        """Return the gradient or, asleep, none of it."""
        return g if basis else g[..., :0]

    def up(self, r: Tensor, basis: Any, like: Tensor) -> Tensor:
        """Return `r` or, asleep, zeros."""
        return r.to(like.dtype) if basis else torch.zeros_like(like)

    def subtract(self, w: Tensor, r: Tensor, basis: Any) -> None:
        """Subtract `r`."""
        if basis:
            w.sub_(r)


@lru_cache(maxsize=64)
def _awake(order: Order, seed: int, refresh: int, count: int, number: int) -> frozenset[int]:
    if order == "random":
        keys = sorted(range(count), key=lambda index: derive(seed, "blocks", refresh, index))
        return frozenset(keys[:number])
    turn = list(range(count))
    if order == "descending":
        turn.reverse()
    elif order == "mirror":
        turn = [end for low in range(count // 2) for end in (low, count - 1 - low)]
    return frozenset(turn[(refresh * number + i) % len(turn)] for i in range(number))
