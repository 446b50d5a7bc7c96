"""Four adapters trained together over one base, against four runs of their own.

    python benchmarks/together.py --model SmolLM2-135M.gguf      about 3 minutes on two cores

Four LoRAs of ranks 8, 16, 16 and 32 on every linear layer, each with its own part of a text (Python's own
language reference), order of rows and AdamW; fp32. A turn is one optimizer step of each. The sides take their
turns one after the other over the same base in memory:

    together      `scrimp together`: the rows of all four in one pass
    in turn       the steps that `scrimp train` takes, one job after the other, on all cores
    two at once   the same by two processes with half the cores each, two jobs in each, both in memory

Starting processes and reading the model is left out, so a real comparison is kinder to `together`. A case is
rows x tokens of a job's batch, packed rows of one length, so that no side pads. The gain is that of small
batches: where one job's rows already fill the machine's arithmetic there is nothing to share but memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import ratios, run_json, say, spread, start

from scrimp.base.platform import SHORT_WAIT

RANKS = (8, 16, 16, 32)
CASES = ("1x8", "1x16", "1x32", "1x64", "4x128")
PROMISED = "1x16"
TIMES = 1.5


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in ("--worker", "--half"):
        settings = json.loads(sys.argv[2])
        if sys.argv[1] == "--half":
            serve(**settings)
        else:
            print(json.dumps(measure(**settings)))
        return
    benchmark = start("together", __doc__, _options)
    given = benchmark.arguments
    cases = {}
    for case in given.cases:
        rows, seq = map(int, case.split("x"))
        settings = {"model": str(given.model), "rows": rows, "seq": seq, "weights": given.weights}
        settings |= {"turns": given.turns, "threads": given.threads or os.cpu_count()}
        found = run_json([sys.executable, __file__, "--worker", json.dumps(settings)], env=SHORT_WAIT)
        cases[case] = compare(found)
        for side in ("in turn", "two at once"):
            what = f"{case}: times the tokens a second of four runs, {side}"
            value = cases[case]["times"][side]["median"]
            if case == PROMISED and side == "in turn":
                benchmark.expect(what, value, at_least=TIMES)
            else:
                say(f"{what}: {value:.2f}")
    benchmark.write({"model": given.model.name, "weights": given.weights, "ranks": RANKS, "cases": cases})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M: a GGUF file or a folder")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="rows x tokens of a job's batch")
    parser.add_argument("--weights", default="dense", help="how the base is stored")
    parser.add_argument("--turns", type=int, default=9, help="timed steps of every side")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 takes all")


def compare(found: dict[str, Any]) -> dict[str, Any]:
    """Return what a worker found, with tokens a second and how many times the others' ours is."""
    seconds, tokens = found.pop("seconds"), found["tokens"]
    ours = seconds["together"]
    return found | {
        "seconds": {side: spread(values) for side, values in seconds.items()},
        "tokens_per_s": {side: round(tokens / spread(values)["median"]) for side, values in seconds.items()},
        "times": {side: ratios(values, ours) for side, values in seconds.items() if side != "together"},
    }


# ---- in processes of their own -----------------------------------------------------------------------


def measure(*, model: str, rows: int, seq: int, weights: str, turns: int, threads: int) -> dict[str, Any]:
    """Return the seconds of a step of all four jobs on every side, in turn."""
    import torch

    from scrimp.training.shared_loop import Together

    half = {"model": model, "rows": rows, "seq": seq, "weights": weights, "threads": max(1, threads // 2)}
    with tempfile.TemporaryDirectory() as folder:
        halves = [_start_half({**half, "numbers": numbers}) for numbers in ([0, 1], [2, 3])]
        base, shared, loops = made(Path(folder), model, rows, seq, weights, [0, 1, 2, 3])
        torch.set_num_threads(threads)
        together = Together.over(
            base,
            shared,
            tokens=4 * rows * seq,
            rounds=10**6,
            reporter=shared[0].reporter,
            stopper=shared[0].stopper,
        )
        sides = {
            "together": together.run_round,
            "in turn": lambda: step_each(loops),
            "two at once": lambda: _both(halves),
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(turns + 2):
            for side in list(sides)[:: 1 if turn % 2 else -1]:
                began = time.perf_counter()
                sides[side]()
                if turn > 1:
                    seconds[side].append(time.perf_counter() - began)
        for each in halves:
            each.stdin.close()
            each.wait()
    return {
        "tokens": 4 * rows * seq,
        "losses": {
            "together": [loop.progress.last.loss for loop in shared],
            "in turn": [loop.progress.last.loss for loop in loops],
        },
        "seconds": seconds,
    }


def _start_half(settings: dict[str, Any]) -> Any:
    started = subprocess.Popen(
        [sys.executable, __file__, "--half", json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    started.stdout.readline()
    return started


def _both(halves: list[Any]) -> None:
    for each in halves:
        print("step", file=each.stdin, flush=True)
    for each in halves:
        each.stdout.readline()


def serve(*, numbers: list[int], model: str, rows: int, seq: int, weights: str, threads: int) -> None:
    """Take a step of some of the jobs whenever a line comes in."""
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        loops = made(Path(folder), model, rows, seq, weights, numbers)[2]
        print("ready", flush=True)
        for _ in sys.stdin:
            step_each(loops)
            print("done", flush=True)


def made(
    folder: Path, model: str, rows: int, seq: int, weights: str, numbers: list[int]
) -> tuple[Any, list[Any], list[Any]]:
    """Return a base and, over it, a loop of each job for it and another to run alone."""
    from scrimp.base.ledger import TERMS, Ledger, Moment
    from scrimp.build import Base, build, inspect, make_base, prepare
    from scrimp.memory.observer import PeakMeter
    from scrimp.training.loop import Loop
    from scrimp.training.progress import Progress
    from scrimp.training.stopping import Stopper
    from scrimp.training.watch import Watch
    from scrimp.tuning.together import share

    quiet, loops, base = Quiet(), ([], []), None
    nothing = Ledger((Moment("none", dict.fromkeys(TERMS, 0)),))  # the recipe leaves nothing to plan
    for number in numbers:
        inputs = inspect(recipe(folder, model, rows, seq, weights, number), cache=folder / "cache")
        prepared = prepare(inputs, quiet.phase)
        base = base or make_base(prepared, inputs.recipe)
        for some in loops:
            own = Base(share(base.model), base.fingerprint)
            job = build(prepared, inputs.recipe, nothing, empty=True, say=quiet.phase, over=own)
            watch = Watch(job, PeakMeter(job.device))
            loop = Loop(job=job, progress=Progress(), watch=watch, reporter=quiet, stopper=Stopper())
            loop.begin()
            some.append(loop)
    assert base is not None
    return base.model, *loops


def recipe(folder: Path, model: str, rows: int, seq: int, weights: str, number: int) -> Any:
    """Return the recipe of a job, over its own quarter of the text."""
    import pydoc_data.topics

    from scrimp.recipe import Recipe, replace

    text = folder / f"{number}.txt"
    topics = list(pydoc_data.topics.topics.values())
    text.write_text("\n".join(topics[number::4]), encoding="utf-8")
    values = {"model.name": model, "data.path": [str(text)], "data.held_out": 0.0, "tune.name": "lora"}
    values |= {"tune.rank": RANKS[number], "seq": seq, "batch": rows, "micro_batch": rows, "steps": 10**6}
    values |= {"optimizer.lr": 1e-4, "precision": "fp32", "device": "cpu", "activations.name": "everything"}
    values |= {"activations.loss": "logits", "seed": number, "weights.name": weights, "memory": "64GiB"}
    values |= {"model.init": "weights", "schedule.warmup": 0, "schedule.decay": 1, "threads": 1}
    values |= {"evaluation.every": 10**6, "checkpoint.every": 10**6}
    return replace(Recipe(), values)


def step_each(loops: list[Any]) -> None:
    """Take a step of one job after the other, as each does alone."""
    for loop in loops:
        loop._train_step()


class Quiet:
    """A reporter that says nothing."""

    def phase(self, message: str, done: float | None) -> None: ...

    def plan(self, job: Any) -> None: ...

    def tick(self, tick: Any) -> None: ...

    def note(self, message: str) -> None: ...

    def done(self, job: Any, run: Any) -> None: ...


if __name__ == "__main__":
    main()
