"""Rules besides Adam: fewer moments, or fewer numbers in them."""

from __future__ import annotations

from typing import Any, Unpack

from scrimp.optim.named.common import Betas, Common, Named, Pieces
from scrimp.optim.rules import adafactor, lion, sgd, sm3


class SGDM(Named):
    """SGD with momentum, as torch has it; the weight decay is decoupled.

    Args:
        params: A model, parameters, or groups.
        lr: Learning rate.
        momentum: Decay rate of the momentum; 0 keeps none.
        weight_decay: Decoupled decay, before the update.
        common: See `scrimp.optim.named`.

    Memory:
        4 bytes a parameter.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        rule = sgd.SGD(momentum=momentum)
        super().__init__(params, Pieces(rule), {"lr": lr, "weight_decay": weight_decay}, common)


class Lion(Named):
    """Lion: the sign of an interpolated momentum.

    Args:
        params: A model, parameters, or groups.
        lr: Learning rate, three to ten times smaller than AdamW's.
        betas: Of the interpolation and of the momentum; (0.95, 0.98) for language models.
        weight_decay: Decoupled decay, three to ten times larger than AdamW's.
        common: See `scrimp.optim.named`.

    Memory:
        4 bytes a parameter.

    References:
        Symbolic Discovery of Optimization Algorithms, Chen et al., NeurIPS 2023, arXiv 2302.06675.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        options = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, Pieces(lion.Lion()), options, common)


class Lion8bit(Lion):
    """Lion with its momentum in 8-bit blocks of 256.

    Args:
        params: As in `Lion`, as are the others.
        lr: Learning rate.
        betas: Of the interpolation and of the momentum.
        weight_decay: Decoupled decay.
        common: See `scrimp.optim.named`.

    Memory:
        1.02 bytes a parameter; tensors of fewer than 4,096 numbers stay in fp32.

    References:
        8-bit Optimizers via Block-wise Quantization, Dettmers et al., ICLR 2022, arXiv 2110.02861.
    """

    own_store = "8bit"


class Adafactor(Named):
    """Adafactor: second moments by row and column.

    Args:
        params: A model, parameters, or groups.
        lr: Learning rate; not read where it is relative.
        momentum: Decay rate of the updates' average, beta1; 0 keeps none.
        scale_parameter: Multiply the rate by each parameter's own size.
        relative_step: The paper's own rate, at most 1 / sqrt(t), in place of `lr`.
        weight_decay: Decoupled decay, by the rule's own rate.
        common: See `scrimp.optim.named`.

    Memory:
        For a matrix (m, n): m + n numbers, and m n with momentum; vectors keep all.

    References:
        Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, Shazeer and Stern, ICML 2018,
        arXiv 1804.04235.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        momentum: float = 0.0,
        scale_parameter: bool = False,
        relative_step: bool = False,
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        rule = adafactor.Adafactor(
            beta1=momentum or None, scale_parameter=scale_parameter, relative_step=relative_step
        )
        super().__init__(params, Pieces(rule), {"lr": lr, "weight_decay": weight_decay}, common)


class SM3(Named):
    """SM3-II: Adagrad with one accumulator for each row and column.

    Args:
        params: A model, parameters, or groups.
        lr: Learning rate; a long warm-up is advised.
        momentum: Decay rate of the momentum; 0 keeps none.
        weight_decay: Decoupled decay, before the update.
        common: See `scrimp.optim.named`.

    Memory:
        For a matrix (m, n): m + n numbers, and m n with momentum.

    References:
        Memory-Efficient Adaptive Optimization, Anil et al., NeurIPS 2019, arXiv 1901.11150.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        rule = sm3.SM3(momentum=momentum)
        super().__init__(params, Pieces(rule), {"lr": lr, "weight_decay": weight_decay}, common)
