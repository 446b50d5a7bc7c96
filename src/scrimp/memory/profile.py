"""What tracing found out about a recipe, as plain numbers: bytes as affine functions of the micro-batch.

The operations of a step do not depend on how many rows a micro-batch has, and at a fixed sequence length
the bytes alive after each of them are affine in that number. So the lines of two traces answer every
batch, and only those on the upper envelope can ever be the peak. It imports no torch: a profile read from
the cache answers a new budget in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Bytes = tuple[int, int, int]  # activations, gradients, temporaries


@dataclass(frozen=True, slots=True)
class Line:
    """What is alive after one operation.

    Attributes:
        operation: Its name.
        base: Bytes at no rows (an intercept, which may be negative).
        slope: Bytes for each row of the micro-batch.
    """

    operation: str
    base: Bytes
    slope: Bytes

    def at(self, rows: int) -> Bytes:
        """Return activations, gradients and temporaries in bytes."""
        a, g, t = (base + rows * slope for base, slope in zip(self.base, self.slope, strict=True))
        return a, g, t


@dataclass(frozen=True, slots=True)
class Effort:
    """What a micro-batch costs, affine in its rows.

    Attributes:
        flops: (base, slope) floating-point operations of products.
        moved: (base, slope) bytes that other operations read and write.
        operations: How many operations there are.
    """

    flops: tuple[int, int]
    moved: tuple[int, int]
    operations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationProfile:
    """A micro-batch in evaluation, without weights and optimizer state.

    Attributes:
        rows: The first and the last number of rows that it holds for; None is no last one.
        lines: The lines that can be the peak.
    """

    rows: tuple[int, int | None]
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """A micro-batch of a recipe in training, without weights and optimizer state.

    Attributes:
        rows: As in `EvaluationProfile`.
        first: The lines that can be the peak, by moment, in the first micro-batch of a step.
        later: The same in the others, where the gradients of those before are alive.
        effort: What it costs.
        answers: What was assumed about values that are not known beforehand.
    """

    rows: tuple[int, int | None]
    first: Mapping[str, tuple[Line, ...]]
    later: Mapping[str, tuple[Line, ...]]
    effort: Effort
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The tensors of a model that stay.

    Attributes:
        parameters: How many numbers it has; tied ones count once.
        layers: Decoder layers.
        weights: Bytes of parameters and buffers.
        loaded: The same before matrices are coded and adapters added: the model as it is read.
        gradients: Bytes of the gradients of what trains.
        largest: Bytes of the largest parameter.
    """

    parameters: int
    layers: int
    weights: int
    loaded: int
    gradients: int
    largest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerProfile:
    """An optimizer over a model's parameters.

    Attributes:
        state: Bytes it keeps between steps.
        paged: Those of them that can leave the device between updates.
        at_hand: The most of these that an update needs.
        temporaries: Most bytes it holds besides during a step, clipping included.
        flops: Floating-point operations of its products in a step.
        moved: Bytes that its other operations read and write in a step.
    """

    state: int
    paged: int
    at_hand: int
    temporaries: int
    flops: int
    moved: int


def highest(lines: Sequence[Line], rows: int) -> tuple[Bytes, str]:
    """Return the largest of some lines at `rows`, and its operation."""
    line = max(lines, key=lambda line: sum(line.at(rows)))
    return line.at(rows), line.operation


def holds_for(rows: Sequence[int | None], wanted: int) -> bool:
    """Tell whether a profile's `rows` say that it answers for a micro-batch of `wanted`."""
    low, high = rows
    assert low is not None
    return low <= wanted and (high is None or wanted <= high)


def evaluation_profile(data: Mapping[str, Any]) -> EvaluationProfile:
    """Read what `dataclasses.asdict` made of an `EvaluationProfile`."""
    return EvaluationProfile(rows=tuple(data["rows"]), lines=_lines(data["lines"]))


def step_profile(data: Mapping[str, Any]) -> StepProfile:
    """Read what `dataclasses.asdict` made of a `StepProfile`."""
    effort = data["effort"]
    return StepProfile(
        rows=tuple(data["rows"]),
        first={name: _lines(found) for name, found in data["first"].items()},
        later={name: _lines(found) for name, found in data["later"].items()},
        effort=Effort(tuple(effort["flops"]), tuple(effort["moved"]), effort["operations"]),
        answers=tuple(data["answers"]),
    )


def _lines(found: Sequence[Mapping[str, Any]]) -> tuple[Line, ...]:
    return tuple(Line(f["operation"], tuple(f["base"]), tuple(f["slope"])) for f in found)
