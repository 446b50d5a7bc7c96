"""The one optimizer: a composition of pieces, run over parameter groups as a `torch.optim.Optimizer`.

For every parameter it knows which composition treats it (`scrimp.optim.plan`), and keeps what the pieces
declare as named tensors in `state[p]`: nothing else, so that a checkpoint opens under
`torch.load(weights_only=True)` and a resumed run computes the same bits. The update runs in `step()`, or
inside the backward pass (`fuse_backward`).

Oddities. Loading keeps every tensor's dtype, where torch casts floats to the parameter's. Counters and seeds
are plain integers, so that no step waits for a GPU. What a parameter's update draws depends on the seed, its
name and its step alone. A gradient that is not finite changes neither moments, subspace nor weights, but
counts as a step; a schedule goes on (a reset falls when it is due). Where elements stand alone in full
precision, only those that are not finite stay as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.base.errors import ScrimpError
from scrimp.base.paged import wait_for_host
from scrimp.optim import groups as given
from scrimp.optim.describe import Row, describe_table
from scrimp.optim.fused_adamw import fused_adamw
from scrimp.optim.group_options import Authors, marker
from scrimp.optim.in_backward import BackwardUpdates
from scrimp.optim.paging import Pager
from scrimp.optim.pieces import Entries, Target
from scrimp.optim.plan import Compose, Plan, plan
from scrimp.optim.update import Updater

PIECES = "pieces"  # the group option that names its composition: a state dict of another one is refused


class Optimizer(torch.optim.Optimizer):
    """Runs compositions of pieces over parameter groups.

    Args:
        params: A model, parameters, named parameters, or groups of them.
        compose: Makes the composition for a group's options; without its mark it is that of the rest.
        options: The options of every group, with their defaults: lr, betas, eps, weight_decay and so on.
        projected: Those of projected groups alone; the first one, where it has a value, marks such a group.
            None where nothing is projected.
        authors: How values are converted in groups that are written in the authors' words.
        seed: What every random draw is derived from.
        maximize: Climb instead of descending.
        compile: Run the arithmetic as compiled functions; a first step then takes seconds.

    Attributes:
        pager: Where state lies between updates; None is the device of its parameter.

    Raises:
        ScrimpError: An option or a rank is not allowed; the message names the group or the matrix.
    """

    def __init__(
        self,
        params: Any,
        *,
        compose: Compose,
        options: Mapping[str, Any],
        projected: Mapping[str, Any] | None = None,
        authors: Authors | None = None,
        seed: int = 0,
        maximize: bool = False,
        compile: bool = False,
    ) -> None:
        self._compose, self._options, self._only_projected = compose, dict(options), projected
        self._authors = authors
        self._mark = marker(projected) if projected else "rank"
        self._maximize, self._updater = maximize, Updater(seed, compile)
        self._plans: dict[Tensor, Plan] = {}  # empty until torch's constructor is through
        self._backward: BackwardUpdates | None = None
        self.pager: Pager | None = None
        read = given.read(params, options=options, projected=projected, authors=authors)
        self._info = dict(read.targets)
        super().__init__(read.groups, {**options, **dict.fromkeys(projected or ()), PIECES: None})
        self._plan_all(self.param_groups)
        self._refuse_nothing()

    # ---- what is treated how -------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, in our words or the authors'; its parameters start without state."""
        if not self._plans:  # called by torch's constructor, which hands over what was read
            super().add_param_group(param_group)
            return
        first = len(self.param_groups)
        read = given.read(
            [param_group],
            options=self._options,
            projected=self._only_projected,
            first=first,
            authors=self._authors,
        )
        known = {p for group in self.param_groups for p in group["params"]}
        twice = next((info.name for p, info in read.targets.items() if p in known), None)
        if twice is not None:
            raise ScrimpError(f"{twice} is in a group of this optimizer already: hand it in once")
        self._info |= read.targets
        self._plan_all([*self.param_groups, *read.groups])
        for group in read.groups:
            super().add_param_group(group)
        self._choose_again()
        if self._backward is not None:
            self._backward.follow()

    def _plan_all(self, groups: list[dict[str, Any]]) -> None:
        """Decide how every parameter of some groups is treated, and write into each what its pieces are."""
        plans: dict[Tensor, Plan] = {}
        for group in groups:
            for p in group["params"]:
                info = self._info[p]
                target = Target(name=info.name, shape=tuple(p.shape), role=info.role, heads=info.heads)
                plans[p] = plan(p, target, group, self._compose, mark=self._mark, asked=info.asked)
            group[PIECES] = self._compose(group).name
        projected = [found for found in plans.values() if found.composition.projector is not None]
        for index, found in enumerate(projected):
            found.target = replace(found.target, index=index, count=len(projected))
            if found.composition.projector is not None:
                found.composition.projector.check_count(len(projected))
        self._plans = plans

    def _choose_again(self) -> None:
        """Choose blind subspaces anew that depend on how many matrices there are."""
        for p, state in self.state.items():
            found = self._plans[p]
            if state and found.misfit(state):
                with self._at_hand(p, state) as held:
                    self._updater.refresh(found.oriented(p.detach()), found, held)

    def _refuse_nothing(self) -> None:
        """Refuse a projection that reaches no matrix at all: it would be another algorithm.

        Raises:
            ScrimpError: There are matrices to project, and the rank fits none.
        """
        left = [found for found in self._plans.values() if found.why]
        if left and not any(found.composition.projector for found in self._plans.values()):
            first = left[0]
            raise ScrimpError(
                f"no matrix would be projected: of {first.target.name}, {first.why}; choose a lower rank, "
                "or an optimizer without one"
            )

    def plan_of(self, p: Tensor) -> Plan:
        """Return how a parameter is treated."""
        return self._plans[p]

    def describe(self) -> str:
        """Return a table of what treats every parameter, its state's bytes, and what was left out and why."""
        rows = [
            Row(
                name=found.target.name,
                shape=tuple(p.shape),
                role=found.target.role,
                piece=found.composition.name,
                state_bytes=found.state_bytes(),
                why=found.why,
            )
            for p, found in self._plans.items()
        ]
        return describe_table(rows)

    def leave_kernels_out(self) -> None:
        """Run the pieces' own arithmetic on a CPU too, as on any other device: a simulation of one does."""
        self._updater.kernels = False

    # ---- one step ------------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # torch.amp.GradScaler asks this before it steps, and Lightning before it clips scaled gradients.
        if self._backward is not None:
            raise ScrimpError(
                "a GradScaler finds no gradients to unscale when updates run inside the backward pass: "
                "train in bfloat16 without a scaler, or call unfuse_backward() for updates at the step"
            )
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, and what waits for its update after `fuse_backward`."""
        if self._backward is not None:
            self._backward.discard()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; after `fuse_backward`, what is left of them.

        Args:
            closure: Computes the loss anew, and its gradients.

        Returns:
            What the closure returned.

        Raises:
            ScrimpError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._backward is not None:
            self._backward.clip()
            self._backward.apply()
            return loss
        for group in self.param_groups:
            alike: dict[Any, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if self._is_adamw(p) and not p.grad.is_sparse and self.pager is None:
                    alike[p.device, p.dtype, self.begin(p)["step"]].append(p)
                else:
                    self._update(p, p.grad, group, None)
            for params in alike.values():
                grads = [p.grad for p in params if p.grad is not None]
                self._update_adamw(params, grads, [self.state[p] for p in params], group)
        return loss

    def fuse_backward(self, *, micro_batches: int = 1, clip: float = 0.0) -> BackwardUpdates:
        """Run every update inside the backward pass from now on, and free its gradient at once.

        See `scrimp.optim.in_backward` for what accumulation and clipping mean there.

        Args:
            micro_batches: Backward passes a step.
            clip: The largest global gradient norm; 0 does not clip.

        Returns:
            The updates, with the gradient norm of the last step.

        Raises:
            ScrimpError: The combination cannot be exact; the message says what can.
        """
        self.unfuse_backward()
        self._backward = BackwardUpdates(self, micro_batches=micro_batches, clip=clip)
        return self._backward

    def unfuse_backward(self) -> None:
        """Go back to updates in `step()`."""
        if self._backward is not None:
            self._backward.remove()
        self._backward = None

    @torch.no_grad()
    def update(
        self, p: nn.Parameter, grad: Tensor, group: dict[str, Any], small: Tensor | None = None
    ) -> None:
        """Update one parameter.

        Args:
            p: The parameter.
            grad: Its gradient; where `small` is given, anything of its shape.
            group: Its group.
            small: The gradient in the subspace, where that is all there is.
        """
        self._update(p, grad, group, small)

    def _update(self, p: nn.Parameter, grad: Tensor, group: dict[str, Any], small: Tensor | None) -> None:
        self.check(p, grad)
        if small is None:
            grad = self._downhill(grad)
        with self._at_hand(p, self.begin(p)) as state:
            if self._is_adamw(p):
                self._update_adamw([p], [grad], [state], group)
                return
            self._updater.update(p, grad, self._plans[p], state, group, small)
            state["step"] += 1

    def check(self, p: nn.Parameter, grad: Tensor) -> None:
        """Raise a ScrimpError for a gradient that no optimizer here treats."""
        if grad.is_sparse:
            raise ScrimpError(f"{self._info[p].name}: sparse gradients are not supported; make it dense")

    def project(self, p: nn.Parameter, *, refresh: bool) -> Tensor:
        """Return a projected parameter's gradient in its subspace, which `refresh` lets be chosen anew."""
        assert p.grad is not None
        found, grad = self._plans[p], self._downhill(p.grad)
        with self._at_hand(p, self.begin(p)) as state:
            if refresh:
                self._updater.refresh_when_due(found.oriented(grad), found, state)
            return self._updater.project(grad, found, state)

    def _downhill(self, grad: Tensor) -> Tensor:
        return -grad if self._maximize else grad

    def _is_adamw(self, p: nn.Parameter) -> bool:
        found = self._plans[p]
        is_torchs = found.is_adamw and not self._maximize and p.is_contiguous()
        return is_torchs and not self._updater.is_fused(p, found)

    def _update_adamw(
        self, params: list[nn.Parameter], grads: list[Tensor], states: list[Entries], group: dict[str, Any]
    ) -> None:
        fused_adamw(params, grads, states, group)
        for state in states:
            state["step"] += 1

    def begin(self, p: nn.Parameter) -> Entries:
        """Return a parameter's state, all zero where it had none."""
        state: Entries = self.state[p]
        found = self._plans[p]
        found.composition.store.prepare(p.device)
        if not state:
            zeros = torch.zeros if self.pager is None else self.pager.zeros
            for name, (shape, dtype) in found.layout().items():
                state[name] = zeros(shape, dtype=dtype, device=p.device)
            state |= dict.fromkeys(("step", *found.counters()), 0)
        return state

    # ---- state ---------------------------------------------------------------------------------------

    def page_state(self, folder: Path) -> None:
        """Keep the state off the device from now on, but for the update of its parameter; see `paging`.

        Args:
            folder: Where state of parameters on a CPU has its files; they have no names, and end with it.
        """
        self.pager = Pager(folder)
        for p, state in self.state.items():
            self.pager.put_back(state, dict(state), p.device)

    def _at_hand(self, p: Tensor, state: Entries) -> AbstractContextManager[Entries]:
        """Have a parameter's state on its device."""
        return nullcontext(state) if self.pager is None else self._fetched(self.pager, p, state)

    @contextmanager
    def _fetched(self, pager: Pager, p: Tensor, state: Entries) -> Iterator[Entries]:
        held = pager.fetch(state, p.device)
        yield held
        pager.put_back(state, held, p.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the options, as torch does; what is on its way to the host has arrived."""
        wait_for_host(self)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state and the options that go with it; the dtype of every tensor is the pieces' own.

        Raises:
            ScrimpError: The state is of another composition, or of other shapes; nothing was loaded.
        """
        handed: object = state_dict
        if not isinstance(handed, Mapping) or not {"state", "param_groups"} <= handed.keys():
            raise ScrimpError("this is no optimizer's state dict: it has no 'state' and 'param_groups'")
        saved = state_dict["param_groups"]
        self._check_groups(saved)
        was = self._plans
        pairs = list(zip(saved, self.param_groups, strict=True))
        self._plan_all([{**theirs, "params": ours["params"]} for theirs, ours in pairs])
        numbers = [number for group in saved for number in group["params"]]
        states = {p: state_dict["state"].get(n, {}) for p, n in zip(self._plans, numbers, strict=True)}
        odd = [self._plans[p].misfit(state) for p, state in states.items() if state]
        if any(odd):
            self._plans = was
            raise ScrimpError(next(filter(None, odd)))
        super().load_state_dict(state_dict)
        for p, state in states.items():
            layout = self._plans[p].layout(state.get("refreshed", 0)) if state else {}
            for name, (_, dtype) in layout.items():  # as it was: torch has cast it to the weight's
                self.state[p][name] = state[name].to(p.device, dtype, copy=True)
            if self.pager is not None and state:
                self.pager.put_back(self.state[p], dict(self.state[p]), p.device)
        if self._backward is not None:
            self._backward.follow()

    def _check_groups(self, saved: list[dict[str, Any]]) -> None:
        """Refuse the groups of a state dict that are not these, but for the options' values."""
        sizes, own = ([len(group["params"]) for group in groups] for groups in (saved, self.param_groups))
        if sizes != own:
            raise ScrimpError(
                f"the state dict has groups of {sizes} parameters, and this optimizer has groups of {own}: "
                "build it over the same parameters in the same groups"
            )
        known = {*self._options, *(self._only_projected or ())}
        for number, (theirs, ours) in enumerate(zip(saved, self.param_groups, strict=True)):
            is_same = theirs.get(PIECES) == ours[PIECES]
            if not is_same or not known <= theirs.keys():
                raise ScrimpError(
                    f"group {number} of the state dict is of {theirs.get(PIECES) or 'another optimizer'}"
                    f"{' with other options' if is_same else ''}, and this optimizer is {ours[PIECES]}: "
                    "build it as it was, or go on without the old state"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: no hooks, as with torch, so its updates run at the step, and no code."""
        kept = {name: value for name, value in vars(self).items() if "hook" not in name}
        plans = {p: replace(found, runs={}) for p, found in self._plans.items()}
        updater = Updater(self._updater.seed, self._updater.compiles, self._updater.kernels)
        return {**kept, "_backward": None, "pager": None, "_plans": plans, "_updater": updater}
