"""Kill a run with SIGKILL, resume it, and compare it with one that was left alone.

    python benchmarks/kills.py --json benchmarks/results/kills.json [-- TRAIN_OPTION...]

One run is left alone. Then 20 runs of the same recipe are killed at seeded random moments after
their first step, and 10 at seeded random operations inside a save (between or within its writes,
syncs and renames; see tests/training/kill_harness.py). Each is resumed with `scrimp train --out DIR
--resume` until it is done. The weights, the last checkpoint's tensors and the lines of
metrics.jsonl must be those of the undisturbed run; only times and measured memory may differ.

A moment is random in time, so the same seed does not stop at the same instruction; an operation
is exact. A run that had ended before its moment came is thrown away and another moment drawn.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HARNESS = Path(__file__).resolve().parents[1] / "tests" / "training" / "kill_harness.py"
DEFAULT_OPTIONS = ["--steps", "60", "--checkpoint.every", "5", "--batch", "4", "--seq", "64"]
PACKAGES = ("scrimp", "torch", "transformers", "safetensors")
TEMPORARY = (".partial-", ".old-", ".trash-")
SAYS_WHERE = re.compile("going on after|step 0|damaged")
POLL_S = 0.005
MAX_RESUMES = 3
MAX_DRAWS = 10


@dataclass(slots=True)
class Kill:
    """One run that was killed, and what became of it."""

    place: str  # "random" or "inside a save"
    at: float | int  # seconds after the first step, or the number of the operation
    steps_logged: int = 0  # when it was killed
    resume_exit_codes: list[int] = field(default_factory=list)
    resumed_from: list[str] = field(default_factory=list)  # what the run itself said
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def identical(self) -> bool:
        return self.resume_exit_codes[-1:] == [0] and not self.differences


@dataclass(slots=True)
class Reference:
    """The run that was left alone."""

    out: Path
    operations: int
    first_to_last_step_s: float


def train_command(out: Path, options: list[str]) -> list[str]:
    return [sys.executable, "-m", "scrimp", "train", *options, "--out", str(out)]


def harness_command(fatal: int, out: Path, options: list[str]) -> list[str]:
    return [sys.executable, str(HARNESS), str(fatal), "--", "train", *options, "--out", str(out)]


def run_reference(out: Path, options: list[str]) -> Reference:
    """Run undisturbed, counting the operations of its saves and timing its steps."""
    first = last = 0.0
    seen = 0
    log = out.with_suffix(".log")  # a file, for nobody would empty a pipe while the run is watched
    with log.open("w") as err, subprocess.Popen(harness_command(0, out, options), stderr=err) as process:
        while process.poll() is None:
            time.sleep(POLL_S)
            if (steps := steps_logged(out)) > seen:
                first, last, seen = first or time.monotonic(), time.monotonic(), steps
    said = log.read_text()
    if process.returncode != 0:
        raise SystemExit(f"the undisturbed run failed with exit code {process.returncode}:\n{said}")
    return Reference(out, int(said.rpartition("operations: ")[2]), last - first)


def kill_at_random(out: Path, options: list[str], seconds: float) -> bool:
    """Kill a run so many seconds after its first step; tell whether it was still running."""
    with subprocess.Popen(train_command(out, options), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not steps_logged(out):
            time.sleep(POLL_S)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return True
    if process.returncode != 0:
        raise SystemExit(f"the run failed by itself with exit code {process.returncode}")
    return False


def kill_inside_a_save(out: Path, options: list[str], operation: int) -> bool:
    """Let a run kill itself in an operation of a save; tell whether it did."""
    done = subprocess.run(harness_command(operation, out, options), stderr=subprocess.DEVNULL, check=False)
    if done.returncode not in (0, -9):
        raise SystemExit(f"the run failed by itself with exit code {done.returncode}")
    return done.returncode == -9


def resume(out: Path, kill: Kill) -> None:
    """Resume until the run is done, or has failed too often."""
    while len(kill.resume_exit_codes) < MAX_RESUMES:
        command = train_command(out, ["--resume"])
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        kill.resume_exit_codes.append(done.returncode)
        said = done.stderr.replace(f"{out.parent}/", "").splitlines()
        lines = [line.strip() for line in said if SAYS_WHERE.search(line)]
        kill.resumed_from += lines
        if done.returncode == 0:
            return
        kill.differences = [f"resuming failed: {done.stderr.strip()[-500:]}"]


def steps_logged(out: Path) -> int:
    """Count the training steps in metrics.jsonl; a last line still being written does not count."""
    try:
        whole = (out / "metrics.jsonl").read_text().rpartition("\n")[0]
    except FileNotFoundError:
        return 0
    return sum(json.loads(line).get("kind") == "train" for line in whole.splitlines())


def compare(reference: Path, out: Path) -> list[str]:
    """Name everything in which a resumed run differs from the undisturbed one."""
    differences = []
    ours, theirs = tensor_hashes(out), tensor_hashes(reference)
    if not theirs:
        differences.append("the undisturbed run has no weights")
    differences += [f"{name} differs" for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    lines, expected = comparable_metrics(out), comparable_metrics(reference)
    if len(lines) != len(expected):
        differences.append(f"metrics.jsonl has {len(lines)} lines instead of {len(expected)}")
    odd = [number for number, pair in enumerate(zip(lines, expected, strict=False), 1) if pair[0] != pair[1]]
    if odd:
        differences.append(f"metrics.jsonl differs from line {odd[0]} on: {lines[odd[0] - 1]}")
    leftovers = [path.relative_to(out) for prefix in TEMPORARY for path in out.rglob(f"{prefix}*")]
    return differences + [f"{path} was left behind" for path in leftovers]


def tensor_hashes(out: Path) -> dict[str, str]:
    """Hash the finished model and every checkpoint that was kept."""
    files = [*out.glob("model/**/*.safetensors"), *out.glob("checkpoints/step-*/*.safetensors")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def comparable_metrics(out: Path) -> list[Any]:
    """Read metrics.jsonl without times, measured memory and the folder's own name."""
    text = (out / "metrics.jsonl").read_text().replace(json.dumps(str(out))[1:-1], "OUT")
    return [without_measurements(json.loads(line)) for line in text.splitlines()]


def without_measurements(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_measurements(item) for key, item in value.items() if not is_measured(key)}
    return value


def is_measured(key: str) -> bool:
    # The prediction starts from what the process holds before the model is built, and that is measured.
    return (
        key in ("tokens_per_s", "peak_bytes", "predicted_bytes")
        or key.endswith("_s")
        or "time" in key
        or "seconds" in key
    )


def run_kill(kill: Kill, reference: Reference, out: Path, options: list[str]) -> bool:
    """Kill a run and resume it; tell whether the kill came before the run's end."""
    start = time.monotonic()
    if kill.place == "random":
        killed = kill_at_random(out, options, kill.at)
    else:
        killed = kill_inside_a_save(out, options, int(kill.at))
    if killed:
        kill.steps_logged = steps_logged(out)
        resume(out, kill)
        if kill.resume_exit_codes[-1] == 0:
            kill.differences = compare(reference.out, out)
        kill.seconds = round(time.monotonic() - start, 1)
    return killed


def draw(place: str, rng: random.Random, reference: Reference) -> Kill:
    if place == "random":
        return Kill(place, round(rng.uniform(0, reference.first_to_last_step_s), 3))
    return Kill(place, rng.randint(1, reference.operations))


def run_all(places: list[str], reference: Reference, work: Path, options: list[str], seed: int) -> list[Kill]:
    kills = []
    for index, place in enumerate(places, 1):
        rng = random.Random(f"{seed}/{place}/{index}")
        out = work / f"kill-{index}"
        for _ in range(MAX_DRAWS):
            kill = draw(place, rng, reference)
            shutil.rmtree(out, ignore_errors=True)
            if run_kill(kill, reference, out, options):
                break
        else:
            raise SystemExit(f"no run could be killed in {MAX_DRAWS} attempts")
        kills.append(kill)
        verdict = "identical" if kill.identical else "; ".join(kill.differences)
        print(f"{index}/{len(places)} {place}, {kill.at}: {verdict}", file=sys.stderr, flush=True)
        if kill.identical:
            shutil.rmtree(out)
    return kills


def surroundings() -> dict[str, Any]:
    return {
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "load": list(os.getloadavg())},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def report(kills: list[Kill], reference: Reference, options: list[str], seed: int) -> dict[str, Any]:
    return {
        "benchmark": "kills",
        "command": ["scrimp", "train", *options],
        "seed": seed,
        "operations_inside_saves": reference.operations,
        "first_to_last_step_s": round(reference.first_to_last_step_s, 3),
        "kills": len(kills),
        "identical": sum(kill.identical for kill in kills),
        "each": [asdict(kill) | {"identical": kill.identical} for kill in kills],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, default=20, help="kills at random moments")
    parser.add_argument("--placed", type=int, default=10, help="kills inside a save")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where the runs lie; those that differ are kept there")
    parser.add_argument("--json", type=Path, help="where the result goes; default: standard output")
    parser.add_argument("options", nargs="*", help="for `scrimp train`, after --")
    arguments = parser.parse_args()
    options = arguments.options or DEFAULT_OPTIONS
    work = arguments.work or Path(tempfile.mkdtemp(prefix="scrimp-kills-"))
    work.mkdir(parents=True, exist_ok=True)

    around = surroundings()  # before the work, so that the load is the neighbours'
    reference = run_reference(work / "undisturbed", options)
    places = ["random"] * arguments.random + ["inside a save"] * arguments.placed
    kills = run_all(places, reference, work, options, arguments.seed)
    result = json.dumps(report(kills, reference, options, arguments.seed) | around, indent=1)
    if arguments.json:
        arguments.json.write_text(result + "\n")
    else:
        print(result)
    if all(kill.identical for kill in kills) and not arguments.work:
        shutil.rmtree(work)
    raise SystemExit(0 if all(kill.identical for kill in kills) else 1)


if __name__ == "__main__":
    main()
