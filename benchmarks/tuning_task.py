"""Every way to fine-tune, on a task with a score: which keyword of Python comes next?

    python benchmarks/tuning_task.py --model SmolLM2-135M.gguf --out tuning                 all of it
    python benchmarks/tuning_task.py --model SmolLM2-135M.gguf --out tuning --only scores   one half

Every method that leaves weights frozen, some optimizers of full fine-tuning, and the quantised bases train
the first 8 layers of the model on the same tokens; the best-known ones train the whole model too. The first
layers alone predict nothing, so they are healed first: a short run on other source, the same for all. Each
side may try three learning rates around its usual one on a prefix of the tokens (one more where the best lies
at the edge). The rate with the lowest loss on validation questions then trains on all of them, the whole
model too, or the next lower one where that leaves the model worse than the prefix did, or than a guess.
The share of the questions answered rightly is the score (`_keyword_task.py`). Scores do not depend on what
else the machine does; tokens/s and peak memory do, and are measured apart, in turns, every run a process of
its own.

Runs that lie in `--out` are not done again, so it can be stopped at any time, and a catalogue that has grown
costs only what is new. A run that failed is tried again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _common import run, say, spread, start
from _keyword_task import KEYWORDS, QUESTIONS, TRAIN, VALIDATION
from _tuning_run import CUT, WHOLE

from scrimp.base import files, platform
from scrimp.bench.machine import BUSY_OTHERS_SHARE, LoadWatch
from scrimp.bench.protocol import rates
from scrimp.bench.suites import NO_LIMIT, STATED
from scrimp.methods import METHODS, piece

CHILD = Path(__file__).with_name("_tuning_run.py")
Task = dict[str, Any]
Do = Callable[[Task], dict[str, Any] | None]

SEQ, BATCH, TOKENS = 32, 8, 40_000
LAYERS = 8
PREFIX = 0.1  # of the tokens, for a trial of a learning rate
TRIALS, MORE_TRIALS, FACTOR = 3, 1, 4.0
SPEED_STEPS = 6
MODELS = (CUT, WHOLE)
HEAL_TOKENS, HEAL_LR = 80_000, 5e-4
GAIN = 0.2
GUESS = math.log(len(KEYWORDS))  # nats
OPTIMIZERS = ("adamw", "adamw-8bit", "lion", "adafactor", "galore", "fira", "apollo-mini")
ON_WHOLE = ("lora", "dora", "pissa", "adamw", "qlora")
FULL_LR = 2e-4  # where the search begins for full fine-tuning; the catalogue says how others' rates compare
# Periods are for runs of hundreds of steps in the papers; these have 156.
PERIODS: Mapping[str, Mapping[str, Any]] = {
    "owlore": {"tune.every": 20, "optimizer.refresh_every": 40},
    "badam": {"tune.every": 20},
    "galore": {"optimizer.refresh_every": 40},
    "fira": {"optimizer.refresh_every": 40},
    "apollo-mini": {"optimizer.refresh_every": 40},
}


@dataclass(frozen=True, slots=True)
class Side:
    """A method on a model.

    Attributes:
        name: The method's.
        model: Its folder's name.
        centre: Where its search for a learning rate begins; None trains nothing.
        recipe: What it changes in the job.
    """

    name: str
    model: str
    centre: float | None
    recipe: Mapping[str, Any]


def main() -> None:
    benchmark = start("tuning_task", __doc__, _options)
    options = benchmark.arguments
    work = Work(options)
    sides = [side for model in MODELS for side in work.sides(model)]
    if options.only != "speed":
        for model in MODELS:  # in turn: the whole model takes the rates that were found for the cut one
            with ThreadPoolExecutor(options.jobs) as pool:
                list(pool.map(work.score, [untrained(model), *(one for one in sides if one.model == model)]))
    if options.only != "scores":
        for turn in range(options.turns):
            for side in sides:
                work.speed(side, turn)
    rows = [work.row(side) for side in [*(untrained(model) for model in MODELS), *sides]]
    for model in MODELS:
        scores = {row["name"]: row["score"] for row in rows if row["model"] == model}
        if scores.get("lora") and scores["untrained"]:
            gained = scores["lora"] - scores["untrained"]
            benchmark.expect(f"{model} model: LoRA's score over the untrained one's", gained, at_least=GAIN)
    benchmark.write({"task": work.task, "seq": SEQ, "batch": BATCH, "tokens": work.tokens, "rows": rows})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M: a GGUF file or a folder")
    parser.add_argument("--out", type=Path, default=Path("tuning"), help="where the runs lie")
    parser.add_argument("--methods", help="some of them, with commas between; none: all")
    parser.add_argument("--only", choices=("scores", "speed"), help="a part of it")
    parser.add_argument("--jobs", type=int, default=platform.usable_cores(), help="scores side by side")
    parser.add_argument("--threads", type=int, default=platform.usable_cores(), help="of a run that is timed")
    parser.add_argument("--turns", type=int, default=2, help="timed runs of each")
    parser.add_argument("--quick", action="store_true", help="a trial: a few steps, one rate, few questions")


class Work:
    """The runs, each done once.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out.resolve()
        shrink = 20 if options.quick else 1
        self.tokens = TOKENS // shrink
        self.trials, self.more = (1, 0) if options.quick else (TRIALS, MORE_TRIALS)
        rows = -(-self.tokens // SEQ)
        counts = {TRAIN: rows, VALIDATION: 100 // shrink, QUESTIONS: 400 // shrink}
        counts = {part: -(-count // len(KEYWORDS)) * len(KEYWORDS) for part, count in counts.items()}
        prepared = {
            "kind": "prepare",
            "name": "prepare",
            "model": str(options.model.resolve()),
            "layers": LAYERS,
            "seq": SEQ,
            "heal": _healing(HEAL_TOKENS // shrink),
            **counts,
        }
        self.folder = self._place(prepared)  # of the models and snippets
        self.task = self._do(prepared)

    def sides(self, model: str) -> list[Side]:
        """Return who trains a model."""
        tuned = [method.name for method in METHODS if method.pieces.get("tune", "full") != "full"]
        names = [*OPTIMIZERS, *tuned] if model == CUT else list(ON_WHOLE)
        asked = self.options.methods.split(",") if self.options.methods else names
        return [_side(name, model) for name in names if name in asked]

    def score(self, side: Side) -> None:
        """Find a side's learning rate on a prefix, and train it on all tokens at that rate."""
        found = self._scored(side, self._do)
        right = found.get(QUESTIONS, {}).get("accuracy")
        told = found.get("why") if right is None else f"{right:.1%} right, lr {found['lr']}"
        say(f"{side.model} {side.name}: {told}")

    def _scored(self, side: Side, do: Do) -> dict[str, Any]:
        """Return what a side's search and its run found, as far as `do` does them."""
        trials = {} if side.centre is None else self._search(replace(side, model=CUT), do)
        best = _best(trials)
        tried = [{"lr": lr, "loss": _validation(found)} for lr, found in sorted(trials.items())]
        if best is None and side.centre is not None:
            return {"lr": None, "trials": tried, "why": next((f["why"] for f in trials.values()), "not done")}
        # Where all tokens leave it worse than the prefix did, or than a guess, that rate was too high.
        for lr in [None] if best is None else sorted((lr for lr in trials if lr <= best), reverse=True):
            found = do(self._task(side, lr=lr, tokens=self.tokens, asks=[QUESTIONS])) or {"why": "not done"}
            after = found.get(QUESTIONS, {}).get("loss", math.inf)
            if lr is None or "status" not in found or after < min(_validation(trials[lr]) or math.inf, GUESS):
                break
        return {"lr": lr, "trials": tried, **found}

    def _search(self, side: Side, do: Do) -> dict[float, dict[str, Any]]:
        """Return what each rate found on a prefix; further ones while the best lies at the edge."""
        assert side.centre is not None
        wanted, trials = rates(side.centre, self.trials, factor=FACTOR), {}
        for _ in range(1 + self.more):
            for lr in wanted:
                if found := do(
                    self._task(side, lr=lr, tokens=round(self.tokens * PREFIX), asks=[VALIDATION])
                ):
                    trials[lr] = found
            best = _best(trials)
            if best is None or min(trials) < best < max(trials):
                break
            wanted = [float(f"{best * FACTOR if best == max(trials) else best / FACTOR:.3g}")]
        return trials

    def speed(self, side: Side, turn: int) -> None:
        """Time a few steps of a side."""
        task = self._timed(side, turn)
        watch, found = LoadWatch(), self._do(task)
        if "busy" not in found:
            # The load before it is that of the run before it.
            busy = watch.others_share() > BUSY_OTHERS_SHARE
            files.write_json(self._place(task) / "result.json", {**found, "busy": busy})
            say(f"{side.model} {side.name}: {found.get('tokens_per_s', found.get('why'))} tokens/s")

    def row(self, side: Side) -> dict[str, Any]:
        """Return what is known of a side."""
        found = self._scored(side, self._found)
        timed = [one for turn in range(self.options.turns) if (one := self._found(self._timed(side, turn)))]
        timed = [one for one in timed if one["status"] == "done"]
        speeds = [one["tokens_per_s"] for one in timed if one.get("tokens_per_s")]
        kept = (
            "lr",
            "trials",
            "why",
            "train_loss",
            "steps",
            "seconds",
            "parameters",
            "trained",
            "state_bytes",
        )
        return {
            "name": side.name,
            "model": side.model,
            **{key: found.get(key) for key in kept},
            "score": found[QUESTIONS]["accuracy"] if QUESTIONS in found else None,
            "loss": found[QUESTIONS]["loss"] if QUESTIONS in found else None,
            "tokens_per_s": spread(speeds, digits=1) if speeds else None,
            "peak_bytes": statistics.median(one["peak_bytes"] for one in timed) if timed else None,
            "tensor_bytes": timed[0]["tensor_bytes"] if timed else None,
            "busy": any(one.get("busy") for one in timed),
        }

    def _task(
        self,
        side: Side,
        *,
        lr: float | None,
        tokens: int,
        asks: Sequence[str],
        threads: int = 1,
        turn: int = 0,
    ) -> Task:
        recipe = {
            **_job(SEQ, BATCH, tokens, threads),
            "model.name": str(self.folder / side.model),
            "data.path": [str(self.folder / f"{TRAIN}.jsonl")],
            "data.packing": "padded",
            "data.long": "cut",
            "optimizer.lr": lr,
            **side.recipe,
        }
        return {
            "kind": "train",
            "name": f"{side.model}-{side.name}",
            "recipe": recipe,
            "asks": asks,
            "turn": turn,
            "trains": lr is not None,
        }

    def _timed(self, side: Side, turn: int) -> Task:
        rate = None if side.centre is None else side.centre / FACTOR  # any that does not diverge
        tokens, threads = SPEED_STEPS * SEQ * BATCH, self.options.threads
        return self._task(side, lr=rate, tokens=tokens, asks=[], threads=threads, turn=turn)

    def _place(self, task: Task) -> Path:
        digest = hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()[:12]
        return self.out / f"{task['name']}-{digest}"

    def _found(self, task: Task) -> dict[str, Any] | None:
        """Return what a task found before."""
        path = self._place(task) / "result.json"
        found: dict[str, Any] | None = json.loads(path.read_text("utf-8")) if path.is_file() else None
        return found

    def _do(self, task: Task) -> dict[str, Any]:
        """Do a task in a process of its own, unless it was done before."""
        found = self._found(task)
        if found is not None and found["status"] != "failed":
            return found
        place = self._place(task)
        place.mkdir(parents=True, exist_ok=True)
        given = {**task, "folder": str(self.folder), "cache": str(self.out / "cache")}
        files.write_json(place / "task.json", given)
        try:
            run([sys.executable, str(CHILD), str(place)])
        except SystemExit as error:  # a defect is one method's, not the benchmark's
            why = str(error).strip().splitlines()[-1]
            files.write_json(place / "result.json", {"status": "failed", "why": why, "seconds": None})
        done: dict[str, Any] = json.loads((place / "result.json").read_text(encoding="utf-8"))
        return done


def _job(seq: int, batch: int, tokens: int, threads: int) -> dict[str, Any]:
    """Return what all recipes share."""
    return {
        **STATED,
        "data.held_out": 0.0,
        "seq": seq,
        "batch": batch,
        "micro_batch": batch,
        "steps": max(1, tokens // (seq * batch)),
        "threads": threads,
        "memory": NO_LIMIT,
    }


def _healing(tokens: int) -> dict[str, Any]:
    """Return how the cut model is healed: on the modules of the library that are no packages."""
    modules = Path(sysconfig.get_paths()["stdlib"]) / "*.py"
    return {**_job(128, 4, tokens, 1), "data.path": [str(modules)], "optimizer.lr": HEAL_LR}


def untrained(model: str) -> Side:
    """Return the model itself as a side."""
    return Side("untrained", model, None, {})


def _side(name: str, model: str) -> Side:
    method = next(method for method in METHODS if method.name == name)
    recipe = {f"{choice}.name": value for choice, value in method.pieces.items()}
    recipe |= {**method.settings, **PERIODS.get(name, {})}
    tune, optimizer = (
        piece(choice, recipe.get(f"{choice}.name", STATED[f"{choice}.name"]))
        for choice in ("tune", "optimizer")
    )
    if not tune.wraps:  # what learns from answers alone then computes no logits of questions
        recipe["activations.loss"] = "chunked"
    return Side(name, model, float(f"{FULL_LR * tune.lr_ratio * optimizer.lr_ratio:.3g}"), recipe)


def _validation(found: Mapping[str, Any]) -> float | None:
    """Return a trial's loss on the validation questions; None where it has none that is finite."""
    loss = found.get(VALIDATION, {}).get("loss")
    return loss if loss is not None and math.isfinite(loss) else None


def _best(trials: Mapping[float, Mapping[str, Any]]) -> float | None:
    """Return the rate with the lowest validation loss, the smaller one on a tie; None where none has one."""
    losses = {lr: loss for lr, found in trials.items() if (loss := _validation(found)) is not None}
    return min(losses, key=lambda lr: (losses[lr], lr), default=None)


if __name__ == "__main__":
    main()
