"""AdamW, its narrow forms, and what steadies it: one rule, many stores and conditioners."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, Unpack

from scrimp.optim.conditioners.spike_clip import SpikeClip
from scrimp.optim.conditioners.stable import StableClip
from scrimp.optim.named.common import Betas, Common, Named, Pieces
from scrimp.optim.named.subspace import check_variant
from scrimp.optim.pieces import Conditioner, Options, Reset
from scrimp.optim.projectors.orientation import require_count
from scrimp.optim.rules.adam import Adam
from scrimp.optim.rules.adam_mini import AdamMini as AdamMiniRule


class AdamW(Named):
    """AdamW: Adam with decoupled weight decay, in one pass where moments are fp32 as the weights.

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        w = (1 - lr wd) w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        params: A model (matrices decay; norms and biases do not), parameters, or groups.
        lr: Learning rate; a schedule may set it anew for every step.
        betas: Decay rates of the two moments.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decoupled decay, before the update.
        common: See `scrimp.optim.named`.

    Memory:
        8 bytes a parameter.

    References:
        Decoupled Weight Decay Regularization, Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **common: Unpack[Common],
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, Pieces(Adam()), options, common)


class AdamW8bit(AdamW):
    """AdamW with moments in 8-bit blocks of 256, in a code that is dense near zero.

    Args:
        params: As in `AdamW`, as are the others.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decoupled decay.
        common: See `scrimp.optim.named`.

    Memory:
        2.03 bytes a parameter; tensors of fewer than 4,096 numbers stay in fp32.

    References:
        8-bit Optimizers via Block-wise Quantization, Dettmers et al., ICLR 2022, arXiv 2110.02861.
    """

    own_store = "8bit"


class AdamW4bit(AdamW):
    """AdamW with moments in 4-bit blocks of 128; the second moment's code has no zero.

    Args:
        params: As in `AdamW`, as are the others.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decoupled decay.
        common: See `scrimp.optim.named`.

    Memory:
        1.06 bytes a parameter; tensors of fewer than 4,096 numbers stay in fp32.

    References:
        Memory Efficient Optimizers with 4-bit States, Li et al., NeurIPS 2023, arXiv 2309.01507, in the code
        books and blocks of torchao's AdamW4bit.
    """

    own_store = "4bit"


class AdamWFP8(AdamW):
    """AdamW with moments in 8-bit floats, each group of 128 stretched to the format's range (COAT).

    Args:
        params: As in `AdamW`, as are the others.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decoupled decay.
        common: See `scrimp.optim.named`; the store "fp8-plain" does not stretch.

    Memory:
        2.13 bytes a parameter.

    References:
        COAT, Xi et al., ICLR 2025, arXiv 2410.19313.
    """

    own_store = "fp8"


class AdamMini(Named):
    """Adam-mini: one second moment for each head, row or tensor.

    Args:
        params: A model, whose roles decide what shares a second moment; parameters or groups share by row.
        lr: Learning rate, as for AdamW.
        betas: Decay rates of the two moments.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decoupled decay, before the update.
        common: See `scrimp.optim.named`.

    Memory:
        4 bytes a parameter, and 4 for each block.

    References:
        Adam-mini: Use Fewer Learning Rates To Gain More, Zhang et al., ICLR 2025, arXiv 2406.16793.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, Pieces(AdamMiniRule()), options, common)


class SPAM(Named):
    """SPAM: Adam that clips spikes of the gradient and forgets its moments every 500 steps.

    Args:
        params: A model, parameters, or groups.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment, before the bias correction.
        weight_decay: Decoupled decay, after the update.
        theta: An element beyond the root of theta times its second moment is a spike.
        warmup: Updates in which the step size recovers after a reset.
        variant: "released" also clips where nothing was seen before, which freezes late rows of an embedding.
        common: See `scrimp.optim.named`; `reset_every` is 500 here.

    Memory:
        8 bytes a parameter.

    References:
        SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training, Huang et al., ICLR 2025,
        arXiv 2501.06842, without its element mask.
    """

    own_reset = 500

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        theta: float = 5000.0,
        warmup: int = 150,
        variant: Literal["paper", "released"] = "paper",
        **common: Unpack[Common],
    ) -> None:
        check_variant(variant)
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        spikes = functools.partial(SpikeClip, theta=theta, variant=variant)
        reset = Reset(warmup=warmup, restart=False)
        pieces = functools.partial(_clipped, Adam(convention="hf"), spikes, reset)
        super().__init__(params, pieces, options, common)


class StableSPAM(Named):
    """Stable-SPAM: Adam on gradients clipped by their running maximum and scaled by their norm's history.

    Args:
        params: A model, parameters, or groups.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decoupled decay, before the update.
        gammas: Decay rates of the norm's two moments.
        theta: Decay rate of the running maximum.
        anneal_steps: Updates over which a cosine halves beta1 and the first gamma (the authors' `total_T`);
            None keeps them.
        variant: "released" counts the maximum's bias correction from each reset, which switches clipping off
            for some hundred steps.
        common: See `scrimp.optim.named`; `reset_every` is 1,000 here.

    Memory:
        8 bytes a parameter, and three numbers a tensor.

    References:
        Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam, Huang et al., 2025, arXiv 2502.17055.
    """

    own_reset = 1000

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gammas: Betas = (0.7, 0.9),
        theta: float = 0.999,
        anneal_steps: int | None = None,
        variant: Literal["paper", "released"] = "paper",
        **common: Unpack[Common],
    ) -> None:
        check_variant(variant)
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if anneal_steps is not None:
            require_count("anneal_steps", anneal_steps)
        clip = functools.partial(
            StableClip,
            gammas=(gammas[0], gammas[1]),
            theta=theta,
            variant=variant,
            anneal_steps=anneal_steps,
        )
        pieces = functools.partial(_clipped, Adam(anneal_steps=anneal_steps), clip, None)
        super().__init__(params, pieces, options, common)


def _clipped(rule: Adam, clip: Callable[..., Conditioner], reset: Reset | None, options: Options) -> Pieces:
    return Pieces(rule, conditioner=clip(every=options["reset_every"]), reset=reset)
