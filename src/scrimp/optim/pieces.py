"""What an optimizer is made of: the protocols of its pieces, and the few types they share.

One update of a matrix W with gradient G:

    G ──lift.prepare──> A ──projector.down──> R ──conditioner──> R' ──rule──> N, step size
                                                                               │
    W  <──write──  decay · W − dense − factor · G − project-back(small)  <──lift┘

Every piece is a frozen dataclass without tensors; what it keeps between steps is declared as `Slot`s, held
by the optimizer as named tensors, and handed back decoded. All arithmetic is pure functions of tensors, so
that the middle of the update (all but the projections) can run as one compiled function.

Matrices are *oriented* before a piece sees them: (..., k, d), where d is the side that the projection
shortens to r and k the side it keeps (the larger one by default). A transposed matrix is a view, so pieces
know no left or right. A 3-D parameter is a batch of matrices, each with its own subspace. Optimizers
without a projector see the parameter in its own shape, flat and in blocks where the rule is elementwise.

Scalars that change from step to step (learning rate, bias corrections) are 0-d float64 tensors, all of them
views of one: a Python number would be compiled in anew at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

Role = Literal["linear", "experts", "embedding", "head", "norm", "bias", "router", "conv", "other"]
Scalars = Mapping[str, Tensor]  # 0-d float64, on the parameter's device
Entries = dict[str, Any]  # `optimizer.state[p]`: stored tensors by name, and counters as plain integers
Options = Mapping[str, Any]  # a parameter group's options: lr, betas, eps, weight_decay, ...
Carry = Callable[[Tensor, "Slot"], Tensor]  # an old slot's value in the new subspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The parameter that a piece is to treat.

    Attributes:
        name: Its name in the model, or its position where it has none.
        shape: Oriented, (..., k, d), where it is projected; else its own.
        role: What it is in the model.
        index: Its number among the parameters that are treated alike, which seeds are derived from.
        count: How many those are.
        heads: Of a query or key projection: how many heads its rows are divided among; else 1.
    """

    name: str
    shape: tuple[int, ...]
    role: Role = "other"
    index: int = 0
    count: int = 1
    heads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A tensor that a piece keeps between steps.

    Attributes:
        name: Its name, part of the key in `state_dict`.
        shape: Its shape.
        signed: Whether it may be negative, which decides the code book of a quantised store.
        axis: The axis that lies in the subspace (of length r), which a rotation may touch; None has none.
        exact: Never quantised: scalars, norms, histories.
    """

    name: str
    shape: tuple[int, ...]
    signed: bool = True
    axis: int | None = None
    exact: bool = False


class Step(NamedTuple):
    """What a rule makes of a gradient: W moves by -size * direction.

    Attributes:
        direction: Shaped like the gradient it was given.
        size: Learning rate times the rule's own gain (H-Adam's bias correction), a scalar.
        decay: The learning rate that multiplies the weight decay, a scalar.
        slots: The rule's slots, renewed.
    """

    direction: Tensor
    size: Tensor
    decay: Tensor
    slots: dict[str, Tensor]


class Update(NamedTuple):
    """What is subtracted from W: `dense + factor * G + project_back(small)`; None is nothing.

    Attributes:
        small: In the subspace, (..., k, r), to be projected back.
        factor: Broadcastable to G: a scalar, or (..., k, 1) for one factor a channel.
        dense: Shaped like W.
        slots: The lift's slots, renewed.
    """

    small: Tensor | None
    factor: Tensor | None
    dense: Tensor | None
    slots: dict[str, Tensor]


class Rule(Protocol):
    """The optimizer proper, in whatever space it is given."""

    @property
    def elementwise(self) -> bool:
        """Whether each element stands alone, so that blocks may be treated alone."""

    @property
    def decay_first(self) -> bool:
        """Whether weight decay multiplies W before the update (torch) or after it (H-Adam)."""

    def slots(self, shape: tuple[int, ...], target: Target) -> tuple[Slot, ...]:
        """Return what is kept for a gradient of `shape`, all zero at first."""

    def scalars(self, options: Options, age: int) -> dict[str, float]:
        """Return the step's numbers; `age` counts updates since the moments began, 1 for the first."""

    def step(self, r: Tensor, slots: Mapping[str, Tensor], s: Scalars, weight: Tensor) -> Step:
        """Return the step for gradient `r`; `weight` is W, for rules that scale by its size. Pure."""


class Projector(Protocol):
    """The part of the gradient that keeps state. Its `basis` is what `load` makes of the entries."""

    @property
    def on_refresh(self) -> Literal["keep", "rotate", "reset"]:
        """What becomes of the moments when the subspace changes."""

    @property
    def mixes(self) -> bool:
        """Whether every element of the gradient reaches `down`, so that a non-finite one shows there."""

    @property
    def is_drawn(self) -> bool:
        """Whether `load` is plain arithmetic on the entry "seed", which may be a tensor, and `like`."""

    @property
    def refresh_needs_gradient(self) -> bool:
        """Whether a refresh reads the whole gradient (singular vectors do, random ones do not)."""

    def transposes(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a parameter of `shape` (..., m, n) is treated as its transpose."""

    def check(self, target: Target) -> str | None:
        """Return why a matrix stays unprojected, in one clause; None where it is projected.

        Raises:
            ValueError: The rank cannot be had.
        """

    def check_count(self, count: int) -> None:
        """Refuse a number of matrices that cannot be treated together.

        Raises:
            ScrimpError: It cannot.
        """

    def down_shape(self, target: Target, step: int) -> tuple[int, ...]:
        """Return the shape of `down`'s result at 0-based `step`."""

    def slots(self, target: Target) -> tuple[Slot, ...]:
        """Return what is kept in the projector's store (a basis)."""

    def tensors(self, target: Target) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return what is kept as it is, such as indices: name to shape and dtype."""

    @property
    def counters(self) -> tuple[str, ...]:
        """Return the names of the plain integers that are kept (seeds, periods), all 0 at first."""

    def due(self, entries: Entries, step: int) -> bool:
        """Tell whether the subspace is chosen anew before 0-based `step`; reads no tensor."""

    def refresh(
        self, g: Tensor, basis: Any, entries: Entries, target: Target, step: int
    ) -> tuple[dict[str, Tensor], Carry | None]:
        """Choose the subspace anew.

        Args:
            g: The oriented gradient, (..., k, d); may hold non-finite values, which must not spread.
            basis: What `load` returned; None at the first refresh.
            entries: What is stored; its tensors and counters may be changed in place.
            target: The matrix.
            step: 0-based.

        Returns:
            The slots' new values, and for `on_refresh="rotate"` how an old slot is carried over.
        """

    def load(self, slots: Mapping[str, Tensor], entries: Entries, target: Target, like: Tensor) -> Any:
        """Return the basis: decoded, or drawn from its seed, in the dtype and on the device of `like`."""

    def down(self, g: Tensor, basis: Any) -> Tensor:
        """Return the oriented gradient (..., k, d) in the subspace; linear in `g`."""

    def up(self, r: Tensor, basis: Any, like: Tensor) -> Tensor:
        """Return a tensor of the subspace in full size, shaped as `like`; the transpose of `down`."""

    def subtract(self, w: Tensor, r: Tensor, basis: Any) -> None:
        """Subtract `up(r)` from the oriented `w` in place, without a full-size temporary where possible."""


class Lift(Protocol):
    """How a step in the subspace becomes an update of all of W, and what becomes of the rest."""

    @property
    def needs_gradient(self) -> bool:
        """Whether it reads G itself, and so cannot do with micro-batches summed in the subspace."""

    def slots(self, target: Target) -> tuple[Slot, ...]:
        """Return what it keeps between steps, all zero at first."""

    def prepare(self, g: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
        """Return what is projected: `g`, or `g` with what was kept added."""

    def update(
        self,
        g: Tensor,
        r: Tensor,
        step: Step,
        up: Callable[[Tensor], Tensor],
        slots: Mapping[str, Tensor],
        s: Scalars,
    ) -> Update:
        """Return the update.

        Args:
            g: What `prepare` returned, (..., k, d).
            r: Its part in the subspace, before the conditioner.
            step: The rule's.
            up: Projects back to full size.
            slots: The lift's own.
            s: The step's numbers: `lr` among them.
        """


class Store(Protocol):
    """How a slot is kept between steps. Shapes and dtypes of its entries follow from the slot alone."""

    def prepare(self, device: Any) -> None:
        """Make ready for slots on a device, before the first is encoded."""

    def layout(self, slot: Slot) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return its entries: suffix ("" for the only one) to shape and dtype."""

    def decode(self, entries: Mapping[str, Tensor], slot: Slot, dtype: Any) -> Tensor:
        """Return the value in `dtype` (the compute dtype: float32, or float64 for float64 weights)."""

    def encode(self, value: Tensor, slot: Slot, noise: Tensor) -> dict[str, Tensor]:
        """Return the entries for a value; `noise` is a 0-d int64 seed for stochastic rounding. Pure."""

    def block(self, slot: Slot) -> int:
        """Return how many elements are kept together: blocks of a flat slot must be multiples of it."""


class Conditioner(Protocol):
    """Changes the gradient before the moments see it: clips spikes, preconditions."""

    @property
    def elementwise(self) -> bool:
        """As a rule's."""

    def slots(self, shape: tuple[int, ...], target: Target) -> tuple[Slot, ...]:
        """Return what it keeps between steps, all zero at first."""

    def scalars(self, options: Options, step: int) -> dict[str, float]:
        """Return the step's numbers; `step` counts all updates, 1 for the first."""

    def condition(
        self, r: Tensor, rule: Mapping[str, Tensor], slots: Mapping[str, Tensor], s: Scalars
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradient to use, and its slots renewed; reads `rule`, the rule's slots. Pure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset:
    """Zeroes the rule's slots every so many updates, and warms the step size up again.

    Attributes:
        every: Updates between resets; 0 never resets.
        warmup: Updates until the step size is whole again.
        restart: Whether the bias correction counts from the reset (False is what SPAM released).
    """

    every: int = 0
    warmup: int = 0
    restart: bool = True

    def factor(self, since: int) -> float:
        """Return the multiple of the step size, `since` updates after a reset (SPAM's cosine)."""
        if since >= self.warmup:
            return 1.0
        return 1 - 0.99 * 0.5 * (1 + math.cos(math.pi * since / (self.warmup + 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """One optimizer as its pieces. `None` for projector and lift treats the gradient in its own shape.

    Attributes:
        rule: The optimizer proper.
        projector: What part of the gradient keeps state.
        lift: How the step becomes an update of the whole matrix.
        store: How the rule's slots are kept.
        basis_store: How the projector's basis is kept.
        conditioner: What happens to the gradient before the moments.
        reset: When the moments begin anew.
        stochastic: Round the weights stochastically where they are narrower than the arithmetic.
    """

    rule: Rule
    projector: Projector | None = None
    lift: Lift | None = None
    store: Store = field(kw_only=True)
    basis_store: Store = field(kw_only=True)
    conditioner: Conditioner | None = None
    reset: Reset = Reset()
    stochastic: bool = True

    @property
    def name(self) -> str:
        """The pieces by name; optimizers of the same name understand each other's state."""
        found = [self.projector, self.conditioner, self.rule, self.lift, self.store]
        names = [type(piece).__name__ for piece in found if piece is not None]
        return " + ".join(names + (["Reset"] if self.reset.every else []))
