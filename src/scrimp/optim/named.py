"""The named optimizers, each with its source's defaults."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def adamw(
    params: Iterable[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> torch.optim.AdamW:
    """AdamW with torch's fused kernel: one pass over each parameter, no temporaries.

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        w = (1 - lr wd) w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        params: What trains. Matrices decay; tensors of fewer than two dimensions (norms, biases) do not.
        lr: Learning rate; a schedule sets it anew for every step.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay.

    Returns:
        The optimizer, with one parameter group that decays and one that does not.

    Memory:
        8 bytes a parameter in fp32 (two moments in the parameter's dtype), and 4 for each step count.

    References:
        Decoupled Weight Decay Regularization, Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101.
    """
    given = list(params)
    groups = [
        {"params": [p for p in given if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in given if p.ndim < 2], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=lr, betas=betas, eps=eps, fused=True)
