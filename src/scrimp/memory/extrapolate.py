"""From short traces to a deep model and any batch: every point of the curve, then the maximum.

Depth: two traces of a few layers are aligned, the first half of every moment from its start and the second
from its end. A point at a fixed distance from such an end is affine in the number of layers, and what lies
between the two aligned stretches of a deep model is affine from layer to layer, so that its largest value is
at one of its ends. The peak itself is not affine (its place moves), and is taken last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from scrimp.memory.profile import Bytes, Line
from scrimp.memory.trace import ACTIVATIONS, GRADIENTS, NEW_GRADIENTS, TEMPORARIES, Array, Curve

MOMENTS = ("forward", "loss", "backward")


class NotAligned(Exception):  # noqa: N818 - it is no error: the whole model is traced then
    """Two traces differ in more than size, so that one says nothing about the other."""


@dataclass(slots=True)
class Points:
    """Points of a curve that can be its peak.

    Attributes:
        moments: The moment of each.
        operations: The operation of each.
        bytes_: (4, points) int64, as in `Curve`.
    """

    moments: list[str]
    operations: list[str]
    bytes_: Array


def points_of(curve: Curve) -> Points:
    """Return all points of a curve."""
    moments = [moment for moment, first, last in _segments(curve) for _ in range(first, last)]
    names = ["start", *(name for name, _ in curve.signatures)]
    return Points(moments, names, curve.bytes_)


def deepen(shallow: Curve, deep: Curve, *, layers: tuple[int, int], wanted: int) -> Points:
    """Extrapolate the points of two traces to more layers.

    Args:
        shallow: The trace of fewer layers.
        deep: The trace of more.
        layers: How many each has.
        wanted: How many the model has.

    Raises:
        NotAligned: The traces differ in more than depth.
    """
    factor, remainder = divmod(wanted - layers[0], layers[1] - layers[0])
    if remainder:
        raise NotAligned("the layers wanted are no whole number of periods away")
    names = [(("start", 0), *curve.signatures) for curve in (shallow, deep)]
    moments: list[str] = []
    operations: list[str] = []
    columns: list[Array] = []
    for (moment, a0, a1), (_, b0, b1) in zip(_segments(shallow), _segments(deep), strict=True):
        left, right = names[0][a0:a1], names[1][b0:b1]
        from_start = _common(left, right)
        from_end = _common(left[::-1], right[::-1])
        if from_start + from_end < len(left):
            raise NotAligned(f"the {moment} of {layers[0]} and of {layers[1]} layers do not match")
        # Layers are alike, so that either stretch reaches into what only looks the same: cut between them.
        cut = (from_start + len(left) - from_end) // 2
        rest = len(left) - cut
        for count, first_a, first_b in ((cut, a0, b0), (rest, a1 - rest, b1 - rest)):
            before = shallow.bytes_[:, first_a : first_a + count]
            after = deep.bytes_[:, first_b : first_b + count]
            columns.append(before + (after - before) * factor)
            moments += [moment] * count
            operations += [name for name, _ in names[0][first_a : first_a + count]]
    return Points(moments, operations, np.concatenate(columns, 1))


def _segments(curve: Curve) -> Iterator[tuple[str, int, int]]:
    """Yield each moment with its first point and the one after its last."""
    points = curve.bytes_.shape[1]
    loss = curve.marks.get("loss", points)
    backward = curve.marks.get("backward", points)
    # A mark is set when so many operations are done: what is alive then belongs to the moment that ends.
    after_forward, after_loss = min(loss + 1, points), min(backward + 1, points)
    yield "forward", 0, after_forward
    yield "loss", after_forward, after_loss
    yield "backward", after_loss, points


def _common(left: Any, right: Any) -> int:
    """Count the equal entries at the start of two sequences."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def lines_of(
    points: Points, more: Points | None, *, rows: int, least: int, gradients: int | None = None
) -> dict[str, tuple[Line, ...]]:
    """Return the lines that can be the peak of each moment.

    Args:
        points: Those of a trace with `rows` rows.
        more: Those of a trace with one row more; None makes lines that hold for `rows` alone.
        rows: Rows of the first trace.
        least: The fewest rows that the lines are to hold for.
        gradients: Bytes of all gradients where those of an earlier micro-batch are alive.

    Raises:
        NotAligned: The two traces differ in more than size.
    """
    if more is not None and points.operations != more.operations:
        raise NotAligned("another batch runs other operations")
    now = _three_terms(points.bytes_, gradients)
    slope = np.zeros_like(now) if more is None else _three_terms(more.bytes_, gradients) - now
    base = now - rows * slope
    found = {}
    for moment in MOMENTS:
        where = np.flatnonzero(np.array([m == moment for m in points.moments], dtype=bool))
        if where.size:
            kept = where[_envelope(base[:, where].sum(0), slope[:, where].sum(0), least)]
            found[moment] = tuple(
                Line(points.operations[i], _bytes(base[:, i]), _bytes(slope[:, i])) for i in kept
            )
    return found


def _three_terms(bytes_: Array, gradients: int | None) -> Array:
    """Return activations, gradients and temporaries; with older gradients alive, a new one is temporary."""
    terms = bytes_[[ACTIVATIONS, GRADIENTS, TEMPORARIES]]
    if gradients is not None:
        terms[1] = gradients
        terms[2] = terms[2] + bytes_[NEW_GRADIENTS]
    return terms


def _bytes(column: Array) -> Bytes:
    a, g, t = (int(value) for value in column)
    return a, g, t


def _envelope(base: Array, slope: Array, low: int) -> list[int]:
    """Return the indices of the lines base + slope x that are the largest for some x >= low."""
    order = sorted(range(len(base)), key=lambda i: (int(slope[i]), int(base[i])))
    kept: list[int] = []
    for i in order:
        while kept and _useless(base, slope, kept, i, low):
            kept.pop()
        kept.append(i)
    return kept


def _useless(base: Array, slope: Array, kept: list[int], new: int, low: int) -> bool:
    """Tell whether the last kept line is nowhere the largest once `new`, which is steeper, is there."""
    b_new, s_new = int(base[new]), int(slope[new])
    b_last, s_last = int(base[kept[-1]]), int(slope[kept[-1]])
    if b_new + s_new * low >= b_last + s_last * low:
        return True
    if len(kept) < 2:
        return False
    b_before, s_before = int(base[kept[-2]]), int(slope[kept[-2]])
    # The last is beaten where it would first be ahead of the one before it.
    return (b_before - b_last) * (s_new - s_last) >= (b_last - b_new) * (s_last - s_before)
