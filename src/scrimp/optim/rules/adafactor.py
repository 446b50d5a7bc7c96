"""Adafactor: the second moment of a matrix as the product of its row and column means.

    beta2 = 1 - t^-0.8                                     0 at t = 1, so nothing needs a bias correction
    row = beta2 row + (1 - beta2) mean_columns(G^2 + 1e-30)          col likewise, over the rows
    U = G / sqrt(row / mean(row) outer col),        U /= max(1, RMS(U) / clip_threshold)
    rho = (relative_step ? min(1e-2, 1/sqrt(t)) : lr) * (scale_parameter ? max(1e-3, RMS(W)) : 1)
    W -= decay rho W,        W -= rho U

It is Hugging Face's form, oddities included. The momentum, which is off by default, averages the *scaled*
update rho U, so a change of the learning rate reaches W with the momentum's delay. The rule's own rho takes
the place of lr in the weight decay. RMS is over the whole tensor, for stacked matrices too, while row and
col belong to each matrix. `torch.optim.Adafactor` walks the same path with `relative_step=False,
scale_parameter=True` while lr <= 1/sqrt(t), but for its weight decay, which has lr instead of rho.

In a subspace G is the projected gradient, and RMS(W) still that of all of W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.optim.pieces import Options, Scalars, Slot, Step, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Adafactor:
    """Adafactor; 4 (m + n) bytes for an m x n matrix in fp32, 4 m n more with momentum.

    Tensors of fewer than two dimensions keep a whole second moment; of more than two, the last two
    dimensions are factored, so that stacked experts are matrices of their own.

    Attributes:
        eps: Added to squared gradients; the least RMS of the weights.
        clip_threshold: The RMS that an unscaled update is cut to.
        decay_rate: The exponent in beta2.
        beta1: Decay rate of the averaged updates; None keeps none.
        scale_parameter: Whether steps are relative to RMS(W).
        relative_step: Whether the rule has its own schedule; `lr` is then not read.
        warmup_init: Whether that schedule starts with 1e-6 t.

    Raises:
        ScrimpError: `warmup_init` without `relative_step`.

    References:
        Adafactor, Shazeer and Stern, ICML 2018, arXiv 1804.04235.
    """

    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    scale_parameter: bool = True
    relative_step: bool = True
    warmup_init: bool = False

    def __post_init__(self) -> None:
        if self.warmup_init and not self.relative_step:
            raise ScrimpError("Adafactor(warmup_init=True) warms up its own schedule: set relative_step=True")

    @property
    def elementwise(self) -> bool:
        """Rows and columns are treated as one."""
        return False

    @property
    def decay_first(self) -> bool:
        """The old weights decay."""
        return True

    def slots(self, shape: tuple[int, ...], target: Target) -> tuple[Slot, ...]:
        """Return the factors (..., m) and (..., n), or the whole of a vector, and the averaged update.

        The factors have no axis: they hold means of squares, which a rotation cannot carry over.
        """
        if len(shape) < 2:
            second: tuple[Slot, ...] = (Slot(name="exp_avg_sq", shape=shape, signed=False),)
        else:
            row, col = shape[:-1], (*shape[:-2], shape[-1])
            second = (
                Slot(name="exp_avg_sq_row", shape=row, signed=False, exact=True),
                Slot(name="exp_avg_sq_col", shape=col, signed=False, exact=True),
            )
        first = () if self.beta1 is None else (Slot(name="exp_avg", shape=shape, axis=len(shape) - 1),)
        return (*second, *first)

    def scalars(self, options: Options, age: int) -> dict[str, float]:
        """Return beta2, and the step size before it is scaled by the weights."""
        rho = options["lr"]
        if self.relative_step:
            rho = min(1e-6 * age if self.warmup_init else 1e-2, 1 / math.sqrt(age))
        return {"beta2": 1 - age**self.decay_rate, "rho": rho, "one": 1.0}

    def step(self, r: Tensor, slots: Mapping[str, Tensor], s: Scalars, weight: Tensor) -> Step:
        """Return the clipped update, or with momentum the average of the scaled ones."""
        scale, second = self._whitening(r, slots, s["beta2"])
        update = r * scale
        update = update / (_rms(update) / self.clip_threshold).clamp(min=1)
        size = s["rho"]
        if self.scale_parameter:
            size = size * _rms(weight).clamp(min=self.eps[1])
        if self.beta1 is None:
            return Step(update, size, size, second)
        average = self.beta1 * slots["exp_avg"] + (1 - self.beta1) * (size * update)
        return Step(average, s["one"], size, {**second, "exp_avg": average})

    def _whitening(
        self, r: Tensor, slots: Mapping[str, Tensor], beta2: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return one over the root of the second moment, and its slots renewed."""
        square = r * r + self.eps[0]
        if r.ndim < 2:
            whole = beta2 * slots["exp_avg_sq"] + (1 - beta2) * square
            return whole.rsqrt(), {"exp_avg_sq": whole}
        row = beta2 * slots["exp_avg_sq_row"] + (1 - beta2) * square.mean(-1)
        col = beta2 * slots["exp_avg_sq_col"] + (1 - beta2) * square.mean(-2)
        # Two roots, not that of a product: 1e-30 squared is no fp32 number.
        rows = (row / row.mean(-1, keepdim=True)).rsqrt()
        scale = rows.unsqueeze(-1) * col.rsqrt().unsqueeze(-2)
        return scale, {"exp_avg_sq_row": row, "exp_avg_sq_col": col}


def _rms(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dtype=wide)
    return norm / math.sqrt(x.numel())
