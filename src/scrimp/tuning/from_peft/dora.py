"""DoRA with the factored norm: peft's layers and files, without a matrix of the weight's size.

    y = g (h - b + s x Aᵀ Bᵀ) + b        g = magnitude / w,   h = x Wᵀ + b, the frozen layer's output
    wᵢ = ‖Wᵢ + s Bᵢ A‖                   over row i; constant in the backward pass (section 4.3 of the paper)
    w² = ‖Wᵢ‖² + s Σₖ Bᵢₖ (2 U + s B A Aᵀ)ᵢₖ,   U = W Aᵀ

peft sends an identity through A and B to get B A, adds it to W, and has autograd keep h, x Aᵀ Bᵀ and more of
that size. Here the norm's largest temporary is U, (out, rank), and the backward pass reads y, which is there
anyway where what follows the layer keeps its input (attention its values, an MLP its gate):

    dA, dB, dx as LoRA's of g dy,   dh = g dy,   dmagnitude = Σ_tokens dy (y - b) / magnitude

Oddities:

- Some models change the output of a linear layer in place (OLMo, Falcon). y is then made again from x: one
  more product of that layer.
- Arithmetic is fp32 at least. g lies within 1e-2 of 1: rounded to bf16 it would be the change's whole size.
- The norms of a frozen W's rows are kept as long as its version stays; writing through `weight.data` is not
  seen until the next `train()`. A quantised W is decoded anew, in blocks of rows, as U needs it.
- With dropout the frozen layer runs twice, the second time on what is left of x, as the authors' does.
- A magnitude of exactly 0 stays 0. Second derivatives are not available.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer, cache_decorator
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scrimp.base.protocols import QuantizedParameter
from scrimp.tuning.from_peft.fused_lora import is_plain

BLOCK = 1 << 20  # elements of W that are decoded or widened at once


def factor_norms(model: nn.Module) -> None:
    """Let every DoRA adapter of a model's linear layers take its norms from the factors.

    Parameters, their names and what is saved stay peft's; embeddings and convolutions stay as they are. An
    adapter whose B is zero changes nothing afterwards, to the last bit: its magnitudes become the norms as
    they are taken here, where peft rounds them to the weight's dtype.

    Args:
        model: A model, or peft's around it, with adapters of `LoraConfig(use_dora=True)`. Others stay as
            they are.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for name, variant in layer.lora_variant.items():
            if type(variant) is DoraLinearVariant and is_plain(layer, name):
                _swap(layer, name)


@torch.no_grad()
def _swap(layer: Any, name: str) -> None:
    old = layer.lora_magnitude_vector[name]
    made = FactoredMagnitude(old)
    layer.lora_magnitude_vector[name] = made.train(old.training)
    layer.lora_variant[name] = FactoredDora()
    b = layer.lora_B[name].weight
    if not b.is_meta and not b.any():
        old.weight.copy_(made.norms(layer, adapter_name=name))


class FactoredMagnitude(DoraLinearLayer):
    """peft's holder of the magnitudes, which it shares, with the norms by factors.

    Attributes:
        weight: (out,), the magnitudes.
        squares: (out,), the squared norms of the frozen rows, float32 or wider; in no state dict.
    """

    squares: Tensor | None

    def __init__(self, old: DoraLinearLayer) -> None:
        super().__init__(fan_in_fan_out=old.fan_in_fan_out)  # type: ignore[no-untyped-call]
        self.weight = old.weight
        self.register_buffer("squares", None, persistent=False)
        self._seen: tuple[Tensor, int] | None = None  # the weight that they are of, and its version

    def train(self, mode: bool = True) -> FactoredMagnitude:
        """Forget the norms of the frozen rows, as peft forgets what it keeps."""
        self._seen = None
        super().train(mode)
        return self

    @cache_decorator("norms")  # type: ignore[untyped-decorator]  # within `peft.helpers.DoraCaching`, as peft's own
    @torch.no_grad()
    def norms(self, layer: Any, *, adapter_name: str) -> Tensor:
        """Return the norms of the rows of W + s B A, (out,), float32 or wider.

        Args:
            layer: peft's layer.
            adapter_name: Which of its adapters.
        """
        stored = _weight(layer.get_base_layer())
        weight = stored.T if self.fan_in_fan_out else stored
        a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        projected, squares = _project(weight, a, self._known(stored))
        self._keep(stored, squares)
        return norms_of(squares, projected, a, b, layer.scaling[adapter_name])

    def _known(self, weight: Tensor) -> Tensor | None:
        """Return the squared norms of a weight's rows, if they are kept and still right."""
        if torch.compiler.is_compiling() or self._seen is None:  # a version is no constant of a graph
            return None
        of, version = self._seen
        return self.squares if of is weight and version == weight._version else None

    def _keep(self, weight: Tensor, squares: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        is_frozen = type(weight) is nn.Parameter and not weight.requires_grad and not weight.is_inference()
        self.squares, self._seen = (squares, (weight, weight._version)) if is_frozen else (None, None)


class FactoredDora(DoraLinearVariant):
    """peft's variant of a layer, of which only the forward pass is another."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Return the layer's output, (..., out).

        Args:
            module: peft's layer.
            active_adapter: Which of its adapters.
            x: (..., in).
            result: The output so far, (..., out).
        """
        if not is_plain(module, active_adapter):
            whole: Tensor = DoraLinearVariant.forward(module, active_adapter, x, result)
            return whole
        dropout = module.lora_dropout[active_adapter]
        if isinstance(dropout, nn.Identity) or not module.training:
            y = _adapted(module, active_adapter, x, result, result.dtype)
            # After another adapter the frozen layer alone could not make y again: it stays out of reach.
            return y if len(module.active_adapters) == 1 else y.clone()
        x = dropout(x)
        again = _frozen(module.get_base_layer(), x)
        exact = torch.promote_types(again.dtype, torch.float32)
        return result + (_adapted(module, active_adapter, x, again, exact) - again)


def norms_of(squares: Tensor, projected: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the norms of the rows of W + s B A, (out,), without B A.

    Args:
        squares: The squared norms of W's rows, (out,), float32 or wider.
        projected: W Aᵀ, (out, rank), of the same dtype.
        a: (rank, in).
        b: (out, rank).
        scale: s.
    """
    a, b = a.to(squares.dtype), b.to(squares.dtype)
    change = b * torch.addmm(projected, b, a @ a.T, beta=2, alpha=scale)
    # Rounding may leave a row of zeros below zero. The floor keeps what is divided by it finite.
    return (squares + scale * change.sum(1)).clamp_min(1e-24).sqrt()


def _weight(base: Any) -> Tensor:
    """Return the frozen layer's weight: itself where its rows can be read, else a copy that peft decodes."""
    stored = getattr(base, "weight", None)
    if isinstance(stored, Tensor) and (
        type(stored) is nn.Parameter or isinstance(stored, QuantizedParameter)
    ):
        return stored
    decoded: Tensor = dequantize_module_weight(base)
    return decoded


def _project(weight: Tensor, a: Tensor, squares: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return W Aᵀ, (out, rank), and the squared norms of W's rows, (out,), which may be known."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a = a.to(dtype)
    if weight.dtype == dtype and not isinstance(weight, QuantizedParameter):
        return weight @ a.T, _squares(weight) if squares is None else squares
    size = max(1, BLOCK // weight.shape[1])
    parts, sums = [], []
    for first in range(0, weight.shape[0], size):
        rows = _rows(weight, first, min(first + size, weight.shape[0]), dtype)
        parts.append(rows @ a.T)
        if squares is None:
            sums.append(_squares(rows))
    return torch.cat(parts), torch.cat(sums) if squares is None else squares


def _rows(weight: Tensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, QuantizedParameter):
        return weight.dequantize_rows(first, last)
    return weight[first:last].to(dtype)


def _squares(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square()


def _frozen(base: Any, x: Tensor) -> Tensor:
    """Return the frozen layer's output."""
    stored = getattr(base, "weight", x)  # packed codes of 4 bits are no dtype to compute in
    h: Tensor = base(x.to(stored.dtype) if stored.is_floating_point() else x)
    return h


def _adapted(module: Any, name: str, x: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    magnitude, base, scale = module.lora_magnitude_vector[name], module.get_base_layer(), module.scaling[name]
    kind = x.device.type
    is_mixed = torch.is_autocast_enabled(kind)
    inner = torch.get_autocast_dtype(kind) if is_mixed else a.dtype
    with torch.autocast(kind, enabled=False) if is_mixed else nullcontext():
        norms = magnitude.norms(module, adapter_name=name)
        made: Tensor = _Adapted.apply(  # type: ignore[no-untyped-call]
            h, x.to(inner), a.to(inner), b.to(inner), magnitude.weight, norms, base, scale, dtype,
            getattr(base, "bias", None),
        )  # fmt: skip
    return made


def _compose(h: Tensor, z: Tensor, b: Tensor, g: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return g (h - bias + s z Bᵀ) + bias, (..., out), float32 or wider."""
    h = h.contiguous()
    y = h * g if bias is None else torch.addcmul((1 - g) * bias, h, g)
    # In place into all of y at once: an output that is a view could not be changed in place by a model.
    rows, scaled = _flat(y), _scaled(b, g, scale).T
    if rows.dtype == z.dtype:
        rows.addmm_(z, scaled)
    else:
        rows.add_(z @ scaled)
    return y


class _Adapted(torch.autograd.Function):
    """The output of a layer and an adapter, and the gradients that the module states."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        norms: Tensor,
        base: nn.Module,
        scale: float,
        dtype: torch.dtype,
        bias: Tensor | None,
    ) -> Tensor:
        z, g = _flat(x) @ a.T, magnitude / norms
        y = _compose(h, z, b, g, bias, scale).to(dtype)
        _, _, of_a, of_b, of_magnitude, *_ = ctx.needs_input_grad
        ctx.witness = None
        kept = y if of_magnitude else None
        if of_magnitude and not torch.compiler.is_compiling():  # compiled code keeps what y was
            ctx.witness, kept = _Witness(y), y.data
        ctx.save_for_backward(
            kept, x if of_a or of_magnitude else None, z if of_b else None, a, b, magnitude, norms, bias
        )
        ctx.base, ctx.scale, ctx.dtypes = base, scale, (h.dtype, dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, x, z, a, b, magnitude, norms, bias = ctx.saved_tensors
        of_h, of_x, of_a, of_b, of_magnitude, *_, of_bias = ctx.needs_input_grad
        g, scale, shape, dy = magnitude / norms, ctx.scale, dy.shape, _flat(dy)
        low = dy.to(b.dtype)
        dh = dx = da = db = dmagnitude = dbias = product = None
        total = None if bias is None else dy.sum(0, dtype=g.dtype)
        if of_magnitude:
            if ctx.witness is not None and ctx.witness.has_changed():
                y = _compose(_frozen(ctx.base, x), _flat(x) @ a.T, b, g, bias, scale).to(ctx.dtypes[1])
            product = (low if low.dtype == g.dtype else dy.to(g.dtype)) * _flat(y)
            along = product.sum(0) if bias is None else product.sum(0) - bias * total
            dmagnitude = torch.where(magnitude == 0, 0, along / magnitude).to(magnitude.dtype)
        if of_h and product is not None and product.dtype == ctx.dtypes[0] == dy.dtype:
            dh = torch.mul(dy, g, out=product).view(shape)
        elif of_h:
            dh = (dy * g).to(ctx.dtypes[0]).view(shape)
        if of_x or of_a:
            dz = low @ _scaled(b, g, scale)
            dx = (dz @ a).view(*shape[:-1], -1) if of_x else None
            da = dz.T @ _flat(x) if of_a else None
        if of_b:
            db = ((scale * g).unsqueeze(1) * (low.T @ z)).to(b.dtype)
        if of_bias:
            dbias = ((1 - g) * total).to(bias.dtype)
        return dh, dx, da, db, dmagnitude, None, None, None, None, dbias


class _Witness:
    """Tells whether a tensor was changed in place, without holding its memory."""

    def __init__(self, of: Tensor) -> None:
        self._alias = of.detach()  # counts the changes of both
        self._alias.data = of.new_empty(0)
        self._version = self._alias._version

    def has_changed(self) -> bool:
        """Tell whether it was."""
        return self._alias._version != self._version


def _flat(rows: Tensor) -> Tensor:
    return rows.reshape(-1, rows.shape[-1])


def _scaled(b: Tensor, g: Tensor, scale: float) -> Tensor:
    """Return s g B, (out, rank), in the dtype of B."""
    return ((scale * g).unsqueeze(1) * b).to(b.dtype)
