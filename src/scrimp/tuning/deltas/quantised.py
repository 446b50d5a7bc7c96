"""Weights on a grid, a scale and an offset for each group of a row's elements; and PEQA, which trains scales.

    W' = (s + ds) (Q - z)                  Q, z, s fixed; ds trains
    d ds = sum over the group of G (Q - z),  G = dL/dW' = dyᵀ x, of which a block of rows at a time exists

What comes out is quantised (`Grid`): there is no adapter beside it, and the deployed model is in few bits. To
change the task is to change the scales. Oddities:

- The layer's weight is replaced by its codes, two a byte in up to four bits; until it is merged the layer has
  no other.
- With one group a row no G is needed: autograd keeps x (Q - z)ᵀ, and not x.
- The paper does not keep scales positive. A learning rate near the scales themselves turns signs over.

Source: PEQA, Kim et al., NeurIPS 2023, arXiv 2305.14152.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scrimp.base.protocols import QuantizedParameter
from scrimp.tuning.deltas.delta import Delta
from scrimp.tuning.deltas.sparse import row_tiles

SMALLEST = 1e-8  # scale of a group of zeros


class Grid(NamedTuple):
    """A weight as uniform codes: scale code + offset.

    Attributes:
        codes: (out, in) uint8.
        scale: (out, groups) float32.
        offset: (out, groups) float32.
        group: Elements of a row that share them; the last group may be shorter.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    group: int

    def decode(self) -> Tensor:
        """Return the weight, (out, in) float32."""
        columns = self.codes.shape[1]
        scale, offset = (spread(each, self.group, columns) for each in (self.scale, self.offset))
        return self.codes.float() * scale + offset


class OnGrid(Delta):
    """A layer whose weight lies on a grid that is learnt."""

    def grid(self, weight: Tensor) -> Grid:
        """Return the quantised form that is deployed.

        Args:
            weight: The base's, (out, in); read where the layer keeps it.
        """
        raise NotImplementedError

    def change(self, weight: Tensor) -> Tensor:
        """Return what the weight becomes less what it is, (out, in) float32."""
        return self.grid(weight).decode() - weight

    @torch.no_grad()
    def merge_into(self, base: nn.Linear) -> None:
        """Give a layer the decoded weight as a plain one, in its dtype."""
        made = self.grid(base.weight).decode().to(base.weight.dtype)
        base.weight = nn.Parameter(made, requires_grad=False)


class TrainedScales(OnGrid):
    """PEQA: y = x ((s + ds) (Q - z))ᵀ + b, where ds trains.

    Q = clamp(round(W / s) + z, 0, 2^bits - 1) with s = (max - min) / (2^bits - 1) and z = round(-min / s) of
    each group, whose range takes in 0.

    Memory: m n / 2 bytes (m n beyond four bits), and 4 + 1 + 4 a group; gradient and moments as of m groups.

    Args:
        weight: (out, in); perhaps quantised otherwise.
        bits: Of a code, 2 to 8.
        group: Elements of a row that share a scale; None takes a whole row.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, *, bits: int, group: int | None) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.columns, self.bits, self.group = columns, bits, columns if group is None else group
        pieces = []
        for tile in row_tiles(rows, columns):
            codes, scale, zero = round_to_nearest(rows_of(weight, tile), bits, self.group)
            pieces.append((self._pack(codes), scale, zero))
        for name, parts in zip(("packed", "scale", "zero"), zip(*pieces, strict=True), strict=True):
            self.register_buffer(name, torch.cat(parts))
        self.change_of_scale = nn.Parameter(torch.zeros_like(self.scale))

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the layer's output, (..., out)."""
        x = autocast(x)
        scale = self.scale + self.change_of_scale
        if scale.shape[1] == 1:
            product: Tensor = _Differences.apply(x, self)  # type: ignore[no-untyped-call]
            y = (product * scale[:, 0]).to(x.dtype)
        else:
            y = _Scaled.apply(x, scale, self)  # type: ignore[no-untyped-call]
        return add_bias(y, base)

    def grid(self, weight: Tensor) -> Grid:
        """Return the codes with the scales learnt."""
        scale = (self.scale + self.change_of_scale).detach()
        return Grid(self._codes(slice(None)), scale, -scale * self.zero, self.group)

    def differences(self, rows: slice) -> Tensor:
        """Return Q - z of some rows, (rows, in) float32."""
        zero = spread(self.zero[rows].float(), self.group, self.columns)
        return self._codes(rows).float() - zero

    def _pack(self, codes: Tensor) -> Tensor:
        if self.bits > 4:
            return codes
        codes = F.pad(codes, (0, codes.shape[1] % 2))
        return (codes[:, ::2] << 4) | codes[:, 1::2]

    def _codes(self, rows: slice) -> Tensor:
        packed = self.packed[rows]
        if self.bits > 4:
            return packed
        return torch.stack([packed >> 4, packed & 15], -1).flatten(-2)[:, : self.columns]


def round_to_nearest(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (rows, in) uint8, scales (rows, groups) float32 and zero points (rows, groups) uint8.

    Args:
        weight: (rows, in), float32.
        bits: Of a code.
        group: Elements of a row that share a scale.
    """
    highest = 2**bits - 1
    parts = grouped(weight, group)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = ((high - low) / highest).clamp(min=SMALLEST)
    zero = (-low / scale).round()
    wide_scale, wide_zero = (spread(each, group, weight.shape[1]) for each in (scale, zero))
    codes = ((weight / wide_scale).round() + wide_zero).clamp(0, highest)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


class _Differences(torch.autograd.Function):
    """x (Q - z)ᵀ, of which autograd keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: TrainedScales) -> Tensor:
        ctx.delta = delta
        flat = x.reshape(-1, x.shape[-1])
        y = x.new_empty(flat.shape[0], delta.scale.shape[0])
        for rows in row_tiles(y.shape[1], delta.columns):
            y[:, rows] = flat @ delta.differences(rows).to(x.dtype).t()
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
        delta, flat = ctx.delta, dy.reshape(-1, dy.shape[-1])
        dx = flat.new_zeros(flat.shape[0], delta.columns, dtype=torch.promote_types(dy.dtype, torch.float32))
        for rows in row_tiles(flat.shape[1], delta.columns):
            dx += flat[:, rows] @ delta.differences(rows).to(dy.dtype)
        return dx.to(dy.dtype).view(*dy.shape[:-1], -1), None


class _Scaled(torch.autograd.Function):
    """x W'ᵀ with W' = scale (Q - z), a scale for each of a row's groups."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, delta: TrainedScales) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.delta = delta
        flat = x.reshape(-1, x.shape[-1])
        y = x.new_empty(flat.shape[0], scale.shape[0])
        for rows in row_tiles(y.shape[1], delta.columns):
            weight = delta.differences(rows) * spread(scale[rows], delta.group, delta.columns)
            y[:, rows] = flat @ weight.to(x.dtype).t()
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, scale), delta = ctx.saved_tensors, ctx.delta
        flat, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = torch.zeros_like(flat, dtype=torch.promote_types(x.dtype, torch.float32))
        dscale = torch.empty_like(scale)
        for rows in row_tiles(scale.shape[0], delta.columns):
            differences = delta.differences(rows)
            gradient = (dy[:, rows].t() @ flat).float()
            dscale[rows] = sums(gradient.mul_(differences), delta.group)
            differences *= spread(scale[rows], delta.group, delta.columns)
            dx += dy[:, rows] @ differences.to(dy.dtype)
        return dx.to(x.dtype).view(x.shape), dscale, None


def spread(per_group: Tensor, group: int, columns: int) -> Tensor:
    """Return (rows, groups) for every element, (rows, columns)."""
    return per_group.repeat_interleave(group, dim=-1)[..., :columns]


def rows_of(weight: Tensor, rows: slice) -> Tensor:
    """Return rows of a weight, quantised or not, in float32."""
    if isinstance(weight, QuantizedParameter):
        return weight.dequantize_rows(rows.start, rows.stop)
    return weight.detach()[rows].float()


def grouped(value: Tensor, group: int) -> Tensor:
    """Return (rows, in) as (rows, groups, group), the last group filled up with the last element."""
    columns = value.shape[-1]
    if missing := -columns % group:
        value = value[..., torch.arange(columns + missing, device=value.device).clamp(max=columns - 1)]
    parts: Tensor = value.unflatten(-1, (-1, group))
    return parts


def sums(value: Tensor, group: int) -> Tensor:
    """Return the sum of each group, (rows, groups)."""
    parts: Tensor = F.pad(value, (0, -value.shape[-1] % group)).unflatten(-1, (-1, group))
    return parts.sum(-1)


def autocast(x: Tensor) -> Tensor:
    """Cast as autocast casts the input of `F.linear`."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def add_bias(y: Tensor, base: nn.Module) -> Tensor:
    """Add a layer's bias, where it has one."""
    bias: Any = base.bias
    return y if bias is None else y + bias.to(y.dtype)
