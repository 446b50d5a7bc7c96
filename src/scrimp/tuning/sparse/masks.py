"""Which entries of a weight train: the highest scores of the whole matrix, or of every row.

Scores are made a tile of rows at a time and only the best are kept, so that nothing of a weight's size is
ever held: |W|, random numbers that are a pure function of a seed, and, seen in the backward pass of one
probe, |dW| or SNIP's |W dW|.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from scrimp.base import counter_random
from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import Probe, QuantizedParameter
from scrimp.base.seeds import derive
from scrimp.tuning.deltas.delta import Delta
from scrimp.tuning.deltas.sparse import Sparse, row_tiles
from scrimp.tuning.targets import Place

Scores = Callable[[slice], Tensor]
"""Returns the scores of some rows, (rows, in)."""
Choose = Callable[[tuple[int, int], int, Scores], Tensor]
"""Returns entries of a matrix of a shape, ascending: `largest` or `largest_of_rows`."""


@torch.no_grad()
def largest(shape: tuple[int, int], count: int, scores: Scores) -> Tensor:
    """Return the entries with the highest scores, (count,) int64, ascending."""
    best, at = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for rows in row_tiles(*shape):
        found = scores(rows).float().reshape(-1)
        places = torch.arange(rows.start * shape[1], rows.stop * shape[1], device=found.device)
        found, places = torch.cat([best.to(found), found]), torch.cat([at.to(places), places])
        best, order = found.topk(min(count, len(found)))
        at = places[order]
    return at.sort().values


@torch.no_grad()
def largest_of_rows(shape: tuple[int, int], count: int, scores: Scores) -> Tensor:
    """Return the entries with the highest scores in every row, (out * count,) int64, ascending."""
    found = []
    for rows in row_tiles(*shape):
        columns = scores(rows).topk(count, dim=1).indices.sort(dim=1).values
        first = torch.arange(rows.start, rows.stop, device=columns.device) * shape[1]
        found.append((first[:, None] + columns).view(-1))
    return torch.cat(found)


def magnitudes(place: Place, *, tune: str, sign: int = 1) -> Scores:
    """Score by |W|, or with -1 by -|W|.

    Raises:
        ScrimpError: The weight lies in a form that cannot be read row by row.
    """
    weight = place.module.weight
    if weight.shape != _shape(place):
        raise ScrimpError(
            f"tune {tune}: the weight of {place.name} lies packed, so its largest entries cannot be told; "
            "choose random ones"
        )
    return lambda rows: _rows(weight, rows).abs().mul(sign)


def random_scores(place: Place, *, seed: int) -> Scores:
    """Score at random."""
    stream, columns = derive(seed, "mask", place.number), _shape(place)[1]

    def scores(rows: slice) -> Tensor:
        count, start = (rows.stop - rows.start) * columns, rows.start * columns
        device = place.module.weight.device
        return counter_random.uniform(stream, count, device=device, start=start).view(-1, columns)

    return scores


def choose(place: Place, count: int, scores: Scores, chooser: Choose) -> Sparse:
    """Return a delta of a layer at the entries with the highest scores."""
    shape, weight = _shape(place), place.module.weight
    if isinstance(weight, FakeTensor) or weight.is_meta:  # only bytes count
        total = count * shape[0] if chooser is largest_of_rows else count
        return Sparse(shape, torch.zeros(total, dtype=torch.int64, device=weight.device))
    return Sparse(shape, chooser(shape, count, scores))


@dataclass(frozen=True, slots=True, kw_only=True)
class FromGradient:
    """Moves every delta, before the first step, to the entries with the largest gradients of a probe.

    Attributes:
        count: How many of a shape: of the matrix, or of every row.
        chooser: Which.
        score: |dW|, or SNIP's |W dW|.
    """

    count: Callable[[tuple[int, int]], int]
    chooser: Choose
    score: Literal["gradient", "snip"]

    def before_step(
        self, step: int, deltas: Mapping[str, Delta], optimizer: torch.optim.Optimizer, probe: Probe | None
    ) -> None:
        """Choose before step 0; a layer that runs more than once is chosen by its last run."""
        if step > 0 or probe is None:
            return
        sparse = [cast("Sparse", delta) for delta in deltas.values()]
        chosen: dict[Sparse, Tensor] = {}
        for delta in sparse:
            delta.watch = partial(self._watch, delta, chosen)
        try:
            # Not backward(): updates may run inside it.
            torch.autograd.grad(probe(), [delta.values for delta in sparse], allow_unused=True)
        finally:
            for delta in sparse:
                delta.watch = None
        for delta, indices in chosen.items():
            delta.move(indices)

    def _watch(
        self, delta: Sparse, chosen: dict[Sparse, Tensor], dy: Tensor, x: Tensor, weight: Tensor
    ) -> None:
        if delta not in chosen:

            def scores(rows: slice) -> Tensor:
                found = dy[:, rows].t() @ x
                return (
                    found.abs() if self.score == "gradient" else found.float().mul(_rows(weight, rows)).abs()
                )

            chosen[delta] = self.chooser(delta.shape, self.count(delta.shape), scores)


def _shape(place: Place) -> tuple[int, int]:
    return place.module.out_features, place.module.in_features


def _rows(weight: Tensor, rows: slice) -> Tensor:
    if isinstance(weight, QuantizedParameter):
        return weight.dequantize_rows(rows.start, rows.stop)
    return weight.detach()[rows].float()
