"""The resident memory of whole runs against what was predicted, and runs under a hard limit.

    python benchmarks/memory_resident.py

Each run is a process of its own: `scrimp train` on Python's own sources, with evaluations and checkpoints.

- Prediction: the predicted peak of the process against the kernel's high-water mark (VmHWM).
- Limit: the same under `RLIMIT_DATA`. When the model is built and the first step is next, the limit is set
  to what the process has then, without the model, plus the predicted tensors times a factor, plus 16 MB. With
  1.05 the run must finish, with 0.9 it must end in one sentence and exit code 2.

The error of the measure itself: the high-water mark counts whole pages of everything resident, mapped files
too, and is read to the page. What tensors alone need is in `memory_accuracy.py`, against the allocator.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import clean_env, say, scrimp_command, spread, start

SLACK = 16 * 10**6  # bytes that a limit allows besides
GROUND = 300 * 10**6  # bytes of tensors from which on the error is promised
RUNS: tuple[tuple[str, ...], ...] = (
    ("--model", "llama-1m"),
    ("--model", "llama-9m", "--seq", "256", "--batch", "8"),
    ("--model", "llama-20m", "--seq", "512", "--batch", "4"),
    ("--model", "llama-35m", "--seq", "256", "--batch", "8", "--micro-batch", "8"),
    ("--model", "llama-35m", "--seq", "256", "--batch", "8", "--micro-batch", "2"),
    ("--model", "llama-35m", "--seq", "256", "--batch", "8", "--activations.loss", "chunked"),
    ("--model", "llama-60m", "--seq", "256", "--batch", "8", "--micro-batch", "8"),
    ("--model", "llama-60m", "--seq", "512", "--batch", "4", "--activations.name", "recompute"),
    ("--model", "llama-60m", "--seq", "256", "--batch", "4", "--precision", "bf16-mixed"),
    ("--model", "llama-60m", "--seq", "256", "--batch", "4", "--precision", "bf16"),
)
LIMITED = (RUNS[2], RUNS[3], RUNS[5])
USUAL = ("--evaluation.tokens", "1024", "--checkpoint.keep", "1")


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--limited":
        limited(float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
        return
    benchmark = start("memory_resident", __doc__, _options)
    given = benchmark.arguments
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        predictions = [predicted_and_measured(words, work, given.steps) for words in RUNS[: given.runs]]
        limits = [under_a_limit(words, work, given.steps) for words in LIMITED[: given.limits]]
    promised = [row for row in predictions if row["predicted_tensors"] >= GROUND]
    errors = [row["error"] for row in promised]
    if errors:
        benchmark.expect(
            "resident memory: worst excess over the prediction, tensors above 300 MB", max(errors), below=0.04
        )
    if limits:
        finished = sum(row["at_1.05"] == "finished" for row in limits) / len(limits)
        refused = sum(row["at_0.9"] == "one sentence, exit code 2" for row in limits) / len(limits)
        benchmark.expect("runs under RLIMIT_DATA at 1.05 that finish, share", finished, at_least=1)
        benchmark.expect(
            "runs under RLIMIT_DATA at 0.9 that end in a clear error, share", refused, at_least=1
        )
    benchmark.write(
        {
            "errors": spread([row["error"] for row in predictions]),
            "runs": predictions,
            "limits": limits,
        }
    )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--runs", type=int, default=len(RUNS))
    parser.add_argument("--limits", type=int, default=len(LIMITED))


def predicted_and_measured(words: tuple[str, ...], work: Path, steps: int) -> dict[str, Any]:
    """Run a recipe and return both peaks; the error is measured / predicted - 1."""
    out = work / "run"
    done = train([*words, "--memory", "20GiB", *plain(words)], out, steps)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads(done.stdout)
    ledgers = json.loads((out / "memory.json").read_text(encoding="utf-8"))
    peak = max(ledgers["predicted"]["moments"], key=lambda moment: moment["total"])
    row = {
        "run": " ".join(words),
        "predicted": found["predicted_bytes"],
        "measured": found["peak_bytes"],
        "predicted_tensors": peak["total"] - peak["terms"]["fixed"],
        "at": peak["name"],
        "error": found["peak_bytes"] / found["predicted_bytes"] - 1,
    }
    sizes = f"{row['measured'] / 1e6:.0f} MB, predicted {row['predicted'] / 1e6:.0f}"
    say(f"{row['run']}: {sizes}, {row['error']:+.2%}")
    return row


def plain(words: tuple[str, ...]) -> list[str]:
    """Return the options that leave the planner nothing to choose, so that a run is what its words say."""
    usual = {"--activations.name": "everything", "--activations.loss": "logits", "--precision": "fp32"}
    return [word for name, value in usual.items() if name not in words for word in (name, value)]


def train(words: list[str], out: Path, steps: int) -> subprocess.CompletedProcess[str]:
    """Run `scrimp train` anew in a folder."""
    command = scrimp_command(
        "train", *words, *USUAL, "--steps", str(steps), "--out", out, "--overwrite", "--json"
    )
    return subprocess.run(command, env=clean_env(), capture_output=True, text=True, check=False)


def under_a_limit(words: tuple[str, ...], work: Path, steps: int) -> dict[str, Any]:
    """Run a recipe under both limits, and say how each ended."""
    row: dict[str, Any] = {"run": " ".join(words)}
    for factor in (1.05, 0.9):
        command = [sys.executable, __file__, "--limited", str(factor), str(work / "limited"), str(steps)]
        done = subprocess.run(
            [*command, *words, *plain(words)], env=clean_env(), capture_output=True, text=True, check=False
        )
        said = done.stderr.strip().splitlines()[-1:] or [""]
        if done.returncode == 0:
            row[f"at_{factor}"] = "finished"
        elif done.returncode == 2 and "Traceback" not in done.stderr and "ran out" in said[0]:
            row[f"at_{factor}"] = "one sentence, exit code 2"
        else:
            row[f"at_{factor}"] = f"exit code {done.returncode}: {said[0][:200]}"
        say(f"{row['run']} at {factor}: {row[f'at_{factor}']}")
    return row


def limited(factor: float, out: Path, words: list[str]) -> None:
    """Be `scrimp train` under a limit that is set when the first step is next."""
    from scrimp.cli import main as scrimp
    from scrimp.report.lines import LineReporter

    # A limit tells a run from its beginning that what is freed must go back to the system.
    resource.setrlimit(resource.RLIMIT_DATA, (2**46, resource.RLIM_INFINITY))
    begin = LineReporter.plan

    def plan(self: Any, job: Any) -> None:
        begin(self, job)
        terms = job.ledger.peak.terms
        tensors = sum(terms.values()) - terms["fixed"]
        allowed = int(factor * tensors) + SLACK - terms["weights"]
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + allowed, resource.RLIM_INFINITY))

    LineReporter.plan = plan  # type: ignore[method-assign]
    steps, *rest = words
    sys.argv = ["scrimp", "train", *rest, *USUAL, "--steps", steps, "--out", str(out), "--overwrite"]
    scrimp()


def _data_bytes() -> int:
    """Return what `RLIMIT_DATA` counts now."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


if __name__ == "__main__":
    main()
