"""A run on a terminal: what it will do, a bar while it does it, what it came to."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from scrimp.base.units import format_bytes, format_duration
from scrimp.report.summary import Lines, done_lines, next_commands, plan_lines

if TYPE_CHECKING:
    from scrimp.build import Job
    from scrimp.training.reporter import Tick
    from scrimp.training.run import Run

REFRESH_SECONDS = 0.5  # drawing takes milliseconds, and a small step takes tens of them


class ConsoleReporter:
    """Tells a run's story on a terminal.

    Args:
        console: Where it draws.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._drawn = 0.0
        self._training = False

    def phase(self, message: str, done: float | None) -> None:
        """Name a phase; where its share is known, draw a bar."""
        if self._training:
            self._update(phase=message)
            return
        if message != self._phase:
            self._phase = message
            self.close()
            if done is None:
                self._console.print(f"[dim]{escape(message)} …[/dim]")
            else:
                self._open(
                    TextColumn("[dim]{task.description}"),
                    BarColumn(),
                    TimeRemainingColumn(),
                )
        if done is not None:
            self._update(completed=done, description=message)

    def plan(self, job: Job) -> None:
        """Write what the run will do, and open the bar."""
        self.close()
        parameters = sum(p.numel() for p in job.model.parameters())
        self.table(plan_lines(job.prepared, job.recipe, job.ledger, parameters=parameters))
        self._training = True
        self._open(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[phase]}"),
        )

    def tick(self, tick: Tick) -> None:
        """Move the bar."""
        over = tick.peak_bytes > tick.budget_bytes
        memory = f"{format_bytes(tick.peak_bytes)} of {format_bytes(tick.predicted_bytes)} planned"
        memory = f"[red]{memory}[/red]" if over else memory
        self._update(
            last=tick.step == tick.steps,
            completed=tick.step / tick.steps,
            description=(
                f"step [bold]{tick.step}[/bold]/{tick.steps}  loss [bold]{tick.loss:.3f}[/bold]  "
                f"{tick.tokens_per_s:,.0f} tokens/s  {memory}"
            ),
            phase=f"{format_duration(tick.left_s)} left",
        )

    def done(self, job: Job, run: Run) -> None:
        """Write what the run came to."""
        self.close()
        self.table(done_lines(job, run))
        self._console.print(
            Panel(escape(run.sample), title="a sample", title_align="left", border_style="dim")
        )
        for command in next_commands(job, run):
            self._console.print(f"[dim]try[/dim]  {escape(command)}", highlight=False, soft_wrap=True)

    def note(self, message: str) -> None:
        """Write a line above the bar."""
        self._console.print(f"[yellow]{escape(message)}[/yellow]", highlight=False, soft_wrap=True)

    def table(self, lines: Lines) -> None:
        """Write labelled lines."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold cyan", justify="right")
        table.add_column(overflow="fold")
        for label, text in lines:
            table.add_row(label, escape(text))
        self._console.print(table)

    def close(self) -> None:
        """Take the bar away."""
        self._training = False
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _open(self, *columns: ProgressColumn) -> None:
        # Drawn by us alone: a refresh thread would take time from the training threads.
        self._bar = Progress(*columns, console=self._console, auto_refresh=False, transient=True)
        self._task = self._bar.add_task("", total=1.0, phase="")
        self._bar.start()

    def _update(self, *, last: bool = False, **fields: object) -> None:
        if self._bar is None:
            return
        self._bar.update(self._task, **fields)  # type: ignore[arg-type]
        now = time.monotonic()
        if last or now - self._drawn >= REFRESH_SECONDS:
            self._drawn = now
            self._bar.refresh()
