"""What every benchmark shares: runs in turn, each in its own process, and a record of the machine.

Compared sides run in turn (A B A B …) and are compared within a pair, so that a machine that slows
down slows both. The JSON of a result says on what, under which load and by which command it was made;
`busy` marks one whose timings are not to be trusted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from scrimp.bench.machine import LoadWatch, clean_env, environment, settle

RESULTS = Path(__file__).resolve().parent / "results"
POLL_S = 0.002


@dataclass(slots=True)
class Benchmark:
    """One benchmark: its arguments, what it found, and the machine around it.

    Attributes:
        name: Of the script, and of the file of results.
        arguments: As parsed.
        targets: What the project promises, beside what was found.
    """

    name: str
    arguments: argparse.Namespace
    targets: list[dict[str, Any]] = field(default_factory=list)
    _load: LoadWatch = field(default_factory=LoadWatch)

    def begin(self) -> None:
        """Wait for the load to settle, as long as `--settle` allows, and note it."""
        settle(self.arguments.settle)
        self._load = LoadWatch()

    def expect(
        self, what: str, value: float, *, at_least: float | None = None, below: float | None = None
    ) -> None:
        """Hold a number against its target, and say how it stands."""
        met = (at_least is None or value >= at_least) and (below is None or value < below)
        target = {"at_least": at_least} if at_least is not None else {"below": below}
        self.targets.append({"what": what, "value": round(value, 4), **target, "met": met})
        wanted = " ".join(f"{name.replace('_', ' ')} {limit:g}" for name, limit in target.items())
        say(f"{'met   ' if met else 'MISSED'} {what}: {value:.3f} ({wanted})")

    def write(self, results: dict[str, Any]) -> None:
        """Write the results, with the machine and the load, as JSON."""
        seconds = self._load.seconds
        load, busy = self._load.end()
        document = {
            "benchmark": self.name,
            "command": command_line(),
            "busy": busy,
            "environment": environment(),
            "load": load,
            "seconds": round(seconds, 1),
            "targets": self.targets,
            "results": results,
        }
        path: Path = self.arguments.json
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        say(f"{'BUSY MACHINE, not to be trusted: ' if busy else ''}{path}, after {seconds:.0f} s")


def start(name: str, description: str | None, add: Callable[[argparse.ArgumentParser], None]) -> Benchmark:
    """Read the command line, with what every benchmark takes, and begin."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    add(parser)
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json", help="where the result goes")
    parser.add_argument(
        "--settle", type=float, default=120, help="wait at most so many seconds for the load to fall"
    )
    benchmark = Benchmark(name, parser.parse_args())
    benchmark.begin()
    return benchmark


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def command_line() -> list[str]:
    """Return the command that was given, without the folders of this machine."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    return ["python", *(Path(word).name if Path(word).is_absolute() else word for word in words)]


def run(command: Sequence[str | Path], *, env: dict[str, str] | None = None) -> str:
    """Run a process of its own to its end and return what it printed.

    Args:
        command: The program and its arguments.
        env: Added to the environment, of which the OpenMP settings are not passed on.
    """
    done = subprocess.run(command, env=clean_env(env), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed ({done.returncode}):\n{done.stderr[-4000:]}")
    return done.stdout


def run_json(command: Sequence[str | Path], *, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a process and read its last line of output as JSON."""
    result: dict[str, Any] = json.loads(run(command, env=env).splitlines()[-1])
    return result


def scrimp_command(*words: str | Path) -> list[str]:
    """Return a command line of the `scrimp` that belongs to this Python."""
    installed = Path(sys.executable).with_name("scrimp.exe" if sys.platform == "win32" else "scrimp")
    program = [str(installed)] if installed.exists() else [sys.executable, "-m", "scrimp"]
    return [*program, *map(str, words)]


class Watched:
    """A process that is timed from outside, and killed where the context is left before its end.

    Args:
        command: The program and its arguments.
        env: Added to the environment, as in `run`.
        cwd: Where it runs; None is here.
    """

    def __init__(
        self, command: Sequence[str], *, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        # A pipe would fill up: nobody reads while it runs.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            command, env=clean_env(env), cwd=cwd, stdout=subprocess.DEVNULL, stderr=self._said
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._said.close()

    def first_line(self, path: Path) -> float:
        """Wait until it has written a whole line into a file, and return the seconds since its start."""
        while self._process.poll() is None:
            if path.is_file() and b"\n" in path.read_bytes()[:4096]:
                return time.perf_counter() - self._began
            time.sleep(POLL_S)
        raise SystemExit(f"{self._process.args!r} ended before its first step:\n{self._read()}")

    def end(self) -> tuple[float, int | None]:
        """Wait for its end, and return the seconds since its start and its peak of resident bytes."""
        peak = None
        if hasattr(os, "wait4"):
            _, status, usage = os.wait4(self._process.pid, 0)
            self._process.returncode = os.waitstatus_to_exitcode(status)
            peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        seconds, code = time.perf_counter() - self._began, self._process.wait()
        if code != 0:
            raise SystemExit(f"{self._process.args!r} failed ({code}):\n{self._read()}")
        return seconds, peak

    def _read(self) -> str:
        self._said.seek(0)
        return self._said.read().decode(errors="replace")[-4000:]


def spread(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Return the median of some numbers, and how far they lie apart."""
    return {
        "median": round(statistics.median(values), digits),
        "lowest": round(min(values), digits),
        "highest": round(max(values), digits),
        "all": [round(value, digits) for value in values],
    }


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Return the spread of ours / theirs within each pair."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])
