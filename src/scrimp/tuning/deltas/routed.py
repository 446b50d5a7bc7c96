"""A low-rank change of which every token uses the k ranks that answer it most: FlyLoRA.

    z = A x              A: (r, in), frozen, sparse and random: p = in // (r // k) entries a row, N(0, 1/r^2)
    y += s B (mask z)    mask: the k largest |z + d|; d: (r,), no gradient, moved once a step for balance

Only B trains, and since A does not, x is not kept for the backward pass. The change depends on the input:
no weight can hold it. Oddities: A is a function of the seed, and is not saved. The authors' runnable code
selects by the signed z + d; their paper and their small file by the magnitude, under which a d far below
zero selects a rank more, not less: balance holds while the rate times the steps is small beside z. Their
code moves d at every forward pass, in evaluation too; here it moves before the next step, by what was
counted in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.base.protocols import Probe
from scrimp.base.seeds import derive
from scrimp.tuning.deltas.delta import Delta
from scrimp.tuning.deltas.parts import CPU, draw_normal, draw_subset

Variant = Literal["paper", "released"]


def sparse_projection(seed: int, rank: int, width: int, entries: int) -> Tensor:
    """Return A: (rank, width) float32 on the CPU, each row with `entries` numbers of std 1 / rank."""
    a = torch.zeros(rank, width, device=CPU)
    for row in range(rank):
        columns = draw_subset(derive(seed, "columns", row), width, entries)
        a[row, columns] = draw_normal(derive(seed, "values", row), (entries,), std=1 / rank)
    return a


class RoutedRanks(Delta):
    """Adds s B (mask z), as above.

    Args:
        a: (r, in) float32, frozen.
        out_features: Rows of B, which starts at zero.
        active: k, the ranks that a token uses.
        scale: s.
        variant: "paper" selects by |z + d|, "released" by z + d.

    References:
        FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise Mixture-of-Experts,
        NeurIPS 2025, arXiv 2510.08396.
    """

    a: Tensor
    bias: Tensor
    counts: Tensor

    def __init__(self, a: Tensor, *, out_features: int, active: int, scale: float, variant: Variant) -> None:
        super().__init__()
        rank = a.shape[0]
        self.active, self.scale, self.variant = active, scale, variant
        self.b = nn.Parameter(torch.zeros(out_features, rank))
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("bias", torch.zeros(rank))
        self.register_buffer("counts", torch.zeros(rank, dtype=torch.int64))  # since d was last moved

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the layer's output, and count the selections while it trains."""
        y: Tensor = base(x)
        z = functional.linear(x.to(self.a.dtype), self.a)
        mask = self.mask(z.detach())
        if self.training:
            self.counts += mask.flatten(0, -2).sum(dim=0, dtype=torch.int64)
        return y + functional.linear(self.scale * mask * z, self.b).to(y.dtype)

    def mask(self, z: Tensor) -> Tensor:
        """Return 1 at each token's selected ranks and 0 elsewhere, (..., r) like z."""
        score = z + self.bias
        if self.variant == "paper":
            score = score.abs()
        chosen = score.topk(self.active, dim=-1, sorted=False).indices
        return torch.zeros_like(z).scatter_(-1, chosen, 1.0)

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Move d by the rate towards the ranks that were selected less than the mean, and count anew."""
        # mean(c) - c, times r: exact in integers. Counting twice, as checkpointing does, changes no sign.
        self.bias += rate * (self.counts.sum() - self.counts.numel() * self.counts).sign()
        self.counts.zero_()

    def change(self, weight: Tensor) -> None:
        """Return None: it depends on the input."""
        return


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Moves the bias of every `RoutedRanks` before each step.

    Attributes:
        rate: By how much.
    """

    rate: float

    def before_step(
        self,
        step: int,
        deltas: Mapping[str, Delta],
        optimizer: torch.optim.Optimizer,
        probe: Probe | None,
    ) -> None:
        """Balance; what was counted is used up, so that a second call changes nothing."""
        for delta in deltas.values():
            if isinstance(delta, RoutedRanks):
                delta.balance(self.rate)
