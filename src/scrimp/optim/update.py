"""One parameter's update, from its gradient to its weights.

    refresh, if due ──> down ──> arithmetic (eager or compiled) ──> subtract

It works on a `Plan`, the parameter's state and its group's options, and knows no other parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.base.protocols import QuantizedParameter
from scrimp.base.seeds import derive
from scrimp.optim.arithmetic import (
    Kind,
    Middle,
    chunks,
    compute_dtype,
    decode,
    encode_into,
    is_finite,
    key,
    middle,
    moments,
    move_codes,
    part,
    write_codes,
)
from scrimp.optim.fused_cpu import drawn, fused_cpu, fused_projected, is_ready
from scrimp.optim.pieces import Entries, Options, Slot, Store
from scrimp.optim.plan import Plan
from scrimp.optim.stores.full import Full

CODE_BLOCK = 1 << 22  # elements of a quantised matrix that are decoded at a time
_compile: Any = torch.compile  # whose stub lacks an argument


@dataclass(slots=True)
class Updater:
    """Runs updates.

    Attributes:
        seed: What every draw is derived from.
        compiles: Whether the arithmetic runs as compiled functions.
        kernels: Whether our kernels for CPUs may be used.
    """

    seed: int
    compiles: bool
    kernels: bool = True
    _functions: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    _last: tuple[Any, Tensor] = field(default_factory=lambda: (None, torch.empty(0)))

    def update(
        self,
        p: nn.Parameter,
        grad: Tensor,
        plan: Plan,
        state: Entries,
        options: Options,
        small: Tensor | None,
    ) -> None:
        """Update a parameter and its state, the count of steps left alone.

        Args:
            p: The parameter.
            grad: Its gradient; where `small` is given, anything of its shape.
            plan: How it is treated.
            state: Its state.
            options: Its group's.
            small: The gradient in the subspace, where that is all there is.
        """
        if not p.numel():
            return
        self._reset_when_due(plan, state)
        if plan.composition.projector is None:
            self._update_whole(p, grad, plan, state, options)
        elif self.is_fused(p, plan):
            self._update_fused(p, grad, plan, state, options, small)
        else:
            self._update_projected(p, grad, plan, state, options, small)

    def is_fused(self, p: nn.Parameter, plan: Plan) -> bool:
        """Tell whether our kernel updates a parameter; plain AdamW's only where we compile: torch has one."""
        is_wanted = self.kernels and (self.compiles or not plan.is_adamw)
        return is_wanted and plan.is_fused and is_ready(p)

    def project(self, grad: Tensor, plan: Plan, state: Entries) -> Tensor:
        """Return a gradient's part in the present subspace of a projected parameter."""
        assert plan.composition.projector is not None
        g = plan.oriented(grad)
        r = plan.composition.projector.down(g, plan.basis(state, g)).to(compute_dtype(g))
        return r if r.numel() else r.clone()  # an empty view would keep the gradient alive

    def refresh_when_due(self, g: Tensor, plan: Plan, state: Entries) -> None:
        """Choose a parameter's subspace anew if it is time, and carry its moments over.

        A later subspace is not taken from a gradient that is not finite; the first one has to be.

        Args:
            g: What the subspace is chosen for, oriented.
            plan: How the parameter is treated.
            state: Its state.
        """
        projector = plan.composition.projector
        assert projector is not None
        if projector.due(state, state["step"]):
            self.refresh(g, plan, state)

    def refresh(self, g: Tensor, plan: Plan, state: Entries) -> None:
        """Choose a parameter's subspace anew; the arguments are those of `refresh_when_due`."""
        composition, projector, step = plan.composition, plan.composition.projector, state["step"]
        assert projector is not None
        noise = torch.tensor(derive(self.seed, "refresh", plan.target.name, step))
        old = None if step == 0 else plan.basis(state, g)
        ok = is_finite(g)
        if not (step and projector.refresh_needs_gradient):
            ok = torch.ones_like(ok)
        before = {name: state[name].clone() for name in projector.tensors(plan.target)}
        slots, carry = projector.refresh(g, old, state, plan.target, step)
        for slot in projector.slots(plan.target):
            codes = encode_into(state, slot, composition.basis_store, slots[slot.name], noise, ok)
            write_codes(state, codes, ok)
        for name, tensor in before.items():
            state[name].copy_(torch.where(ok, state[name], tensor))
        state["refreshed"] = step
        for slot in plan.rule_slots(step):
            store = plan.store(slot)
            if projector.on_refresh == "reset":
                _zero(state, slot, store, g.device)
            elif carry is not None and slot.axis is not None and step:
                value = carry(decode(state, slot, store, compute_dtype(g)), slot)
                write_codes(state, encode_into(state, slot, store, value, noise, ok), ok)

    def _reset_when_due(self, plan: Plan, state: Entries) -> None:
        every, step = plan.composition.reset.every, state["step"]
        if every and (step + 1) % every == 0:
            for slot in plan.rule_slots(step):
                for name in _entries(state, slot):  # as they lie: a refresh due now may lay them out anew
                    state[name].zero_()

    def _update_whole(
        self, p: nn.Parameter, grad: Tensor, plan: Plan, state: Entries, options: Options
    ) -> None:
        """Update a parameter in its own shape, flat and block by block where that is possible."""
        numbers = plan.numbers(state, options, state["step"])
        if self.is_fused(p, plan):
            fused_cpu(p, grad, plan.composition, state, numbers)
            return
        entries = _tensors(state)
        values, noise = self._values(numbers, p.device), plan.noise(self.seed, state["step"])
        kind = plan.kind_of(numbers, options)
        if plan.is_quantized:
            self._update_codes(p, plan, kind, (grad, grad, None, entries, values, noise, is_finite(grad)))
            return
        run = self._middle(plan, kind, in_place=False)
        w = p.detach()
        if not (kind.is_elementwise and w.is_contiguous()):
            run(w, grad, grad, None, entries, values, noise, None)
            return
        w, g, count = w.view(-1), grad.reshape(-1), w.numel()
        # A compiled loop over full-precision state holds nothing in between, and each call takes its time.
        if self.compiles and isinstance(plan.composition.store, Full):
            flat = {name: tensor.view(-1) for name, tensor in entries.items()}
            run(w, g, g, None, flat, values, noise, None)
            return
        block = max((plan.store(slot).block(slot) for slot in plan.rule_slots(state["step"])), default=1)
        ok = None if kind.guards_elements else is_finite(grad)
        for number, (first, last) in enumerate(chunks(count, block)):
            held = {name: part(tensor, first, last, count) for name, tensor in entries.items()}
            mine = g[first:last].data  # compiled code is made anew for views of other shapes
            run(w[first:last].data, mine, mine, None, held, values, noise + (number << 20), ok)

    def _update_projected(
        self,
        p: nn.Parameter,
        grad: Tensor,
        plan: Plan,
        state: Entries,
        options: Options,
        small: Tensor | None,
    ) -> None:
        composition, projector, step = plan.composition, plan.composition.projector, state["step"]
        assert projector is not None and composition.lift is not None
        g = plan.oriented(grad)
        if small is None:
            g = composition.lift.prepare(g, plan.lift_slots(state, compute_dtype(p)))
            self.refresh_when_due(g, plan, state)
        basis, r = None, small
        # To draw a basis in compiled code takes a tenth of the time, and to hand it over as much again.
        if self.compiles and projector.is_drawn and r is None:
            basis = torch.tensor(state["seed"])
        else:
            basis = plan.basis(state, g)
            r = projector.down(g, basis) if r is None else r
        ok = None if projector.mixes or small is not None else is_finite(g)
        numbers, entries = plan.numbers(state, options, step), _tensors(state)
        values, noise = self._values(numbers, p.device), plan.noise(self.seed, step)
        kind = plan.kind_of(numbers, options)
        if plan.is_quantized:
            self._update_codes(p, plan, kind, (g, r, basis, entries, values, noise, ok))
            return
        # A window's dimensions can only be viewed as one where they lie in order (not in channels_last).
        whole = p.detach() if p.ndim < 4 else p.detach().contiguous()
        w = plan.oriented(whole)
        # Narrow weights are rounded once, stochastically: no product adds into them directly.
        in_place = not (composition.stochastic and w.dtype == torch.bfloat16)
        left = self._middle(plan, kind, in_place=in_place)(w, g, r, basis, entries, values, noise, ok)
        if left is not None:
            projector.subtract(w, left.to(w.dtype), plan.basis(state, g) if r is None else basis)
        if p.ndim > 3 and not p.is_contiguous():
            p.copy_(whole)

    def _update_fused(
        self,
        p: nn.Parameter,
        grad: Tensor,
        plan: Plan,
        state: Entries,
        options: Options,
        small: Tensor | None,
    ) -> None:
        """Update a projected parameter by the CPU's kernel."""
        g = plan.oriented(grad)
        if small is None:
            self.refresh_when_due(g, plan, state)
        basis = drawn(plan.composition, state, plan.target)
        if basis is None:
            basis = plan.basis(state, g)
        numbers, transposed = plan.numbers(state, options, state["step"]), plan.transposed
        fused_projected(p, grad, plan.composition, state, numbers, basis, small, transposed=transposed)

    def _update_codes(
        self,
        p: nn.Parameter,
        plan: Plan,
        kind: Kind,
        given: tuple[Tensor, Tensor | None, Any, Entries, Tensor, Tensor, Tensor | None],
    ) -> None:
        """Update a parameter that holds codes, in blocks of rows: it has no full-precision copy."""
        assert isinstance(p, QuantizedParameter)
        g, noise = given[0], given[-2]
        run = self._function(lambda: functools.partial(moments, kind, in_place=False), "moments", kind)
        move = self._function(lambda: functools.partial(move_codes, kind, p.codec), "codes", kind, p.codec)
        change = run(p, *given)
        write_codes(given[3], change.codes, change.ok)
        if plan.transposed:
            g, change = g.mT, change.each(lambda t: t.mT if t.ndim else t)
        rows, columns = p.shape
        step = max(1, CODE_BLOCK // columns)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            mine = change.each(functools.partial(_rows, first=first, last=last))
            held = p.stored_rows(first, last)
            for name, value in move(held, g[first:last], mine, noise, first * columns).items():
                held[name].copy_(value)

    def _values(self, numbers: dict[str, float], device: torch.device) -> Tensor:
        """Return the step's numbers as one float64 tensor, made once for parameters alike."""
        if (numbers, device) != self._last[0]:
            values = torch.tensor(list(numbers.values()), dtype=torch.float64)
            self._last = ((numbers, device), values.to(device, non_blocking=True))
        return self._last[1]

    def _middle(self, plan: Plan, kind: Kind, *, in_place: bool) -> Callable[..., Any]:
        """Return the function that updates a parameter."""
        name = (kind.decays, in_place)
        if name not in plan.runs:
            make = functools.partial(middle, kind, in_place=in_place)
            plan.runs[name] = _writing(self._function(make, kind, in_place))
        return plan.runs[name]

    def _function(self, make: Callable[[], Callable[..., Any]], *name: Any) -> Callable[..., Any]:
        """Return a function of arithmetic, compiled where that was asked for; made once."""
        if name not in self._functions:
            function = make()
            if self.compiles:
                # Each kind on its own: they share one code object, whose recompilations are limited. To look
                # at every call whether the modules' own names are as they were takes a fifth of a small one.
                function = _compile(
                    function,
                    fullgraph=True,
                    dynamic=True,
                    isolate_recompiles=True,
                    options={"guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe},
                )
            self._functions[name] = function
        return self._functions[name]


def _writing(run: Callable[..., Middle]) -> Callable[..., Tensor | None]:
    """Return a function that writes the codes which the arithmetic left."""

    def written(*given: Any) -> Tensor | None:
        small: Tensor | None
        small, codes, ok, _ = run(*given)
        if ok is not None:
            write_codes(given[4], codes, ok)
        return small

    return written


def _tensors(state: Entries) -> dict[str, Tensor]:
    # Counters change at every step, and compiled code would be made anew for each.
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _rows(tensor: Tensor, first: int, last: int) -> Tensor:
    """Return some rows of what is broadcastable to a matrix."""
    return tensor if tensor.ndim < 2 or len(tensor) == 1 else tensor[first:last]


def _entries(state: Entries, slot: Slot) -> set[str]:
    """Return the names of a slot's tensors, in whichever layout they are."""
    return {name for name in state if name == slot.name or name.startswith(f"{slot.name}.")}


def _zero(state: Entries, slot: Slot, store: Store, device: torch.device) -> None:
    """Zero a slot, in new tensors where its layout changes: an empty one may be kept otherwise."""
    layout = {key(slot, suffix): entry for suffix, entry in store.layout(slot).items()}
    old = _entries(state, slot)
    for name in old - layout.keys():
        del state[name]
    for name, (shape, dtype) in layout.items():
        if name in old and tuple(state[name].shape) == shape:
            state[name].zero_()
        else:
            state[name] = torch.zeros(shape, dtype=dtype, device=device)
