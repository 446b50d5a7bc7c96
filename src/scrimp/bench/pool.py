"""Tasks done in processes of their own, some side by side, each once.

A finished task is found in its folder and not done again. A task that takes much longer than any other did is
ended, so that no contestant can hang a suite. Whatever ends the program ends its processes.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scrimp.bench import peers
from scrimp.bench.tasks import Place, Task

POLL_S = 0.05
PATIENCE = 20.0  # times the longest task so far
LEAST_PATIENCE_S = 600.0
SILENCE_S = 60.0


@dataclass(slots=True)
class Pool:
    """Does tasks.

    Attributes:
        folder: Where their folders lie.
        say: Told once a minute what those that run say.
        jobs: How many at once.
        again: Do even what was done before.
    """

    folder: Path
    say: Callable[[str], None]
    jobs: int = 1
    again: bool = False
    _heard: float = 0.0
    _longest: float = 0.0
    _done: set[Path] = field(default_factory=set)

    def place(self, task: Task) -> Place:
        """Return where a task lies."""
        package = None if task.peer is None else peers.peer(task.peer).package
        return Place(self.folder / task.key(package))

    def cached(self, task: Task) -> dict[str, Any] | None:
        """Return what a task found before; None where it must be done."""
        place = self.place(task)
        found = place.result if not self.again or place.path in self._done else None
        return None if found is None or found["status"] == "failed" else found

    def now(self, task: Task) -> dict[str, Any]:
        """Do one task, whether it was done before or not."""
        running = self._start(0, task)
        try:
            running.process.wait()
        finally:
            running.end()
        return self._finish(running)

    def do(self, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Begin tasks in their order, and yield each one's number with what it found as it ends."""
        waiting = []
        for number, task in enumerate(tasks):
            found = self.cached(task)
            if found is None:
                waiting.append(number)
            else:
                yield number, found
        running: list[_Running] = []
        self._heard = time.monotonic()
        with ExitStack() as stack:
            stack.callback(_end_all, running)
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    number = waiting.pop(0)
                    running.append(self._start(number, tasks[number]))
                for entry in [entry for entry in running if entry.is_over(self._patience())]:
                    running.remove(entry)
                    entry.end()
                    yield entry.number, self._finish(entry)
                    self._heard = time.monotonic()
                self._pass_on(running)
                time.sleep(POLL_S)

    def _pass_on(self, running: Sequence[_Running]) -> None:
        """Say how those that run are doing, when nothing else was to be told for a while."""
        if time.monotonic() - self._heard < SILENCE_S:
            return
        self._heard = time.monotonic()
        for entry in running:
            self.say(f"{entry.task.contestant}: {entry.place.last_words()}")

    def _patience(self) -> float:
        return max(LEAST_PATIENCE_S, PATIENCE * self._longest) if self._longest else float("inf")

    def _start(self, number: int, task: Task) -> _Running:
        place = self.place(task)
        place.prepare(task)
        return _Running(number, task, place, place.start())

    def _finish(self, entry: _Running) -> dict[str, Any]:
        self._done.add(entry.place.path)
        found = entry.place.result
        if found is None:
            why = entry.late or entry.place.last_words()
            found = {"status": "failed", "why": why}
            entry.place.write_result(found)
        elif entry.task.mode == "train":
            self._longest = max(self._longest, time.monotonic() - entry.began)
        return found


@dataclass(slots=True)
class _Running:
    number: int
    task: Task
    place: Place
    process: subprocess.Popen[str]
    began: float = field(default_factory=time.monotonic)
    late: str = ""

    def is_over(self, patience: float) -> bool:
        if self.process.poll() is not None:
            return True
        if time.monotonic() - self.began > patience:
            self.late = f"ended after {patience:,.0f} s, far longer than any other run took"
            self.end()
        return bool(self.late)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


def _end_all(running: Sequence[_Running]) -> None:
    for entry in running:
        entry.end()
