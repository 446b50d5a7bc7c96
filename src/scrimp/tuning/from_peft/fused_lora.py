"""peft's LoRA layer with the change added by one product.

    y = h + s (x Aᵀ) Bᵀ        h = x Wᵀ + b, the frozen layer's output

peft makes x Aᵀ Bᵀ, scales it, and adds it to h: three passes over tensors of the output's size, and one more
in the backward pass. Here the product's own epilogue scales and adds, and what is scaled on the way back has
`rank` columns. Parameters, files, merging and everything else stay peft's.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


def fuse(model: nn.Module) -> None:
    """Let every plain LoRA of a model's linear layers add its change in one product.

    Args:
        model: A model, or peft's around it. Layers of other kinds, or with one of peft's variants (DoRA and
            others), stay as they are.
    """
    for layer in model.modules():
        if type(layer) is Linear and not layer.lora_variant:
            layer.__class__ = FusedLinear


def is_plain(layer: Any, name: str) -> bool:
    """Tell whether an adapter's parts are what the equations speak of: FSDP puts its own around them."""
    parts = layer.lora_A[name], layer.lora_B[name]
    return all(type(part) is nn.Linear and part.bias is None for part in parts)


class FusedLinear(Linear):
    """peft's layer, of which only the forward pass is another, and only where one adapter is at work."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, (..., out)."""
        name = self._alone()
        if name is None or args or kwargs:
            whole: Tensor = super().forward(x, *args, **kwargs)
            return whole
        a, b = cast("Tensor", self.lora_A[name].weight), cast("Tensor", self.lora_B[name].weight)
        frozen: Tensor = self.base_layer(x)
        x = self.lora_dropout[name](self._cast_input_dtype(x, a.dtype))
        inner = x.flatten(0, -2) @ a.T
        # A frozen layer in another dtype than its adapter's: the sum is rounded once, as peft's.
        whole = torch.addmm(frozen.flatten(0, -2).to(inner.dtype), inner, b.T, alpha=self.scaling[name])
        return whole.view(*frozen.shape).to(frozen.dtype)

    def _alone(self) -> str | None:
        """Return the one adapter that is at work, if there is one and it is what the equation speaks of."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        (name,) = self.active_adapters
        if name not in self.lora_A or name in self.lora_variant:
            return None
        return name if is_plain(self, name) else None
