"""The natural gradient, by an empirical Fisher matrix of the last gradients.

    H = [g_(t-s+1) ... g_t], g = vec(G),        G = (lambda I + H H^T)^-1 g_t

By the Woodbury identity that is an s x s system. As g_t is the last column of H, the identity takes its
shortest form, (lambda I + H H^T)^-1 H e = H (lambda I + H^T H)^-1 e with e = (0 ... 0 1): the authors'
g / lambda - H z / lambda^2 subtracts two numbers |g|^2 / lambda times larger than their difference.

With s = 1 this is g / (lambda + |g|^2); while |g|^2 is far below lambda it is g / lambda, which Adam does
not notice: the method acts where the gradient's norm exceeds sqrt(lambda), about 0.03.

The history outlives a change of the subspace, as in the authors' code: for s updates it mixes coordinates of
the old basis with those of the new one. It counts s gradients of memory, ten times Adam's two moments, which
the paper's table leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.optim.conditioners.matrices import matrices
from scrimp.optim.pieces import Options, Scalars, Slot, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class NaturalGradient:
    """Natural GaLore's preconditioner, each matrix on its own; 4 s bytes an element of the gradient.

    Attributes:
        history: How many gradients, s, the present one among them.
        damping: lambda.

    Raises:
        ScrimpError: `history` below 1, or `damping` not above 0.

    References:
        Natural GaLore, Das, 2024, arXiv 2410.16029.
    """

    history: int = 20
    damping: float = 1e-3

    def __post_init__(self) -> None:
        if self.history < 1 or not self.damping > 0:
            raise ScrimpError(
                f"NaturalGradient(history={self.history}, damping={self.damping}): "
                "history must be at least 1 and damping above 0"
            )

    @property
    def elementwise(self) -> bool:
        """A matrix is treated as one."""
        return False

    def slots(self, shape: tuple[int, ...], target: Target) -> tuple[Slot, ...]:
        """Return the last gradients, (matrices, s, elements of a matrix); zero ones change nothing."""
        count = matrices(shape, target)
        own = (count, self.history, math.prod(shape) // count)
        return (Slot(name="gradients", shape=own, exact=True),)

    def scalars(self, options: Options, step: int) -> dict[str, float]:
        """Return lambda."""
        return {"damping": self.damping}

    def condition(
        self, r: Tensor, rule: Mapping[str, Tensor], slots: Mapping[str, Tensor], s: Scalars
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the natural gradient and the history with this gradient at its end."""
        past = slots["gradients"]
        history = torch.cat([past[:, 1:], r.reshape(past.shape[0], 1, -1)], dim=1)
        identity = torch.eye(self.history, dtype=r.dtype, device=r.device)
        gram = history @ history.mT + s["damping"] * identity
        last = identity[:, -1:].expand(past.shape[0], -1, -1)
        # `solve` would ask a GPU whether the matrix is singular, which lambda forbids.
        weights, _ = torch.linalg.solve_ex(gram, last)
        return (weights.mT @ history).reshape(r.shape), {"gradients": history}
