"""Low-rank changes whose rank grows while they train: IncreLoRA's and TriAdaptLoRA's.

    RankOnes      B diag(e) A alpha / (rho + 1e-5)               rho: the rank so far
    Triangular    B (C_lower + C_upper) A alpha / (rho + 1e-5)

Room for the largest rank is there from the start, so that parameters, and an optimizer's state for them,
keep their shapes, and a resumed run its bits: memory is that of the largest rank. What has not grown yet is
zero in all factors, hence has a zero gradient and stays zero. What grows is drawn by the seed, the layer
and its number. Its moments start at zero, but at the age of the run: an Adam with the authors' fresh state
would start it with steps a third as long.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.base.seeds import derive
from scrimp.tuning.deltas.delta import Delta, Factors
from scrimp.tuning.deltas.parts import add_product, draw_normal

STD = 0.02  # of drawn vectors, as in AdaLoRA, where both methods come from
ADVANCE = 1e-5  # the coefficient of a rank that learns ahead
_EPS = 1e-5
_ABSENT, _AHEAD, _GROWN = 0, 1, 2


class Growing(Delta):
    """What both have.

    Attributes:
        a: (largest, in) float32; rows that are not there are zero.
        b: (out, largest) float32; so are columns.
        seed: The layer's.
        alpha: The scale times the rank.
    """

    def __init__(self, in_features: int, out_features: int, *, largest: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.alpha, self.seed = alpha, seed
        self.a = nn.Parameter(torch.zeros(largest, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, largest))

    @property
    def rank(self) -> int:
        """How many ranks have grown; reading it waits for the device."""
        return int(self.grown().sum())

    @property
    def room(self) -> int:
        """How many more can; reading it waits for the device."""
        return self.a.shape[0] - self.rank

    def grown(self) -> Tensor:
        """Tell which ranks count, (largest,) bool."""
        raise NotImplementedError

    def present(self) -> Tensor:
        """Tell which ranks are there, (largest,) bool."""
        return self.grown()

    def grow(self, count: int) -> None:
        """Let so many more ranks count."""
        raise NotImplementedError

    def product(self) -> Factors:
        """Return the change's factors at the largest rank, detached."""
        raise NotImplementedError

    def factors(self) -> Factors:
        """Return the change's factors, of the ranks that are there."""
        whole, there = self.product(), self.present().nonzero().flatten()
        return Factors(whole.a[there], whole.b[:, there])

    def _scale(self) -> Tensor:
        return self.alpha / (self.grown().sum() + _EPS)

    @torch.no_grad()
    def _draw(self, ranks: range) -> None:
        for rank in ranks:
            row = draw_normal(derive(self.seed, "a", rank), (self.a.shape[1],), std=STD)
            column = draw_normal(derive(self.seed, "b", rank), (self.b.shape[0],), std=STD)
            self.a[rank] = row.to(self.a.device)
            self.b[:, rank] = column.to(self.b.device)


class RankOnes(Growing):
    """Adds B diag(e) A alpha / (rho + 1e-5), with some ranks that learn ahead of their use.

    Those have the fixed coefficient 1e-5 and do not count in rho; where the rank grows, they come first.

    Args:
        in_features: Of the layer.
        out_features: Of the layer.
        rank: At first.
        ahead: How many learn ahead.
        largest: What it may grow to.
        alpha: The scale times the rank.
        seed: The layer's.

    References:
        IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning, Zhang et al.,
        arXiv 2308.12043.
    """

    stage: Tensor
    importance: Tensor
    uncertainty: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        ahead: int,
        largest: int,
        alpha: float,
        seed: int,
    ) -> None:
        super().__init__(in_features, out_features, largest=largest, alpha=alpha, seed=seed)
        self.ahead = ahead
        self.e = nn.Parameter(torch.zeros(largest))
        self.register_buffer("stage", torch.full((largest,), _ABSENT, dtype=torch.uint8))
        self.register_buffer("importance", torch.zeros(()))  # both smoothed over measurements
        self.register_buffer("uncertainty", torch.zeros(()))
        self._become(_GROWN, range(rank))
        self._become(_AHEAD, range(rank, min(rank + ahead, largest)))
        self._draw(range(min(rank + ahead, largest)))

    def grown(self) -> Tensor:
        """Tell which ranks have grown."""
        return self.stage == _GROWN

    def present(self) -> Tensor:
        """Tell which ranks are there, those that learn ahead included."""
        return self.stage != _ABSENT

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the layer's output."""
        return add_product(base(x), x, self.a, self.b, scale=self._coefficients())

    def product(self) -> Factors:
        """Return A, and B diag(e) with its scale."""
        return Factors(self.a.detach(), self.b.detach() * self._coefficients().detach())

    @torch.no_grad()
    def grow(self, count: int) -> None:
        """Let those that learn ahead count, and others learn ahead in their place."""
        first, there = self.rank, int(self.present().sum())
        wanted = range(there, min(first + count + self.ahead, self.a.shape[0]))
        self._become(_AHEAD, wanted)
        self._become(_GROWN, range(first, first + count))
        self._draw(wanted)
        self.e[first : first + count] = ADVANCE  # the function stays as it is, but for rho

    @torch.no_grad()
    def stop(self) -> None:
        """Drop what learns ahead: nothing will grow any more."""
        counts = self.grown()
        self.a.mul_(counts[:, None])
        self.b.mul_(counts)
        self.stage.mul_(counts)

    @torch.no_grad()
    def observe(self, score: Tensor, *, beta1: float, beta2: float) -> None:
        """Take a measured sensitivity, 0-d, into the smoothed ones."""
        self.importance.lerp_(score, 1 - beta1)
        self.uncertainty.lerp_((score - self.importance).abs(), 1 - beta2)

    def _coefficients(self) -> Tensor:
        ahead = ADVANCE * (self.stage == _AHEAD)
        return self._scale() * torch.where(self.grown(), self.e, ahead)

    def _become(self, stage: int, ranks: range) -> None:
        self.stage[ranks.start : ranks.stop] = stage


class Triangular(Growing):
    """Adds B (C_lower + C_upper) A alpha / (rho + 1e-5), both triangles made of the blocks that grew.

    A block that grows adds its rows to the lower triangle and its columns to the upper one, both with the
    square where they meet, which thus counts twice. Vectors are random and C is zero where it is new, so
    that growing changes nothing and the gradient of C is not zero. The peft fork that was read starts every
    new block at zero in all factors, where no gradient ever is: that is not repeated.

    Args:
        in_features: Of the layer.
        out_features: Of the layer.
        rank: At first, one block.
        largest: What it may grow to.
        alpha: The scale times the rank.
        seed: The layer's.

    References:
        TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient
        Fine-Tuning, Liang, Wang and Zeng, arXiv 2501.08008.
    """

    block: Tensor
    norm_before: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, rank: int, largest: int, alpha: float, seed: int
    ) -> None:
        super().__init__(in_features, out_features, largest=largest, alpha=alpha, seed=seed)
        self.lower = nn.Parameter(torch.zeros(largest, largest))
        self.upper = nn.Parameter(torch.zeros(largest, largest))
        self.register_buffer("block", torch.zeros(largest, dtype=torch.int64))  # from 1; 0 is not there
        self.register_buffer("norm_before", torch.zeros(()))
        self._add_block(range(rank), 1)

    def grown(self) -> Tensor:
        """Tell which ranks have grown."""
        return self.block > 0

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the layer's output."""
        y: Tensor = base(x)
        z = functional.linear(functional.linear(x.to(self.a.dtype), self.a), self._scale() * self._core())
        return y + functional.linear(z, self.b).to(y.dtype)

    def product(self) -> Factors:
        """Return A, and B C with its scale."""
        return Factors(self.a.detach(), (self.b @ (self._scale() * self._core())).detach())

    @torch.no_grad()
    def grow(self, count: int) -> None:
        """Add a block of so many ranks."""
        first = self.rank
        self._add_block(range(first, first + count), int(self.block.max()) + 1)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return |C|_F over the number of blocks, 0-d."""
        size: Tensor = self._core().norm() / self.block.max()
        return size

    def _add_block(self, ranks: range, number: int) -> None:
        self.block[ranks.start : ranks.stop] = number
        self._draw(ranks)

    def _core(self) -> Tensor:
        row, column = self.block[:, None], self.block[None, :]
        there = (row > 0) & (column > 0)
        return self.lower * (there & (row >= column)) + self.upper * (there & (row <= column))
