"""Budgets drawn at random: does the planner keep what it says?

    python benchmarks/memory_budgets.py

For shapes, sequences, batches and budgets drawn at random, `scrimp train --memory BUDGET --strict` plans and
runs. What the planner says fits must run inside the budget, by the resident memory of the whole process
(`--strict` ends it otherwise); and with a budget 10 % below its prediction the planner must choose otherwise
or refuse. Draws that it refuses at once are drawn again, and counted.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from _common import clean_env, say, scrimp_command, start
from memory_resident import train

SHAPES = ("llama-9m", "llama-20m", "llama-35m")
SMALLEST, LARGEST = 29.0, 31.0  # powers of two, in bytes


def main() -> None:
    benchmark = start("memory_budgets", __doc__, _options)
    given = benchmark.arguments
    with tempfile.TemporaryDirectory() as folder:
        rows, refused = honesty(Path(folder), given.budgets, given.steps)
    kept = sum(row["kept"] for row in rows)
    changed = sum(row["less_is_otherwise"] for row in rows)
    benchmark.expect(f"random budgets of {len(rows)} that were kept", kept, at_least=len(rows))
    benchmark.expect(
        f"random budgets of {len(rows)}: 10 % less is chosen otherwise", changed, at_least=len(rows)
    )
    benchmark.write({"budgets": rows, "refused": refused})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budgets", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2)


def honesty(work: Path, budgets: int, steps: int) -> tuple[list[dict[str, Any]], int]:
    """Draw budgets, and hold the planner to what it says."""
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    refused = 0
    while len(rows) < budgets:
        words = ["--model", draw.choice(SHAPES), "--seq", str(draw.choice([128, 256, 512]))]
        words += ["--batch", str(draw.choice([2, 4, 8])), "--precision", draw.choice(["fp32", "bf16-mixed"])]
        budget = round(2 ** draw.uniform(SMALLEST, LARGEST)) >> 20
        done = train([*words, "--memory", f"{budget}MiB", "--strict"], work / "honest", steps)
        if "nothing fits" in done.stderr:
            refused += 1  # and there is nothing to hold it to
            continue
        row = {"run": " ".join(words), "budget": budget << 20, "kept": done.returncode == 0}
        if row["kept"]:
            found = json.loads(done.stdout)
            row |= {"predicted": found["predicted_bytes"], "measured": found["peak_bytes"]}
            row["kept"] = found["peak_bytes"] <= budget << 20
            row["less_is_otherwise"] = less_is_otherwise(words, found)
        else:
            row |= {"said": done.stderr.strip().splitlines()[-1][:300], "less_is_otherwise": False}
        rows.append(row)
        say(f"{row['run']} in {budget} MiB: {'kept' if row['kept'] else row}")
    return rows, refused


def less_is_otherwise(words: list[str], found: dict[str, Any]) -> bool:
    """Tell whether 10 % less than was predicted makes the planner choose another recipe, or none."""
    less = int(found["predicted_bytes"] * 0.9) >> 20
    command = scrimp_command("train", *words, "--memory", f"{less}MiB", "--steps", "4", "--dry-run", "--json")
    done = subprocess.run(command, env=clean_env(), capture_output=True, text=True, check=False)
    if done.returncode == 2 and "nothing fits" in done.stderr:
        return True
    recipe = json.loads(done.stdout)["recipe"]
    chosen = ("activations.name", "activations.loss", "precision", "micro_batch")
    return any(recipe[name] != found["recipe"][name] for name in chosen)


if __name__ == "__main__":
    main()
