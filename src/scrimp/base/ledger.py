"""The ledger's types: bytes by term at every moment of a run.

The peak is the largest moment, never the sum of the terms: gradients, state and activations are
not all alive at once. Predictions and measurements fill the same type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Term = Literal["fixed", "weights", "gradients", "optimizer state", "activations", "temporaries"]


@dataclass(frozen=True, slots=True)
class Moment:
    """What is held at one moment of a run.

    Attributes:
        name: The moment, such as `loss` or `optimizer step`.
        terms: Bytes by term.
    """

    name: str
    terms: Mapping[Term, int]

    @property
    def total(self) -> int:
        """Bytes held in all."""
        return sum(self.terms.values())


@dataclass(frozen=True, slots=True)
class Ledger:
    """The moments of a run, in the order in which they happen.

    Attributes:
        moments: At least one moment.
    """

    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        """The moment that holds the most."""
        return max(self.moments, key=lambda moment: moment.total)
