"""When a run looks closely at its memory, and what it makes of it.

Tracking every storage costs 9 to 22 % of a small step, so it is on for the first two optimizer steps, the
first evaluation and the first save, and again for a step whose micro-batch is larger than any before. In
between the high-water mark alone is read, once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from scrimp.base.ledger import Ledger
from scrimp.memory.observer import Observer, PeakMeter
from scrimp.memory.trace import ending

if TYPE_CHECKING:
    from scrimp.base.protocols import Batch, LossFunction
    from scrimp.build import Job

TRACKED_STEPS = 2
SAME_PEAK = 0.02  # of the peak: a mark this near to a moment's belongs to it


class Watch:
    """Watches a job train.

    Args:
        job: The job.
        meter: Reads the marks.
    """

    def __init__(self, job: Job, meter: PeakMeter) -> None:
        self._observer = Observer(meter, job.model, job.optimizer, job.device)
        self._meter = meter
        # A dispatch mode would keep torch.compile from compiling.
        self._may_track = not job.recipe.compile
        self._steps_left = TRACKED_STEPS
        self._largest = 0
        self._left = {"evaluation", "save"}
        self._tracking = False

    @property
    def ledger(self) -> Ledger | None:
        """What was measured; None before the first step."""
        return self._observer.ledger

    def step(self, batch: Sequence[Batch]) -> AbstractContextManager[None]:
        """Return a context for an optimizer step."""
        largest = max(micro.input_ids.numel() for micro in batch)
        self._tracking = self._may_track and (self._steps_left > 0 or largest > self._largest)
        self._largest = max(self._largest, largest)
        self._steps_left -= 1
        return self._observer.step(several=len(batch) > 1) if self._tracking else nullcontext()

    def during(self, name: str) -> AbstractContextManager[None]:
        """Return a context for the moment `name`, which is watched the first time."""
        if not self._may_track or name not in self._left:
            return nullcontext()
        self._left.discard(name)
        return self._observer.during(name)

    def loss(self, loss: LossFunction) -> Callable[[Any], Tensor]:
        """Return a loss function that tells when its forward pass ends."""
        return ending(loss, self._observer.forward_ended) if self._tracking else loss

    def before_update(self) -> None:
        """Tell that the gradients are there."""
        self._observer.before_update()

    def peak(self) -> int:
        """Return the highest memory use so far in bytes."""
        return self._meter.read()

    def peak_moment(self) -> str:
        """Name the moment of the peak; a step without its moments where none of those seen was as high."""
        return moment_of(self.ledger, self.peak())


def moment_of(measured: Ledger | None, peak: int) -> str:
    """Name the moment that a peak belongs to."""
    if measured is None or measured.peak.total < peak * (1 - SAME_PEAK):
        return "a later step"
    return measured.peak.name
