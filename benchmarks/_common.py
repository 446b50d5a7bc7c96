"""What every benchmark shares: runs in turn, each in its own process, and a record of the machine.

Compared sides run in turn (A B A B …) and are compared within a pair, so that a machine that slows
down slows both. The JSON of a result says on what, under which load and by which command it was made;
`busy` marks one whose timings are not to be trusted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import psutil

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("scrimp", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")
OPENMP_SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
BUSY_LOAD_PER_CORE = 0.5
BUSY_OTHERS_SHARE = 0.05  # of all cores' time, by processes that are not ours
POLL_S = 0.002

CORES = psutil.cpu_count() or 1


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
    _load_before: tuple[float, float, float] = (0.0, 0.0, 0.0)
    _cpu_before: tuple[float, float] = (0.0, 0.0)
    _began: float = 0.0

    def begin(self) -> None:
        """Wait for the load to settle, as long as `--settle` allows, and note it."""
        until = time.monotonic() + self.arguments.settle
        while os.getloadavg()[0] / CORES > BUSY_LOAD_PER_CORE and time.monotonic() < until:
            time.sleep(1)
        self._load_before, self._cpu_before = os.getloadavg(), _cpu_seconds()
        self._began = time.monotonic()

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
        seconds = time.monotonic() - self._began
        machine, own = (
            after - before for after, before in zip(_cpu_seconds(), self._cpu_before, strict=True)
        )
        others = max(0.0, machine - own) / (seconds * CORES)
        busy = self._load_before[0] / CORES > BUSY_LOAD_PER_CORE or others > BUSY_OTHERS_SHARE
        document = {
            "benchmark": self.name,
            "command": command_line(),
            "busy": busy,
            "environment": environment(),
            "load": {
                "before": self._load_before,
                "after": os.getloadavg(),
                "others_share_of_cpu": round(others, 3),
            },
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


def environment() -> dict[str, Any]:
    """Return what the numbers depend on besides the code."""
    return {
        "device": "cpu",
        "cpu": cpu_model(),
        "cores": CORES,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), **dict(filter(None, map(_version, PACKAGES)))},
        "openmp": {name: os.environ[name] for name in OPENMP_SETTINGS if name in os.environ},
    }


def _version(package: str) -> tuple[str, str] | None:
    try:
        return package, version(package)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def command_line() -> list[str]:
    """Return the command that was given, without the folders of this machine."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    return ["python", *(Path(word).name if Path(word).is_absolute() else word for word in words)]


def _cpu_seconds() -> tuple[float, float]:
    """Return the CPU seconds of the machine and of this process with its finished children."""
    busy, own = psutil.cpu_times(), os.times()
    return (
        busy.user + busy.system + busy.nice,
        own.user + own.system + own.children_user + own.children_system,
    )


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


def clean_env(added: dict[str, str] | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in OPENMP_SETTINGS}
    return {**kept, **(added or {})}


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
