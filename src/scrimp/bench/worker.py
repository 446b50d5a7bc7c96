"""A process of the bench: one contestant on one job, alone, so that its memory is its own.

    python -m scrimp.bench.worker FOLDER      reads task.json, writes result.json

Every contestant has the same rows in the same order, the same initial weights, schedule, clipping and
evaluation. A peer that is an optimizer takes our optimizer's place in our loop; one that brings a loop of its
own (transformers' Trainer) is handed the same job. Checkpoints are left out: a run that is cut short is done
again, and its losses are the same bits.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scrimp.base import platform
from scrimp.base.errors import ScrimpError
from scrimp.base.platform import passive_openmp
from scrimp.bench import peers
from scrimp.bench.protocol import thinned
from scrimp.bench.suites import NO_LIMIT
from scrimp.bench.tasks import ANSWER, Place, Task
from scrimp.build import Inputs, inspect
from scrimp.recipe import flat, nest, parse
from scrimp.report.lines import LineReporter
from scrimp.training.metrics import MetricsFile, read_metrics

if TYPE_CHECKING:
    import torch

    from scrimp.build import Job, Prepared
    from scrimp.recipe import Recipe
    from scrimp.training.reporter import Tick


def answer(found: Mapping[str, Any]) -> None:
    """Tell the suite something, on standard output."""
    print(f"{ANSWER}{json.dumps(found)}", flush=True)


class EnoughError(Exception):
    """The last turn was taken."""


class TakingTurns(LineReporter):
    """Holds the loop back after every turn until the next one is asked for.

    A line with a number on standard input asks for so many steps; the answer is one line of JSON with the
    seconds and the tokens they took. The end of the input ends the run.
    """

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job
        self._left = 0
        self._asked = 0
        self._began = 0.0

    def wait(self) -> None:
        """Wait for the next turn.

        Raises:
            EnoughError: There is none.
        """
        line = sys.stdin.readline()
        if not line.strip():
            raise EnoughError
        self._asked = self._left = int(line)
        self._began = time.perf_counter()

    def step_done(self) -> None:
        """Count a step, and answer after the turn's last one."""
        self._left -= 1
        if self._left:
            return
        self._synchronize()
        seconds = time.perf_counter() - self._began
        recipe = self._job.recipe
        assert recipe.batch is not None and recipe.seq is not None
        tokens = self._asked * recipe.batch * recipe.seq
        answer({"seconds": seconds, "tokens": tokens})
        self.wait()

    def tick(self, tick: Tick) -> None:
        """Take a step of our own loop for one of the turn."""
        self.step_done()

    def _synchronize(self) -> None:
        if self._job.device.type != "cpu":
            import torch

            torch.accelerator.synchronize(self._job.device)


def main(folder: Path) -> None:
    """Do a task."""
    place, task = Place(folder), Task.read(folder)
    if task.mode != "turns":  # those listen themselves
        threading.Thread(target=_end_with_the_suite, daemon=True).start()
    with passive_openmp():
        import torch  # noqa: F401
    try:
        modes = {"describe": describe, "base": make_base, "train": train, "turns": take_turns}
        modes[task.mode](task, place)
    except ScrimpError as error:
        place.write_result({"status": "failed", "why": str(error)})


def _end_with_the_suite() -> None:
    sys.stdin.read()
    os._exit(1)


def describe(task: Task, place: Place) -> None:
    """Say what the job is: its sizes, its text, and what a search for a rate needs to know."""
    from scrimp import models
    from scrimp.resolve import choose_device

    device = choose_device(_inspect(task).recipe)
    prepared, recipe, predicted = _fitted(task, device)
    corpus = prepared.corpus
    found = {
        "data": corpus.report.description,
        "fingerprint": corpus.fingerprint,
        "device": device.type,
        "device_name": device_name(device),
    }
    weights = _files(prepared.inputs.model.path)
    place.write_result(
        {
            "status": "done",
            "recipe": flat(recipe),
            "non_embedding": models.non_embedding(prepared.config, trust_remote_code=task.trust_remote_code),
            "documents": corpus.report.documents,
            "held_out": corpus.held_out.documents,
            "predicted_bytes": predicted,
            "facts": json.dumps([found, weights]),
            **found,
        }
    )


def _fitted(task: Task, device: torch.device) -> tuple[Prepared, Recipe, int]:
    """Return the job's inputs and its recipe, with a micro-batch of which two fit, and its predicted bytes.

    That depends on the machine's memory, and not on what happens to be free. Where not even AdamW's state
    fits, a contestant's may: then it is one sequence at a time.
    """
    from scrimp.training.run import plan

    half = {} if "memory" in task.recipe else {"memory": f"{_total_memory(device) // 2**21}MiB"}
    try:
        prepared, _, resolved = plan(_inspect(task, half), LineReporter())
    except ScrimpError:
        one = {"memory": NO_LIMIT, "micro_batch": task.recipe.get("micro_batch", 1)}
        prepared, _, resolved = plan(_inspect(task, one), LineReporter())
    return prepared, resolved.recipe, resolved.ledger.peak.total


def _total_memory(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return platform.total_memory_bytes()


def device_name(device: torch.device) -> str:
    """Return what the device that trains calls itself."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor_name()


def _files(path: Path | None) -> list[tuple[str, int, int]]:
    """Return the names, sizes and times of a model's files: whether it is still the same one."""
    if path is None:
        return []
    paths = [path] if path.is_file() else sorted(one for one in path.iterdir() if one.is_file())
    status = [(one.name, one.stat()) for one in paths]
    return [(name, found.st_size, found.st_mtime_ns) for name, found in status]


def make_base(task: Task, place: Place) -> None:
    """Train the model that a fine-tuning suite starts from, or go on with it."""
    from scrimp.training.run import execute
    from scrimp.training.start import choose_start

    inputs = _inspect(task)
    start = choose_start(inputs.recipe, out=place.run, resume=True)
    execute(start, inputs, LineReporter())
    place.write_result({"status": "done"})


def train(task: Task, place: Place) -> None:
    """Train to the end, and write down what was reached and what it took."""
    began = time.monotonic()
    with _bout(task) as bout, MetricsFile(place.metrics) as metrics:
        diverged = ""
        try:
            bout.run(metrics, LineReporter())
        except Exception as error:
            # A peer may stumble over such a gradient in any way, before our loop has seen it.
            if bout.is_finite:
                raise
            diverged = str(error) or type(error).__name__
        found = {
            "status": "diverged" if diverged else "done",
            "why": diverged,
            "seconds": round(time.monotonic() - began, 2),
            **bout.found(),
        }
    place.write_result({**found, **learned(read_metrics(place.metrics), diverged=bool(diverged))})


def learned(rows: list[dict[str, Any]], *, diverged: bool) -> dict[str, Any]:
    """Return the curves of a run and what it ended at, from its metrics."""
    steps = [row for row in rows if row["kind"] == "train"]
    held_out = [row for row in rows if row["kind"] == "eval"]
    tokens, losses = thinned([row["tokens"] for row in steps], [row["loss"] for row in steps])
    end = held_out[-1] if held_out and not diverged else {}
    return {
        "loss": end.get("eval_loss"),
        "bits_per_byte": end.get("bits_per_byte"),
        "evaluation_tokens": end.get("eval_tokens"),
        "curve": {
            "tokens": tokens,
            "train": losses,
            "eval_tokens": [row["tokens"] for row in held_out],
            "eval": [row["eval_loss"] for row in held_out],
        },
    }


def take_turns(task: Task, _: Place) -> None:
    """Do steps whenever they are asked for."""
    with _bout(task) as bout, suppress(EnoughError):
        turns = TakingTurns(bout.job)
        answer({"settings": dict(bout.settings)})
        turns.wait()
        bout.run(None, turns)


def _inspect(task: Task, changes: Mapping[str, Any] | None = None) -> Inputs:
    recipe = parse(nest({**task.recipe, **(changes or {})}), where=task.contestant)
    cache = None if task.cache is None else Path(task.cache)
    return inspect(recipe, cache=cache, trust_remote_code=task.trust_remote_code)


def _bout(task: Task) -> Any:
    """Return a context with the contestant's job, ready to run."""
    from scrimp.bench.bout import bout

    peer = None if task.peer is None else peers.peer(task.peer)
    return bout(_inspect(task), peer, LineReporter())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
