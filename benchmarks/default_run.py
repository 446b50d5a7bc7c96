"""The default run, as a stranger starts it: `scrimp train` and nothing else, as a whole process.

    python benchmarks/default_run.py

Wall seconds from the start of the process to its end and to its first step, the final bits per byte,
and the peak of resident memory as the kernel counted it. The first run finds no token file and
tokenises; the later ones find one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from _common import Watched, say, scrimp_command, spread, start

COLUMNS = ("seconds", "first_step_seconds", "bits_per_byte", "peak_bytes")


def main() -> None:
    benchmark = start("default_run", __doc__, _options)
    with tempfile.TemporaryDirectory(prefix="scrimp-default-") as work:
        runs = [
            _run(Path(work), number, benchmark.arguments.options)
            for number in range(benchmark.arguments.runs)
        ]
    found = {name: spread([run[name] for run in runs]) for name in COLUMNS if runs[0][name] is not None}
    benchmark.expect("seconds, the slowest run", found["seconds"]["highest"], below=90)
    benchmark.expect(
        "seconds to the first step, the slowest", found["first_step_seconds"]["highest"], below=15
    )
    benchmark.expect("bits per byte, the worst", found["bits_per_byte"]["highest"], below=3.0)
    benchmark.write({**found, "each": runs})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("options", nargs="*", help="for `scrimp train`, after --; the default run has none")


def _run(work: Path, number: int, options: list[str]) -> dict[str, Any]:
    """Do one run, with a cache of tokens that the first one finds empty."""
    out = work / f"run-{number}"
    command = scrimp_command("train", *options, "--cache", work / "cache", "--out", out)
    with Watched(command, cwd=work) as process:
        first_step = process.first_line(out / "metrics.jsonl")
        seconds, peak = process.end()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    end = rows[-1]
    found = {
        "tokens_cached": number > 0,
        "seconds": round(seconds, 2),
        "first_step_seconds": round(first_step, 2),
        "steps": end["step"],
        "bits_per_byte": end["bits_per_byte"],
        "eval_loss": end["eval_loss"],
        "peak_bytes": peak,
        "peak_bytes_by_scrimp": end["peak_bytes"],
        "predicted_bytes": end["predicted_bytes"],
    }
    say(f"run {number + 1}: {found}")
    return found


if __name__ == "__main__":
    main()
