"""How long `scrimp --help` and `import scrimp` take, and how many packages an installation has.

    python benchmarks/startup.py

Wall time of whole processes, in turn. Packages are counted from the metadata of what is installed:
scrimp and, from one to the next, everything it requires on this system without an extra.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.metadata import distribution

from _common import run, say, scrimp_command, spread, start
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

COMMANDS = {
    "scrimp --help": scrimp_command("--help"),
    "import scrimp": [sys.executable, "-c", "import scrimp"],
    "an empty program": [sys.executable, "-c", ""],
}


def main() -> None:
    benchmark = start("startup", __doc__, _options)
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        run(command)  # the first one reads the files from the disk
    for _ in range(benchmark.arguments.runs):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            run(command)
            seconds[name].append(time.perf_counter() - began)
    found = {name: spread(values) for name, values in seconds.items()}
    packages = sorted(installed_with("scrimp"))
    say(f"{len(packages)} packages: {', '.join(packages)}")
    benchmark.expect("scrimp --help: seconds", found["scrimp --help"]["median"], below=0.5)
    benchmark.expect("import scrimp: seconds", found["import scrimp"]["median"], below=1.5)
    benchmark.expect("packages", len(packages), below=46)
    benchmark.write({"seconds": found, "packages": packages})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=7)


def installed_with(name: str) -> set[str]:
    """Return a package and all that it requires, with the extras that its requirements ask for."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(name, "")]
    while waiting:
        package, extra = waiting.pop()
        if (package, extra) in seen:
            continue
        seen.add((package, extra))
        found.add(package)
        for line in distribution(package).requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                target = canonicalize_name(needed.name)
                waiting += [(target, wanted) for wanted in ("", *needed.extras)]
    return found


if __name__ == "__main__":
    main()
