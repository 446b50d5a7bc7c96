"""All measurements that need a GPU, by one command, as one JSON.

    python benchmarks/gpu/run.py                              at most 25 minutes on one H100-class card
    python benchmarks/gpu/run.py --parts planner,headlines    only these
    python benchmarks/gpu/run.py --device cpu --tiny          does it run? (minutes, its figures mean nothing)

Every measurement is a process of its own, so that its memory is its own and nothing that it does ends the
others. The minutes, which also hold the ending of a process that is late, are shared out among the parts that
are not finished, and what a part leaves over goes to the next ones. The JSON is written after every process:
a command that was stopped goes on where it was, trying again what failed or was late; `--again` measures
anew.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gpu_tests
import headlines
import planner
import pretrain
import speed
from _card import card
from _document import Document
from _tasks import FOUND, Part, Row, Setting, perform

from scrimp.data import cache_folder

PARTS = (gpu_tests.PART, headlines.PART, planner.PART, speed.PART, pretrain.PART)
RESULT = Path(__file__).resolve().parents[1] / "results" / "gpu.json"
MINUTES = 25.0


def main(arguments: Sequence[str]) -> None:
    options = _options(arguments)
    gpu = card() if options.device == "cuda" else None
    if options.device == "cuda" and gpu is None:
        raise SystemExit("no GPU: nvidia-smi shows none; --device cpu --tiny tries the program without one")
    setting = Setting(device=options.device, tiny=options.tiny, work=options.work, again=options.again)
    document = Document.open(options.json, setting, gpu, again=options.again, parts=options.parts)
    document.command = ["python", "benchmarks/gpu/run.py", *_shown(arguments)]
    clock = Clock(60 * options.minutes, [part for part in options.parts if not document.finished(part.name)])
    for part in list(clock.waiting):
        measure(part, setting, document, clock)
    document.tell()


@dataclass(slots=True)
class Clock:
    """Shares the time out among the parts.

    Attributes:
        seconds: For all.
        waiting: The parts that are still to come.
    """

    seconds: float
    waiting: list[Part]
    _began: float = field(default_factory=time.monotonic)

    def begin(self, part: Part) -> float:
        """Return the seconds that a part may take, which is the next one."""
        left = self.seconds - (time.monotonic() - self._began)
        share = part.minutes / sum(other.minutes for other in self.waiting)
        self.waiting.remove(part)
        return max(0.0, left * share)


def measure(part: Part, setting: Setting, document: Document, clock: Clock) -> None:
    """Run the tasks of a part that have no finding yet, until its time is over."""
    began, seconds = time.monotonic(), clock.begin(part)
    say(f"{part.name}: at most {seconds:.0f} s")
    rows: dict[str, Row] = {row["name"]: row for row in document.rows(part.name)}
    asked: list[str] = []

    def left() -> float:
        return began + seconds - time.monotonic()

    for task in part.tasks(setting, rows, left):
        asked.append(task.name)
        before = rows.get(task.name)
        if before is None or before["status"] not in FOUND:
            row = perform(task, left())
            say(f"{part.name}: {_line(row)}")
            rows[task.name] = _richer(before, row)
            document.put(part, list(rows.values()), took=row["seconds"])
    finished = all(rows[name]["status"] in FOUND for name in asked)
    document.put(part, list(rows.values()), finished=finished)


def _richer(before: Row | None, row: Row) -> Row:
    """Return the new row, unless it has nothing to say: it was not begun, or lost what was half found."""
    if before is None or row["status"] in FOUND or "document" in row:
        return row
    return before if "document" in before or not row["seconds"] else row


def _line(row: Row) -> str:
    found = f"{row['error_percent']:+.2f} % off, " if "error_percent" in row else ""
    why = f": {row['why']}" if row["why"] else ""
    return f"{row['name']}: {row['status']}, {found}{row['seconds']:.0f} s{why}"


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULT, help="where the result goes, and goes on from")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--parts", default=",".join(names), help=f"some of {','.join(names)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="everything in a form that takes seconds")
    parser.add_argument("--again", action="store_true", help="measure anew what the result holds already")
    parser.add_argument(
        "--work", type=Path, help="folder in which suites keep their runs; default: the cache's"
    )
    options = parser.parse_args(arguments)
    asked = options.parts.split(",")
    if unknown := set(asked) - set(names):
        parser.error(f"--parts: there is no {min(unknown)!r}; known: {', '.join(names)}")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu: 7B takes hours there; add --tiny")
    if options.minutes <= 0:
        parser.error("--minutes must be above 0")
    options.parts = [part for part in PARTS if part.name in asked]
    options.work = options.work or cache_folder() / "benchmarks" / "gpu"
    return options


def _shown(words: Sequence[str]) -> list[str]:
    """Return words of the command line without the folders of this machine."""
    return [Path(word).name if os.path.isabs(word) else word for word in words]  # noqa: PTH117 - a string


if __name__ == "__main__":
    # What is running leads a process group of its own, and has to be ended with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    main(sys.argv[1:])
