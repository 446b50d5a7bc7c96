"""AdamW through torch's fused kernel, where a composition is exactly that.

One pass over each parameter, no temporaries and nothing to compile: the reference for every other path, and
the fastest eager one (compiled arithmetic of our own comes close). The kernel itself leaves everything as it
was where it is told that a gradient is not finite. It walks memory and knows no strides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from scrimp.base.protocols import QuantizedParameter
from scrimp.optim.arithmetic import is_finite
from scrimp.optim.pieces import Composition, Entries, Options, Reset
from scrimp.optim.rules.adam import Adam
from scrimp.optim.stores.full import Full

DEVICES = ("cpu", "cuda", "mps")  # that have the kernel


def is_adamw(composition: Composition, p: Tensor) -> bool:
    """Tell whether torch's kernel computes what a composition says for a parameter that is contiguous."""
    return (
        composition.projector is None
        and composition.conditioner is None
        and composition.reset == Reset()
        and composition.rule == Adam()
        and composition.store == Full(p.dtype)
        and p.device.type in DEVICES
        and not isinstance(p, QuantizedParameter)
    )


def fused_adamw(
    params: Sequence[nn.Parameter], grads: Sequence[Tensor], states: Sequence[Entries], options: Options
) -> None:
    """Update parameters of one group that took equally many steps; all or, on a non-finite gradient, none.

    Args:
        params: Of one device and dtype.
        grads: Their gradients.
        states: Their states, whose `step` counts the updates before this one.
        options: lr, betas, eps and weight_decay.
    """
    device, (beta1, beta2) = params[0].device, options["betas"]
    is_bad = torch.stack([is_finite(g) for g in grads]).all().logical_not().to(torch.float32)
    step = torch.full((), float(states[0]["step"]), device=device)
    adamw(
        list(params),
        [g.contiguous() for g in grads],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [step.clone() for _ in params],
        fused=True,
        found_inf=is_bad,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=float(options["lr"]),
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        maximize=False,
    )
