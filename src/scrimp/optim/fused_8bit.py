"""8-bit AdamW and Lion in one pass on a CPU, where a composition is exactly that.

Decoded and coded again apart from the arithmetic, the moments of every parameter cross the memory as float32
twice. The kernel of `stores.dynamic8_kernel` keeps each block in the nearest cache instead. Codes and scales
are those of every other path to the bit; weights are too, but where torch's square root is rounded otherwise
(in its last place, about one in two hundred).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from scrimp.base.protocols import QuantizedParameter
from scrimp.optim.pieces import Composition, Rule
from scrimp.optim.rules.adam import Adam
from scrimp.optim.rules.lion import Lion
from scrimp.optim.stores import dynamic8_kernel
from scrimp.optim.stores.dynamic8 import Dynamic8

BLOCK = 256  # the kernel's


def is_8bit(composition: Composition, p: Tensor) -> bool:
    """Tell whether the kernel, where there is one, computes what a composition says for a parameter."""
    store = composition.store
    return (
        isinstance(store, Dynamic8)
        and store.block_size == BLOCK
        and p.numel() >= store.min_size
        and type(composition.rule) in (Adam, Lion)
        and composition.projector is None
        and composition.conditioner is None
        and p.dtype == torch.float32
        and p.device.type == "cpu"
        and not isinstance(p, QuantizedParameter)
    )


def is_ready(p: Tensor) -> bool:
    """Tell whether there is a kernel, and a parameter lies as it walks."""
    return dynamic8_kernel.available() and p.is_contiguous()


def fused_8bit(
    p: nn.Parameter, grad: Tensor, rule: Rule, entries: Mapping[str, Tensor], numbers: Mapping[str, float]
) -> None:
    """Update a parameter and its moments; nothing where the gradient is not finite.

    Args:
        p: The parameter, for which `is_8bit` and `is_ready` hold.
        grad: Its gradient.
        rule: Adam or Lion.
        entries: The moments' codes and scales, by name.
        numbers: The step's, as of `Plan.numbers`.
    """
    size, decay = numbers["size"] * numbers["rewarm"], numbers["lr"] * numbers["weight_decay"]
    own = {**numbers, "size": size, "decay": decay}
    weight, grad = p.detach(), grad.to(p.dtype).contiguous()
    ok = dynamic8_kernel.is_finite(grad)
    if isinstance(rule, Adam):
        dynamic8_kernel.adam(weight, grad, entries, own, ok, hf=rule.convention == "hf")
    else:
        dynamic8_kernel.lion(weight, grad, entries, own, ok)
