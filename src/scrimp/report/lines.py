"""Plain lines, at most one every ten seconds: for notebooks, logs and pipes."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from scrimp.report.summary import done_lines, next_commands, plan_lines

if TYPE_CHECKING:
    from scrimp.build import Job
    from scrimp.training.reporter import Tick
    from scrimp.training.run import Run

LINE_SECONDS = 10.0


class LineReporter:
    """Tells a run's story in plain lines.

    Args:
        stream: Where they go; None is standard error.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._phase = ""
        self._last = 0.0
        self._training = False

    def phase(self, message: str, done: float | None) -> None:
        """Write a phase when it begins, and how far it is every ten seconds."""
        if self._training:
            return  # the ticks tell enough
        if message != self._phase:
            self._phase = message
            self.note(message)
        elif done is not None and self._is_due():
            self.note(f"{message}: {done:.0%}")

    def plan(self, job: Job) -> None:
        """Write what the run will do."""
        parameters = sum(p.numel() for p in job.model.parameters())
        for label, text in plan_lines(job.prepared, job.recipe, job.ledger, parameters=parameters):
            self.note(f"{label:>13}  {text}")
        self._training = True

    def tick(self, tick: Tick) -> None:
        """Write where the run stands every ten seconds, and at its end."""
        if self._is_due() or tick.step == tick.steps:
            self.note(str(tick))

    def done(self, job: Job, run: Run) -> None:
        """Write what the run came to."""
        self._training = False
        for label, text in done_lines(job, run):
            self.note(f"{label:>13}  {text}")
        self.note(f"\n{run.sample}\n")
        for command in next_commands(job, run):
            self.note(f"try: {command}")

    def note(self, message: str) -> None:
        """Write a line; a reader that left (`scrimp train 2>&1 | head`) stops no run."""
        self._last = time.monotonic()
        with suppress(BrokenPipeError):
            print(message, file=self._stream, flush=True)

    def _is_due(self) -> bool:
        return time.monotonic() - self._last >= LINE_SECONDS
