"""What is told of the steps that are done: metrics, loggers, and a line for people."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from scrimp.base.units import parse_bytes
from scrimp.build import Job
from scrimp.training.budget import over_budget
from scrimp.training.loggers import Logger
from scrimp.training.metrics import Metrics, MetricsFile
from scrimp.training.progress import Progress
from scrimp.training.reporter import Reporter, Tick
from scrimp.training.watch import Watch


@dataclass(slots=True, kw_only=True)
class Teller:
    """Tells of a loop's steps, from where it begins.

    Attributes:
        job: What runs.
        watch: Looks at the memory.
        reporter: Told about every step.
        metrics: Where metrics go; None writes none.
        loggers: Other takers of metrics.
        began: When, on the monotonic clock.
        first: The steps done before.
        first_tokens: The tokens before.
        over: What to say of a budget that is exceeded; empty while it is not.
    """

    job: Job
    watch: Watch
    reporter: Reporter
    metrics: MetricsFile | None
    loggers: list[Logger]
    began: float
    first: int
    first_tokens: int
    over: str = ""

    @classmethod
    def begin(
        cls,
        job: Job,
        progress: Progress,
        watch: Watch,
        reporter: Reporter,
        metrics: MetricsFile | None,
        loggers: list[Logger],
    ) -> Teller:
        """Start the clock."""
        return cls(
            job=job,
            watch=watch,
            reporter=reporter,
            metrics=metrics,
            loggers=loggers,
            began=time.monotonic(),
            first=progress.step,
            first_tokens=progress.tokens,
        )

    def write(self, kind: Any, last: Metrics, extra: dict[str, float] | None = None) -> None:
        """Write a line of metrics, and hand it to the loggers."""
        if self.metrics is not None:
            self.metrics.write(kind, last, extra)
        values = extra or {
            "loss": last.loss,
            "lr": last.lr,
            "grad_norm": last.grad_norm,
            "peak_bytes": last.peak_bytes,
        }
        for logger in self.loggers:
            logger.log(last.step, values)

    def report(self, last: Metrics) -> None:
        """Tell people where the run stands, and once that it is over its budget."""
        recipe = self.job.recipe
        assert recipe.steps is not None and recipe.memory is not None
        spent, budget = time.monotonic() - self.began, parse_bytes(recipe.memory)
        self.reporter.tick(
            Tick(
                step=last.step,
                steps=recipe.steps,
                loss=last.loss,
                tokens_per_s=(last.tokens - self.first_tokens) / spent,
                peak_bytes=last.peak_bytes,
                predicted_bytes=last.predicted_bytes,
                budget_bytes=budget,
                left_s=spent / (last.step - self.first) * (recipe.steps - last.step),
            )
        )
        if last.peak_bytes > budget and not self.over:
            self.over = "memory: " + over_budget(
                last.peak_bytes, budget, predicted=self.job.ledger, measured=self.watch.ledger
            )
            if not recipe.strict:
                self.reporter.note(f"{self.over}; a smaller --micro-batch or --seq needs less")
