"""What OpenMP's threads do while they wait: tokens/s of the default model, alone and beside a busy program.

    python benchmarks/openmp_wait.py

Between two parallel regions an OpenMP thread either sleeps (passive) or spins (active). GNU's OpenMP,
which torch brings on Linux, spins 300,000 times where nothing is set, some milliseconds, and then sleeps
(default); `short`, which scrimp asks for, is a hundredth of that. This measures what it costs on a
machine that is otherwise idle, and what it saves beside one busy single-threaded program. One thread,
which waits for nobody, is the yardstick. All cases run in turn.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _common import ratios, run_json, say, spread, start
from _sides import Spec

from scrimp.base.platform import SHORT_WAIT

SIDES = Path(__file__).with_name("_sides.py")
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
CASES = {
    "one thread": (1, PASSIVE),
    "passive": (2, PASSIVE),
    "short": (2, SHORT_WAIT),  # what scrimp asks for
    "default": (2, {"GOMP_SPINCOUNT": "300000"}),  # said aloud, so that scrimp leaves it
    "active": (2, {"OMP_WAIT_POLICY": "ACTIVE"}),
}
SKIP = 3


def main() -> None:
    benchmark = start("openmp_wait", __doc__, _options)
    options = benchmark.arguments
    speeds: dict[str, dict[str, list[float]]] = {place: {case: [] for case in CASES} for place in PLACES}
    with tempfile.TemporaryDirectory(prefix="scrimp-openmp-") as work:
        spec = _spec(options, work, threads=2)
        run_json([sys.executable, SIDES, "prepare", spec.write(Path(work) / "spec.json")])
        for turn in range(options.pairs):
            for place, around in PLACES.items():
                for case, (threads, env) in CASES.items():
                    path = _spec(options, work, threads=threads).write(Path(work) / "spec.json")
                    with around():
                        found = run_json([sys.executable, SIDES, "ours", path], env=env)
                    speeds[place][case].append(_tokens_per_s(spec, found["ends"]))
                said = ", ".join(f"{case} {values[-1]:,.0f}" for case, values in speeds[place].items())
                say(f"turn {turn + 1}, {place}: tokens/s {said}")
    benchmark.write(
        {
            "settings": {"pairs": options.pairs, "model": "llama-1m 8x128", "threads": 2},
            "tokens_per_s": {
                place: {case: spread(values, 1) for case, values in by_case.items()}
                for place, by_case in speeds.items()
            },
            "short_over": {
                place: {
                    case: ratios(by_case["short"], values)
                    for case, values in by_case.items()
                    if case != "short"
                }
                for place, by_case in speeds.items()
            },
        }
    )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=3, help="turns through all cases")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=5, help="of steps, where that is sooner")


def _spec(options: argparse.Namespace, work: str, *, threads: int) -> Spec:
    return Spec(
        model="llama-1m",
        batch=8,
        seq=128,
        steps=options.steps,
        seconds=options.seconds,
        lr=1e-3,
        threads=threads,
        work=work,
    )


def _tokens_per_s(spec: Spec, ends: list[float]) -> float:
    skip = min(SKIP, len(ends) // 2)
    return spec.batch * spec.seq * (len(ends) - skip) / (ends[-1] - ends[skip - 1])


@contextmanager
def _alone() -> Iterator[None]:
    yield


@contextmanager
def _beside_a_spinner() -> Iterator[None]:
    """Keep one core busy with a program of its own."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as spinner:
        try:
            yield
        finally:
            spinner.kill()


PLACES: dict[str, Any] = {"alone": _alone, "beside one busy program": _beside_a_spinner}

if __name__ == "__main__":
    main()
