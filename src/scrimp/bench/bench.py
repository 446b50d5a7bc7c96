"""A suite from its first process to its document.

    describe ─> speed in turns ─> tuning trials ─> more seeds at the best rate ─> bench.json

Trials go round by round: every contestant's first rate, then every contestant's second, so that an hour in
which the machine was slow falls on all. The document is written after every step, so that a suite that was
stopped still shows what it found; the same command goes on with what is missing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scrimp import laws
from scrimp.base import platform
from scrimp.base.errors import ScrimpError
from scrimp.base.units import format_duration
from scrimp.bench.contestants import Contestant
from scrimp.bench.machine import LoadWatch
from scrimp.bench.pool import Pool
from scrimp.bench.protocol import best, rates
from scrimp.bench.suites import REFERENCE, STATED, Suite
from scrimp.bench.tasks import Mode, Place, Task
from scrimp.bench.turns import compare

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a suite is asked to do.

    Attributes:
        suite: The suite.
        contestants: Who competes.
        stated: Fields of the recipe that the user gave, by dotted name.
        trials: Learning rates each may try.
        seeds: Runs at the best rate.
        pairs: Turns against the reference.
        jobs: Learning runs side by side.
        seconds: Training time for each contestant in place of steps; None trains all for the same steps.
        cache: Folder of the token files; None is the platform's.
        trust_remote_code: Whether the model's own code may run.
        again: Do even what was done before.
        command: What the user typed.
    """

    suite: Suite
    contestants: Sequence[Contestant]
    stated: Mapping[str, Any]
    trials: int
    seeds: int
    pairs: int
    jobs: int
    seconds: float | None = None
    cache: Path | None = None
    trust_remote_code: bool = False
    again: bool = False
    command: Sequence[str] = ()

    @property
    def recipe(self) -> dict[str, Any]:
        """The job, by dotted fields of a recipe."""
        length = {"steps", "tokens"}
        own = {
            name: value
            for name, value in self.suite.recipe.items()
            if name not in length or not length & self.stated.keys()
        }
        return {**STATED, **own, **self.stated}


@dataclass(slots=True)
class Entry:
    """What is known of a contestant so far.

    Attributes:
        contestant: It.
        missing: What it needs and is not there; empty where it can compete.
        failed: Why it stopped competing; empty where it did not.
        steps: Optimizer steps of its learning runs.
        trials: Tuning trials, each with `lr`, `seed`, `loss` and the whole `found`.
        runs: The runs at its best rate, one a seed.
        speeds: Its turns, and the reference's beside them.
        others_share: Of all cores' time, what other programs took meanwhile.
    """

    contestant: Contestant
    missing: str = ""
    failed: str = ""
    steps: int = 0
    trials: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    speeds: dict[str, list[float]] = field(default_factory=dict)
    others_share: float = 0.0

    @property
    def competes(self) -> bool:
        """Whether it is there and has not failed."""
        return not self.missing and not self.failed


@dataclass(frozen=True, slots=True)
class Run:
    """A learning run to be done."""

    entry: Entry
    lr: float
    seed: int


@dataclass(slots=True)
class Bench:
    """Runs a suite.

    Attributes:
        ask: What was asked for.
        pool: Does the tasks.
        say: Told how it goes.
        load: Watches the machine.
        earlier: Seconds that were spent on it before, where it was stopped.
        entries: The contestants.
        reference: The one that the others are held against: AdamW where it competes, else the first.
        job: What the job was found to be.
        centre: The learning rate of AdamW in the middle of the search.
        law: Where that rate comes from.
    """

    ask: Ask
    pool: Pool
    say: Say
    load: LoadWatch
    earlier: float = 0.0
    entries: list[Entry] = field(default_factory=list)
    reference: Entry = field(init=False)
    job: dict[str, Any] = field(default_factory=dict)
    centre: float = 0.0
    law: str = ""
    _took: dict[Mode, list[float]] = field(default_factory=dict)

    def run(self) -> Iterator[None]:
        """Run the suite, and yield whenever there is something new to write down.

        Raises:
            ScrimpError: The job itself cannot be run.
        """
        self._describe()
        self._admit()
        yield
        for entry in self._competing() if self.ask.pairs else ():
            self._take_turns(entry)
            yield
        self._set_lengths()
        for number in range(self.ask.trials):
            yield from self._round(self._trials(number))
        for number in range(1, self.ask.seeds):
            yield from self._round(self._seeds(number))

    def _competing(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.competes]

    def _admit(self) -> None:
        """Find out who can compete, and whom the others are held against.

        Raises:
            ScrimpError: Nobody can.
        """
        device = self.job["device"]
        missing = {one.name: one.why_missing(device) for one in self.ask.contestants}
        self.entries = [Entry(one, missing=missing[one.name]) for one in self.ask.contestants]
        for name, why in missing.items():
            if why:
                self.say(f"{name}: not here; {why}")
        competing = self._competing()
        if not competing:
            raise ScrimpError(f"methods: nobody can compete here; {next(iter(missing.values()))}")
        usual = [entry for entry in competing if entry.contestant.name == REFERENCE]
        self.reference = [*usual, *competing][0]

    def _describe(self) -> None:
        """Find out what the job is; this also tokenises its text, once for all."""
        self.say("reading the job")
        task = self._task("describe", Contestant(name=REFERENCE, title=REFERENCE), self.ask.recipe)
        for _, found in self.pool.do([task]):
            if found["status"] != "done":
                raise ScrimpError(found["why"])
            self.job = found
        if found["device"] == "cpu":
            room = platform.available_memory_bytes() // found["predicted_bytes"]
            self.pool.jobs = max(1, min(self.pool.jobs, room))
        self._find_centre()

    def _find_centre(self) -> None:
        """Choose the rate that the search is around."""
        recipe = self.job["recipe"]
        tokens = recipe["steps"] * recipe["batch"] * recipe["seq"]
        stated = self.ask.recipe.get("optimizer.lr")
        if stated not in (None, "auto"):
            self.centre, self.law = float(stated), "stated"
        elif recipe["model.init"] == "weights":
            self.centre, self.law = recipe["optimizer.lr"], "the default for fine-tuning"
        else:
            guess = laws.steplaw_lr(self.job["non_embedding"], tokens)
            self.centre, self.law = guess.value, guess.source

    def _task(self, mode: Mode, contestant: Contestant, recipe: Mapping[str, Any]) -> Task:
        merged = {**recipe, **contestant.recipe}
        return Task(
            mode=mode,
            contestant=contestant.name,
            suite=self.ask.suite.name,
            recipe={name: value for name, value in merged.items() if value is not None},
            peer=None if contestant.peer is None else contestant.peer.name,
            cache=None if self.ask.cache is None else str(self.ask.cache),
            trust_remote_code=self.ask.trust_remote_code,
        )

    def _recipe(self, **changes: Any) -> dict[str, Any]:
        """Return the job's recipe with what a run of it needs stated; `__` in a name stands for a dot."""
        found, asked = self.job["recipe"], self.ask.recipe
        settled = ("batch", "micro_batch", "seq", "model.name", "data.path", "data.tokenizer")
        held = {name: found[name] for name in settled}
        changed = {name.replace("__", "."): value for name, value in changes.items()}
        asked.pop("tokens", None)
        return {**asked, **held, **changed}

    def _take_turns(self, entry: Entry) -> None:
        """Measure a contestant's speed beside the reference's."""
        suite, pairs = self.ask.suite, self.ask.pairs
        # As long as a learning run, where settings of a peer depend on that.
        steps = max(self.job["recipe"]["steps"], (pairs + 1) * suite.turn_steps + 1)
        recipe = self._recipe(steps=steps, optimizer__lr=self.centre, evaluation__every=steps)
        task = self._task("turns", entry.contestant, recipe)
        place, found = self.pool.place(task), self.pool.cached(task)
        if found is None:
            load = LoadWatch()
            other = self._task("turns", self.reference.contestant, recipe)
            reference = Place(place.path / "reference")
            place.prepare(task)
            reference.prepare(other)
            try:
                speeds = compare(place, reference, pairs=pairs, steps=suite.turn_steps)
            except ScrimpError as error:
                found = {"status": "failed", "why": str(error)}
            else:
                found = {"status": "done", "speeds": speeds, "others_share": load.others_share()}
            place.write_result(found)
            self._took.setdefault("turns", []).append(load.seconds)
        if found["status"] == "failed":
            entry.failed = found["why"]
            self.say(f"{entry.contestant.name}: failed; {entry.failed}")
            return
        entry.speeds, entry.others_share = found["speeds"], found["others_share"]
        mine, theirs = entry.speeds["contestant"], entry.speeds["reference"]
        ratio = statistics.median(own / other for own, other in zip(mine, theirs, strict=True))
        self.say(f"{entry.contestant.name}: {ratio:.2f} x the reference's speed{self._left()}")

    def _set_lengths(self) -> None:
        recipe = self.job["recipe"]
        for entry in self._competing():
            entry.steps = recipe["steps"]
            if self.ask.seconds is not None:
                speed = statistics.median(entry.speeds["contestant"])
                entry.steps = max(1, int(self.ask.seconds * speed / (recipe["batch"] * recipe["seq"])))

    def _trials(self, number: int) -> list[Run]:
        """Return the runs of one round of the search; each round begins with another contestant."""
        first = self.job["recipe"]["seed"]
        tried = [
            Run(entry, rates(self.centre * entry.contestant.lr_ratio, self.ask.trials)[number], first)
            for entry in self._competing()
        ]
        return tried[number:] + tried[:number]

    def _seeds(self, number: int) -> list[Run]:
        first = self.job["recipe"]["seed"]
        found = [(entry, best(entry.trials)) for entry in self._competing()]
        return [Run(entry, trial["lr"], first + number) for entry, trial in found if trial is not None]

    def _round(self, runs: Sequence[Run]) -> Iterator[None]:
        for number, found in self.pool.do([self._training(run) for run in runs]):
            self._note(runs[number], found)
            yield

    def _training(self, run: Run) -> Task:
        steps = run.entry.steps
        recipe = self._recipe(
            steps=steps,
            optimizer__lr=run.lr,
            seed=run.seed,
            evaluation__every=max(1, steps // max(1, self.ask.suite.evaluations)),
            checkpoint__every=steps,
            threads=self.ask.recipe.get("threads") or (1 if self.job["device"] == "cpu" else None),
        )
        return self._task("train", run.entry.contestant, recipe)

    def _note(self, run: Run, found: dict[str, Any]) -> None:
        entry = run.entry
        name = entry.contestant.name
        if found["status"] == "failed":
            entry.failed = found["why"]
            self.say(f"{name}: failed; {entry.failed}")
            return
        self._took.setdefault("train", []).append(found["seconds"])
        done = {"lr": run.lr, "seed": run.seed, "loss": found["loss"], "found": found}
        (entry.trials if run.seed == self.job["recipe"]["seed"] else entry.runs).append(done)
        loss = "diverged" if found["loss"] is None else f"held-out loss {found['loss']:.4f}"
        self.say(f"{name}, lr {run.lr:g}, seed {run.seed}: {loss}{self._left()}")

    def _left(self) -> str:
        """Say about how long the rest will take, by what took so long so far."""
        competing = self._competing()
        turns = sum(not entry.speeds for entry in competing) if self.ask.pairs else 0
        done = sum(len(entry.trials) + len(entry.runs) for entry in competing)
        runs = len(competing) * (self.ask.trials + max(0, self.ask.seeds - 1)) - done
        left = 0.0
        for mode, count, width in (("turns", turns, 1), ("train", runs, self.ask.jobs)):
            took = self._took.get(mode, [])  # type: ignore[call-overload]
            if count and not took:
                return ""
            left += count * statistics.fmean(took) / width if count else 0.0
        return f"; about {format_duration(left)} left" if left else ""
