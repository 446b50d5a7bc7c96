"""SM3-II: Adagrad with one accumulator a row and one a column.

    nu_ij = min(row_i, col_j) + G_ij^2
    direction  G / sqrt(nu), 0/0 = 0, or with momentum an average of it        size lr
    row_i = max_j nu_ij        col_j = max_i nu_ij

A tensor of k dimensions has k vectors, a vector one: Adagrad. min(row_i, col_j) is never less than the sum
of all squared gradients of the element, so steps are never longer than Adagrad's; nothing decays, so they
shrink for ever. The authors warm the learning rate up, quadratically. Stacked experts are matrices of their
own (one accumulator for each expert's rows and columns): a common one would let the busiest expert slow
down the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.optim.pieces import Options, Scalars, Slot, Step, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class SM3:
    """SM3-II; 4 (m + n) bytes for an m x n matrix in fp32, 4 m n more with momentum.

    Attributes:
        momentum: Decay rate of the averaged direction; 0 keeps none.

    References:
        Memory-Efficient Adaptive Optimization, Anil et al., NeurIPS 2019, arXiv 1901.11150.
    """

    momentum: float = 0.9

    @property
    def elementwise(self) -> bool:
        """Rows and columns are treated as one."""
        return False

    @property
    def decay_first(self) -> bool:
        """The old weights decay (the paper has no weight decay)."""
        return True

    def slots(self, shape: tuple[int, ...], target: Target) -> tuple[Slot, ...]:
        """Return an accumulator for each dimension, broadcastable to the gradient, and the average."""
        batch = len(shape) - 2 if target.role == "experts" else 0
        shapes = [
            tuple(size if at < batch or at == dim else 1 for at, size in enumerate(shape))
            for dim in range(batch, len(shape))
        ]
        accumulators = tuple(
            Slot(name=f"accumulator_{i}", shape=of, signed=False, exact=True)
            for i, of in enumerate(shapes or [()])
        )
        if self.momentum == 0:
            return accumulators
        return (*accumulators, Slot(name="exp_avg", shape=shape, axis=len(shape) - 1))

    def scalars(self, options: Options, age: int) -> dict[str, float]:
        """Return the step size and the momentum."""
        return {"size": options["lr"], "momentum": self.momentum}

    def step(self, r: Tensor, slots: Mapping[str, Tensor], s: Scalars, weight: Tensor) -> Step:
        """Return the direction and the new accumulators."""
        accumulators = {name: value for name, value in slots.items() if name != "exp_avg"}
        nu = functools.reduce(torch.minimum, accumulators.values()) + r * r
        new = {name: _cover(nu, old) for name, old in accumulators.items()}
        # Where nothing was ever seen, and where a square underflows, the direction is 0.
        direction = torch.where(nu == 0, 0.0, r * nu.rsqrt())
        if self.momentum == 0:
            return Step(direction, s["size"], s["lr"], new)
        average = s["momentum"] * slots["exp_avg"] + (1 - s["momentum"]) * direction
        return Step(average, s["size"], s["lr"], {**new, "exp_avg": average})


def _cover(nu: Tensor, accumulator: Tensor) -> Tensor:
    """Return the largest elements of `nu` in the shape of the accumulator: over its dimensions of size 1."""
    dims = [dim for dim in range(nu.ndim) if accumulator.shape[dim] == 1]
    return nu.amax(dims, keepdim=True) if dims else nu
