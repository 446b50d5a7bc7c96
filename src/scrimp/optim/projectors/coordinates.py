"""Parts of the gradient itself: some of its columns, rows or elements.

    R = G[:, idx]        up(R) = R at idx, 0 elsewhere

The rest of the gradient is none of the projector's business; FRUGAL gives it its sign. A part of
`int(length * density)` may be empty: the moments are then of size 0 and everything is rest.

References:
    FRUGAL, Zmushko et al., ICML 2025, arXiv 2411.07837.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from scrimp.base.counter_random import bits
from scrimp.base.seeds import derive
from scrimp.optim.pieces import Carry, Entries, Target
from scrimp.optim.projectors.orientation import OnRefresh, Subspace, require, require_count, require_fraction
from scrimp.optim.projectors.refresh import matching


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates(Subspace):
    """A random subset of columns, rows or elements.

    Memory: 4 bytes an index (8 for elements of a tensor of 2^31 and more). A 3-D parameter has a subset of
    columns or rows for each matrix, of elements for the whole of it.

    Attributes:
        density: The fraction that keeps state, of the columns, rows or elements.
        kind: What is chosen. Rows are columns of the transpose.
        every: Steps between choices.
        seed: Of the choices.
        on_refresh: What becomes of the moments; "rotate" lets an index that survives carry its own.
    """

    density: float
    kind: Literal["columns", "rows", "elements"] = "columns"
    every: int = 200
    seed: int = 0
    on_refresh: OnRefresh = "reset"

    def __post_init__(self) -> None:
        """Check the words and the numbers."""
        require_fraction("density", self.density)
        require("kind", self.kind, ("columns", "rows", "elements"))
        require_count("every", self.every)
        require("on_refresh", self.on_refresh, ("keep", "rotate", "reset"))

    @property
    def mixes(self) -> bool:
        """What is not chosen is not seen."""
        return False

    @property
    def refresh_needs_gradient(self) -> bool:
        """The choice is blind."""
        return False

    def transposes(self, shape: tuple[int, ...]) -> bool:
        """Rows are columns of the transpose."""
        return self.kind == "rows"

    def check(self, target: Target) -> str | None:
        """Return None for a matrix."""
        return None if len(target.shape) > 1 else "it is no matrix"

    def down_shape(self, target: Target, step: int) -> tuple[int, ...]:
        """Return (..., k, r), or (r,) for elements."""
        kept = () if self.kind == "elements" else target.shape[:-1]
        return (*kept, self._count(target))

    def tensors(self, target: Target) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return the indices, ascending."""
        wide = self.kind == "elements" and math.prod(target.shape) >= 2**31
        sets = 1 if self.kind == "elements" else math.prod(target.shape[:-2])
        return {"indices": ((sets, self._count(target)), torch.int64 if wide else torch.int32)}

    def refresh(
        self, g: Tensor, basis: Any, entries: Entries, target: Target, step: int
    ) -> tuple[dict[str, Tensor], Carry | None]:
        """Draw the indices."""
        seed = derive(self.seed, "coordinates", step // self.every, target.index)
        rows = () if self.kind == "elements" else target.shape[:-2]
        length = math.prod(target.shape) if self.kind == "elements" else target.shape[-1]
        keys = bits(seed, math.prod(rows) * length, device=entries["indices"].device).view(*rows, length)
        # A stable sort, so that equal keys fall alike on every device.
        drawn = torch.sort(keys, dim=-1, stable=True).indices[..., : self._count(target)].sort(-1).values
        rotates = basis is not None and self.on_refresh == "rotate"
        carry = matching(basis, drawn.to(basis.device)) if rotates else None
        entries["indices"].copy_(drawn.view(entries["indices"].shape))
        return {}, carry

    def load(self, slots: Mapping[str, Tensor], entries: Entries, target: Target, like: Tensor) -> Any:
        """Return the indices, int64."""
        batch = () if self.kind == "elements" else target.shape[:-2]
        return entries["indices"].to(like.device, torch.int64).view(*batch, self._count(target))

    def down(self, g: Tensor, basis: Any) -> Tensor:
        """Return what lies at the indices."""
        if self.kind == "elements":
            return g.take(basis)
        return g.index_select(-1, basis) if basis.ndim == 1 else g.gather(-1, _every_row(basis, g))

    def up(self, r: Tensor, basis: Any, like: Tensor) -> Tensor:
        """Return `r` at the indices, 0 elsewhere."""
        full = torch.zeros_like(like)
        r = r.to(like.dtype)
        if self.kind == "elements":
            return full.put(basis, r)
        if basis.ndim == 1:
            return full.index_copy(-1, basis, r)
        return full.scatter(-1, _every_row(basis, full), r)

    def subtract(self, w: Tensor, r: Tensor, basis: Any) -> None:
        """Subtract `r` at the indices."""
        r = r.to(w.dtype)
        if self.kind == "elements":
            w.put_(basis, -r, accumulate=True)
        elif basis.ndim == 1:
            w.index_add_(-1, basis, r, alpha=-1)
        else:
            w.scatter_add_(-1, _every_row(basis, w), -r)

    def _count(self, target: Target) -> int:
        length = math.prod(target.shape) if self.kind == "elements" else target.shape[-1]
        return int(length * self.density)


def _every_row(indices: Tensor, like: Tensor) -> Tensor:
    return indices.unsqueeze(-2).expand(*like.shape[:-1], indices.shape[-1])
