"""What the named optimizers share: their common options, and how pieces become an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, TypedDict

from scrimp.base.errors import ScrimpError
from scrimp.base.suggest import did_you_mean
from scrimp.optim.group_options import AUTHORS_WORDS, Authors
from scrimp.optim.optimizer import Optimizer
from scrimp.optim.pieces import Composition, Conditioner, Lift, Options, Projector, Reset, Rule, Store
from scrimp.optim.stores import STORES
from scrimp.optim.stores.full import Full

Betas = tuple[float, float]


class Common(TypedDict, total=False):
    """Options that every named optimizer takes, by keyword.

    Attributes:
        store: How the moments are kept, a name of `scrimp.optim.stores.STORES`.
        reset_every: Updates between resets of the moments; 0 never.
        seed: Of every random draw.
        maximize: Climb instead of descending.
        compile: Run the arithmetic as compiled functions.
    """

    store: str
    reset_every: int
    seed: int
    maximize: bool
    compile: bool


class Pieces(NamedTuple):
    """What treats a group of parameters, the store and the reset's period left to the group's options."""

    rule: Rule
    projector: Projector | None = None
    lift: Lift | None = None
    basis_store: Store | None = None
    conditioner: Conditioner | None = None
    reset: Reset | None = None


class Named(Optimizer):
    """An optimizer of some pieces; `own_store` and `own_reset` stand for options that are not given.

    Args:
        params: A model, parameters, or groups.
        pieces: Every group's, or what makes a group's by its options: like all that is kept a function of a
            module or a partial of one, not a closure, so that optimizers can be pickled.
        options: Those of every group, besides the common ones.
        common: The common options that were given.
        projected: Those of projected groups alone; the first, where it has a value, marks such a group.
        authors: See `Optimizer`.

    Raises:
        TypeError: An option is unknown.
        ScrimpError: One has a value that it cannot have.
    """

    own_store: ClassVar[str] = "fp32"
    own_reset: ClassVar[int] = 0

    def __init__(
        self,
        params: Any,
        pieces: Pieces | Callable[[Options], Pieces],
        options: Mapping[str, Any],
        common: Common,
        *,
        projected: Mapping[str, Any] | None = None,
        authors: Authors | None = None,
    ) -> None:
        _check(common, (*options, *(projected or ())))
        every = {
            **options,
            "store": common.get("store", self.own_store),
            "reset_every": common.get("reset_every", self.own_reset),
        }
        super().__init__(
            params,
            compose=functools.partial(_composed, pieces),
            options=every,
            projected=projected,
            authors=authors,
            seed=common.get("seed", 0),
            maximize=common.get("maximize", False),
            compile=common.get("compile", False),
        )


def _check(common: Common, others: Iterable[str]) -> None:
    """Refuse an option that is unknown, and values of the common ones that no group's check sees."""
    odd = common.keys() - Common.__annotations__.keys()
    if odd:
        name, known = min(odd), [*Common.__annotations__, *others]
        ours = AUTHORS_WORDS.get(name)
        hint = f"; here it is called {ours!r}" if ours in known else did_you_mean(name, known)
        raise TypeError(f"there is no option {name!r}{hint}; known: {', '.join(known)}")
    seed = common.get("seed", 0)
    if type(seed) is not int or seed < 0:
        raise ScrimpError(f"seed must be a whole number of at least 0, not {seed!r} ({type(seed).__name__})")


def _composed(pieces: Pieces | Callable[[Options], Pieces], options: Options) -> Composition:
    pieces = pieces if isinstance(pieces, Pieces) else pieces(options)
    return Composition(
        rule=pieces.rule,
        projector=pieces.projector,
        lift=pieces.lift,
        store=store(options["store"]),
        basis_store=pieces.basis_store or Full(),
        conditioner=pieces.conditioner,
        reset=replace(pieces.reset or Reset(), every=options["reset_every"]),
    )


def store(name: str) -> Store:
    """Return the state store of a name.

    Raises:
        ScrimpError: There is none of that name; the message names the nearest and all of them.
    """
    if name not in STORES:
        raise ScrimpError(
            f"store: there is no {name!r}{did_you_mean(name, tuple(STORES))}; known: {', '.join(STORES)}"
        )
    return STORES[name]
