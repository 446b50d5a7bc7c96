"""Where a run stands, besides its tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from scrimp.training.evaluate import Evaluation
from scrimp.training.metrics import Metrics


@dataclass(slots=True)
class Progress:
    """All that a checkpoint stores besides tensors.

    Attributes:
        step: Optimizer steps done.
        tokens: Targets trained on.
        skipped: Steps left out for a loss or gradient that was not finite.
        last: The metrics of the last step.
        evaluation: The last evaluation.
        evaluated_step: The step it was made at.
        best_loss: The lowest held-out loss that a checkpoint was made at.
        best_step: The step of that checkpoint.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    last: Metrics | None = None
    evaluation: Evaluation | None = None
    evaluated_step: int | None = None
    best_loss: float | None = None
    best_step: int | None = None

    def to_plain(self) -> dict[str, Any]:
        """Return it as data for JSON; `"nan"`, `"inf"` and `"-inf"` are what JSON has no number for."""
        return {name: _encode(value) for name, value in asdict(self).items()}

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Progress:
        """Read what `to_plain` wrote."""
        values = {name: _decode(value) for name, value in data.items()}
        for name, kind in (("last", Metrics), ("evaluation", Evaluation)):
            if values[name] is not None:
                values[name] = kind(**values[name])
        return cls(**values)


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _encode(inner) for name, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _decode(inner) for name, inner in value.items()}
    return float(value) if isinstance(value, str) else value
