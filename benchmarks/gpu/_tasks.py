"""Tasks: processes of their own with a time limit each, and what became of them as rows.

A task prints what it found as the last line of its standard output, in JSON. Whatever else becomes of it is a
row too, with its sentence: memory that ran out, an error, a limit that passed. A task leads a process group,
and whatever is left of that is killed at its end: nothing of it keeps the card. All of this lies within the
limit, so that a task that is not done has to end a little sooner.

Rows are plain data: `name`, `status` (`STATUSES`), `why`, `seconds`, and what the task found.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from scrimp.base.platform import SHORT_WAIT
from scrimp.bench.machine import clean_env

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
Expect = Callable[..., None]
STATUSES = ("done", "out of memory", "failed", "late")
FOUND = ("done", "out of memory")  # findings; a rerun tries the others again
GRACE_S = 12.0  # of its limit, for a task that is asked to end, so that it can save
KILL_S = 3.0  # of its limit, until the killed are gone and the card has its memory back
MOST_FOR_ENDING = 0.5  # of a short limit
POLL_S = 0.05
SAID_CHARACTERS = 3000
LEAST_S = GRACE_S + KILL_S  # a task with less time is not begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all parts are told.

    Attributes:
        device: `cuda` or `cpu`.
        tiny: Whether the tiny form is wanted, which a CPU does in seconds.
        work: Where suites keep their runs, to go on with them.
        again: Whether suites measure anew what is kept there.
    """

    device: str
    tiny: bool
    work: Path
    again: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One process.

    Attributes:
        name: Unique in its part.
        command: What to run.
        document: Where it writes what it found, again and again, in place of a last line; what is there
            counts even where the task was ended.
    """

    name: str
    command: tuple[str, ...]
    document: Path | None = None

    @property
    def folder(self) -> Path | None:
        """Where it runs, so that its own record of its command names no folder of this machine."""
        return None if self.document is None else self.document.parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of the whole.

    Attributes:
        name: On the command line.
        minutes: Its share of the 25.
        tasks: Yields its tasks; told the rows so far, which later tasks may depend on, and the seconds left.
        summary: Makes something of its rows, and holds numbers against their targets.
    """

    name: str
    minutes: float
    tasks: Callable[[Setting, Mapping[str, Row], Callable[[], float]], Iterator[Task]]
    summary: Callable[[list[Row], Expect], dict[str, Any]]


def own(module: str, name: str, spec: Mapping[str, Any]) -> Task:
    """Return a task that runs a module of this folder as a program."""
    script = Path(__file__).with_name(f"{module}.py")
    return Task(name=name, command=(sys.executable, str(script), json.dumps(spec)))


def bench(setting: Setting, name: str, words: list[str]) -> Task:
    """Return a task that runs `scrimp bench`; a suite that was ended goes on where it stopped."""
    folder, out = setting.work / ("tiny" if setting.tiny else setting.device), name.replace(" ", "-")
    command = (sys.executable, "-m", "scrimp", "bench", *words, "--device", setting.device, "--out", out)
    again = ("--again",) if setting.again else ()
    return Task(name=name, command=(*command, *again, "--json"), document=folder / out / "bench.json")


def perform(task: Task, limit: float) -> Row:
    """Run a task to its end, or until its limit in seconds has passed, and return its row."""
    if limit < LEAST_S:
        return {"name": task.name, "status": "late", "why": "no time was left to begin it", "seconds": 0.0}
    began, began_at = time.monotonic(), time.time()
    share = min(1.0, MOST_FOR_ENDING * limit / (GRACE_S + KILL_S))
    grace, kill = share * GRACE_S, share * KILL_S
    if task.folder is not None:
        task.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        process = subprocess.Popen(
            task.command,
            cwd=task.folder,
            env=clean_env(SHORT_WAIT),
            stdout=out,
            stderr=error,
            start_new_session=True,
        )
        late = False
        try:
            process.wait(limit - grace - kill)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _end(process, grace, kill)
        row = {"name": task.name, **_read(process, out, error, found=task.document is not None)}
    if task.document is not None and task.document.is_file() and task.document.stat().st_mtime >= began_at:
        row["document"] = json.loads(task.document.read_text(encoding="utf-8"))
    if late and row["status"] == "failed":
        row |= {"status": "late", "why": f"it was ended: its {limit:.0f} s did not suffice"}
    return {**row, "seconds": round(time.monotonic() - began, 2)}


def _end(process: subprocess.Popen[bytes], grace: float, kill: float) -> None:
    """Ask a process to end, and after so many seconds of grace kill what is left of it and of its group."""
    if process.poll() is None:
        process.terminate()  # it alone: a suite whose runs were ended behind its back would call them failed
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    until = time.monotonic() + kill
    with suppress(ProcessLookupError):  # the group is empty
        os.killpg(process.pid, signal.SIGKILL)
        while time.monotonic() < until:
            process.poll()  # the dead count until they are read
            time.sleep(POLL_S)
            os.killpg(process.pid, signal.SIGKILL)


def _read(process: subprocess.Popen[bytes], out: IO[bytes], error: IO[bytes], *, found: bool) -> Row:
    """Return how a process ended, with what it printed unless that was `found` elsewhere."""
    said = _text(error)
    last = _text(out).strip().splitlines()[-1:] or [""]
    if process.returncode == 0 and (found or last[0].startswith("{")):
        printed: Row = {} if found else json.loads(last[0])
        return {"status": "done", "why": "", **printed}
    lines = [line for line in said.splitlines() if line.strip()] or ["it ended without a word"]
    why = f"exit code {process.returncode}: {lines[-1].strip()[:300]}"
    return {"status": "failed", "why": why, "said": said[-SAID_CHARACTERS:]}


def _text(file: IO[bytes]) -> str:
    """Read a file of a process without the folders of this machine."""
    file.seek(0)
    text = file.read().decode(errors="replace")
    return text.replace(f"{ROOT}/", "").replace(f"{sys.prefix}/", "")


def answer(work: Callable[[dict[str, Any]], Row]) -> None:
    """Be a task's process: do the work that the command line specifies, and print its row."""
    from scrimp.base.platform import passive_openmp

    with passive_openmp():
        import torch

    from scrimp.base.errors import ScrimpError

    try:
        row = work(json.loads(sys.argv[1]))
    except (torch.OutOfMemoryError, MemoryError) as error:
        row = {"status": "out of memory", "why": str(error).partition("\n")[0][:600]}
    except ScrimpError as error:
        row = {"status": "failed", "why": str(error)}
    print(json.dumps(row), flush=True)
