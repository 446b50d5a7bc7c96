"""Where names go in a picture so that they can be read, and which points form a front: geometry alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

Box = tuple[float, float, float, float]  # left, bottom, right, top
RADIUS = 7  # of a point's mark
# To the right, to the left, above, below and the corners, the preferred first.
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other matches in both coordinates, from left to right."""
    best, found = math.inf, []
    for x, y in sorted(points):
        if y < best:
            best = y
            found.append((x, y))
    return found


def spread_out(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return places near some values that are at least a gap apart and, if there is room, within bounds."""
    order = sorted(range(len(values)), key=lambda n: values[n])
    places = [values[n] for n in order]
    for _ in range(200):
        for below in range(len(places) - 1):
            short = gap - (places[below + 1] - places[below])
            if short > 0:
                places[below] -= short / 2
                places[below + 1] += short / 2
    places = list(accumulate(places, lambda below, place: max(place, below + gap), initial=low - gap))[1:]
    places = list(
        accumulate(reversed(places), lambda above, place: min(place, above - gap), initial=high + gap)
    )
    found = [0.0] * len(values)
    for n, place in zip(reversed(order), places[1:], strict=True):
        found[n] = place
    return found


def place_names(
    spots: Sequence[Sequence[float]],
    sizes: Sequence[tuple[float, float]],
    *,
    around: Sequence[Sequence[float]],
    inside: Sequence[float],
    reaches: Sequence[float],
) -> list[Box]:
    """Return each name's box, where it hides the least of marks, of a front and of the names before it.

    Args:
        spots: The points, in pixels.
        sizes: Width and height of each point's name.
        around: The corners of a front that is drawn in steps.
        inside: The box that no name should leave.
        reaches: How far from its point a name may lie, the preferred first.
    """
    taken: list[Box] = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in spots]
    taken += _steps(around)
    found = []
    for spot, size in zip(spots, sizes, strict=True):
        boxes = [_box(spot, size, reach, side) for reach in reaches for side in SIDES]
        best = min(boxes, key=lambda box: _hidden(box, taken, inside))
        taken.append(best)
        found.append(best)
    return found


def _steps(corners: Sequence[Sequence[float]]) -> Iterator[Box]:
    """Yield the boxes of a front's lines: to the right from a corner, then down to the next."""
    for (x, y), (right, down) in pairwise(corners):
        yield x, y - 2, right, y + 2
        yield right - 2, down, right + 2, y


def _box(spot: Sequence[float], size: tuple[float, float], reach: float, side: tuple[int, int]) -> Box:
    """Return the box of a name on some side of a spot, at some distance."""
    (x, y), (width, height), (right, up) = spot, size, side
    left = x + right * reach + (right - 1) * width / 2
    bottom = y + up * reach + (up - 1) * height / 2
    return left, bottom, left + width, bottom + height


def _hidden(box: Box, taken: Sequence[Box], inside: Sequence[float]) -> float:
    """Return how many square pixels of what is taken, or outside, a box would cover."""
    left, bottom, right, top = box
    covered = sum(
        max(0.0, min(right, other[2]) - max(left, other[0]))
        * max(0.0, min(top, other[3]) - max(bottom, other[1]))
        for other in taken
    )
    x0, y0, x1, y1 = inside
    beyond = max(0.0, x0 - left, right - x1) + max(0.0, y0 - bottom, top - y1)
    return float(covered + 1000 * beyond)
