"""What it saves and what it costs that AdamW's state leaves the process between updates.

    python benchmarks/paged_state.py [--model SmolLM2-135M.gguf] [--steps 8] [--turns 3]

Full tuning in turn with `--placement device` and `--placement paged-state`, each run a process of its own,
on the source of Python's standard library: the peak of resident memory (VmHWM) beside its prediction, and the
time of a step, the median of all but the first two. Both must end in the same weights, to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from _common import ratios, run, say, scrimp_command, spread, start

PLACEMENTS = ("device", "paged-state")
WARM_UP = 2  # steps
ERROR = 0.05


def main() -> None:
    benchmark = start("paged_state", __doc__, _options)
    options = benchmark.arguments
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PLACEMENTS}
    for _ in range(options.turns):
        for name in PLACEMENTS:
            found[name].append(_train(options, name))
            say(f"{name}: {found[name][-1]}")
    peaks = {name: max(one["peak"] for one in runs) for name, runs in found.items()}
    seconds = {name: [one["seconds"] for one in runs] for name, runs in found.items()}
    hashes = {one["sha256"] for runs in found.values() for one in runs}
    benchmark.expect("different weights at the end", len(hashes) - 1, below=1)
    for name, runs in found.items():
        error = max(abs(one["predicted"] / one["peak"] - 1) for one in runs)
        benchmark.expect(f"{name}: error of the predicted peak", error, below=ERROR)
    results = {
        "model": Path(options.model).name,
        "tokens": {"batch": options.batch, "seq": options.seq, "steps": options.steps},
        "peak_bytes": peaks,
        "predicted_bytes": {name: runs[0]["predicted"] for name, runs in found.items()},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "time": ratios(seconds["paged-state"], seconds["device"]),
    }
    saved, slower = 1 - peaks["paged-state"] / peaks["device"], results["time"]["median"]
    say(f"{saved:.0%} less memory, {slower:.2f} times the time")
    benchmark.write(results)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-60m", help="a shape, a folder or a GGUF file")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)


def _train(options: argparse.Namespace, placement: str) -> dict[str, Any]:
    job = {
        "--model": options.model,
        "--seq": options.seq,
        "--batch": options.batch,
        "--micro-batch": options.batch,
        "--steps": options.steps,
        "--precision": "fp32",
        "--lr": 1e-5,
        "--memory": "1TiB",
        "--data.held-out": 0,
        "--placement": placement,
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [str(word) for pair in job.items() for word in pair]
        run(scrimp_command("train", *words, "--out", out))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [row for row in rows if row["kind"] == "train"]
        weights = (out / "model" / "model.safetensors").read_bytes()
    speeds = [options.seq * options.batch / row["tokens_per_s"] for row in steps[WARM_UP:]]
    return {
        "peak": rows[-1]["peak_bytes"],
        "predicted": rows[-1]["predicted_bytes"],
        "seconds": statistics.median(speeds),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }


if __name__ == "__main__":
    main()
