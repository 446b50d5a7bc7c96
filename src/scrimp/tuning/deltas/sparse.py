"""A sparse change of a weight, without ever a copy of the weight or a dense gradient.

    y = x (W + S)^T        S has `values` at `indices`, 0 elsewhere

Forward, the entries of W itself are overwritten by W + S, the product is taken, and the old entries are put
back: bit for bit, since they were kept and nothing is subtracted. Autograd keeps x, values and indices.
Backward does the same for dx; the gradient of the values is gathered from dW one tile of rows at a time. (A
scatter out of place, as SHiRA's and NeuroAda's released layers have it, keeps a copy of every weight for
the backward pass, and makes a whole dW.) Oddities:

- W + S is rounded to W's dtype, as it will be when merged: the output before merging is that after it, bit
  for bit. Of a bf16 weight a value below about 2^-9 of the entry changes nothing yet; its gradient passes
  through.
- While a layer computes, its weight is not the base's. Two streams must not run one layer at once.
- A weight that is not plain memory (quantised, sharded) stays as it is: y = base(x) + x S^T, with S in tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from scrimp.tuning.deltas.delta import Delta

TILE = 1 << 19  # elements of a weight's size at a time; fewer take longer, 2^18 a fifth
ROWS = 64  # at least; fewer make slow products

Watch = Callable[[Tensor, Tensor, Tensor], None]
"""Sees what the backward pass passes by: dy (tokens, out), x (tokens, in) and the layer's weight."""


class Tile(NamedTuple):
    """Some rows of a matrix, and which of the sorted entries lie in them."""

    rows: slice
    entries: slice


class Sparse(Delta):
    """A change at chosen entries of the weight.

    Attributes:
        shape: The weight's, (out, in).
        indices: (count,) int32, or int64 from 2^31 elements on: row * in + column, ascending, each once.
        values: (count,) float32, what is added there; 0 at first.
        watch: What looks on in the backward pass.

    Args:
        shape: The weight's.
        indices: Of any integer dtype.

    Memory:
        8 bytes an entry, 4 for its gradient, and the optimizer's.
    """

    indices: Tensor

    def __init__(self, shape: tuple[int, int], indices: Tensor) -> None:
        super().__init__()
        self.shape = shape
        dtype = torch.int32 if shape[0] * shape[1] < 1 << 31 else torch.int64
        self.register_buffer("indices", indices.to(dtype))
        self.values = nn.Parameter(torch.zeros(len(indices), device=indices.device))
        self.watch: Watch | None = None
        self._tiles: tuple[Tile, ...] = ()
        self._tiled: tuple[int, int] | None = None

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the layer's output."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        weight: Any = base.weight
        given = (x, self.values, self.indices, self.tiles(), weight, self.watch)
        y: Tensor
        if is_plain(base):
            y = _InPlace.apply(*given, base.bias)  # type: ignore[no-untyped-call]
            return y
        y = base(x) + _Product.apply(*given, self.shape)  # type: ignore[no-untyped-call]
        return y

    def change(self, weight: Tensor) -> Tensor:
        """Return the change, (out, in) float32."""
        change = torch.zeros(self.shape, device=self.values.device)
        change.view(-1)[self.indices] = self.values.detach()
        return change

    def tiles(self) -> tuple[Tile, ...]:
        """Return the entries by rows; where the entries were moved, this waits for the device."""
        now = (id(self.indices), self.indices._version)
        if self._tiled != now:
            self._tiles, self._tiled = tiles_of(self.indices, self.shape), now
        return self._tiles

    def forget_tiles(self) -> None:
        """Look at the entries anew: they may have been read from a file past torch."""
        self._tiled = None

    @torch.no_grad()
    def move(self, indices: Tensor) -> None:
        """Choose other entries, as many, ascending; all values are 0 then."""
        self.indices.copy_(indices)
        self.values.zero_()


def is_plain(base: Any) -> bool:
    """Tell whether a layer is torch's own, and its weight plain memory that can be written to."""
    weight: Tensor = base.weight
    return type(base) is nn.Linear and type(weight) in (nn.Parameter, FakeTensor) and weight.is_contiguous()


def row_tiles(rows: int, columns: int) -> Iterator[slice]:
    """Yield the rows of a matrix in tiles of about `TILE` elements."""
    step = max(ROWS, TILE // columns)
    for first in range(0, rows, step):
        yield slice(first, min(rows, first + step))


def tiles_of(indices: Tensor, shape: tuple[int, int]) -> tuple[Tile, ...]:
    """Return which of the ascending entries lie in which rows; waits for the device."""
    rows = list(row_tiles(*shape))
    if isinstance(indices, FakeTensor) or indices.is_meta:  # only bytes count: spread evenly
        ends = [len(indices) * tile.stop // shape[0] for tile in rows]
    else:
        bounds = torch.tensor([tile.stop * shape[1] for tile in rows], device=indices.device)
        ends = torch.searchsorted(indices.long(), bounds).tolist()
    starts = [0, *ends[:-1]]
    return tuple(Tile(tile, slice(a, b)) for tile, a, b in zip(rows, starts, ends, strict=True))


def gathered_gradient(dy: Tensor, x: Tensor, indices: Tensor, tiles: Sequence[Tile]) -> Tensor:
    """Return dW = dy^T x at some entries, (count,) float32.

    Args:
        dy: (tokens, out).
        x: (tokens, in).
        indices: (count,), ascending.
        tiles: Of them.
    """
    found = torch.empty(len(indices), dtype=torch.float32, device=x.device)
    for rows, entries in tiles:
        if entries.start < entries.stop:
            tile = dy[:, rows].t() @ x
            found[entries] = tile.view(-1)[indices[entries] - rows.start * x.shape[1]].float()
    return found


def common_sparsity(counts: Mapping[str, tuple[tuple[int, int], int]]) -> tuple[float, dict[str, int]]:
    """Return the sparsity of a peft Supertuning with room for all, and every layer's number of entries then.

    Args:
        counts: Every layer's shape and number of entries.
    """
    sizes = {name: shape[0] * shape[1] for name, (shape, _) in counts.items()}
    sparsity = 1 - max(count / sizes[name] for name, (_, count) in counts.items())
    while True:
        room = {name: int(size * (1 - sparsity)) for name, size in sizes.items()}  # as peft computes it
        if all(count <= room[name] for name, (_, count) in counts.items()):
            return sparsity, room
        sparsity = math.nextafter(sparsity, 0.0)  # it was rounded down by one


def padded(indices: Tensor, values: Tensor, count: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return `count` entries, ascending, and their values: zeros at the first unused ones."""
    unused = torch.ones(shape[0] * shape[1], dtype=torch.bool)
    unused[indices] = False
    added = unused.nonzero()[: count - len(indices), 0].to(indices.dtype)
    found, order = torch.cat([indices, added]).sort()
    return found, torch.cat([values, values.new_zeros(len(added))])[order]


@contextmanager
def _added(weight: Tensor, indices: Tensor, values: Tensor) -> Iterator[None]:
    """Hold a weight at its changed entries, and put the old ones back."""
    # Past autograd's count of changes: whatever it keeps of the weight is right again when it is read.
    flat = weight.data.view(-1)
    old = flat[indices]
    flat[indices] = (old.float() + values).to(flat.dtype)
    try:
        yield
    finally:
        flat[indices] = old


def _watched(watch: Watch | None, dy: Tensor, x: Tensor, weight: Tensor) -> None:
    if watch is not None:
        watch(dy, x, weight)


class _InPlace(torch.autograd.Function):
    """y = x (W + S)^T + b, with S inside W for the while; W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        tiles: tuple[Tile, ...],
        weight: Tensor,
        watch: Watch | None,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, values, indices)
        # The weight is no saved tensor: the same layer, called again, writes to it before it is read here.
        ctx.weight, ctx.tiles, ctx.watch = weight, tiles, watch
        with _added(weight, indices, values):
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, indices = ctx.saved_tensors
        needs_x, needs_values = ctx.needs_input_grad[:2]
        dy, flat = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = None
        if needs_x:
            with _added(ctx.weight, indices, values):
                dx = (dy @ ctx.weight.to(dy.dtype)).view(x.shape)
        dv = gathered_gradient(dy, flat, indices, ctx.tiles) if needs_values else None
        _watched(ctx.watch, dy, flat, ctx.weight)
        return dx, dv, None, None, None, None, None


class _Product(torch.autograd.Function):
    """x S^T, with S in tiles of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        tiles: tuple[Tile, ...],
        weight: Tensor,
        watch: Watch | None,
        shape: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, values, indices)
        ctx.weight, ctx.tiles, ctx.watch = weight, tiles, watch
        flat = x.reshape(-1, shape[1])
        y = flat.new_empty(len(flat), shape[0])
        for tile in tiles:
            y[:, tile.rows] = flat @ _dense_rows(tile, values, indices, flat).t()
        return y.view(*x.shape[:-1], shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, indices = ctx.saved_tensors
        needs_x, needs_values = ctx.needs_input_grad[:2]
        dy, flat = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = None
        if needs_x:
            total = torch.zeros(
                flat.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
            )
            for tile in ctx.tiles:
                total += dy[:, tile.rows] @ _dense_rows(tile, values, indices, flat)
            dx = total.to(x.dtype).view(x.shape)
        dv = gathered_gradient(dy, flat, indices, ctx.tiles) if needs_values else None
        _watched(ctx.watch, dy, flat, ctx.weight)
        return dx, dv, None, None, None, None, None


def _dense_rows(tile: Tile, values: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    """Return a tile's rows of S, (rows, in)."""
    rows, entries = tile
    dense = like.new_zeros(rows.stop - rows.start, like.shape[1])
    dense.view(-1)[indices[entries] - rows.start * like.shape[1]] = values[entries].to(dense.dtype)
    return dense
