"""What the drop-in modules share: the authors' constructors and group keys, run by `Optimizer`.

Groups are written, kept and shown in the authors' words (`update_proj_gap`, `proj_type`, ...), and a group is
projected where it has a `rank`; in the others these words are None. As in their code the singular vectors are
those of an exact decomposition in float32, with the signs that come out of it, and a rank above the smaller
side of a matrix is cut to it; with one warning here.

Deliberately different in all of them:

- The state is named tensors instead of a pickled object; in float32 the basis does not keep all singular
  vectors alive.
- Moments and bases of bf16 weights are float32, where theirs are bf16 and second moments stall, and such
  weights are rounded stochastically. (`scrimp.optim.GaLore` and others take `store="bf16-nearest"`.)
- A gradient that is not finite leaves state and weights as they are. Theirs raise an error in the SVD, or
  fill the weights with NaN.
- `closure` is called with gradients enabled; theirs cannot compute any.
- Vectors in a projected group are refused at construction, where theirs raise an IndexError at the first
  step; `lr`, `betas`, `rank` and so on are checked then too. Keys that a group lacks have the values of the
  authors' examples.
- `no_deprecation_warning` is taken, and there is no such warning to switch off: they warn of their class.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from scrimp.base.errors import ScrimpError
from scrimp.optim.optimizer import Optimizer
from scrimp.optim.pieces import Composition, Lift, Options, Projector, Rule, Slot, Store, Target
from scrimp.optim.projectors.svd import SingularVectors
from scrimp.optim.projectors.two_sided import TwoSided
from scrimp.optim.rules.adam import Adam
from scrimp.optim.stores.full import Full

Betas = tuple[float, float]
FULL = Full()


class AuthorsOptimizer(Optimizer):
    """An optimizer under its authors' name; the base of all classes of these modules.

    Args:
        params: Parameters, or groups of them; those with a `rank` are projected.
        rule: Makes the rule, by a group's options.
        projector: Makes the projector of a projected group.
        lift: Makes its lift.
        options: The options of every group.
        projected: Those of projected groups, `rank` the first.
        store: How moments are kept.
        compile: Run the arithmetic as compiled functions.
    """

    def __init__(
        self,
        params: Any,
        *,
        rule: Callable[[Options], Rule],
        lift: Callable[[Options], Lift],
        options: Mapping[str, Any],
        projected: Mapping[str, Any],
        projector: Callable[[Options], Projector] | None = None,
        store: Store = FULL,
        compile: bool = False,
    ) -> None:
        compose = functools.partial(_composed, rule, projector or singular_vectors, lift, store)
        super().__init__(params, compose=compose, options=options, projected=projected, compile=compile)
        self._warn_of_cut_ranks()

    def _warn_of_cut_ranks(self) -> None:
        cut = [
            f"{plan.target.name} ({min(plan.target.shape[-2:])})"
            for plan in (self.plan_of(p) for group in self.param_groups for p in group["params"])
            if isinstance(plan.composition.projector, CutSingularVectors | CutTwoSided)
            and plan.composition.projector.rank > min(plan.target.shape[-2:])
        ]
        if cut:
            more = f" and {len(cut) - 3} more" if len(cut) > 3 else ""
            warnings.warn(
                f"the rank is above the smaller side of {', '.join(cut[:3])}{more}, and cut to it there: "
                "such a matrix needs more state than without a rank",
                stacklevel=4,
            )


def _composed(
    rule: Callable[[Options], Rule],
    projector: Callable[[Options], Projector],
    lift: Callable[[Options], Lift],
    store: Store,
    group: Options,
) -> Composition:
    whole = Composition(rule=rule(group), store=store, basis_store=FULL)
    return whole if group["rank"] is None else replace(whole, projector=projector(group), lift=lift(group))


def options_of_adam(
    lr: float, betas: Betas, eps: float, weight_decay: float, correct_bias: bool
) -> dict[str, Any]:
    """Return the options of every group of an Adam."""
    return {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "correct_bias": correct_bias,
    }


def adam(options: Options) -> Rule:
    """Return the old Hugging Face Adam that the authors carry, with or without bias correction."""
    return Adam(convention="hf") if options["correct_bias"] else UncorrectedAdam(convention="hf")


def refuse_other(word: str, value: object, only: object) -> None:
    """Raise a ScrimpError for an argument of theirs that has one value here."""
    if value != only:
        raise ScrimpError(f"{word}={value!r} is not supported: leave it at {only!r}")


def singular_vectors(options: Options) -> Projector:
    """Return the projector on singular vectors, by a group's rank, update_proj_gap and proj_type."""
    rank, every, side = options["rank"], options["update_proj_gap"], options["proj_type"]
    if side == "full":
        return CutTwoSided(rank=rank, every=every, method="svd", align=False, released=True)
    return CutSingularVectors(rank=rank, every=every, side=side, method="svd", align=False, released=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class UncorrectedAdam(Adam):
    """Adam as BERT's code had it: the moments start at zero, and nothing makes up for that."""

    def scalars(self, options: Options, age: int) -> dict[str, float]:
        """Return Adam's numbers, the step size without its correction."""
        return {**Adam.scalars(self, options, age), "size": options["lr"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamThatDecaysLast(Adam):
    """Torch's Adam, but for a decay of the new weights: the authors let bitsandbytes decay nothing before."""

    @property
    def decay_first(self) -> bool:
        """The new weights decay."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class CutSingularVectors(SingularVectors):
    """Singular vectors, as many as there are where the rank is above the smaller side."""

    rank: int

    def check(self, target: Target) -> str | None:
        """Take any matrix."""
        return None

    def down_shape(self, target: Target, step: int) -> tuple[int, ...]:
        """Return (..., k, r)."""
        return (*target.shape[:-1], min(self.rank, *target.shape[-2:]))

    def slots(self, target: Target) -> tuple[Slot, ...]:
        """Return the basis, (..., d, r)."""
        rank = min(self.rank, *target.shape[-2:])
        return (Slot(name="basis", shape=(*target.shape[:-2], target.shape[-1], rank)),)


@dataclass(frozen=True, slots=True, kw_only=True)
class CutTwoSided(TwoSided):
    """Singular vectors of both sides, as many as there are where the rank is above the smaller side."""

    def check(self, target: Target) -> str | None:
        """Take any matrix."""
        return None

    def down_shape(self, target: Target, step: int) -> tuple[int, ...]:
        """Return (..., r, r)."""
        rank = min(self.rank, *target.shape[-2:])
        return (*target.shape[:-2], rank, rank)

    def slots(self, target: Target) -> tuple[Slot, ...]:
        """Return both bases."""
        batch, (k, d) = target.shape[:-2], target.shape[-2:]
        rank = min(self.rank, k, d)
        return (
            Slot(name="left", shape=(*batch, k, rank)),
            Slot(name="right", shape=(*batch, d, rank)),
        )
