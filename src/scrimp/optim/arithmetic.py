"""The middle of an update, as pure as it gets: all between `down` and `subtract`, for one parameter.

    entries ──decode──> slots ──conditioner, rule──> step ──lift──> W's own part in place, and what is left

One function per kind of parameter, run eagerly or compiled: its pieces are known when it is made, and
everything that varies (shapes, scalars, seeds) comes as tensors, so that one compilation serves all
matrices of a kind. A gradient that is not finite changes nothing, or its elements alone that are not: `ok`
selects the old value everywhere, without asking a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scrimp.base.counter_random import round_to_bf16
from scrimp.base.protocols import RowCodec
from scrimp.optim.pieces import Composition, Entries, Scalars, Slot, Store, Target, Update
from scrimp.optim.stores.full import Full

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # stored tensors by name: shape and dtype
CHUNK = 1 << 18  # elements at a time: what an eager update touches stays in the cache
PARTS = 64  # of a parameter at the most


@dataclass(frozen=True, slots=True)
class Kind:
    """What parameters have in common that are updated by the same code.

    Attributes:
        composition: Their pieces.
        target: One of them, without its name, shape and number.
        exact: Keeps what is never quantised.
        numbers: Names of the step's numbers.
        decays: Whether there is weight decay.
    """

    composition: Composition
    target: Target
    exact: Store
    numbers: tuple[str, ...]
    decays: bool

    @property
    def is_elementwise(self) -> bool:
        """Whether blocks of a parameter may be updated alone."""
        c = self.composition
        alone = c.conditioner is None or c.conditioner.elementwise
        return alone and c.projector is None and c.rule.elementwise

    @property
    def guards_elements(self) -> bool:
        """Whether elements that are not finite are left out one by one: to look at all first takes longer."""
        c = self.composition
        return self.is_elementwise and c.conditioner is None and isinstance(c.store, Full)

    def store(self, slot: Slot) -> Store:
        """Return the store that keeps a slot of the rule."""
        return self.exact if slot.exact else self.composition.store


def key(slot: Slot, suffix: str) -> str:
    """Return the name of an entry in `optimizer.state[p]`."""
    return f"{slot.name}.{suffix}" if suffix else slot.name


def decode(entries: Mapping[str, Tensor], slot: Slot, store: Store, dtype: torch.dtype) -> Tensor:
    """Return a slot's value from a parameter's entries."""
    own = {suffix: entries[key(slot, suffix)] for suffix in store.layout(slot)}
    return store.decode(own, slot, dtype)


def encode_into(
    entries: Entries, slot: Slot, store: Store, value: Tensor, noise: Tensor, ok: Tensor
) -> dict[str, Tensor]:
    """Write a slot's value into a parameter's entries, unless `ok` is false, and return its codes.

    Codes are left to `write_codes`: in compiled code a choice between bytes takes longer than all else.
    """
    codes = {}
    for suffix, new in store.encode(value, slot, noise).items():
        old = entries[key(slot, suffix)]
        if new.dtype == torch.uint8:
            codes[key(slot, suffix)] = new
        else:
            old.copy_(torch.where(ok, new, old))
    return codes


def write_codes(entries: Entries, codes: Mapping[str, Tensor], ok: Tensor) -> None:
    """Write codes into a parameter's entries, unless `ok` is false."""
    for name, new in codes.items():
        entries[name].copy_(torch.where(ok, new.view_as(entries[name]), entries[name]))


class Change(NamedTuple):
    """How W is to change: to `(1 - decay) W - dense - factor G - project_back(small)`; None is nothing.

    Attributes:
        small: What is to be projected back, in the subspace.
        factor: Of the gradient.
        dense: Shaped like W.
        decay: What weight decay takes: near 1, what it leaves would be rounded by more.
        codes: New entries that are codes, by name, to be written with `write_codes`.
        ok: Whether the gradient is finite, or which of its elements are; else nothing is to change.
    """

    small: Tensor | None
    factor: Tensor | None
    dense: Tensor | None
    decay: Tensor | None
    codes: dict[str, Tensor]
    ok: Tensor

    def each(self, function: Callable[[Tensor], Tensor]) -> Change:
        """Return the change with a function applied to what has W's shape, or is broadcastable to it."""
        factor = None if self.factor is None else function(self.factor)
        return self._replace(factor=factor, dense=None if self.dense is None else function(self.dense))


Middle = tuple[Tensor | None, dict[str, Tensor], Tensor | None, Tensor | None]


def middle(kind: Kind, *, in_place: bool) -> Callable[..., Middle]:
    """Make the function that updates all state of a parameter and W as far as it can.

    Args:
        kind: What is known of the parameter.
        in_place: Whether what is to be projected back is returned for `Projector.subtract`; else it becomes
            part of W's elementwise update (W is rounded but once).

    Returns:
        A function of `(w, g, r, basis, entries, numbers, noise, ok)`: W and G oriented, G in the subspace
        (None computes it) and the basis (then the seed to draw it from), the stored tensors by name, the
        step's numbers as one tensor, a seed, and whether the gradient is finite (None finds out). It returns
        what is still to be projected back and subtracted, or None; the new codes, which `write_codes` writes;
        where there are codes, whether the gradient is finite; and the gradient's factor.
    """
    composition, first = kind.composition, kind.composition.rule.decay_first

    def run(
        w: Tensor,
        g: Tensor,
        r: Tensor | None,
        basis: Any,
        entries: Entries,
        numbers: Tensor,
        noise: Tensor,
        ok: Tensor | None,
    ) -> Middle:
        change = moments(kind, w, g, r, basis, entries, numbers, noise, ok, in_place=in_place)
        if not change.dense is change.factor is change.decay is None:
            new = _moved(w.to(compute_dtype(w)), g, change, first=first)
            w.copy_(torch.where(change.ok, _rounded(new, w.dtype, noise, composition.stochastic), w))
        small = change.small
        if small is not None and change.decay is not None and not first:
            small = small - change.decay * small
        # What is returned is computed once; otherwise compiled code works out the factor for every element.
        return small, change.codes, change.ok if change.codes else None, change.factor

    return run


def moments(
    kind: Kind,
    w: Tensor,
    g: Tensor,
    r: Tensor | None,
    basis: Any,
    entries: Entries,
    numbers: Tensor,
    noise: Tensor,
    ok: Tensor | None,
    *,
    in_place: bool,
) -> Change:
    """Update all state of a parameter; the arguments are those of `middle`'s function."""
    composition, target, dtype = kind.composition, kind.target, compute_dtype(g)
    s: Scalars = dict(zip(kind.numbers, numbers.unbind(), strict=True))
    if r is None:  # the basis is drawn where it is used, with the function that uses it
        assert composition.projector is not None
        basis = composition.projector.load({}, {"seed": basis}, replace(target, shape=tuple(g.shape)), g)
        r = composition.projector.down(g, basis)
    if ok is None:
        ok = r.abs() < torch.inf if kind.guards_elements else is_finite(r)  # compiled isfinite is slow
    shape = tuple(r.shape)
    changed: list[tuple[Slot, Store, Tensor]] = []
    rule_slots = composition.rule.slots(shape, target)
    state = {slot.name: decode(entries, slot, kind.store(slot), dtype) for slot in rule_slots}
    r = raw = r.to(dtype)
    if composition.conditioner is not None:
        slots = composition.conditioner.slots(shape, target)
        kept = {slot.name: decode(entries, slot, kind.exact, dtype) for slot in slots}
        r, kept = composition.conditioner.condition(r, state, kept, s)
        changed += [(slot, kind.exact, kept[slot.name]) for slot in slots]
    step = composition.rule.step(r, state, s, w)
    step = step._replace(size=step.size * s["rewarm"])
    changed += [(slot, kind.store(slot), step.slots[slot.name]) for slot in rule_slots]
    update = Update(None, None, step.size * step.direction, {})
    if composition.projector is not None and composition.lift is not None:
        up = functools.partial(composition.projector.up, basis=basis, like=g)
        slots = composition.lift.slots(replace(target, shape=tuple(g.shape)))
        kept = {slot.name: decode(entries, slot, kind.exact, dtype) for slot in slots}
        update = composition.lift.update(g, raw, step, up, kept, s)
        changed += [(slot, kind.exact, update.slots[slot.name]) for slot in slots]
        if update.small is not None and not in_place:
            back = up(update.small)
            update = update._replace(small=None, dense=back if update.dense is None else update.dense + back)
    codes: dict[str, Tensor] = {}
    for number, (slot, store, value) in enumerate(changed):
        codes |= encode_into(entries, slot, store, value, noise + number + 1, ok)
    decay = step.decay * s["weight_decay"] if kind.decays else None
    small = None if update.small is None else torch.where(ok, update.small, 0.0)
    return Change(small, update.factor, update.dense, decay, codes, ok)


def move_codes(
    kind: Kind,
    codec: RowCodec,
    held: Mapping[str, Tensor],
    g: Tensor,
    change: Change,
    noise: Tensor,
    start: int,
) -> dict[str, Tensor]:
    """Decode a block of rows of a quantised W, update it and code it again, with fresh scales.

    Args:
        kind: What is known of the parameter.
        codec: How its rows become entries.
        held: The entries of the rows.
        g: Their gradient.
        change: Theirs; nothing in it is left to be projected back.
        noise: A seed.
        start: Index of the block's first element.

    Returns:
        The new entries. (Compiled code that wrote them itself would be four times slower.)
    """
    new = _moved(codec.decode(held, torch.float32), g, change, first=kind.composition.rule.decay_first)
    coded = codec.encode(new, noise, start).items()
    return {name: torch.where(change.ok, value, held[name]) for name, value in coded}


def _moved(w: Tensor, g: Tensor, change: Change, *, first: bool) -> Tensor:
    """Return W after its decay and the parts of the update that have its size."""
    if change.decay is not None and first:
        w = w - change.decay * w
    if change.factor is not None:
        w = w - change.factor * g
    if change.dense is not None:
        w = w - change.dense
    return w - change.decay * w if change.decay is not None and not first else w


def _rounded(value: Tensor, dtype: torch.dtype, noise: Tensor, stochastic: bool) -> Tensor:
    if stochastic and dtype == torch.bfloat16 and value.dtype == torch.float32:
        return round_to_bf16(value, noise)
    return value.to(dtype)


def compute_dtype(w: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic: float32, or float64 for float64 weights."""
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def is_finite(g: Tensor) -> Tensor:
    """Return whether all of a gradient is finite, a 0-d bool on its device, without a copy of it."""
    # A sum in another dtype would copy; only float16 has so little range that the sum itself overflows.
    return torch.isfinite(g.sum(dtype=torch.float32) if g.dtype == torch.float16 else g.sum())


def square_sum(g: Tensor) -> Tensor:
    """Return the sum of squares in the dtype of the arithmetic, block by block: narrow ones are copied."""
    parts = g.flatten().split(CHUNK << 4) if g.element_size() < 4 else (g,)
    norms = [torch.linalg.vector_norm(part, dtype=compute_dtype(g)) for part in parts]
    return torch.stack(norms).square().sum()


def chunks(count: int, block: int, size: int = CHUNK) -> list[tuple[int, int]]:
    """Cut `count` elements into ranges of at least `size`, each beginning at a multiple of `block`."""
    size = max(size, count // PARTS)
    size = max(block, size - size % block)
    starts = [i * size for i in range(max(1, count // size))]
    return list(zip(starts, [*starts[1:], count], strict=True))


def part(entry: Tensor, first: int, last: int, count: int) -> Tensor:
    """Return the part of an entry that belongs to elements first..last of `count`, flat.

    An entry may hold a number for each element, for two of them (4-bit codes) or for a block (scales); ranges
    begin at multiples of the block, so that the proportion, rounded down, is exact.
    """
    held = entry.numel()
    stop = held if last == count else last * held // count
    return entry.view(-1)[first * held // count : stop].data
