"""How one parameter is treated, and what follows from it: what it keeps, how it is turned, its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import QuantizedParameter
from scrimp.base.seeds import derive
from scrimp.optim.arithmetic import Kind, Layout, compute_dtype, decode, key
from scrimp.optim.fused_adamw import is_adamw
from scrimp.optim.fused_cpu import is_fused
from scrimp.optim.paging import is_small, tensor_bytes
from scrimp.optim.pieces import Composition, Entries, Options, Slot, Store, Target
from scrimp.optim.stores.full import Full

Compose = Callable[[Options], Composition]


@dataclass(slots=True, kw_only=True)
class Plan:
    """How one parameter is treated.

    Attributes:
        composition: By which pieces.
        target: What the pieces are told of it.
        exact: Keeps what is never quantised.
        transposed: Whether the pieces see its transpose.
        why: Why it is left unprojected, in a clause; empty where it is projected or nothing would project it.
        is_quantized: Whether it holds codes. What is asked of a parameter at every step is asked once: to
            find it out takes longer than to update a small one.
        is_adamw: Whether torch's kernel computes what the pieces say, wherever its numbers lie in order.
        is_fused: Whether our kernel for CPUs does, likewise.
        kinds: What its code depends on, without and with weight decay.
        runs: The functions that update it.
    """

    composition: Composition
    target: Target
    exact: Store
    transposed: bool = False
    why: str = ""
    is_quantized: bool = False
    is_adamw: bool = False
    is_fused: bool = False
    kinds: dict[bool, Kind] = field(default_factory=dict)
    runs: dict[tuple[bool, bool], Callable[..., Any]] = field(default_factory=dict)

    def kind(self) -> tuple[Composition, tuple[int, ...], bool]:
        """Return what parameters have in common whose updates hold and compute the same."""
        return self.composition, self.target.shape, self.transposed

    def oriented(self, tensor: Tensor) -> Tensor:
        """Return the parameter or its gradient as the pieces see it: (..., k, d); a view."""
        if self.composition.projector is None:
            return tensor
        if tensor.ndim > 3:  # a convolution's kernel as (out, in times window)
            tensor = tensor.flatten(1)
        return tensor.mT if self.transposed else tensor

    def store(self, slot: Slot) -> Store:
        """Return the store that keeps a slot of the rule."""
        return self.exact if slot.exact else self.composition.store

    def shape(self, step: int) -> tuple[int, ...]:
        """Return the shape of the gradient that the rule is given at 0-based `step`."""
        projector = self.composition.projector
        return self.target.shape if projector is None else projector.down_shape(self.target, step)

    def rule_slots(self, step: int) -> tuple[Slot, ...]:
        """Return what the rule keeps."""
        return self.composition.rule.slots(self.shape(step), self.target)

    def counters(self) -> tuple[str, ...]:
        """Return the names of the plain integers that are kept, all 0 at first."""
        projector = self.composition.projector
        return () if projector is None else ("refreshed", *projector.counters)

    def layout(self, step: int = 0) -> Layout:
        """Return the tensors that are kept, by name: shape and dtype. Their bytes are the formula."""
        c, target = self.composition, self.target
        slots = [(slot, self.store(slot)) for slot in self.rule_slots(step)]
        if c.conditioner is not None:
            slots += [(slot, self.exact) for slot in c.conditioner.slots(self.shape(step), target)]
        if c.projector is not None and c.lift is not None:
            slots += [(slot, c.basis_store) for slot in c.projector.slots(target)]
            slots += [(slot, self.exact) for slot in c.lift.slots(target)]
        entries = {
            key(slot, name): entry for slot, store in slots for name, entry in store.layout(slot).items()
        }
        return entries | ({} if c.projector is None else dict(c.projector.tensors(target)))

    def misfit(self, state: Entries) -> str:
        """Return in a sentence how a state is not what is kept; empty where it is."""
        name, wanted = self.target.name, self.layout(state.get("refreshed", 0))
        absent = sorted({*wanted, "step", *self.counters()} ^ state.keys())
        if absent:
            return f"{name}: {absent[0]!r} is not kept both in the state dict and here: build it as it was"
        shapes = {key: (tuple(state[key].shape), shape) for key, (shape, _) in wanted.items()}
        odd = next((key for key, (held, shape) in shapes.items() if held != shape), "")
        if not odd:
            return ""
        return (
            f"{name}: {odd!r} has the shape {shapes[odd][0]} in the state dict and {shapes[odd][1]} here: "
            "it is of another model, or of a matrix with other options"
        )

    def state_bytes(self, step: int = 0) -> int:
        """Return the bytes of the tensors that are kept."""
        return sum(tensor_bytes(*entry) for entry in self.layout(step).values())

    def paged_bytes(self, step: int = 0) -> int:
        """Return the bytes of those that a pager keeps off the device."""
        layout = self.layout(step).values()
        return sum(tensor_bytes(*entry) for entry in layout if not is_small(*entry))

    def basis(self, state: Entries, like: Tensor) -> Any:
        """Return the projector's basis, decoded or drawn anew."""
        projector, store = self.composition.projector, self.composition.basis_store
        assert projector is not None
        slots = projector.slots(self.target)
        values = {slot.name: decode(state, slot, store, compute_dtype(like)) for slot in slots}
        return projector.load(values, state, self.target, like)

    def lift_slots(self, state: Entries, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return what the lift keeps, decoded."""
        assert self.composition.lift is not None
        slots = self.composition.lift.slots(self.target)
        return {slot.name: decode(state, slot, self.exact, dtype) for slot in slots}

    def needs_gradient(self, state: Entries, step: int) -> bool:
        """Tell whether the update at `step` reads the whole gradient, or only its part in the subspace."""
        c = self.composition
        if c.projector is None or c.lift is None or c.lift.needs_gradient:
            return True
        return c.projector.refresh_needs_gradient and (not state or c.projector.due(state, step))

    def kind_of(self, numbers: Mapping[str, float], options: Options) -> Kind:
        """Return what the update's code depends on, where the step has these numbers."""
        decays = options["weight_decay"] != 0
        if decays not in self.kinds:
            target = replace(self.target, name="", index=0, count=1, shape=())
            self.kinds[decays] = Kind(self.composition, target, self.exact, tuple(numbers), decays)
        return self.kinds[decays]

    def numbers(self, state: Entries, options: Options, step: int) -> dict[str, float]:
        """Return the numbers of 0-based `step`, by name: always the same names."""
        c, age, rewarm = self.composition, step + 1, 1.0
        if c.projector is not None and c.projector.on_refresh == "reset":
            age = step - state["refreshed"] + 1
        if c.reset.every and step + 1 >= c.reset.every:
            since = (step + 1) % c.reset.every
            rewarm = c.reset.factor(since)
            age = min(age, since + 1) if c.reset.restart else age
        options = {**options, "lr": float(options["lr"]), "step": step + 1}
        numbers = {
            "rewarm": rewarm,
            "lr": options["lr"],
            "weight_decay": options["weight_decay"],
            **c.rule.scalars(options, age),
        }
        if c.conditioner is not None:
            numbers |= c.conditioner.scalars(options, step + 1)
        return numbers

    def noise(self, seed: int, step: int) -> Tensor:
        """Return the seed of what a step draws, a 0-d int64 tensor."""
        return torch.tensor(derive(seed, self.target.name, step))


def plan(p: Tensor, target: Target, options: Options, compose: Compose, *, mark: str, asked: bool) -> Plan:
    """Decide how a parameter is treated.

    Args:
        p: The parameter.
        target: What is known of it, with its own shape.
        options: Its group's.
        compose: Makes the composition for a group's options; without its mark it is that of the rest.
        mark: The option that makes a group a projected one.
        asked: Whether the user put it among the projected ones by hand; else a rank too large leaves it be.

    Raises:
        ScrimpError: It cannot be treated so.
    """
    double = p.dtype == torch.float64
    exact = Full(torch.float64) if double else Full()

    def widened(composition: Composition) -> Composition:
        stores = {"store": composition.store, "basis_store": composition.basis_store}
        wide = {name: exact for name, store in stores.items() if double and isinstance(store, Full)}
        return replace(composition, **wide)  # type: ignore[arg-type]

    def planned(composition: Composition, target: Target, **more: Any) -> Plan:
        return Plan(
            composition=composition,
            target=target,
            exact=exact,
            is_quantized=isinstance(p, QuantizedParameter),
            is_adamw=is_adamw(composition, p),
            is_fused=is_fused(composition, p),
            **more,
        )

    composition = widened(compose(options))
    if composition.projector is None:
        return planned(composition, target)
    if p.ndim < 2:
        raise ScrimpError(
            f"{target.name} has {p.ndim} dimension{'' if p.ndim == 1 else 's'}, and only matrices can be "
            "projected: put it into a group without rank"
        )
    shape = tuple(p.shape) if p.ndim < 4 else (p.shape[0], p[0].numel())
    transposed = composition.projector.transposes(shape)
    if transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    oriented = replace(target, shape=shape)
    try:
        why = composition.projector.check(oriented)
    except ValueError as error:
        if asked:
            raise ScrimpError(str(error)) from None
        why = f"rank above its smaller side, {min(shape[-2:])}"
    if composition.projector.on_refresh == "rotate":
        _refuse_rotation(composition, oriented)
    if why and not asked:
        rest = widened(compose({**options, mark: None}))
        return planned(rest, target, why=why)
    return planned(composition, oriented, transposed=transposed)


def _refuse_rotation(composition: Composition, target: Target) -> None:
    """Refuse a rule that keeps what no rotation can carry into a new subspace.

    Raises:
        ScrimpError: It does.
    """
    assert composition.projector is not None
    kept = composition.rule.slots(composition.projector.down_shape(target, 0), target)
    stuck = [slot.name for slot in kept if slot.axis is None and slot.shape]
    if stuck:
        raise ScrimpError(
            f"{type(composition.rule).__name__} keeps {stuck[0]!r}, which cannot be rotated into a new "
            "subspace: use on_refresh='keep' or 'reset'"
        )
