"""The algebra of LoRA's gradients: small matrices that make two factors move as their product should.

    G = dL/dW: (out, in)      g_A = s B^T G      g_B = s G A^T      a step moves W by  s B g^A + s g^B A

What G itself would do is known through g_A and g_B alone, so nothing of W's shape is ever made:

    P_B G  =  s B [(B^T B)^-1 g_A / s^2]         P_B, P_A: projections onto B's columns and A's rows
    G P_A  =  s [g_B (A A^T)^-1 / s^2] A

Costs are of order r^2 (out + in) for a pair, and r^3 once for all pairs of a rank together. Everything takes
stacks of pairs, A (..., r, in) and B (..., out, r). Damping is relative to the mean eigenvalue of a Gram
matrix, since B grows by orders of magnitude from zero; where B is zero, g_A is too, and stays so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_TINY = 1e-30  # keeps the inverse of a zero Gram matrix finite


class Spectrum(NamedTuple):
    """Symmetric matrices as V diag(values) V^T: (..., r) and (..., r, r)."""

    values: Tensor
    vectors: Tensor

    def inverse(self) -> Tensor:
        """Return the inverses, (..., r, r)."""
        return (self.vectors / self.values.unsqueeze(-2)) @ self.vectors.mT


def gram_a(a: Tensor) -> Tensor:
    """Return A A^T, (..., r, r), in fp32 or more."""
    a = wide(a)
    return a @ a.mT


def gram_b(b: Tensor) -> Tensor:
    """Return B^T B, (..., r, r), in fp32 or more."""
    b = wide(b)
    return b.mT @ b


def inverse(gram: Tensor, damping: float, *, is_relative: bool = True) -> Tensor:
    """Return (gram + d I)^-1, (..., r, r).

    Args:
        gram: (..., r, r).
        damping: d, or d over the mean eigenvalue.
        is_relative: Whether it is the latter.
    """
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    extra = damping * mean + _TINY if is_relative else torch.full_like(mean, damping)
    inverted: Tensor = torch.linalg.inv_ex(gram + torch.diag_embed(extra.expand(gram.shape[:-1]))).inverse
    return inverted


def spectrum(gram: Tensor, damping: float) -> Spectrum:
    """Return the eigenvalues, none negative, plus damping times their mean, and the eigenvectors."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    return Spectrum(values + damping * values.mean(-1, keepdim=True) + _TINY, vectors)


def sylvester(left: Spectrum, right: Spectrum, constant: Tensor) -> Tensor:
    """Return X with L X + X R = C, for positive definite L and R; all (..., r, r)."""
    rotated = left.vectors.mT @ constant @ right.vectors
    divided = rotated / (left.values.unsqueeze(-1) + right.values.unsqueeze(-2))
    return left.vectors @ divided @ right.vectors.mT


def lora_pro(
    a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, *, scale: float, aa: Spectrum, bb: Spectrum
) -> tuple[Tensor, Tensor]:
    """Return LoRA-Pro's gradients: together they move W as close to G as rank r allows.

        g^A = (B^T B)^-1 g_A / s^2 + X A
        g^B = (I - P_B) g_B (A A^T)^-1 / s^2 - B X
        s B g^A + s g^B A = P_B G + (I - P_B) G P_A        whatever X is

    X keeps both closest to g_A and g_B: B^T B X + X A A^T = -(B^T B)^-1 g_A A^T / s^2.

    Args:
        a: (..., r, in).
        b: (..., out, r).
        grad_a: (..., r, in).
        grad_b: (..., out, r).
        scale: s.
        aa: Of A A^T.
        bb: Of B^T B.
    """
    projected_a = bb.inverse() @ grad_a / scale**2
    projected_b = grad_b @ aa.inverse() / scale**2
    x = sylvester(bb, aa, -projected_a @ a.mT)
    outside = projected_b - b @ (bb.inverse() @ (b.mT @ projected_b))
    return projected_a + x @ a, outside - b @ x


def at_once(grams: Sequence[Tensor], function: Callable[[Tensor], Any]) -> list[Any]:
    """Apply a function of matrices (..., r, r) to many of them, all of a shape in one call.

    Args:
        grams: The matrices.
        function: Takes (number, ..., r, r), and returns a tensor or a `Spectrum` with as many entries.
    """
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, gram in enumerate(grams):
        alike[gram.shape, gram.dtype, gram.device].append(index)
    found: list[Any] = [None] * len(grams)
    for indices in alike.values():
        result = function(torch.stack([grams[index] for index in indices]))
        for place, index in enumerate(indices):
            found[index] = (
                Spectrum(*(part[place] for part in result)) if isinstance(result, tuple) else result[place]
            )
    return found


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in fp32, or as it is where that is more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
