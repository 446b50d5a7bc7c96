"""Random projections that are never stored: a seed is kept, and the matrix is drawn again when needed.

    B (d, r), entries N(0, 1 / r)      R = G B,  E ||R_i||^2 = ||G_i||^2 for every row

Norms survive a random projection, directions do not (B B^T is far from a projector): it serves lifts that
read norms (APOLLO). With `orthonormal` the columns are those of a QR decomposition, and it serves the others.

The draw is a pure function of (seed, refresh number, index of the matrix), the same on every device. What
apollo-torch does instead (`released`): torch's generator on the gradient's device, seeded 1, 2, 3, ... for
the parameters in order, and at each refresh with the last of 15 integers drawn under the old seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from scrimp.base.counter_random import normal
from scrimp.base.seeds import derive
from scrimp.optim.pieces import Carry, Entries, Target
from scrimp.optim.projectors.orientation import (
    SIDES,
    MatrixBasis,
    Side,
    check_rank,
    is_transposed_view,
    require,
    require_count,
    require_rank,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Random(MatrixBasis):
    """A seeded Gaussian basis.

    Memory: none. With `hold` d * r numbers, outside the optimizer's state.

    Attributes:
        rank: Columns; a float is a share of the shortened side.
        every: Steps between draws.
        side: See `orientation`.
        seed: Of all draws; when `released`, of parameter 0, and one more for every further one.
        orthonormal: Columns of unit length at right angles, instead of N(0, 1 / r).
        hold: Keeps the drawn matrix until the next draw: memory for time.
        released: Draws as apollo-torch does, on whichever device; the rank may then be of any size.
        on_refresh: What becomes of the moments.

    References:
        APOLLO, Zhu et al., MLSys 2025, arXiv 2412.05270.
    """

    rank: float
    every: int = 200
    side: Side = "std"
    seed: int = 0
    orthonormal: bool = False
    hold: bool = False
    released: bool = False
    on_refresh: Literal["keep", "reset"] = "keep"
    # The drawn matrix of each parameter, by its number, with what it was drawn for.
    _held: dict[int, tuple[Any, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the words and the numbers."""
        require_rank(self.rank)
        require_count("every", self.every)
        require("side", self.side, SIDES)
        require("on_refresh", self.on_refresh, ("keep", "reset"))

    @property
    def refresh_needs_gradient(self) -> bool:
        """A draw looks at nothing."""
        return False

    def check(self, target: Target) -> str | None:
        """See `check_rank`; what is released takes any matrix."""
        if self.released:
            return None
        rank = self.rank_of(target.shape[-1])
        return check_rank(target, rank, stored=0, kept=math.prod(self.down_shape(target, 0)))

    @property
    def is_drawn(self) -> bool:
        """Entries of their own are; a decomposition, torch's generator and what is held are not."""
        return isinstance(self.rank, int) and not (self.released or self.orthonormal or self.hold)

    @property
    def counters(self) -> tuple[str, ...]:
        """Return the present draw's seed, and for apollo-torch's layout whether W lies transposed."""
        return ("seed", "transposed") if self.released else ("seed",)

    def refresh(
        self, g: Tensor, basis: Any, entries: Entries, target: Target, step: int
    ) -> tuple[dict[str, Tensor], Carry | None]:
        """Renew the seed."""
        if not self.released:
            seed = derive(self.seed, "projection", step // self.every, target.index)
        else:
            seed = self.seed + target.index if basis is None else _next_seed(entries["seed"])
            entries["transposed"] = int(is_transposed_view(g))
        entries["seed"] = seed
        return {}, None

    def down(self, g: Tensor, basis: Any) -> Tensor:
        """Return G B; compiled with what follows, a sum for rank 1, so that G is read once."""
        if self.rank == 1 and torch.compiler.is_compiling():
            return torch.sum(g * basis.mT, -1, keepdim=True)
        return MatrixBasis.down(self, g, basis)

    def load(self, slots: Mapping[str, Tensor], entries: Entries, target: Target, like: Tensor) -> Any:
        """Draw the basis, or return the one held."""
        if not self.hold:
            return self._draw(entries, target, like)
        key = (entries["seed"], like.dtype, like.device, target.shape)
        held = self._held.get(target.index)
        if held is None or held[0] != key:
            held = self._held[target.index] = (key, self._draw(entries, target, like))
        return held[1]

    def _draw(self, entries: Entries, target: Target, like: Tensor) -> Tensor:
        d = target.shape[-1]
        rank = self.rank_of(d)
        shape = (*target.shape[:-2], d, rank)
        if self.released:
            left = bool(entries["transposed"])
            drawn = _generator_draw(shape, entries["seed"], left=left, device=like.device)
        else:
            drawn = normal(entries["seed"], math.prod(shape), device=like.device).view(shape)
        basis: Tensor = torch.linalg.qr(drawn)[0] if self.orthonormal else drawn / math.sqrt(rank)
        return basis.to(like.dtype)


def _generator_draw(shape: tuple[int, ...], seed: int, *, left: bool, device: torch.device) -> Tensor:
    # A basis for the left side is drawn as it is, one for the right side as its transpose.
    generator = torch.Generator(device=device).manual_seed(seed)
    lying = shape if left else (*shape[:-2], shape[-1], shape[-2])
    drawn = torch.randn(lying, generator=generator, device=device)
    return drawn if left else drawn.mT


def _next_seed(seed: int) -> int:
    generator = torch.Generator().manual_seed(seed)
    return int(torch.randint(0, 2**63 - 1, (15,), generator=generator)[-1])
