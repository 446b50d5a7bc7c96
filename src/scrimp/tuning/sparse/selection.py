"""Scalable sparse fine-tuning (SFT): entries that turned out useless are given up for more promising ones.

Before every `every`-th step, share p of the entries, those with the smallest |value|, are dropped (the
weight is the pre-trained one there again), and as many grow, from 0, where the score is highest:

    rigl    |sum of gradients| over the last `accumulate` steps, among the candidates: as many entries as
            train, with the largest |dW| in the first micro-batch of those steps
    sm3     row_i column_j, SM3's accumulators

An entry that is dropped and grown at once stays as it is. p is 1 the first time with rigl (the entries were
drawn at random), and falls from `share` to 0 over the run after that.

**rigl and Adam.** A new entry gets the moments that Adam would have after these a steps,

    m = mean(g) (1 - beta1^a)      v = mean(g^2) (1 - beta2^a)

and has age a, but an optimizer counts one age t for a whole tensor. The moments' recursions do not know the
age; only the direction d(age) = m / (1 - beta1^age) / (sqrt(v / (1 - beta2^age)) + eps) does. So
lr (d(t) - d(age)) is added after each update, from the moments as they are then, which makes each element's
update the one of its own age. Without it a new entry's first steps would be about five times too long. (No
choice of the moments at the start can do that: Adam's weights of old and new gradients depend on the age at
every step.)

**sm3** brings its own preconditioner with one accumulator a row and a column of the weight, g / sqrt(nu +
1e-8) with nu = min(row_i, column_j) + g^2; what goes with it is SGD without momentum.

Oddities: the gradients that score are those before clipping. The released code advances the age on a copy
where the moments are not fp32, so that its bias correction stands still.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import Probe
from scrimp.tuning.deltas.delta import Delta
from scrimp.tuning.deltas.sparse import Sparse, gathered_gradient, tiles_of
from scrimp.tuning.sparse.masks import largest

ACCUMULATED = ("pending", "sums", "squares")
SM3_EPS = 1e-8


class Reselected(Sparse):
    """A sparse delta whose entries change while it trains.

    Attributes:
        birth: (count,) float32: an element's age is the optimizer's step less this (rigl).
        candidates: (count,) entries that may grow, ascending (rigl).
        pending: (count,) float32, the candidates' gradient of the step under way (rigl).
        sums: (count,) float32, of their gradients before (rigl).
        squares: (count,) float32, of their squares (rigl).
        row: (out, 1) float32 accumulators (sm3).
        column: (1, in) float32 accumulators (sm3).

    Memory:
        With rigl 20 bytes an entry more than a sparse delta's, with sm3 4 (out + in).
    """

    birth: Tensor
    candidates: Tensor
    pending: Tensor
    sums: Tensor
    squares: Tensor
    row: Tensor
    column: Tensor

    def __init__(self, base: Sparse, select: Literal["rigl", "sm3"]) -> None:
        super().__init__(base.shape, base.indices)
        if select == "sm3":
            self.register_buffer("row", self.values.new_zeros(self.shape[0], 1).detach())
            self.register_buffer("column", self.values.new_zeros(1, self.shape[1]).detach())
            return
        self.register_buffer("candidates", self.indices.clone())
        for name in ("birth", *ACCUMULATED):
            self.register_buffer(name, torch.zeros_like(self.values.detach()))

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take the gradient of the step that is over into the sums."""
        self.sums.add_(self.pending)
        self.squares.addcmul_(self.pending, self.pending)
        self.pending.zero_()


class Replacement(NamedTuple):
    """What trains after a replacement.

    Attributes:
        indices: (count,), ascending.
        source: (count,) int64, where each comes from: the number of an old one, or count + a candidate's.
    """

    indices: Tensor
    source: Tensor


def replaced(indices: Tensor, values: Tensor, candidates: Tensor, scores: Tensor, drop: int) -> Replacement:
    """Drop the entries with the smallest values for the candidates with the highest scores.

    Args:
        indices: (count,), ascending.
        values: (count,).
        candidates: (count,), ascending.
        scores: (count,), not negative; of those that train already they count for nothing.
        drop: How many.
    """
    order = values.abs().argsort(stable=True)
    kept = order[drop:]
    scores = scores.masked_fill(torch.isin(candidates, indices[kept]), -1.0)
    grown = scores.argsort(descending=True, stable=True)[:drop]
    at = torch.searchsorted(indices, candidates[grown]).clamp(max=len(indices) - 1)
    trained_before = indices[at] == candidates[grown]
    source = torch.cat([kept, torch.where(trained_before, at, len(indices) + grown)])
    found, order = torch.cat([indices[kept], candidates[grown]]).sort()
    return Replacement(found, source[order])


@dataclass(slots=True, kw_only=True)
class Reselection:
    """Replaces entries, and keeps every element's own age.

    Attributes:
        select: Where entries grow.
        every: Steps between replacements.
        accumulate: Steps whose gradients score; no more than `every`.
        share: p0, of the entries.
        decay: How p falls: p0 (1 - t/T), or p0 (1 + cos(pi t/T)) / 2.
        steps: T, those of the run; None keeps p.
    """

    select: Literal["rigl", "sm3"] = "rigl"
    every: int = 20
    accumulate: int = 5
    share: float = 0.2
    decay: Literal["linear", "cosine"] = "linear"
    steps: int | None = None
    needs_step: ClassVar[bool] = True  # updates inside the backward pass come before its hooks
    _hooked: Any = field(default=None, init=False, repr=False)
    _choosing: set[Reselected] = field(default_factory=set, init=False, repr=False)

    def before_step(
        self, step: int, deltas: Mapping[str, Delta], optimizer: torch.optim.Optimizer, probe: Probe | None
    ) -> None:
        """Replace entries when it is time, and look at gradients before that."""
        sparse = [cast("Reselected", delta) for delta in deltas.values()]
        if self._hooked is not optimizer:
            self._hook(sparse, optimizer)
        if self.select == "sm3":
            for delta in sparse if step and step % self.every == 0 else ():
                self._replace_sm3(delta, step)
            return
        looked = (step - 1) % self.every >= self.every - self.accumulate
        for delta in sparse:
            if step and looked:
                delta.accumulate()
            if step and step % self.every == 0:
                self._replace_rigl(delta, step, optimizer)
            self._look(delta, step)

    def replaced_at(self, step: int, count: int) -> int:
        """Return how many of `count` entries are replaced before 0-based `step`."""
        if self.select == "rigl" and step == self.every:
            return count
        done = 0.0 if self.steps is None else min(1.0, step / self.steps)
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return int(self.share * left * count)

    # ---- rigl ----------------------------------------------------------------------------------------

    def _look(self, delta: Reselected, step: int) -> None:
        """Watch the gradients in the steps before a replacement."""
        into = step % self.every - (self.every - self.accumulate)
        delta.watch = partial(self._watch, delta) if into >= 0 else None
        self._choosing.discard(delta)
        if into == 0:
            self._choosing.add(delta)
            for name in ACCUMULATED:
                delta.get_buffer(name).zero_()

    def _watch(self, delta: Reselected, dy: Tensor, x: Tensor, weight: Tensor) -> None:
        if delta in self._choosing:
            self._choosing.discard(delta)
            delta.candidates.copy_(
                largest(delta.shape, len(delta.values), lambda rows: (dy[:, rows].t() @ x).abs())
            )
        tiles = tiles_of(delta.candidates, delta.shape)
        delta.pending.add_(gathered_gradient(dy, x, delta.candidates, tiles))

    @torch.no_grad()
    def _replace_rigl(self, delta: Reselected, step: int, optimizer: torch.optim.Optimizer) -> None:
        drop = self.replaced_at(step, len(delta.values))
        indices, source = replaced(delta.indices, delta.values, delta.candidates, delta.sums.abs(), drop)
        group, state = _options(optimizer, delta), optimizer.state.get(delta.values)
        age = self.accumulate
        if state:
            beta1, beta2 = group["betas"]
            first, second = _moments(state)
            _take_(first, delta.sums / age * (1 - beta1**age), source)
            _take_(second, delta.squares / age * (1 - beta2**age), source)
            _take_(delta.birth, torch.full_like(delta.birth, int(state["step"]) - age), source)
        _take_(delta.values, torch.zeros_like(delta.values), source)
        delta.indices.copy_(indices)

    @torch.no_grad()
    def _correct(self, sparse: list[Reselected], optimizer: torch.optim.Optimizer) -> None:
        """Make the update just done that of every element's own age."""
        seen = [delta for delta in sparse if optimizer.state.get(delta.values)]
        gradients = [delta.values.grad for delta in seen if delta.values.grad is not None]
        if not gradients:
            return
        # An update that was left out has nothing to correct.
        done = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        for delta in seen:
            group, state = _options(optimizer, delta), optimizer.state[delta.values]
            first, second = _moments(state)
            now = torch.full_like(delta.birth, int(state["step"]))
            taken = _direction(first, second, now, group)
            due = _direction(first, second, now - delta.birth, group)
            correction = torch.where(done & (delta.birth != 0), taken - due, 0.0)
            delta.values.add_(correction * float(group["lr"]))

    # ---- sm3 -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _replace_sm3(self, delta: Reselected, step: int) -> None:
        drop = self.replaced_at(step, len(delta.values))
        candidates = largest(delta.shape, len(delta.values), lambda rows: delta.row[rows] * delta.column)
        rows, columns = candidates // delta.shape[1], candidates % delta.shape[1]
        scores = delta.row[rows, 0] * delta.column[0, columns]
        indices, source = replaced(delta.indices, delta.values, candidates.to(delta.indices), scores, drop)
        _take_(delta.values, torch.zeros_like(delta.values), source)
        delta.indices.copy_(indices)

    @torch.no_grad()
    def _precondition(self, sparse: list[Reselected], optimizer: torch.optim.Optimizer) -> None:
        for delta in sparse:
            if set(optimizer.state.get(delta.values, ())) - {"step"}:
                raise ScrimpError(
                    "tune sft-ma has its own SM3, and no moments that follow its entries: train it with "
                    "--optimizer sgd-m and --optimizer.momentum 0"
                )
            if delta.values.grad is not None:
                delta.values.grad.copy_(sm3_direction(delta, delta.values.grad))

    # ---- both ----------------------------------------------------------------------------------------

    def _hook(self, sparse: list[Reselected], optimizer: torch.optim.Optimizer) -> None:
        self._hooked = optimizer
        for delta in sparse:
            delta.forget_tiles()
        if self.select == "sm3":
            optimizer.register_step_pre_hook(lambda *_: self._precondition(sparse, optimizer))
        else:
            optimizer.register_step_post_hook(lambda *_: self._correct(sparse, optimizer))


def sm3_direction(delta: Reselected, gradient: Tensor) -> Tensor:
    """Return g / sqrt(nu + 1e-8), (count,), and take it into the accumulators."""
    rows, columns = delta.indices.long() // delta.shape[1], delta.indices.long() % delta.shape[1]
    row, column = delta.row[:, 0], delta.column[0]
    nu = torch.minimum(row[rows], column[columns]).addcmul_(gradient, gradient)
    row.scatter_reduce_(0, rows, nu, "amax")
    column.scatter_reduce_(0, columns, nu, "amax")
    return gradient * (nu + SM3_EPS).rsqrt()


def _direction(first: Tensor, second: Tensor, age: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return Adam's direction at ages (count,)."""
    c1, c2 = (-torch.expm1(age * math.log(beta)) if beta else 1.0 for beta in group["betas"])
    direction: Tensor = (first / c1) / ((second / c2).sqrt() + group["eps"])
    return direction


def _moments(state: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    if not {"exp_avg", "exp_avg_sq"} <= state.keys():
        raise ScrimpError(
            "tune sft gives new entries Adam's moments: train it with --optimizer adamw and fp32 state, or "
            "use --tune sft-ma with --optimizer sgd-m and --optimizer.momentum 0"
        )
    return state["exp_avg"], state["exp_avg_sq"]


def _options(optimizer: torch.optim.Optimizer, delta: Sparse) -> dict[str, Any]:
    """Return the options of the group that a delta's values are in."""
    return next(g for g in optimizer.param_groups if any(p is delta.values for p in g["params"]))


def _take_(old: Tensor, new: Tensor, source: Tensor) -> None:
    """Rearrange entries in place: those of old ones, or of candidates."""
    old.copy_(torch.cat([old, new.to(old)])[source])
