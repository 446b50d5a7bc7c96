"""What an adapter adds to a linear layer whose own weight stays as it is.

    y = delta(x, base)          base: y = x W^T + b, frozen, perhaps quantised

A `Delta` computes the whole output, so that it may also scale it, or change W in place for the product. What
trains is fp32, whatever the base's dtype; what it draws once and keeps (indices, frozen factors) are buffers,
saved with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import QuantizedParameter


class Factors(NamedTuple):
    """A change of a weight as B A, every scale included.

    Attributes:
        a: (r, in) float32.
        b: (out, r) float32.
    """

    a: Tensor
    b: Tensor


class Delta(nn.Module):
    """A change of one linear layer."""

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the layer's output.

        Args:
            x: (..., in).
            base: The frozen layer, (..., in) to (..., out).
        """
        raise NotImplementedError

    def change(self, weight: Tensor) -> Tensor | None:
        """Return what merging adds to a weight (out, in), in fp32; None where no weight can hold it.

        Args:
            weight: The base's, (out, in) float32; a change that does not depend on it needs its shape alone.
        """
        found = self.factors()
        return None if found is None else found.b @ found.a

    def factors(self) -> Factors | None:
        """Return the change as exact low-rank factors; None where it has none."""
        return None

    @torch.no_grad()
    def merge_into(self, base: nn.Linear) -> None:
        """Add the change to a base layer whose weight is dense.

        Raises:
            ScrimpError: No weight can hold it.
        """
        added = self.change(base.weight.float())
        if added is None:
            raise ScrimpError(f"{type(self).__name__} depends on its input, so it cannot be merged")
        base.weight.copy_((base.weight.float() + added).to(base.weight.dtype))


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a delta.

    Attributes:
        base_layer: The layer, as peft names it.
        delta: What it adds.
    """

    def __init__(self, base_layer: nn.Linear, delta: Delta) -> None:
        super().__init__()
        self.base_layer, self.delta = base_layer, delta

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted output, (..., out)."""
        y: Tensor = self.delta(x, self.base_layer)
        return y

    @property
    def weight(self) -> Tensor:
        """The base's, for code of models that looks at its dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.base_layer.bias


def dense(weight: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a weight (out, in) as a plain tensor; of a quantised one, a decoded copy."""
    if isinstance(weight, QuantizedParameter):
        return weight.dequantize_rows(0, weight.shape[0]).to(dtype)
    return weight.detach().to(dtype)
