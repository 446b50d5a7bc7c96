"""The folder of a suite: its runs, its document, its report and its pictures.

bench.json     the document, whole after every run
report.html    the same for people
loss.svg ...   pictures, where matplotlib is installed
tasks/         every run with its metrics and what its process said
topics.jsonl   the fine-tuning suite's own text
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scrimp.base import extras, files
from scrimp.base.errors import Interrupted, ScrimpError
from scrimp.base.lock import run_lock
from scrimp.bench.bench import Bench
from scrimp.bench.document import document
from scrimp.bench.entries import Ask
from scrimp.bench.machine import LoadWatch
from scrimp.bench.pool import Pool
from scrimp.bench.trained_model import trained_model
from scrimp.report.page import write_page
from scrimp.training.stopping import Stopper


@dataclass(frozen=True, slots=True)
class SuiteFolder:
    """Where a suite lies.

    Attributes:
        path: The folder.
    """

    path: Path

    def run(self, ask: Ask, say: Callable[[str], None]) -> dict[str, Any]:
        """Run a suite, or go on with it, and return its document.

        Raises:
            ScrimpError: The folder is used by something else, or the job cannot be run.
            Interrupted: A signal stopped it.
        """
        self._check()
        is_new = not self.path.exists()
        with files.explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with run_lock(self.path), Stopper().listening():
            try:
                return self._run(ask, say)
            except ScrimpError:
                if is_new and not self.document.exists():
                    with suppress(OSError):  # Windows keeps a lock's file
                        files.remove_tree(self.path)  # nothing was found that could be lost
                raise
            except Interrupted as stop:
                raise Interrupted(
                    f"stopped; what is finished lies in {self.path}, and the same command goes on from there",
                    signal_number=stop.signal_number,
                    out=self.path,
                ) from None

    def _run(self, ask: Ask, say: Callable[[str], None]) -> dict[str, Any]:
        load = LoadWatch()
        pool = Pool(self.path / "tasks", say, again=ask.again)
        if ask.suite.tunes:
            suite = replace(ask.suite, recipe={**ask.suite.recipe, **trained_model(self.path, ask, pool)})
            ask = replace(ask, suite=suite)
        bench = Bench(ask, pool, say, load)
        for _ in bench.run():
            self._write(document(bench))
        found = document(bench)
        self._write(found)
        if extras.is_installed("matplotlib"):
            from scrimp.report.suite_plots import write_plots

            write_plots(found, self.path)
        else:
            say("no pictures: they need matplotlib, pip install 'scrimp[plots]'")
        say(f"wrote {self.path / 'report.html'}")
        return found

    @property
    def document(self) -> Path:
        """The suite's document."""
        return self.path / "bench.json"

    def _write(self, found: dict[str, Any]) -> None:
        files.write_json(self.document, found)
        write_page(found, self.path / "report.html")

    def _check(self) -> None:
        """Refuse a folder that holds something else.

        Raises:
            ScrimpError: It does.
        """
        if self.path.is_dir():
            strange = any(entry.name != ".lock" for entry in self.path.iterdir())
            if strange and not any((self.path / name).exists() for name in ("tasks", "bench.json")):
                raise ScrimpError(f"{self.path} holds something else than a suite: choose another --out")
        elif self.path.exists():
            raise ScrimpError(f"{self.path} is a file: choose another --out")
