"""The ledger's types: bytes by term and by place at every moment of a run.

The peak is the largest moment, never the sum of the terms: gradients, state and activations are
not all alive at once. Predictions and measurements fill the same type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Term = Literal["fixed", "weights", "gradients", "optimizer state", "activations", "temporaries"]
Place = Literal["device", "host", "disk"]
Basis = Literal["traced", "formula", "measured"]
TERMS: tuple[Term, ...] = get_args(Term)


@dataclass(frozen=True, slots=True)
class Moment:
    """What one rank holds at one moment of a run.

    Attributes:
        name: The moment, such as `loss` or `optimizer step`.
        terms: Bytes by term on the device that trains. Where that is a CPU, it is the process's memory.
        elsewhere: Bytes by term on the host beside a GPU, and on disk.
        operation: Where known, the operation at which it held the most.
    """

    name: str
    terms: Mapping[Term, int]
    elsewhere: Mapping[Place, Mapping[Term, int]] = field(default_factory=dict)
    operation: str = ""

    @property
    def total(self) -> int:
        """Bytes held on the device in all."""
        return sum(self.terms.values())

    def total_at(self, place: Place) -> int:
        """Bytes held at a place in all."""
        return self.total if place == "device" else sum(self.elsewhere.get(place, {}).values())


@dataclass(frozen=True, slots=True)
class Ledger:
    """The moments of a run, in the order in which they happen.

    Attributes:
        moments: At least one moment.
        basis: Where the bytes come from.
        error: How far the peak may be off, as a share of it.
        notes: What was assumed, in sentences.
        ranks: Processes that each hold this.
    """

    moments: tuple[Moment, ...]
    basis: Basis = "traced"
    error: float = 0.0
    notes: tuple[str, ...] = ()
    ranks: int = 1

    @property
    def peak(self) -> Moment:
        """The moment that holds the most on the device."""
        return max(self.moments, key=lambda moment: moment.total)

    def peak_at(self, place: Place) -> int:
        """The most bytes held at a place."""
        return max(moment.total_at(place) for moment in self.moments)

    def to_plain(self) -> dict[str, Any]:
        """Return it as data for JSON."""
        return {
            "basis": self.basis,
            "error": self.error,
            "notes": list(self.notes),
            "ranks": self.ranks,
            "moments": [
                {
                    "name": moment.name,
                    "operation": moment.operation,
                    "total": moment.total,
                    "terms": dict(moment.terms),
                    "elsewhere": {place: dict(terms) for place, terms in moment.elsewhere.items()},
                }
                for moment in self.moments
            ],
        }

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Ledger:
        """Read what `to_plain` made."""
        moments = tuple(
            Moment(found["name"], found["terms"], found["elsewhere"], found["operation"])
            for found in data["moments"]
        )
        return cls(moments, data["basis"], data["error"], tuple(data["notes"]), data["ranks"])
