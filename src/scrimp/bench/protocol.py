"""The rules of a fair comparison, as pure functions of numbers.

After AlgoPerf (arXiv 2306.07179), external tuning, cut down to what a laptop can do. Every contestant has the
same number of tuning trials: learning rates spaced evenly on a logarithmic scale around a centre that does
not depend on how it did, all with the first seed. The rate with the lowest held-out loss at the end is run
with the other seeds. Compared are tokens and seconds to a target loss, and the loss at the end beside them;
the target is what the reference reached, with a little room. A best rate at the edge of the grid is marked:
a wider search might have helped that contestant.

Speed is compared in turns: contestant and reference are alive at once, and each does a few steps while the
other waits (A B B A ...), so that a machine that slows down slows both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

LR_FACTOR = 10**0.5
TARGET_ROOM = 1.02
POINTS = 150  # of a curve
TARGET_RULE = (
    "the reference's median held-out loss at the end of its runs at its best learning rate, plus 2 %; "
    "reached at the first evaluation that is not above it, median over the seeds, a seed that misses counts "
    "as never"
)


def rates(centre: float, trials: int, *, factor: float = LR_FACTOR) -> list[float]:
    """Return the learning rates of a search, the centre first and then outwards, the smaller side first.

    Args:
        centre: The rate in the middle.
        trials: How many.
        factor: From one rate to the next.
    """
    offsets = sorted(range(-(trials // 2), (trials + 1) // 2), key=lambda offset: (abs(offset), offset))
    return [_rounded(centre * factor**offset) for offset in offsets]


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")  # a rate that a reader can type


class Trial(Protocol):
    """A run of the search."""

    @property
    def lr(self) -> float:
        """Its peak learning rate."""

    @property
    def loss(self) -> float | None:
        """Held-out nats a token at its end; None where it diverged."""


T = TypeVar("T", bound=Trial)


def best(trials: Sequence[T]) -> T | None:
    """Return the trial with the lowest held-out loss, the smaller rate on a tie; None if none is finite."""
    finite = [trial for trial in trials if trial.loss is not None]
    return min(finite, key=lambda trial: (trial.loss, trial.lr), default=None)


def at_edge(chosen: Trial, trials: Sequence[Trial]) -> bool:
    """Tell whether a search might go on: the best rate is its smallest or largest, and rates matter."""
    tried = [trial.lr for trial in trials]
    matters = len({trial.loss for trial in trials}) > 1  # some methods find their rate themselves
    return matters and chosen.lr in (min(tried), max(tried))


def spread(values: Sequence[float | None], *, digits: int = 6) -> dict[str, Any] | None:
    """Return the median of some numbers, and how far they lie apart.

    Args:
        values: A run that diverged has None, which is higher than any number.
        digits: Significant ones to keep.

    Returns:
        `median`, `lowest`, `highest` and `all` of the numbers; None where half of them or more are missing.
    """
    finite = [value for value in values if value is not None]
    if 2 * len(finite) <= len(values):
        return None
    median = statistics.median(math.inf if value is None else value for value in values)
    shown = [float(f"{value:.{digits}g}") for value in finite]
    return {
        "median": float(f"{median:.{digits}g}"),
        "lowest": min(shown),
        "highest": max(shown),
        "all": shown,
    }


def to_target(curves: Sequence[Mapping[str, Any]], target: float) -> dict[str, Any]:
    """Return how many tokens the median seed took to the target loss.

    Args:
        curves: One a seed, with `eval_tokens` and `eval`.
        target: Nats a token.

    Returns:
        `tokens` (None where the median seed never got there), `reached` and `of` seeds.
    """
    needed = [_first_at(curve, target) for curve in curves]
    median = statistics.median(needed) if needed else math.inf
    return {
        "tokens": None if math.isinf(median) else round(median),
        "reached": sum(not math.isinf(tokens) for tokens in needed),
        "of": len(needed),
    }


def _first_at(curve: Mapping[str, Any], target: float) -> float:
    points = zip(curve["eval_tokens"], curve["eval"], strict=True)
    return next((tokens for tokens, loss in points if loss is not None and loss <= target), math.inf)


def refresh_every(steps: int) -> int:
    """Return the steps between two refreshes of a projection: the papers' 200, or ten refreshes a run."""
    return min(200, math.ceil(steps / 10))


def turn_order(pairs: int) -> list[bool]:
    """Return who goes first in each pair, alternately: whether it is the contestant."""
    return [pair % 2 == 0 for pair in range(pairs)]


def thinned(tokens: Sequence[int], losses: Sequence[float | None]) -> tuple[list[int], list[float | None]]:
    """Return a curve of at most `POINTS` points: the mean loss of even stretches, at their last token."""
    size = max(1, math.ceil(len(tokens) / POINTS))
    stretches = [slice(first, first + size) for first in range(0, len(tokens), size)]
    means = [_mean(losses[stretch]) for stretch in stretches]
    return [tokens[stretch][-1] for stretch in stretches], means


def _mean(losses: Sequence[float | None]) -> float | None:
    finite = [loss for loss in losses if loss is not None]
    return float(f"{statistics.fmean(finite):.5g}") if len(finite) == len(losses) else None
