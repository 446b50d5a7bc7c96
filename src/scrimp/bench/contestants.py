"""Who competes: a method of the catalogue, with other pieces joined by `+`, or a peer's package.

adamw                     a method of the catalogue (`scrimp methods`)
adamw+recompute+bf16      the same with other pieces, or another precision
plan:400MiB               what the planner chooses for that budget
galore-torch              a package's best-known method
pytorch-optimizer:Fira    another class of a package
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from scrimp.base.errors import ScrimpError
from scrimp.base.suggest import did_you_mean
from scrimp.base.units import parse_bytes
from scrimp.bench import peers
from scrimp.bench.suites import STATED, Suite
from scrimp.methods import METHODS, PIECES, Choice, Method, piece
from scrimp.recipe import Precision
from scrimp.reported import reported

if TYPE_CHECKING:
    from scrimp.bench.peers import Peer

PLAN = "plan:"
_FIELDS: dict[Choice, str] = {"loss": "activations.loss"}  # elsewhere it is CHOICE.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One row of a suite.

    Attributes:
        name: As on the command line.
        title: For people.
        recipe: What its recipe has in place of the job's, by dotted field.
        lr_ratio: Its learning rate over AdamW's, as its source states.
        paper: Key of the figures that its paper reports; None where there is no paper.
        peer: The package that runs it; None is ours.
    """

    name: str
    title: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    lr_ratio: float = 1.0
    paper: str | None = None
    peer: Peer | None = None

    @property
    def kind(self) -> Literal["ours", "peer"]:
        """Whose code it is."""
        return "ours" if self.peer is None else "peer"

    def why_missing(self, device: str) -> str:
        """Return what is needed for it to run on a type of device; empty where it can."""
        if self.peer is None:
            return ""
        if not peers.installed_version(self.peer):
            return peers.install_line(self.peer)
        return "works on CUDA alone" if self.peer.needs not in ("", device) else ""


def contestants(names: Sequence[str], suite: Suite) -> list[Contestant]:
    """Read the names of contestants; `all` is the whole catalogue and every peer of the suite.

    Raises:
        ScrimpError: A name is unknown or stands twice, or one cannot compete in the suite.
    """
    names = [name.strip() for name in names]
    if names == ["all"]:
        names = _everybody(suite)
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ScrimpError(f"methods: {min(twice)!r} is named twice; name each contestant once")
    return [contestant(name, suite) for name in names]


def _everybody(suite: Suite) -> list[str]:
    there = [entry.name for entry in peers.PEERS if suite.name in entry.suites]
    # An adapter over random weights would be no comparison.
    ours = [m.name for m in METHODS if suite.tunes or not _is_adapter(m)]
    return list(dict.fromkeys([*suite.contestants, *ours, *there]))


def _is_adapter(method: Method) -> bool:
    return piece("tune", method.pieces.get("tune", "full")).freezes_base


def contestant(name: str, suite: Suite) -> Contestant:
    """Read the name of a contestant.

    Raises:
        ScrimpError: It is unknown, or cannot compete in the suite.
    """
    if name.startswith(PLAN):
        return _planned(name)
    base, *others = name.split("+")
    methods = {method.name: method for method in METHODS}
    if base in methods:
        return _ours(name, methods[base], others)
    if ":" not in base and base not in {entry.name for entry in peers.PEERS}:
        known = [*methods, *(entry.name for entry in peers.PEERS)]
        raise ScrimpError(
            f"methods: there is no {base!r}{did_you_mean(base, known)}; `scrimp methods` lists all"
        )
    if others:
        raise ScrimpError(
            f"methods: {name!r} joins pieces to a peer, which brings its own; leave +{others[0]} out"
        )
    found = peers.peer(base)
    if suite.name not in found.suites:
        raise ScrimpError(
            f"methods: {name} cannot compete in the suite {suite.name}, only in {', '.join(found.suites)}"
        )
    return Contestant(name=name, title=found.title, lr_ratio=found.lr_ratio, paper=found.paper, peer=found)


def _planned(name: str) -> Contestant:
    budget = name.removeprefix(PLAN)
    parse_bytes(budget)
    open_choices = dict.fromkeys(("activations.name", "activations.loss", "precision", "micro_batch"))
    return Contestant(
        name=name,
        title=f"what the planner chooses for {budget}",
        recipe={**open_choices, "memory": budget},
    )


def _ours(name: str, method: Method, others: Sequence[str]) -> Contestant:
    recipe: dict[str, Any] = {_field(choice): value for choice, value in method.pieces.items()}
    recipe |= method.settings
    for other in others:
        field_, value = _piece(other)
        recipe[field_] = value
    optimizer = piece("optimizer", recipe.get("optimizer.name", STATED["optimizer.name"]))
    tune = piece("tune", recipe.get("tune.name", "full"))
    return Contestant(
        name=name,
        title=" with ".join([method.name, ", ".join(others)]) if others else method.name,
        recipe=recipe,
        lr_ratio=optimizer.lr_ratio * tune.lr_ratio,
        # No paper reports on a combination.
        paper=method.name if not others and reported(method.name) else None,
    )


def _field(choice: Choice) -> str:
    return _FIELDS.get(choice, f"{choice}.name")


def _piece(name: str) -> tuple[str, str]:
    """Return the field of a recipe that a piece or a precision is a value of.

    Raises:
        ScrimpError: It is neither.
    """
    if name in get_args(Precision) and name != "auto":
        return "precision", name
    found = [entry for entry in PIECES if entry.name == name]
    if not found:
        known = [*(entry.name for entry in PIECES), *get_args(Precision)]
        raise ScrimpError(
            f"methods: there is no piece {name!r}{did_you_mean(name, known)}; see scrimp methods"
        )
    return _field(found[0].choice), name
