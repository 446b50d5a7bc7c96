"""A frozen matrix that lies in memory as 4-bit codes, and is a parameter of bf16 or fp32 to everyone else.

    y = x Wᵀ + b        a block of rows of W is decoded, multiplied, and dropped
    dx = dy W           decoded again, block by block; the blocks' products are summed in fp32

It never trains, so that autograd keeps neither x nor a decoded matrix. Oddities:

- `F.linear` (and so `nn.Linear`) is the one operation in blocks. Any other that reads the weight gets a
  decoded copy of all of it. A view that could be written through is refused, since it would be one, too.
- The product runs in the dtype of x, or autocast's. Nothing depends on whether a module trains or
  evaluates, and nothing is repacked on the way.
- Only `copy_` and what fills a tensor anew (`normal_`, `zero_`, ...) change it in place. A change of dtype
  keeps the codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from scrimp.base.errors import ScrimpError
from scrimp.weights.coded import BLOCK, autocast, blocks, decoded, weight_of, written
from scrimp.weights.nf4_code import NF4Code, encode

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

aten = torch.ops.aten

_FILLS = frozenset({aten.normal_.default, aten.uniform_.default, aten.zero_.default, aten.fill_.Scalar})
_LIKES = frozenset({aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
                    aten.rand_like.default, aten.randn_like.default})  # fmt: skip


class NF4Weight(Tensor):
    """A frozen parameter (out, in) held as codes with an absmax a group; see the module.

    It is a `QuantizedParameter` to those who read it. For modules `nn.Parameter(weight, requires_grad=False)`
    makes it a parameter.

    Attributes:
        codec: How elements become codes; its dtype is this tensor's.
        parts: What it is kept as; see `NF4Code`.
    """

    codec: NF4Code
    parts: dict[str, Tensor]

    @staticmethod
    def __new__(cls, parts: dict[str, Tensor], codec: NF4Code, shape: tuple[int, ...]) -> NF4Weight:
        """Make a weight of its parts, which it keeps."""
        codes = parts["codes"]
        made: NF4Weight = Tensor._make_wrapper_subclass(cls, shape, dtype=codec.dtype, device=codes.device)
        return made

    def __init__(self, parts: dict[str, Tensor], codec: NF4Code, shape: tuple[int, ...]) -> None:
        self.parts, self.codec = parts, codec

    @classmethod
    def empty(cls, shape: tuple[int, ...], codec: NF4Code, *, device: torch.device | str) -> NF4Weight:
        """Make a weight of shape (out, in) that holds nothing yet."""
        layout = codec.layout(math.prod(shape))
        parts = {name: torch.empty(size, dtype=dtype, device=device)
                 for name, (size, dtype) in layout.items()}  # fmt: skip
        return cls(parts, codec, tuple(shape))

    @classmethod
    def of(cls, dense: Tensor, codec: NF4Code) -> NF4Weight:
        """Make a weight of a matrix (out, in)."""
        made = cls.empty(tuple(dense.shape), codec, device=dense.device)
        if not dense.is_meta:
            flat = dense.reshape(-1)
            _fill(made, lambda some: flat[some].float())
        return made

    # ---- what readers ask for ------------------------------------------------------------------------

    def dequantize_rows(self, first: int, last: int) -> Tensor:
        """Return rows `first` to `last` (excluded), (last - first, in) float32."""
        return self.decoded(first, last, torch.float32)

    def dequantize(self) -> Tensor:
        """Return a plain tensor of the same shape and dtype."""
        return self.decoded(0, self.shape[0], self.dtype)

    def decoded(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return rows `first` to `last` (excluded), (last - first, in) in `dtype`."""
        columns = self.shape[1]
        flat = self.codec.decode(self.parts, first * columns, last * columns, dtype)
        return flat.view(last - first, columns)

    def stored_rows(self, first: int, last: int) -> NoReturn:
        """Refuse: groups run across rows, and nothing may be changed.

        Raises:
            ScrimpError: Always.
        """
        raise _frozen()

    def requantize_rows_(self, first: int, last: int, value: Tensor, noise: Tensor) -> NoReturn:
        """Refuse: it is frozen.

        Raises:
            ScrimpError: Always.
        """
        raise _frozen()

    # ---- what torch asks for -------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Tensor:
        # torch asks for the tensors that `__tensor_flatten__` names by attribute.
        parts: dict[str, Tensor] = self.__dict__.get("parts", {})
        if name in parts:
            return parts[name]
        raise AttributeError(name)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[NF4Code, tuple[int, ...]]]:
        return list(self.parts), (self.codec, tuple(self.shape))

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], context: tuple[NF4Code, tuple[int, ...]], outer_size: Any, outer_stride: Any
    ) -> NF4Weight:
        return NF4Weight(dict(parts), *context)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.codec}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take over `F.linear`; let torch do all else."""
        kwargs = kwargs or {}
        if func is F.linear and isinstance(weight_of(args, kwargs), NF4Weight):
            return _linear(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on the parts, on pieces, or on a decoded copy."""
        kwargs = kwargs or {}
        if func in _ON_PARTS:
            return _ON_PARTS[func](func, args, kwargs)
        if func in _FILLS:
            weight = args[0]
            _fill(weight, lambda some: func(_piece(weight, some), *args[1:], **kwargs))
            return weight
        if func in _LIKES:
            like = torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device)
            return func(like, *args[1:], **kwargs)
        if func._schema.is_mutable and written(func, args, NF4Weight):
            raise _frozen()
        if func.is_view:
            raise ScrimpError(
                f"{func} would return a decoded copy of {args[0]}, and what is written to it would be lost: "
                "read its dequantize()"
            )
        return func(*decoded(args, NF4Weight), **decoded(kwargs, NF4Weight))


def _frozen() -> ScrimpError:
    return ScrimpError("weights nf4 are frozen: tune an adapter (--tune lora), or train with weights int8")


# ---- the product -----------------------------------------------------------------------------------


def _linear(input: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Stand in for `F.linear`, whose autocast happens below the level that is taken over here."""
    if weight.requires_grad:
        raise _frozen()
    input, bias = autocast(input, bias)
    out: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b, with W decoded in blocks of rows, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        flat = x.reshape(-1, x.shape[-1])
        y = x.new_empty(*x.shape[:-1], weight.shape[0])  # no view: peft's AdaLoRA adds to it in place
        found = y.view(-1, weight.shape[0])
        for rows in blocks(*weight.shape):
            torch.mm(flat, weight.decoded(rows.start, rows.stop, x.dtype).t(), out=found[:, rows])
        if bias is not None:
            y += bias
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad
        flat = dy.reshape(-1, dy.shape[-1])
        dx = _dx(flat, weight).view(*dy.shape[:-1], -1) if needs_x else None
        return dx, None, flat.sum(0) if needs_bias else None


def _dx(dy: Tensor, weight: NF4Weight) -> Tensor:
    """Return dy W, (tokens, in), summed over blocks in float32 at least."""
    products = (
        dy[:, rows] @ weight.decoded(rows.start, rows.stop, dy.dtype) for rows in blocks(*weight.shape)
    )
    if weight.shape.numel() <= BLOCK:
        return next(products)
    total = dy.new_zeros(dy.shape[0], weight.shape[1], dtype=torch.promote_types(dy.dtype, torch.float32))
    for product in products:
        total += product
    return total.to(dy.dtype)


# ---- operations on the parts -----------------------------------------------------------------------


def _fill(weight: NF4Weight, value_of: Callable[[slice], Tensor]) -> None:
    """Code a matrix anew, a run of whole groups at a time; of all of it only absmax is held in float32."""
    numel, group = weight.shape.numel(), weight.codec.group
    absmax = weight.parts["codes"].new_empty(-(-numel // group), dtype=torch.float32)
    size = max(1, BLOCK // group) * group
    for first in range(0, numel, size):
        last = min(numel, first + size)
        codes, largest = encode(value_of(slice(first, last)), group)
        weight.parts["codes"][first // 2 : -(-last // 2)] = codes
        absmax[first // group : -(-last // group)] = largest
    for name, part in weight.codec.encode_absmax(absmax).items():
        weight.parts[name].copy_(part)


def _piece(weight: NF4Weight, some: slice) -> Tensor:
    return weight.parts["codes"].new_empty(some.stop - some.start, dtype=torch.float32)


def _part_by_part(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NF4Weight:
    """Do to each part what is asked of the whole."""
    weight: NF4Weight = args[0]
    parts = {name: func(part, *args[1:], **kwargs) for name, part in weight.parts.items()}
    return NF4Weight(parts, weight.codec, tuple(weight.shape))


def _to_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Move to another device, and to another dtype that decoding can have: anything else is decoded."""
    weight: NF4Weight = args[0]
    dtype = kwargs.get("dtype") or weight.dtype
    if dtype not in DTYPES:
        moved: Tensor = func(weight.dequantize(), **kwargs)
        return moved
    made = _part_by_part(func, args, {name: value for name, value in kwargs.items() if name != "dtype"})
    return NF4Weight(made.parts, replace(made.codec, dtype=dtype), tuple(made.shape))


def _empty_like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NF4Weight:
    weight: NF4Weight = args[0]
    codec = replace(weight.codec, dtype=kwargs.get("dtype") or weight.dtype)
    return NF4Weight.empty(tuple(weight.shape), codec, device=kwargs.get("device") or weight.device)


def _copy_(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    target, source = args[:2]
    if not isinstance(target, NF4Weight):
        return target.copy_(source.dequantize())  # type: ignore[no-any-return]
    if isinstance(source, NF4Weight) and replace(source.codec, dtype=target.dtype) == target.codec:
        for name, part in target.parts.items():
            part.copy_(source.parts[name])
        return target
    dense = source.dequantize() if isinstance(source, NF4Weight) else source.expand(target.shape)
    flat = dense.reshape(-1)
    _fill(target, lambda some: flat[some].to(target.device, torch.float32))
    return target


_ON_PARTS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _part_by_part,
    aten.alias.default: _part_by_part,
    aten.clone.default: _part_by_part,
    aten._to_copy.default: _to_copy,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy_,
}
