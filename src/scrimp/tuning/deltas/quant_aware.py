"""L4Q: a layer whose weight, with a LoRA added, is rounded to a grid in the product itself.

    W' = q clamp(round(w)) + o,  w = (W + c B A - o) / q           A, B, q, o train

Derivatives, with G = dL/dW' = dyᵀ x, of which a block of rows at a time exists, and
I = [lowest <= w <= highest]:

    dq = sum over the group of G (round(w) - w where I, else clamp(w))
    do = sum over the group of G (1 - I)
    dA = c Bᵀ (G I),  dB = c (G I) Aᵀ              rounding passes as if it were not there

What comes out is quantised (`Grid`), with no adapter beside it. Oddities:

- The layer keeps its own weight in training: memory is saved afterwards.
- A public reimplementation leaves -w out of dq, which is wrong: w depends on q.

Sources: L4Q, Jeon et al., ACL 2025, arXiv 2402.04902; its derivatives of q and o are those of LSQ,
Esser et al., ICLR 2020, arXiv 1902.08153.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scrimp.tuning.deltas.low_rank import Start
from scrimp.tuning.deltas.quantised import (
    SMALLEST,
    Grid,
    OnGrid,
    add_bias,
    autocast,
    grouped,
    rows_of,
    spread,
    sums,
)
from scrimp.tuning.deltas.sparse import row_tiles


class Placed(NamedTuple):
    """Rows of a weight on a grid, each (rows, in) float32.

    Attributes:
        exact: w, in steps from the offset.
        clamped: The code.
        value: What the code stands for.
    """

    exact: Tensor
    clamped: Tensor
    value: Tensor


class QuantAware(OnGrid):
    """L4Q: y = x W'ᵀ + b with W' = q clamp(round((W + c B A - o) / q)) + o, where A, B, q and o train.

    At first B = 0, o = 0 and q = max(|min W / lowest|, |max W / highest|) of each group, with
    lowest = -2^(bits - 1) and highest = 2^(bits - 1) - 1.

    Memory: the base as it is; r (m + n) + 2 m groups that train; of a token x alone is kept.

    Args:
        weight: (out, in); perhaps quantised otherwise.
        start: A and B.
        scale: c.
        bits: Of a code, 2 to 8.
        group: Elements of a row that share q and o.
    """

    def __init__(self, weight: Tensor, start: Start, *, scale: float, bits: int, group: int) -> None:
        super().__init__()
        self.scale, self.group = scale, group
        self.lowest, self.highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        steps = []
        for tile in row_tiles(*weight.shape):
            parts = grouped(rows_of(weight, tile), group)
            low, high = parts.amin(-1) / self.lowest, parts.amax(-1) / self.highest
            steps.append(torch.maximum(low.abs(), high.abs()).clamp(min=SMALLEST))
        self.lora_A, self.lora_B = nn.Parameter(start.a), nn.Parameter(start.b)
        self.step = nn.Parameter(torch.cat(steps))
        self.offset = nn.Parameter(torch.zeros_like(self.step))

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the layer's output, (..., out)."""
        weight: Any = base.weight
        trained = self.lora_A, self.lora_B, self.step, self.offset
        y: Tensor = _QuantAware.apply(autocast(x), *trained, weight, self)  # type: ignore[no-untyped-call]
        return add_bias(y, base)

    def grid(self, weight: Tensor) -> Grid:
        """Return the codes, counted from the lowest, with the scales and offsets learnt."""
        tiles = row_tiles(*weight.shape)
        codes = torch.cat([self.place(weight, tile).clamped - self.lowest for tile in tiles])
        step, offset = self.step.detach(), self.offset.detach()
        return Grid(codes.to(torch.uint8), step, offset + step * self.lowest, self.group)

    def place(self, weight: Tensor, rows: slice) -> Placed:
        """Return where some rows of the weight lie on the grid."""
        columns = weight.shape[1]
        with torch.autocast(weight.device.type, enabled=False):  # the backward pass has none, and must agree
            added = self.scale * (self.lora_B[rows] @ self.lora_A)
        moved = rows_of(weight, rows) + added
        step, offset = (spread(each[rows], self.group, columns) for each in (self.step, self.offset))
        exact = (moved - offset) / step
        clamped = exact.round().clamp(self.lowest, self.highest)
        return Placed(exact.detach(), clamped.detach(), (clamped * step + offset).detach())


class _QuantAware(torch.autograd.Function):
    """x W'ᵀ, with W' made anew in blocks of rows, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        step: Tensor,
        offset: Tensor,
        weight: Tensor,
        delta: QuantAware,
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, step, offset, weight)
        ctx.delta = delta
        flat = x.reshape(-1, x.shape[-1])
        y = x.new_empty(flat.shape[0], weight.shape[0])
        for rows in row_tiles(*weight.shape):
            y[:, rows] = flat @ delta.place(weight, rows).value.to(x.dtype).t()
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, step, offset, weight = ctx.saved_tensors
        delta: QuantAware = ctx.delta
        flat, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = torch.zeros_like(flat, dtype=torch.promote_types(x.dtype, torch.float32))
        da, db, dstep, doffset = (torch.zeros_like(each) for each in (a, b, step, offset))
        for rows in row_tiles(*weight.shape):
            placed = delta.place(weight, rows)
            dx += dy[:, rows] @ placed.value.to(dy.dtype)
            gradient = (dy[:, rows].t() @ flat).float()
            within = (placed.exact >= delta.lowest) & (placed.exact <= delta.highest)
            slope = placed.clamped - torch.where(within, placed.exact, 0.0)
            dstep[rows] = sums(gradient * slope, delta.group)
            doffset[rows] = sums(gradient * ~within, delta.group)
            gradient *= within
            da += delta.scale * (b[rows].t() @ gradient)
            db[rows] = delta.scale * (gradient @ a.t())
        return dx.to(x.dtype).view(x.shape), da, db, dstep, doffset, None, None
