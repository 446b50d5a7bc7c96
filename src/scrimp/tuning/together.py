"""Several LoRAs over one base: the rows of a batch belong to jobs, and the base's product is taken once.

    y = x W^T + b                          once, for the rows of all jobs
    y_j += s_j (x_j A_j^T) B_j^T           for the rows of job j, in place

Every job keeps a model of its own whose base tensors are the others' (`share`), so that all that is done with
one job's adapter (evaluating, saving, naming) is done as if it were alone. One more such model, the trunk,
runs the shared batches (`lay_together`): where any job has an adapter it has a `SharedLinear`.

Memory: x and the (rows, r) products x_j A_j^T are kept for the backward pass, as a single LoRA keeps them; y
is kept by nobody, so it may be changed in place. An activation policy that keeps the products of matrices
cannot be used with that, and torch says so. On a CPU all jobs' small products of a layer are one call
(`together_cpu`).

Source: the split at the small product is LoRAFusion's, Zhu et al., arXiv 2510.00206; its adapters' tokens
share a product as mLoRA's do, Ye et al., arXiv 2312.02515.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from scrimp.tuning import together_cpu
from scrimp.tuning.from_peft.tuning import ADAPTER

Model = TypeVar("Model", bound=nn.Module)


class Span(NamedTuple):
    """Rows of a shared batch.

    Attributes:
        job: Whose they are.
        first: The first row.
        last: The row after the last.
    """

    job: int
    first: int
    last: int


@dataclass(slots=True)
class Rows:
    """Whose the rows of the present batch are; every shared layer reads it."""

    spans: tuple[Span, ...] = field(default=())


class Low(NamedTuple):
    """The rows of one adapter in a product.

    Attributes:
        first: The first row of the batch.
        last: The row after the last.
        scale: alpha / r, or whatever the adapter has in its place.
    """

    first: int
    last: int
    scale: float


class SharedLinear(nn.Module):
    """A frozen linear layer with one LoRA a job.

    Args:
        base: The layer.
        adapters: peft's layers around it, by job; they stay their jobs' and are no part of this module.
        rows: Whose the rows are.
    """

    def __init__(self, base: nn.Linear, adapters: Mapping[int, nn.Module], rows: Rows) -> None:
        super().__init__()
        self.base_layer = base
        self._adapters, self._rows = dict(adapters), rows

    def forward(self, x: Tensor) -> Tensor:
        """Return (rows, ..., out) of inputs (rows, ..., in)."""
        y: Tensor = self.base_layer(x)
        lows, factors = [], []
        for job, first, last in self._rows.spans:
            if job in self._adapters:
                layer = cast("Any", self._adapters[job])
                lows.append(Low(first, last, layer.scaling[ADAPTER]))
                factors += [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
        if not lows:
            return y
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else factors[0].dtype
        with torch.autocast(device, enabled=False):
            return cast("Tensor", _add_all(y, x, tuple(lows), dtype, *factors))

    @property
    def weight(self) -> Tensor:
        """The base's, for code of models that looks at its dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.base_layer.bias


class _Added(torch.autograd.Function):
    """y with every adapter's change added to its rows, in place; the arithmetic runs in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, lows: tuple[Low, ...], dtype: torch.dtype, *factors: Tensor
    ) -> Tensor:
        is_plain = dtype == x.dtype and together_cpu.takes(x, y, factors)
        small = (
            together_cpu.add_rows(y, x, lows, factors) if is_plain else _add_rows(y, x, lows, factors, dtype)
        )
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, *factors, *small)
        ctx.lows, ctx.is_plain = lows, is_plain
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gy = gradients[0].contiguous()
        count = len(ctx.lows)
        x, *rest = ctx.saved_tensors
        factors, small = rest[: 2 * count], rest[2 * count :]
        gx = _rows_like(x, ctx.lows) if ctx.needs_input_grad[1] else None
        backward = together_cpu.rows_backward if ctx.is_plain else _rows_backward
        found = backward(gy, x, gx, ctx.lows, factors, small)
        return gradients[0], gx, None, None, *found


_add_all: Any = _Added.apply


def _add_rows(
    y: Tensor, x: Tensor, lows: Sequence[Low], factors: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The equations of `together_cpu.add_rows`, on any device, in `dtype`."""
    small = []
    for (first, last, scale), a, b in zip(lows, factors[::2], factors[1::2], strict=True):
        s = (x[first:last].flatten(0, -2).to(dtype) @ a.to(dtype).T).mul_(scale)
        _put(y[first:last], s, b.to(dtype).T, keep=1.0)
        small.append(s)
    return small


def _rows_backward(
    gy: Tensor,
    x: Tensor,
    gx: Tensor | None,
    lows: Sequence[Low],
    factors: Sequence[Tensor],
    small: Sequence[Tensor],
) -> list[Tensor]:
    """The equations of `together_cpu.rows_backward`, on any device, in the dtype of `small`."""
    found = []
    for (first, last, scale), a, b, s in zip(lows, factors[::2], factors[1::2], small, strict=True):
        g = gy[first:last].flatten(0, -2).to(s.dtype)
        gs = (g @ b.to(s.dtype)).mul_(scale)
        found.append((gs.T @ x[first:last].flatten(0, -2).to(s.dtype)).to(a.dtype))
        found.append((g.T @ s).to(b.dtype))
        if gx is not None:
            _put(gx[first:last], gs, a.to(s.dtype), keep=0.0)
    return found


def _put(rows: Tensor, left: Tensor, right: Tensor, *, keep: float) -> None:
    """Set rows of a contiguous tensor to keep * rows + left @ right; `keep` is 1, or 0, which reads none."""
    flat = rows.view(-1, rows.shape[-1])
    if flat.dtype == left.dtype:
        flat.addmm_(left, right, beta=keep)
    elif keep:
        flat.add_(left @ right)
    else:
        flat.copy_(left @ right)


def _rows_like(x: Tensor, lows: Sequence[Low]) -> Tensor:
    """Return a contiguous tensor of the shape of x, zero where no adapter writes."""
    covered = sum(low.last - low.first for low in lows) == len(x)
    return (torch.empty_like if covered else torch.zeros_like)(x, memory_format=torch.contiguous_format)


def share(model: Model) -> Model:
    """Return a model of the same structure over the very same tensors."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def lay_together(trunk: nn.Module, models: Sequence[nn.Module]) -> Rows:
    """Put the adapters of several models over a trunk that shares their base.

    Args:
        trunk: The base alone; changed in place.
        models: The jobs' models, with their adapters.

    Returns:
        Where the jobs of a batch's rows are to be set before it runs.
    """
    from peft.tuners.lora import LoraLayer

    rows = Rows()
    at: dict[str, dict[int, nn.Module]] = {}
    for job, model in enumerate(models):
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                at.setdefault(name, {})[job] = cast("nn.Module", module)
    for name, layers in at.items():
        trunk.set_submodule(name, SharedLinear(cast("nn.Linear", trunk.get_submodule(name)), layers, rows))
    return rows
