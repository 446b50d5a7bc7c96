"""What OpenMP's threads do while they wait: tokens/s of the default model, alone and beside a busy program.

    python benchmarks/openmp_wait.py

Between two parallel regions an OpenMP thread either sleeps (passive) or spins (active). GNU's OpenMP,
which torch brings on Linux, spins for about a millisecond where nothing is set, then sleeps (default).
scrimp asks for the passive wait. This measures what that costs on a machine that is otherwise idle, and
what it saves beside one busy single-threaded program. All cases run in turn.
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

SIDES = Path(__file__).with_name("_sides.py")
WAITS = {
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "default": {"GOMP_SPINCOUNT": "300000"},  # GNU's own default, said aloud so that scrimp leaves it
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
}
SKIP = 3


def main() -> None:
    benchmark = start("openmp_wait", __doc__, _options)
    options = benchmark.arguments
    speeds: dict[str, dict[str, list[float]]] = {place: {wait: [] for wait in WAITS} for place in PLACES}
    with tempfile.TemporaryDirectory(prefix="scrimp-openmp-") as work:
        spec = Spec(
            model="llama-1m",
            batch=8,
            seq=128,
            steps=options.steps,
            seconds=options.seconds,
            lr=1e-3,
            threads=options.threads,
            work=work,
        )
        path = spec.write(Path(work) / "spec.json")
        run_json([sys.executable, SIDES, "prepare", path])
        for turn in range(options.pairs):
            for place, around in PLACES.items():
                for wait, env in WAITS.items():
                    with around():
                        found = run_json([sys.executable, SIDES, "ours", path], env=env)
                    speeds[place][wait].append(_tokens_per_s(spec, found["ends"]))
                said = ", ".join(f"{wait} {values[-1]:,.0f}" for wait, values in speeds[place].items())
                say(f"turn {turn + 1}, {place}: tokens/s {said}")
    benchmark.write(
        {
            "settings": {"pairs": options.pairs, "threads": options.threads, "model": "llama-1m 8x128"},
            "tokens_per_s": {
                place: {wait: spread(values, 1) for wait, values in by_wait.items()}
                for place, by_wait in speeds.items()
            },
            "passive_over": {
                place: {wait: ratios(by_wait["passive"], by_wait[wait]) for wait in ("default", "active")}
                for place, by_wait in speeds.items()
            },
        }
    )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=3, help="turns through all cases")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=8, help="of steps, where that is sooner")
    parser.add_argument("--threads", type=int, default=2)


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
