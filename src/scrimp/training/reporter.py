"""Who is told how a run goes. The loop knows this protocol; `scrimp.report` draws with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from scrimp.base.units import format_bytes, format_duration

if TYPE_CHECKING:
    from scrimp.build import Job
    from scrimp.training.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Where a run stands after an optimizer step.

    Attributes:
        step: Optimizer steps done.
        steps: Optimizer steps of the run.
        loss: Training loss in nats.
        tokens_per_s: Over the steps since the process began.
        peak_bytes: Highest memory use so far.
        predicted_bytes: The peak that was predicted.
        budget_bytes: The memory budget.
        left_s: Estimate of the time left, evaluations and checkpoints included.
    """

    step: int
    steps: int
    loss: float
    tokens_per_s: float
    peak_bytes: int
    predicted_bytes: int
    budget_bytes: int
    left_s: float

    def __str__(self) -> str:
        return (
            f"step {self.step}/{self.steps}  loss {self.loss:.3f}  {self.tokens_per_s:,.0f} tokens/s  "
            f"peak {format_bytes(self.peak_bytes)} of {format_bytes(self.predicted_bytes)} planned  "
            f"{format_duration(self.left_s)} left"
        )


class Reporter(Protocol):
    """Listens to a run."""

    def phase(self, message: str, done: float | None) -> None:
        """A phase before or after the steps began or moved on; `done` is its share, if known."""

    def plan(self, job: Job) -> None:
        """The run is built, and its first step is next."""

    def tick(self, tick: Tick) -> None:
        """An optimizer step was done."""

    def note(self, message: str) -> None:
        """Something the user should know."""

    def done(self, job: Job, run: Run) -> None:
        """The run is finished and its model saved."""
