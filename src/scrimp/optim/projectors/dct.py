"""Columns of one fixed orthonormal basis, the cosine transform's, chosen by the gradient.

    Q_ij = sqrt(2 / d) cos(i (2j + 1) pi / 2d),  row 0 over sqrt(2)     Q Q^T = 1
    S = G Q,   idx = the r columns of S with the largest norm,   B = Q[:, idx]

Q is the same for every matrix with the same d, so a matrix keeps r integers instead of a basis. By the 2-norm
the choice is the best one: no other r columns leave a smaller ||G - G B B^T||_F.

G Q is the third kind of cosine transform of G's rows. What the authors compute by FFT (Makhoul) is the second
kind, G Q^T: a choice among other columns. This is their mode `matmul`.

An index that survives a refresh carries its moments to its new place and a new one starts at 0 ("rotate").
Its price: a new index has m = v = 0 while the bias corrections are near 1, so its first update is
(1 - beta1) / sqrt(1 - beta2), 3.2 times the usual. Under "keep", the authors' default, places change their
indices and the moments mix: two orders of summation end 15 % apart after 30 steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from scrimp.optim.pieces import Carry, Entries, Target
from scrimp.optim.projectors.orientation import (
    SIDES,
    MatrixBasis,
    Side,
    check_rank,
    require,
    require_count,
)
from scrimp.optim.projectors.refresh import matching

_held: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def cosine_basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return Q (size, size), built in float64; one copy for each size, dtype and device."""
    key, mode = (size, dtype, device), detect_fake_mode()
    held = _held.get(key)
    # A simulation's copy is no tensor outside it, nor in another simulation, and a real one none inside.
    if held is None or getattr(held, "fake_mode", None) is not mode:
        held = _held[key] = _cosine_basis(size).to(device, dtype)
    return held


def _cosine_basis(size: int) -> Tensor:
    index = torch.arange(size, dtype=torch.float64)
    # i (2j + 1) counts quarter turns of size: the remainder is exact, a large angle's cosine is not.
    angle = torch.outer(index, 2 * index + 1).remainder(4 * size) * (math.pi / (2 * size))
    basis = angle.cos() * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosine(MatrixBasis):
    """Columns of the cosine basis.

    Memory: 4 r bytes a matrix, and d * d numbers for each d.

    Attributes:
        rank: Columns.
        every: Steps between choices.
        side: See `orientation`.
        norm: 1 or 2, the norm that ranks the columns of S.
        on_refresh: What becomes of the moments.

    References:
        SVD-free low-rank adaptive gradient optimization, Modoranu et al., ICLR 2026, arXiv 2505.17967.
    """

    rank: int
    every: int = 1
    side: Side = "std"
    norm: Literal[1, 2] = 1
    on_refresh: Literal["keep", "rotate"] = "rotate"

    def __post_init__(self) -> None:
        """Check the words and the numbers."""
        require_count("rank", self.rank)
        require_count("every", self.every)
        require("side", self.side, SIDES)
        require("norm", self.norm, (1, 2))
        require("on_refresh", self.on_refresh, ("keep", "rotate"))

    @property
    def refresh_needs_gradient(self) -> bool:
        """The norms are the gradient's."""
        return True

    def check(self, target: Target) -> str | None:
        """See `check_rank`."""
        return check_rank(target, self.rank, stored=0, kept=math.prod(self.down_shape(target, 0)))

    def tensors(self, target: Target) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return the indices, by falling norm."""
        return {"indices": ((math.prod(target.shape[:-2]), self.rank), torch.int32)}

    def refresh(
        self, g: Tensor, basis: Any, entries: Entries, target: Target, step: int
    ) -> tuple[dict[str, Tensor], Carry | None]:
        """Choose the columns of the largest norm."""
        spread = g.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) @ cosine_basis(g.shape[-1], g.dtype, g.device)
        score = spread.abs().sum(-2) if self.norm == 1 else spread.square().sum(-2)
        chosen = score.topk(self.rank).indices
        old = entries["indices"].to(chosen.device).view(chosen.shape)
        carry = matching(old, chosen) if basis is not None and self.on_refresh == "rotate" else None
        entries["indices"].copy_(chosen.view(-1, self.rank))
        return {}, carry

    def load(self, slots: Mapping[str, Tensor], entries: Entries, target: Target, like: Tensor) -> Any:
        """Return the columns of Q at the indices, (..., d, r)."""
        table = cosine_basis(target.shape[-1], like.dtype, like.device)
        indices = entries["indices"].to(like.device)
        rows = table.mT.index_select(0, indices.view(-1))
        return rows.view(*target.shape[:-2], self.rank, target.shape[-1]).mT
