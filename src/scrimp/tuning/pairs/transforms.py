"""What methods make of the gradients of LoRA's pairs, around an optimizer's step.

    Preconditioned    each gradient on its own: LoRA-FA, Riemannian preconditioning, half of AltLoRA
    Alternating       AltLoRA: that, and a momentum that follows the factors
    Equivalent        LoRA-Pro: both gradients together, for any optimizer
    EquivalentAdam    LoRA-Pro in full: Adam on what both amount to
    RateRatio         LoRA+: a faster B

Oddity: LoRA-Pro's Sylvester equation takes eigenvalues, for which torch waits for a GPU, once for all pairs
of a rank. The other methods do not wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.tuning.pairs.algebra import (
    Spectrum,
    at_once,
    gram_a,
    gram_b,
    inverse,
    lora_pro,
    spectrum,
    wide,
)
from scrimp.tuning.pairs.pairs import Awake, Pair, PairTransform


@dataclass(frozen=True, slots=True, kw_only=True)
class Preconditioned(PairTransform):
    """Each gradient times the inverse Gram matrix of the other factor, those of before the step.

        projected  g_A <- (B^T B + d I)^-1 g_A / s^2     g_B <- g_B (A A^T + d I)^-1 / s^2     d: relative
        scaled     g_A <- (B^T B + d I)^-1 g_A           g_B <- g_B (A A^T + d I)^-1           d: absolute

    Attributes:
        damping: d.
        form: Which.
        trained: "b" where A is frozen.
    """

    damping: float
    form: Literal["projected", "scaled"] = "projected"
    trained: Awake = "both"

    def before_update(self, pairs: Sequence[Pair], optimizer: torch.optim.Optimizer) -> None:
        """Multiply the gradients that are there."""
        with_a = [pair for pair in pairs if pair.a.grad is not None]
        with_b = [pair for pair in pairs if pair.b.grad is not None]
        for pair, inverted in zip(with_a, at_once([gram_b(p.b) for p in with_a], self._invert), strict=True):
            _grad(pair.a).copy_(self._factor(pair) * inverted @ wide(_grad(pair.a)))
        for pair, inverted in zip(with_b, at_once([gram_a(p.a) for p in with_b], self._invert), strict=True):
            _grad(pair.b).copy_(wide(_grad(pair.b)) @ (self._factor(pair) * inverted))

    def _invert(self, gram: Tensor) -> Tensor:
        return inverse(gram, self.damping, is_relative=self.form == "projected")

    def _factor(self, pair: Pair) -> float:
        return 1 / pair.scale**2 if self.form == "projected" else 1.0


@dataclass(slots=True, kw_only=True)
class Alternating(PairTransform):
    """Projected gradients whose momentum follows the subspace that the other factor spans.

    When a step has moved B and A (new: B', A'), the first moments are expressed anew by least squares:

        M_A <- (B'^T B' + d I)^-1 B'^T B M_A          B' M_A stays closest to B M_A
        M_B <- M_B A A'^T (A' A'^T + d I)^-1

    That is done after the step and not before the next one: so the old factors need not be kept.

    Attributes:
        damping: d, relative to the mean eigenvalue.
        mode: "alternate" trains B in even steps and A in odd ones; "joint" both in all.
        plus: Whether the optimizer keeps second moments.
        name: What a recipe calls the method.
    """

    damping: float
    mode: Literal["alternate", "joint"]
    plus: bool
    name: str
    _old: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def awake(self, step: int) -> Awake:
        """Return B first, since A has no gradient while B is zero."""
        if self.mode == "joint":
            return "both"
        return "a" if step % 2 else "b"

    def before_update(self, pairs: Sequence[Pair], optimizer: torch.optim.Optimizer) -> None:
        """Project the gradients, and keep the factors until the step is through."""
        Preconditioned(damping=self.damping).before_update(pairs, optimizer)
        self._old = {
            pair.name: tuple(p.clone() if p.grad is not None else p for p in (pair.a, pair.b))  # type: ignore[misc]
            for pair in pairs
        }

    def after_update(self, pairs: Sequence[Pair], optimizer: torch.optim.Optimizer) -> None:
        """Express the moments in the new subspaces."""
        moved_a = [pair for pair in pairs if pair.a.grad is not None]
        moved_b = [pair for pair in pairs if pair.b.grad is not None]
        inverse_aa = at_once([gram_a(pair.a) for pair in moved_a], self._inverse)
        inverse_bb = at_once([gram_b(pair.b) for pair in moved_b], self._inverse)
        for pair, inverted in zip(moved_a, inverse_aa, strict=True):
            for moment in self._moment(optimizer, pair.b):
                carry = wide(self._old[pair.name][0]) @ wide(pair.a).mT @ inverted
                moment.copy_(wide(moment) @ carry)
        for pair, inverted in zip(moved_b, inverse_bb, strict=True):
            for moment in self._moment(optimizer, pair.a):
                carry = inverted @ (wide(pair.b).mT @ wide(self._old[pair.name][1]))
                moment.copy_(carry @ wide(moment))
        self._old = {}

    def _inverse(self, gram: Tensor) -> Tensor:
        return inverse(gram, self.damping)

    def _moment(self, optimizer: torch.optim.Optimizer, p: Tensor) -> list[Tensor]:
        """Return the first moment that an optimizer holds for a factor; none where it keeps none (yet).

        Raises:
            ScrimpError: It keeps something else, or second moments where they are not wanted.
        """
        kept = _kept(optimizer, p)
        wanted = {"exp_avg", "exp_avg_sq"} if self.plus else {"momentum_buffer"}
        if kept and kept.keys() != wanted:
            use = "adamw for AltLoRA+" if self.plus else "sgd for AltLoRA (adamw is AltLoRA+, --tune.plus)"
            raise ScrimpError(
                f"tune {self.name}: the optimizer keeps {', '.join(sorted(kept))}, and what is to follow the "
                f"factors is {', '.join(sorted(wanted))}: use --optimizer {use}"
            )
        return [tensor for name, tensor in kept.items() if name != "exp_avg_sq"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Equivalent(PairTransform):
    """LoRA-Pro's gradients, for the optimizer to go on with.

    Attributes:
        damping: Of both Gram matrices, relative to the mean eigenvalue.
    """

    damping: float

    def before_update(self, pairs: Sequence[Pair], optimizer: torch.optim.Optimizer) -> None:
        """Replace the gradients of pairs that have both."""
        for pair, aa, bb in _spectra(pairs, self.damping):
            grads = wide(_grad(pair.a)), wide(_grad(pair.b))
            _replace(pair, *lora_pro(wide(pair.a), wide(pair.b), *grads, scale=pair.scale, aa=aa, bb=bb))


@dataclass(frozen=True, slots=True, kw_only=True)
class EquivalentAdam(PairTransform):
    """LoRA-Pro in full: Adam on the gradient of W that a step of both factors amounts to, then SGD.

        g~ = s B g^A + s g^B A (out, in)      u = Adam(g~)      g_A, g_B <- those of u: s B^T u, s u A^T

    A gradient that is not finite changes no moment, and stays so for the optimizer to leave out.

    Attributes:
        damping: Of both Gram matrices, relative to the mean eigenvalue.
        betas: Of the moments.
        eps: Added to the root of the second moment.
        name: What a recipe calls the method.
    """

    damping: float
    betas: tuple[float, float]
    eps: float
    name: str
    buffers: tuple[str, ...] = ("equivalent_exp_avg", "equivalent_exp_avg_sq", "equivalent_step")

    def begin(self, pairs: Sequence[Pair]) -> None:
        """Make the moments, of W's shape."""
        for pair in pairs:
            shape = (*pair.b.shape[:-1], pair.a.shape[-1])
            for buffer, size in zip(self.buffers, (shape, shape, ()), strict=True):
                pair.module.register_buffer(buffer, wide(pair.b).new_zeros(size))

    def before_update(self, pairs: Sequence[Pair], optimizer: torch.optim.Optimizer) -> None:
        """Replace the gradients of pairs that have both."""
        for pair, aa, bb in _spectra(pairs, self.damping):
            a, b, s = wide(pair.a), wide(pair.b), pair.scale
            g_a, g_b = lora_pro(a, b, wide(_grad(pair.a)), wide(_grad(pair.b)), scale=s, aa=aa, bb=bb)
            is_finite = g_a.isfinite().all() & g_b.isfinite().all()
            u = self._adam(pair, s * (b @ g_a + g_b @ a).where(is_finite, 0.0), is_finite)
            new = lora_pro(a, b, s * (b.mT @ u), s * (u @ a.mT), scale=s, aa=aa, bb=bb)
            _replace(pair, *(torch.where(is_finite, grad, torch.nan) for grad in new))

    def after_update(self, pairs: Sequence[Pair], optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that does more than to subtract.

        Raises:
            ScrimpError: It keeps moments of its own.
        """
        kept = [name for pair in pairs for p in (pair.a, pair.b) for name in _kept(optimizer, p)]
        if kept:
            raise ScrimpError(
                f"tune {self.name}: its full variant is Adam already, and the optimizer keeps {kept[0]}: "
                "use --optimizer sgd-m --optimizer.momentum 0"
            )

    def _adam(self, pair: Pair, grad: Tensor, is_finite: Tensor) -> Tensor:
        """Return Adam's direction, (..., out, in); the moments take the gradient in where it is finite."""
        first, second, step = (pair.module.get_buffer(buffer) for buffer in self.buffers)
        beta1, beta2 = self.betas
        intake = is_finite.to(first.dtype)
        step.add_(intake)
        first.lerp_(grad, (1 - beta1) * intake)
        second.lerp_(grad.square_(), (1 - beta2) * intake)
        root: Tensor = (second / (1 - beta2**step)).sqrt_().add_(self.eps)
        return root.reciprocal_().mul_(first).div_(1 - beta1**step)


@dataclass(slots=True, kw_only=True)
class RateRatio(PairTransform):
    """B learns at a multiple of A's rate.

    While a step runs, the factors B lie in parameter groups of their own, whose rate is the multiple of what
    the schedule says. Afterwards the groups are as they were, for schedulers and checkpoints.

    Attributes:
        ratio: B's rate over A's.
    """

    ratio: float
    _groups: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)

    def before_update(self, pairs: Sequence[Pair], optimizer: torch.optim.Optimizer) -> None:
        """Divide the groups."""
        fast = {pair.b for pair in pairs}
        self._groups = list(optimizer.param_groups)
        halves: list[dict[str, Any]] = []
        for group in self._groups:
            rates = {False: group["lr"], True: group["lr"] * self.ratio}
            for is_fast, lr in rates.items():
                params = [p for p in group["params"] if (p in fast) is is_fast]
                halves.append({**group, "params": params, "lr": lr})
        optimizer.param_groups[:] = [half for half in halves if half["params"]]

    def after_update(self, pairs: Sequence[Pair], optimizer: torch.optim.Optimizer) -> None:
        """Put the groups together again."""
        optimizer.param_groups[:] = self._groups


def _spectra(pairs: Sequence[Pair], damping: float) -> list[tuple[Pair, Spectrum, Spectrum]]:
    """Return the pairs that have both gradients, with the spectra of A A^T and B^T B."""
    whole = [pair for pair in pairs if pair.a.grad is not None and pair.b.grad is not None]
    grams = [gram_a(pair.a) for pair in whole] + [gram_b(pair.b) for pair in whole]
    found = at_once(grams, lambda gram: spectrum(gram, damping))
    return list(zip(whole, found[: len(whole)], found[len(whole) :], strict=True))


def _kept(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """Return the tensors that an optimizer holds for a parameter, its counter left out."""
    state = optimizer.state.get(p, {})
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.ndim}


def _replace(pair: Pair, grad_a: Tensor, grad_b: Tensor) -> None:
    _grad(pair.a).copy_(grad_a)
    _grad(pair.b).copy_(grad_b)


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad
