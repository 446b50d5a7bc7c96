"""AdamW, Lion and others in one pass on a CPU, or as few as they need, and Adam in a subspace in one call.

What the kernel of `kernels.cpu` touches it touches once. Compiled arithmetic of full precision does as well
on a large parameter, but every call takes it a tenth of a millisecond; and it cannot keep codes in the
nearest cache between decoding and coding, so that 8-bit moments would cross the memory as float32, twice.
In a subspace (GaLore, Fira, APOLLO) the kernel multiplies too: G's norms are found with R = G B, and what is
projected back leaves the product for the weights at once.

Moments of elements are those of every other path to the bit; weights are too, but where torch's square root
is rounded otherwise (in its last place, about one in two hundred). Products, norms and means are summed in
another order, and what comes of them is equal to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from torch import Tensor, float32, nn

from scrimp.base.protocols import QuantizedParameter
from scrimp.optim.kernels import cpu
from scrimp.optim.lifts.back import ProjectBack
from scrimp.optim.lifts.residual import ScaledResidual
from scrimp.optim.lifts.scaling import ScaleGradient
from scrimp.optim.pieces import Composition, Entries, Lift, Rule, Target
from scrimp.optim.projectors.dct import Cosine
from scrimp.optim.projectors.random import Random
from scrimp.optim.projectors.svd import SingularVectors
from scrimp.optim.rules.adafactor import Adafactor
from scrimp.optim.rules.adam import Adam
from scrimp.optim.rules.adam_mini import AdamMini
from scrimp.optim.rules.lion import Lion
from scrimp.optim.rules.sgd import SGD
from scrimp.optim.stores.dynamic8 import Dynamic8
from scrimp.optim.stores.full import Full

_EVERY = ("rewarm", "lr", "weight_decay", "size")
_ADAM = itemgetter(*_EVERY, "beta1", "beta2", "eps", "inv_c1", "inv_root_c2")
_NUMBERS: dict[type, Any] = {  # in the order of the kernel
    Adam: _ADAM,
    AdamMini: _ADAM,
    Adafactor: itemgetter("rewarm", "weight_decay", "beta2", "rho"),
    Lion: itemgetter(*_EVERY, "beta1", "beta2"),
    SGD: itemgetter(*_EVERY, "momentum", "intake"),
}
_MOMENTS: dict[type, tuple[str, ...]] = {
    Adam: ("exp_avg", "exp_avg_sq"),
    AdamMini: ("exp_avg", "exp_avg_sq"),
    Adafactor: ("exp_avg_sq_row", "exp_avg_sq_col"),
    Lion: ("exp_avg",),
    SGD: ("momentum_buffer",),
}


def is_fused(composition: Composition, p: Tensor) -> bool:
    """Tell whether the kernel, where there is one, computes what a composition says for a parameter."""
    rule, store = composition.rule, composition.store
    known = type(rule) in _NUMBERS if composition.projector is None else _is_projected(composition, p)
    return (
        known
        and composition.conditioner is None
        and not (isinstance(rule, SGD) and rule.momentum == 0)
        and not (isinstance(rule, AdamMini) and store != Full())
        and not (isinstance(rule, Adafactor) and not (store == Full() and rule.beta1 is None and p.ndim == 2))
        and (store == Full() or (type(store) is Dynamic8 and store == Dynamic8(min_size=store.min_size)))
        and p.dtype == float32
        and p.device.type == "cpu"
        and not isinstance(p, QuantizedParameter)
    )


def _is_projected(composition: Composition, p: Tensor) -> bool:
    lift = composition.lift
    return (
        p.ndim == 2
        and type(composition.rule) is Adam
        and type(composition.projector) in (Cosine, Random, SingularVectors)
        and type(lift) in (ProjectBack, ScaledResidual, ScaleGradient)
        and not (isinstance(lift, ScaledResidual) and not lift.orthonormal)
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
    weight, moments, values = p.detach(), _moments(rule, state), _NUMBERS[type(rule)](numbers)
    if isinstance(rule, Adam):
        cpu.adam(weight, grad, moments, values, whole=whole, hf=rule.convention == "hf")
    elif isinstance(rule, AdamMini):
        cpu.adam_mini(weight, grad, moments, values)
    elif isinstance(rule, Adafactor):
        bounds = (*rule.eps, rule.clip_threshold)
        cpu.adafactor(weight, grad, moments, (*values, *bounds), scales=rule.scale_parameter)
    elif isinstance(rule, SGD):
        cpu.sgd(weight, grad, moments, values, whole=whole, nesterov=rule.nesterov)
    else:
        cpu.lion(weight, grad, moments, values, whole=whole)


def fused_projected(
    p: nn.Parameter,
    grad: Tensor,
    composition: Composition,
    state: Entries,
    numbers: Mapping[str, float],
    basis: Tensor,
    small: Tensor | None,
    *,
    transposed: bool,
) -> None:
    """Update a projected parameter, its moments and its limiter; a gradient not finite changes nothing.

    Args:
        p: The parameter (m, n), for which `is_fused` and `is_ready` hold.
        grad: Its gradient; where `small` is given, anything of its shape.
        composition: How it is treated.
        state: Its state, the count of steps left alone.
        numbers: The step's, as of `Plan.numbers`.
        basis: Of the present subspace, (d, r).
        small: The gradient in the subspace, (k, r), where that is all there is.
        transposed: Whether the oriented parameter (k, d) is the transposed one.
    """
    rule, lift = composition.rule, composition.lift
    assert isinstance(rule, Adam) and lift is not None
    cpu.adam_projected(
        p.detach(),
        grad if small is None else None,
        small,
        basis,
        _moments(rule, state),
        state.get("limited_norm"),
        _NUMBERS[Adam](numbers),
        _lift_numbers(lift, numbers["size"] * numbers["rewarm"]),
        hf=rule.convention == "hf",
        per_matrix=isinstance(lift, ScaleGradient) and lift.per == "tensor",
        pulls=not isinstance(lift, ScaleGradient),
        reads=lift.needs_gradient,
        transposed=transposed,
    )


def drawn(composition: Composition, state: Entries, target: Target) -> Tensor | None:
    """Return the basis of a matrix, drawn by the kernel; None where it is not one that it draws."""
    projector = composition.projector
    if not (isinstance(projector, Random) and projector.is_drawn):
        return None
    d = target.shape[-1]
    return cpu.draw(state["seed"], d, projector.rank_of(d))


def _moments(rule: Rule, state: Entries) -> list[Tensor]:
    """Return what the kernel takes for moments: tensors, or codes and scales in turn."""
    names = _MOMENTS[type(rule)]
    if names[0] in state:
        return [state[name] for name in names]
    return [state[f"{name}.{part}"] for name in names for part in ("codes", "scale")]


def _lift_numbers(lift: Lift, size: float) -> tuple[float, ...]:
    """Return before, inside, gamma, factor and back, as `lifts.h` calls them, for a step's size."""
    if isinstance(lift, ScaleGradient):
        before, after = (lift.scale, 1.0) if lift.front else (1.0, lift.scale)
        return before, 0.0, lift.gamma or 1.0, size * after, 0.0
    if isinstance(lift, ScaledResidual):
        taken, weight = (lift.scale, 1.0) if lift.variant == "released" else (1.0, lift.scale)
        return 1.0, 2 * taken - taken**2, lift.gamma or 1.0, size * weight, size * lift.scale
    assert isinstance(lift, ProjectBack)
    return 1.0, 0.0, 1.0, 0.0, size * lift.scale
