"""A change of full rank from small factors through a distance, made sparse on the fly: SNELL.

    K_h[j, i] = |P_h[j] - Q_h[i]|_2        P: (2, in, q), Q: (2, out, q)
    D^T = c (K_0 - K_1)                    c = 0.1
    change = D [|D| > tau]                 variant "paper": a mask; tau: a quantile of |D|
    change = D |D| [|D| > tau]             variant "released": the code; |D| has no gradient

Only x and the factors are kept for the backward pass, which computes D again; for a moment a few matrices
of the weight's size exist. Oddities: the change is not zero at the start (at zero nothing would be above
the threshold, and nothing would train). A linear kernel without threshold is a LoRA of rank 2 q, for those
who compare.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from scrimp.tuning.deltas.delta import Delta, Factors

Variant = Literal["released", "paper"]
Kernel = Literal["distance", "linear"]
SCALE = 0.1  # c; the code has no option for it


class Kernelised(Delta):
    """Adds the change above.

    Args:
        p: (2, in, q) float32.
        q: (2, out, q) float32.
        sparsity: The share of entries that is zero, below 1; 0 keeps all.
        variant: What becomes of the entries that are kept.
        kernel: "linear" is P Q^T instead of the distance.

    References:
        Expanding Sparse Tuning for Low Memory Usage, Shen et al., NeurIPS 2024, arXiv 2411.01800.
    """

    def __init__(
        self, p: Tensor, q: Tensor, *, sparsity: float, variant: Variant, kernel: Kernel = "distance"
    ) -> None:
        super().__init__()
        self.p, self.q = nn.Parameter(p), nn.Parameter(q)
        self.sparsity, self.variant, self.kernel = sparsity, variant, kernel

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the layer's output."""
        y: Tensor = base(x)
        added: Tensor = checkpoint(
            self._product, x, self.p, self.q, use_reentrant=False, preserve_rng_state=False
        )
        return y + added.to(y.dtype)

    def change(self, weight: Tensor) -> Tensor:
        """Return the change, (out, in) float32."""
        return self._change(self.p, self.q).detach()

    def factors(self) -> Factors | None:
        """Return the change as a LoRA, which it is where the kernel is linear and nothing is left out."""
        if self.kernel == "distance" or self.sparsity > 0 or self.variant == "released":
            return None
        p, q = self.p.detach(), self.q.detach()
        return Factors(torch.cat([p[0].T, p[1].T]), SCALE * torch.cat([q[0], -q[1]], dim=1))

    def _product(self, x: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return functional.linear(x.to(p.dtype), self._change(p, q))

    def _change(self, p: Tensor, q: Tensor) -> Tensor:
        k = torch.cdist(q, p) if self.kernel == "distance" else q @ p.mT  # (2, out, in)
        d = SCALE * (k[0] - k[1])
        size = d.detach().abs()
        kept = size if self.variant == "released" else torch.ones_like(size)
        return d * kept.where(size > threshold(size, self.sparsity), 0.0) if self.sparsity > 0 else d * kept


def threshold(size: Tensor, sparsity: float) -> Tensor:
    """Return the value that a share `sparsity` of the entries do not exceed, 0-d.

    It separates the entries as `torch.quantile` does, which sorts them all, and selects instead.
    """
    flat = size.flatten()
    value: Tensor = flat.kthvalue(int(sparsity * (flat.numel() - 1)) + 1).values
    return value
