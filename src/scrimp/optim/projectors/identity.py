"""No projection at all, in the form of one: R = G."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from scrimp.optim.pieces import Carry, Entries, Target
from scrimp.optim.projectors.orientation import Subspace


@dataclass(frozen=True, slots=True)
class Identity(Subspace):
    """The whole gradient keeps state: under it every projected method is its full-rank self."""

    @property
    def on_refresh(self) -> Literal["keep"]:
        """Nothing ever changes."""
        return "keep"

    @property
    def mixes(self) -> bool:
        """All of the gradient is there."""
        return True

    @property
    def refresh_needs_gradient(self) -> bool:
        """Nothing is chosen."""
        return False

    def check(self, target: Target) -> str | None:
        """Return None: every shape will do."""
        return None

    def down_shape(self, target: Target, step: int) -> tuple[int, ...]:
        """Return the shape itself."""
        return target.shape

    def due(self, entries: Entries, step: int) -> bool:
        """Return False."""
        return False

    def refresh(
        self, g: Tensor, basis: Any, entries: Entries, target: Target, step: int
    ) -> tuple[dict[str, Tensor], Carry | None]:
        """Do nothing."""
        return {}, None

    def load(self, slots: Mapping[str, Tensor], entries: Entries, target: Target, like: Tensor) -> Any:
        """Return None."""
        return None

    def down(self, g: Tensor, basis: Any) -> Tensor:
        """Return the gradient."""
        return g

    def up(self, r: Tensor, basis: Any, like: Tensor) -> Tensor:
        """Return `r`."""
        return r.to(like.dtype)

    def subtract(self, w: Tensor, r: Tensor, basis: Any) -> None:
        """Subtract `r`."""
        w.sub_(r)
