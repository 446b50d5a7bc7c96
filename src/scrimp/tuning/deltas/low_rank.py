"""Low-rank changes of a linear layer, with and without a core between the factors.

    LowRank        y = base(x) + s (B A - B0 A0) x       A: (r, in), B: (out, r)
    LowRankCore    y = base(x) + s (B R - C0) A x        R: (r, r), or its diagonal; C0: (out, r)

The subtracted part is how an initialisation that is meant to move the base weight (W - s B0 A0) is done: the
base stays as it is, so it may be quantised, is not rounded, and the change exports as a plain LoRA on it,
of rank 2r (LowRank) or r (LowRankCore, whose A is the same in both). Where B = B0 and A = A0 both parts are
the same operations on the same numbers, so that the difference is zero to the last bit.

A factor that does not train is a buffer. Where A is one, the backward pass needs A x, of r features, and not
x. Where A trains, x is kept in its own dtype and not in the factors' fp32.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.tuning.deltas.delta import Delta, Factors
from scrimp.tuning.deltas.parts import draw_uniform

CorePart = Literal["lora_A", "lora_B", "core"]
CoreShape = Literal["full", "diagonal", "triangular"]


class Start(NamedTuple):
    """Where the factors of a LoRA begin, without the scale.

    Attributes:
        a: (r, in) float32.
        b: (out, r) float32.
    """

    a: Tensor
    b: Tensor


class CoreStart(NamedTuple):
    """Where the factors of a change with a core begin, without the scale.

    Attributes:
        a: (r, in) float32.
        b: (out, r) float32.
        core: (r, r) or (r,) float32.
    """

    a: Tensor
    b: Tensor
    core: Tensor


def lora_start(layer: nn.Linear, rank: int, *, seed: int) -> Start:
    """Return LoRA's own start: A uniform in +-1/sqrt(in) (Kaiming's with a = sqrt(5), as peft's), B zero.

    Args:
        layer: Whose shape and device count; its weight may be packed.
        rank: r.
        seed: Of A; drawn on the CPU, so that every device begins alike.
    """
    out, fan_in, device = layer.out_features, layer.in_features, layer.weight.device
    a = torch.empty(rank, fan_in, device=device)
    if not a.is_meta:
        a.copy_(draw_uniform(seed, (rank, fan_in), bound=1 / math.sqrt(fan_in)))
    return Start(a, torch.zeros(out, rank, device=device))


class LowRank(Delta):
    """y = base(x) + s (B A - B0 A0) x.

    Attributes:
        lora_A: A, (r, in) float32.
        lora_B: B, (out, r) float32.
        start_a: A0, or None where nothing is subtracted.
        start_b: B0.
        scale: s.
        dropout: The probability with which B A, not B0 A0, misses an input.
    """

    lora_A: Tensor  # noqa: N815 - peft's name
    lora_B: Tensor  # noqa: N815
    start_a: Tensor | None
    start_b: Tensor | None

    def __init__(
        self,
        start: Start,
        *,
        scale: float,
        dropout: float = 0.0,
        trains_a: bool = True,
        subtracts_start: bool = False,
    ) -> None:
        """Take the factors where they begin.

        Args:
            start: The factors; not copied.
            scale: s, alpha / r or, rank-stabilised, alpha / sqrt(r).
            dropout: As above.
            trains_a: Whether A trains.
            subtracts_start: Whether to subtract s B0 A0, with A0 and B0 the start.
        """
        super().__init__()
        self.scale, self.dropout = scale, dropout
        _hold(self, "lora_A", start.a, trains=trains_a)
        _hold(self, "lora_B", start.b, trains=True)
        self.register_buffer("start_a", start.a.clone() if subtracts_start else None)
        self.register_buffer("start_b", start.b.clone() if subtracts_start else None)

    def begin(self, start: Start) -> None:
        """Begin anew elsewhere, in place."""
        _fill((self.lora_A, self.start_a), start.a)
        _fill((self.lora_B, self.start_b), start.b)

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the layer's output, (..., out) in the base's dtype; the change is computed in fp32."""
        y: Tensor = base(x)
        h = functional.dropout(x.to(self.lora_A.dtype), self.dropout, self.training) if self.dropout else x
        change = _product(h, self.lora_A, self.lora_B, self.scale)
        if self.start_a is not None and self.start_b is not None:
            change = change - _product(x, self.start_a, self.start_b, self.scale)
        return (y + change).to(y.dtype)

    @torch.no_grad()
    def factors(self) -> Factors:
        """Return (A, s B), and with a start to subtract ([A; A0], s [B, -B0])."""
        if self.start_a is None or self.start_b is None:
            return Factors(self.lora_A.detach(), self.scale * self.lora_B)
        b = self.scale * torch.cat([self.lora_B, -self.start_b], dim=1)
        return Factors(torch.cat([self.lora_A, self.start_a]), b)


class LowRankCore(Delta):
    """y = base(x) + s (B R - C0) A x.

    Attributes:
        lora_A: A, (r, in) float32.
        lora_B: B, (out, r) float32; in pieces, a list of its columns, each of which can be put to sleep.
        core: R: (r, r), of which a triangular one's lower half counts, or (r,), its diagonal.
        start_b: C0 = B0 R0, (out, r), or None where nothing is subtracted.
        scale: s.
        shape: The core's.
    """

    lora_A: Tensor  # noqa: N815 - peft's name
    lora_B: Tensor | nn.ParameterList  # noqa: N815
    core: Tensor
    start_b: Tensor | None

    def __init__(
        self,
        start: CoreStart,
        *,
        scale: float,
        shape: CoreShape = "full",
        trains: tuple[CorePart, ...] = ("core",),
        pieces: int = 1,
        subtracts_start: bool = False,
    ) -> None:
        """Take the factors where they begin.

        Args:
            start: The factors; not copied.
            scale: s.
            shape: The core's.
            trains: Which of the three.
            pieces: Of a B that trains.
            subtracts_start: Whether to subtract s B0 R0 A, with B0 and R0 the start; A must be frozen.
        """
        super().__init__()
        self.scale, self.shape = scale, shape
        _hold(self, "lora_A", start.a, trains="lora_A" in trains)
        _hold(self, "core", start.core, trains="core" in trains)
        if pieces == 1:
            _hold(self, "lora_B", start.b, trains="lora_B" in trains)
        else:
            self.lora_B = nn.ParameterList(part.clone() for part in start.b.tensor_split(pieces, dim=1))
        with torch.no_grad():
            self.register_buffer("start_b", self._b_core().clone() if subtracts_start else None)

    def begin(self, start: CoreStart) -> None:
        """Begin anew elsewhere, in place."""
        _fill((self.lora_A,), start.a)
        _fill((self.core,), start.core)
        parts = self.parts
        for part, value in zip(parts, start.b.tensor_split(len(parts), dim=1), strict=True):
            _fill((part,), value)
        if self.start_b is not None:
            _fill((self.start_b,), self._b_core())

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the layer's output, (..., out) in the base's dtype; the change is computed in fp32."""
        y: Tensor = base(x)
        z = down(x, self.lora_A) * self.scale  # (..., r)
        if self.start_b is None:
            change = functional.linear(self._through_core(z), self._b())
        else:
            change = functional.linear(z, self._b_core() - self.start_b)
        return (y + change).to(y.dtype)

    @torch.no_grad()
    def factors(self) -> Factors:
        """Return (A, s (B R - C0))."""
        b = self._b_core()
        return Factors(self.lora_A.detach(), self.scale * (b if self.start_b is None else b - self.start_b))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """B's pieces, (out, some of r) each."""
        return tuple(self.lora_B) if isinstance(self.lora_B, nn.ParameterList) else (self.lora_B,)

    def _b(self) -> Tensor:
        parts = self.parts
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _matrix(self) -> Tensor:
        return self.core.tril() if self.shape == "triangular" else self.core

    def _through_core(self, z: Tensor) -> Tensor:
        return z * self.core if self.shape == "diagonal" else functional.linear(z, self._matrix())

    def _b_core(self) -> Tensor:
        """Return B R, (out, r)."""
        return self._b() * self.core if self.shape == "diagonal" else self._b() @ self._matrix()


def _product(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    # The scale meets r features and not `out`.
    return functional.linear(down(x, a) * scale, b)


def down(x: Tensor, a: Tensor) -> Tensor:
    """Return x A^T, (..., r) in A's dtype, with x saved in its own.

    Args:
        x: (..., in), perhaps of half precision.
        a: (r, in) float32.
    """
    if x.dtype == a.dtype:
        return functional.linear(x, a)
    z: Tensor = _Down.apply(x, a)  # type: ignore[no-untyped-call]
    return z


class _Down(torch.autograd.Function):
    """x A^T with x saved as it came, which siblings share: each one's fp32 copy would be twice as large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, a)
        ctx.dtype = x.dtype
        return functional.linear(x.to(a.dtype), a)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, a = ctx.saved_tensors
        g = gradients[0].to(a.dtype)
        to_x = (g @ a).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        to_a = None if x is None else g.flatten(0, -2).mT @ x.flatten(0, -2).to(a.dtype)
        return to_x, to_a


def _hold(module: nn.Module, name: str, value: Tensor, *, trains: bool) -> None:
    if trains:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


@torch.no_grad()
def _fill(held: Collection[Tensor | None], value: Tensor) -> None:
    for tensor in held:
        if tensor is not None:
            tensor.copy_(value)
