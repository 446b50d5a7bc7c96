"""AdamW, Lion and SGD with momentum in one pass on a CPU, where a composition is exactly that.

What the kernel of `kernels.cpu` touches it touches once. Compiled arithmetic of full precision does as well
on a large parameter, but every call takes it a tenth of a millisecond; and it cannot keep codes in the
nearest cache between decoding and coding, so that 8-bit moments would cross the memory as float32, twice.

Moments are those of every other path to the bit; weights are too, but where torch's square root is rounded
otherwise (in its last place, about one in two hundred).
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from torch import Tensor, float32, nn

from scrimp.base.protocols import QuantizedParameter
from scrimp.optim.kernels import cpu
from scrimp.optim.pieces import Composition, Entries
from scrimp.optim.rules.adam import Adam
from scrimp.optim.rules.lion import Lion
from scrimp.optim.rules.sgd import SGD
from scrimp.optim.stores.dynamic8 import Dynamic8
from scrimp.optim.stores.full import Full

_EVERY = ("rewarm", "lr", "weight_decay", "size")
_NUMBERS: dict[type, Any] = {  # in the order of the kernel
    Adam: itemgetter(*_EVERY, "beta1", "beta2", "eps", "inv_c1", "inv_root_c2"),
    Lion: itemgetter(*_EVERY, "beta1", "beta2"),
    SGD: itemgetter(*_EVERY, "momentum", "intake"),
}
_MOMENTS = {Adam: ("exp_avg", "exp_avg_sq"), Lion: ("exp_avg",), SGD: ("momentum_buffer",)}


def is_fused(composition: Composition, p: Tensor) -> bool:
    """Tell whether the kernel, where there is one, computes what a composition says for a parameter."""
    rule, store = composition.rule, composition.store
    return (
        composition.projector is None
        and composition.conditioner is None
        and type(rule) in _NUMBERS
        and not (isinstance(rule, SGD) and rule.momentum == 0)
        and (store == Full() or (type(store) is Dynamic8 and store == Dynamic8(min_size=store.min_size)))
        and p.dtype == float32
        and p.device.type == "cpu"
        and not isinstance(p, QuantizedParameter)
    )


def is_ready(p: Tensor) -> bool:
    """Tell whether a parameter lies as the kernel walks, and there is one; it is built on first use."""
    return p.is_contiguous() and cpu.prepare()


def fused_cpu(
    p: nn.Parameter, grad: Tensor, composition: Composition, state: Entries, numbers: Mapping[str, float]
) -> None:
    """Update a parameter and its moments.

    Elements whose gradient is not finite stay as they are; where the store quantises, all stay.

    Args:
        p: The parameter, for which `is_fused` and `is_ready` hold.
        grad: Its gradient.
        composition: How it is treated.
        state: Its state, the count of steps left alone.
        numbers: The step's, as of `Plan.numbers`.
    """
    rule, whole = composition.rule, not isinstance(composition.store, Full)
    names, values = _MOMENTS[type(rule)], _NUMBERS[type(rule)](numbers)
    if names[0] in state:
        moments = [state[name] for name in names]
    else:
        moments = [state[f"{name}.{part}"] for name in names for part in ("codes", "scale")]
    weight = p.detach()
    if isinstance(rule, Adam):
        cpu.adam(weight, grad, moments, values, whole=whole, hf=rule.convention == "hf")
    elif isinstance(rule, SGD):
        cpu.sgd(weight, grad, moments, values, whole=whole, nesterov=rule.nesterov)
    else:
        cpu.lion(weight, grad, moments, values, whole=whole)
