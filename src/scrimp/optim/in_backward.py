"""Updates inside the backward pass: each gradient is used and freed as soon as it is whole.

Exact, or refused:

    one micro-batch             each parameter is updated when its gradient arrives; one is alive at a time
    several                     micro-batches add up in the subspace (`down` is linear) where the lift only
                                projects back; elsewhere, and at a refresh that reads it, the gradient itself
                                adds up, as it does without fusing
    one, clipped globally       what is projected back waits in its subspace, the rest as it is, until the
                                norm of all is known
    several, clipped globally   refused: the norm of a sum of gradients does not follow from their projections
    clipped, no such lift       refused: all gradients would have to wait

`norm` is the gradients' global norm, but with several micro-batches that of their parts in the subspaces.
A parameter that misses a backward pass (an expert without tokens) is updated at the end. Learning rates
are read when a gradient arrives, so a scheduler moves between steps, as always. A `GradScaler` finds no
gradients to unscale, so the optimizer refuses it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scrimp.base.errors import ScrimpError
from scrimp.optim.arithmetic import square_sum
from scrimp.optim.clipping import MARGIN

if TYPE_CHECKING:
    from scrimp.optim.optimizer import Optimizer


class BackwardUpdates:
    """Hooks that run an optimizer's updates.

    Args:
        optimizer: Whose.
        micro_batches: Backward passes a step.
        clip: The largest global gradient norm; 0 does not clip.

    Raises:
        ScrimpError: The combination cannot be exact.
    """

    def __init__(self, optimizer: Optimizer, *, micro_batches: int, clip: float) -> None:
        if type(micro_batches) is not int or micro_batches < 1:
            raise ScrimpError(f"micro_batches must be a whole number of at least 1, not {micro_batches!r}")
        if not 0 <= clip < math.inf:
            raise ScrimpError(
                f"clip must be a finite number of at least 0 (which does not clip), not {clip!r}"
            )
        self._optimizer, self._clip = optimizer, clip
        self.micro_batches = micro_batches
        self._groups: dict[nn.Parameter, dict[str, Any]] = {}
        self._handles: list[Any] = []
        self._count: dict[Tensor, int] = {}
        self._small: dict[Tensor, Tensor] = {}
        self._squares: list[Tensor] = []
        self.norm = torch.zeros(())
        self.follow()

    def follow(self) -> None:
        """Take over the optimizer's groups as they are now, new parameters among them."""
        known = self._groups
        self._groups = {p: group for group in self._optimizer.param_groups for p in group["params"]}
        self._refuse_inexact()
        self._handles += [self._register(p) for p in self._groups if p not in known]

    def _refuse_inexact(self) -> None:
        if not self._clip:
            return
        if self.micro_batches > 1:
            raise ScrimpError(
                f"clip {self._clip:g} with {self.micro_batches} micro-batches inside the backward pass "
                "cannot be exact: the norm of their sum is not known before all are there; use clip 0, one "
                "micro-batch, or updates at the step"
            )
        if not any(self._waits_small(p) for p in self._groups):
            raise ScrimpError(
                f"clip {self._clip:g} inside the backward pass would keep every gradient until the norm "
                "of all is known, which saves nothing: use clip 0, or updates at the step"
            )

    def _waits_small(self, p: nn.Parameter) -> bool:
        """Tell whether a parameter's part in the subspace is all that its update needs of the gradient."""
        composition = self._optimizer.plan_of(p).composition
        return composition.lift is not None and not composition.lift.needs_gradient

    def _register(self, p: nn.Parameter) -> Any:
        frozen = not p.requires_grad  # a sleeping layer's, which torch would not take a hook for
        p.requires_grad_(True)
        handle = p.register_post_accumulate_grad_hook(self._arrived)
        p.requires_grad_(not frozen)
        return handle

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _arrived(self, p: nn.Parameter) -> None:
        self._count[p] = self._count.get(p, 0) + 1
        if self._count[p] > self.micro_batches:
            raise ScrimpError(
                f"{self._optimizer.plan_of(p).target.name} got more than the {self.micro_batches} backward "
                "passes of a step: call step() after them, or give their number to fuse_backward"
            )
        if p.grad is None:
            raise ScrimpError(
                f"{self._optimizer.plan_of(p).target.name} has no gradient left: another optimizer took it "
                "inside the same backward pass; call its unfuse_backward() first"
            )
        self._optimizer.check(p, p.grad)
        is_last = self._count[p] == self.micro_batches
        if self._clip:
            self._squares.append(square_sum(p.grad))
            if self._waits_small(p):
                self._add_small(p)
            return
        whole = self.micro_batches == 1 or self._needs_gradient(p)
        if not whole:
            self._add_small(p)
        if is_last:
            self._squares.append(square_sum(p.grad if whole else self._small[p]))
            self._update(p)

    def _needs_gradient(self, p: nn.Parameter) -> bool:
        state = self._optimizer.begin(p)
        return self._optimizer.plan_of(p).needs_gradient(state, state["step"])

    def _add_small(self, p: nn.Parameter) -> None:
        """Add the gradient's part in the subspace to what is there of it, and free the gradient."""
        assert p.grad is not None
        # One subspace for all of them: the first chooses it.
        r = self._optimizer.project(p, refresh=p not in self._small)
        if p in self._small:
            self._small[p] += r
        else:
            self._small[p] = r
        p.grad = None

    def _update(self, p: nn.Parameter) -> None:
        small, group = self._small.pop(p, None), self._groups[p]
        if small is not None:
            shaped = torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)  # of no memory
            self._optimizer.update(p, shaped, group, small)
        elif p.grad is not None:
            self._optimizer.update(p, p.grad, group)
        p.grad = None

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Scale what waits so that the global norm is at most the limit, and return the norm before."""
        if not self._clip:
            self._squares += [square_sum(self._held(p)) for p in self._waiting()]
        # A model may lie on several devices.
        squares = [square.to(self._squares[0].device) for square in self._squares]
        self.norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
        self._squares.clear()
        if self._clip:
            factor = (self._clip / (self.norm + MARGIN)).clamp(max=1.0)
            for p in self._waiting():
                self._held(p).mul_(factor.to(p.device))
        return self.norm

    @torch.no_grad()
    def apply(self) -> None:
        """Update what is still waiting, and make ready for the next step."""
        for p in self._waiting():
            self._update(p)
        self._count.clear()

    def discard(self) -> None:
        """Drop what is still waiting; what was updated stays."""
        for p in self._waiting():
            self._small.pop(p, None)
            p.grad = None
        self._count.clear()
        self._squares.clear()

    def _waiting(self) -> list[nn.Parameter]:
        return [p for p in self._groups if p in self._small or p.grad is not None]

    def _held(self, p: nn.Parameter) -> Tensor:
        held = self._small.get(p, p.grad)
        assert held is not None
        return held
