"""Weight normalisation: the decoder's matrices as a length and a direction for every row.

    W_i = g_i V_i / ||V_i||

torch's own parametrisation, on the linear layers of the decoder. With GaLore on V and Adam on g it is
GradNormLoRP as its paper writes it: autograd gives both of them the paper's gradients, dV with its
tangential correction. What its authors released is another algorithm: the lengths are set back at every
step, dV lacks the correction, and what remains is GaLore on V with a further full-size copy of W.

Source: Gradient Weight-Normalized Low-Rank Projection (GradNormLoRP), Huang et al., AAAI 2025, arXiv
2412.19616; Weight Normalization, Salimans and Kingma, NeurIPS 2016, arXiv 1602.07868.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm as normalised

from scrimp.base.errors import ScrimpError


class WeightNorm:
    """Lengths and directions in place of matrices; of a matrix (m, n), m numbers more."""

    def apply(self, model: nn.Module) -> None:
        """Parametrise every linear layer of `model` but the output head, in place.

        Raises:
            ScrimpError: There is none.
        """
        found = list(_linears(model))
        if not found:
            raise ScrimpError(f"weights weight-norm: {type(model).__name__} has no linear layers; use dense")
        for module in found:
            normalised(module, "weight", dim=0)

    def materialize(self, model: nn.Module) -> None:
        """Turn every one back into a plain matrix, in place."""
        for module in list(model.modules()):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def weight_norm() -> WeightNorm:
    """Build weight normalisation."""
    return WeightNorm()


def _linears(model: nn.Module) -> Iterator[nn.Linear]:
    ask = getattr(model, "get_output_embeddings", None)  # transformers' way
    head = ask() if callable(ask) else None
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield module
