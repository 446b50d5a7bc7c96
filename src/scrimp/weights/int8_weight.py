"""A matrix that lies in memory as 8-bit codes, and is a parameter of bf16 or fp32 to everyone else.

    y = x Wᵀ + b        a block of rows of W is decoded, multiplied, and dropped
    dx = dy W           decoded again, block by block; the blocks' products are summed in fp32
    dW = dyᵀ x          a plain tensor of the weight's dtype, in `.grad`

Autograd keeps x and the codes, never a decoded matrix. Oddities:

- `F.linear` (and so `nn.Linear`) is the one operation in blocks. Any other that reads the weight gets a
  decoded copy of all of it. A view that could be written through is refused, since it would be one, too.
- The product runs in the dtype of x, or autocast's.
- Only `copy_` and what fills a tensor anew (`normal_`, `zero_`, ...) change it in place, block by block and
  rounded to nearest. Everything else is refused: an update rounded to nearest would be lost where it is
  smaller than half a step of the code. An optimizer uses `requantize_rows_`, which rounds stochastically.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from scrimp.base.errors import ScrimpError
from scrimp.weights.affine8 import Affine8
from scrimp.weights.coded import autocast, blocks, decoded, weight_of, written

aten = torch.ops.aten

_FILLS = frozenset({aten.normal_.default, aten.uniform_.default, aten.zero_.default, aten.fill_.Scalar})
_LIKES = frozenset({aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
                    aten.rand_like.default, aten.randn_like.default})  # fmt: skip


class Int8Weight(Tensor):
    """A parameter (out, in) held as codes with a scale and an offset a group; see the module.

    It is a `QuantizedParameter` for optimizers, and `nn.Parameter(weight)` makes it one for modules.

    Attributes:
        codec: How rows become codes; its dtype is this tensor's.
        codes: (out, in) uint8.
        scale: (out, groups), in the weight's dtype.
        offset: (out, groups), in the weight's dtype.
    """

    codec: Affine8
    codes: Tensor
    scale: Tensor
    offset: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, offset: Tensor, codec: Affine8) -> Int8Weight:
        """Make a weight of its parts, which it keeps."""
        made: Int8Weight = Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=codec.dtype, device=codes.device
        )
        return made

    def __init__(self, codes: Tensor, scale: Tensor, offset: Tensor, codec: Affine8) -> None:
        self.codes, self.scale, self.offset, self.codec = codes, scale, offset, codec

    @classmethod
    def empty(cls, shape: tuple[int, ...], codec: Affine8, *, device: torch.device | str) -> Int8Weight:
        """Make a weight of shape (out, in) that holds nothing yet."""
        layout = codec.layout(*shape)
        parts = {name: torch.empty(shape, dtype=dtype, device=device)
                 for name, (shape, dtype) in layout.items()}  # fmt: skip
        return cls(**parts, codec=codec)

    @classmethod
    def of(cls, dense: Tensor, codec: Affine8) -> Int8Weight:
        """Make a weight of a matrix (out, in), rounded to nearest, a block of rows at a time."""
        made = cls.empty(dense.shape, codec, device=dense.device)
        if not dense.is_meta:
            _fill(made, lambda rows: dense[rows].float())
        return made

    # ---- what an optimizer asks for ------------------------------------------------------------------

    def stored_rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Return views of the codes, scales and offsets of rows `first` to `last` (excluded)."""
        rows = slice(first, last)
        return {"codes": self.codes[rows], "scale": self.scale[rows], "offset": self.offset[rows]}

    def dequantize_rows(self, first: int, last: int) -> Tensor:
        """Return rows `first` to `last` (excluded), (last - first, in) float32."""
        return self.codec.decode(self.stored_rows(first, last), torch.float32)

    def requantize_rows_(self, first: int, last: int, value: Tensor, noise: Tensor | None) -> None:
        """Store rows with fresh scales, rounded stochastically: the expectation is `value`.

        Args:
            first: The first row.
            last: The row after the last.
            value: (last - first, in), float32.
            noise: A 0-d int64 seed, one for the whole matrix; None rounds to nearest.
        """
        made = self.codec.encode(value, noise, first * self.shape[1])
        for name, stored in self.stored_rows(first, last).items():
            stored.copy_(made[name])

    @property
    def parts(self) -> dict[str, Tensor]:
        """Codes, scales and offsets by name."""
        return {name: getattr(self, name) for name in PARTS}

    def dequantize(self) -> Tensor:
        """Return a plain tensor of the same shape and dtype."""
        return self.codec.decode(self.stored_rows(0, self.shape[0]), self.dtype)

    # ---- what torch asks for -------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], Affine8]:
        return ["codes", "scale", "offset"], self.codec

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], codec: Affine8, outer_size: Any, outer_stride: Any
    ) -> Int8Weight:
        return Int8Weight(parts["codes"], parts["scale"], parts["offset"], codec)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.codec}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take over `F.linear`; let torch do all else."""
        kwargs = kwargs or {}
        if func is F.linear and isinstance(weight_of(args, kwargs), Int8Weight):
            return _linear(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on the parts, on blocks, or on a decoded copy."""
        kwargs = kwargs or {}
        if func in _ON_PARTS:
            return _ON_PARTS[func](func, args, kwargs)
        if func in _FILLS:
            _fill(args[0], lambda rows: _filled(func, args, kwargs, rows))
            return args[0]
        if func in _LIKES:
            return func(args[0].codes, *args[1:], **{"dtype": args[0].dtype} | kwargs)
        if func._schema.is_mutable and (changed := written(func, args, Int8Weight)):
            raise ScrimpError(
                f"{func} would change {changed[0]} in place, which would be lost in rounding: "
                "use an optimizer of scrimp.optim, which rounds stochastically"
            )
        if func.is_view and not (torch.is_grad_enabled() and args[0].requires_grad):
            raise ScrimpError(
                f"{func} would return a decoded copy of {args[0]}, and what is written to it would be lost: "
                "read its dequantize(), write by requantize_rows_()"
            )
        return func(*decoded(args, Int8Weight), **decoded(kwargs, Int8Weight))


# ---- the product -----------------------------------------------------------------------------------


def _linear(input: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Stand in for `F.linear`, whose autocast happens below the level that is taken over here."""
    input, bias = autocast(input, bias)
    out: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b, with W decoded in blocks of rows, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        flat = x.reshape(-1, x.shape[-1])
        y = x.new_empty(*x.shape[:-1], weight.shape[0])  # no view: peft's AdaLoRA adds to it in place
        found = y.view(-1, weight.shape[0])
        for rows in blocks(*weight.shape):
            found[:, rows] = flat @ _rows(weight, rows, x.dtype).t()
        if bias is not None:
            y += bias
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dy = dy.reshape(-1, dy.shape[-1])
        dx = _dx(dy, weight).to(x.dtype).view(x.shape) if needs_x else None
        dw = (dy.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if needs_weight else None
        return dx, dw, dy.sum(0) if needs_bias else None


def _dx(dy: Tensor, weight: Int8Weight) -> Tensor:
    """Return dy W, (tokens, in), summed over blocks in float32 at least."""
    total = dy.new_zeros(dy.shape[0], weight.shape[1], dtype=torch.promote_types(dy.dtype, torch.float32))
    for rows in blocks(*weight.shape):
        total += dy[:, rows] @ _rows(weight, rows, dy.dtype)
    return total


def _rows(weight: Int8Weight, rows: slice, dtype: torch.dtype) -> Tensor:
    return weight.codec.decode(weight.stored_rows(rows.start, rows.stop), dtype)


# ---- operations on the parts -----------------------------------------------------------------------


def _fill(weight: Int8Weight, value_of: Callable[[slice], Tensor]) -> None:
    for rows in blocks(*weight.shape):
        weight.requantize_rows_(rows.start, rows.stop, value_of(rows), None)


def _filled(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rows: slice) -> Tensor:
    weight = args[0]
    value = weight.scale.new_empty(rows.stop - rows.start, weight.shape[1], dtype=torch.float32)
    filled: Tensor = func(value, *args[1:], **kwargs)
    return filled


def _part_by_part(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Int8Weight:
    """Do to each part what is asked of the whole."""
    weight: Int8Weight = args[0]
    parts = {name: func(getattr(weight, name), *args[1:], **kwargs) for name in PARTS}
    return Int8Weight(**parts, codec=weight.codec)


def _to_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Move to another device, and to another dtype that a code can have: anything else is decoded."""
    weight: Int8Weight = args[0]
    dtype = kwargs.get("dtype") or weight.dtype
    others = {name: value for name, value in kwargs.items() if name != "dtype"}
    if dtype == weight.dtype:
        return _part_by_part(func, args, others)
    if dtype not in DTYPES:
        moved: Tensor = func(weight.dequantize(), **kwargs)
        return moved
    made = Int8Weight.of(weight.dequantize(), replace(weight.codec, dtype=dtype))
    return _part_by_part(func, (made,), others)


def _empty_like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Int8Weight:
    weight: Int8Weight = args[0]
    device = kwargs.get("device") or weight.device
    codec = replace(weight.codec, dtype=kwargs.get("dtype") or weight.dtype)
    return Int8Weight.empty(weight.shape, codec, device=device)


def _copy_(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    target, source = args[:2]
    if not isinstance(target, Int8Weight):
        return target.copy_(source.dequantize())  # type: ignore[no-any-return]
    if isinstance(source, Int8Weight) and source.codec == target.codec:
        for name in PARTS:
            getattr(target, name).copy_(getattr(source, name))
        return target
    dense = source.dequantize() if isinstance(source, Int8Weight) else source.expand(target.shape)
    _fill(target, lambda rows: dense[rows].to(target.device, torch.float32))
    return target


DTYPES = (torch.bfloat16, torch.float32)
PARTS = ("codes", "scale", "offset")
_ON_PARTS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _part_by_part,
    aten.alias.default: _part_by_part,
    aten.clone.default: _part_by_part,
    aten._to_copy.default: _to_copy,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy_,
}
