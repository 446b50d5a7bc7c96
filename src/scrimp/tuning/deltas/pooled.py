"""Low-rank changes whose factors several layers share, or that repeat within one.

    Sharded    A and B are assembled of shards gathered from pools             MoS
    Tied       B diag(e) A, with A and B of all layers of a shape, own e       S2-LoRA
    Tiled      B [A', A', ..., A']                                             Block-LoRA

Every layer registers what it shares, as tied weights are: `named_parameters` lists it once, `state_dict`
under the name of each. All are exact plain LoRAs for those who only read the result.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scrimp.tuning.deltas.delta import Delta, Factors
from scrimp.tuning.deltas.parts import add_product


class ShardPool(nn.Module):
    """The shards of all layers of one kind.

    Attributes:
        a: (e L l, in / l) float32, for L layers, l shards a vector and the budget of a LoRA of rank e.
        b: (e L l, out / l) float32, zeros at first.
    """

    def __init__(self, a: Tensor, *, out_features: int, shards: int) -> None:
        super().__init__()
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(torch.zeros(a.shape[0], out_features // shards))


class Sharded(Delta):
    """Adds s B A, whose every row of A, and column of B, is a concatenation of l shards of the pool.

    Args:
        pool: Shared by the layers of a kind.
        rows_a: (r l,) int32, the rows of the pool that make A: the first l make its first row.
        rows_b: (r l,) int32, the same for B's columns, drawn separately.
        rank: r.
        scale: s.
    """

    rows_a: Tensor
    rows_b: Tensor

    def __init__(self, pool: ShardPool, rows_a: Tensor, rows_b: Tensor, *, rank: int, scale: float) -> None:
        super().__init__()
        self.pool, self.rank, self.scale = pool, rank, scale
        self.register_buffer("rows_a", rows_a)
        self.register_buffer("rows_b", rows_b)

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the layer's output; A and B live for as long as the backward pass needs them."""
        a, b = self._assembled()
        return add_product(base(x), x, a, b, scale=self.scale)

    def factors(self) -> Factors:
        """Return what was assembled."""
        a, b = self._assembled()
        return Factors(a.detach(), self.scale * b.detach())

    def _assembled(self) -> tuple[Tensor, Tensor]:
        a = self.pool.a.index_select(0, self.rows_a).view(self.rank, -1)
        b = self.pool.b.index_select(0, self.rows_b).view(self.rank, -1)
        return a, b.T


class FactorPair(nn.Module):
    """Two factors.

    Attributes:
        a: (r, in) float32.
        b: (out, r) float32.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)


class Tied(Delta):
    """Adds s B diag(e) A, where a coefficient that is not above the threshold counts as zero.

    The gradient passes the threshold by as if it were not there, so that a rank can return.

    Args:
        pair: Shared by the layers of a shape.
        scale: s.
        threshold: Of |e|.
    """

    def __init__(self, pair: FactorPair, *, scale: float, threshold: float) -> None:
        super().__init__()
        self.pair, self.scale, self.threshold = pair, scale, threshold
        self.coefficients = nn.Parameter(torch.zeros(pair.a.shape[0]))  # a change of zero at first

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the layer's output."""
        e = self.coefficients
        through = e + (self._kept() - e).detach()
        return add_product(base(x), x, self.pair.a, self.pair.b, scale=self.scale * through)

    def factors(self) -> Factors:
        """Return the ranks that are left; one of zeros where none is."""
        e = self.scale * self._kept().detach()
        left = e.nonzero().flatten() if bool(e.any()) else torch.zeros(1, dtype=torch.int64, device=e.device)
        return Factors(self.pair.a.detach()[left], self.pair.b.detach()[:, left] * e[left])

    def _kept(self) -> Tensor:
        e = self.coefficients
        return e * (e.abs() > self.threshold)


class Tiled(Delta):
    """Adds s B A' sum_k x_k, for an input cut into pieces x_k: a LoRA with A = [A', ..., A'].

    What is saved for the backward pass is the sum, a piece's width of x.

    Args:
        tile: A', (r, in / pieces) float32.
        out_features: Rows of B, which starts at zero.
        pieces: How many.
        scale: s.
    """

    def __init__(self, tile: Tensor, *, out_features: int, pieces: int, scale: float) -> None:
        super().__init__()
        self.pieces, self.scale = pieces, scale
        self.tile = nn.Parameter(tile)
        self.b = nn.Parameter(torch.zeros(out_features, tile.shape[0]))

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the layer's output."""
        summed = x.unflatten(-1, (self.pieces, -1)).sum(dim=-2, dtype=self.tile.dtype)
        return add_product(base(x), summed, self.tile, self.b, scale=self.scale)

    def factors(self) -> Factors:
        """Return A with its repetitions."""
        return Factors(self.tile.detach().repeat(1, self.pieces), self.scale * self.b.detach())
