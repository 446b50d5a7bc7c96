"""A suite from its first process to its last.

    describe ─> speed in turns ─> tuning trials ─> more seeds at the best rate

Trials go round by round: every contestant's first rate, then every contestant's second, so that an hour in
which the machine was slow falls on all. What one contestant does wrong costs that contestant alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scrimp import laws
from scrimp.assembly import takes_besides
from scrimp.base import platform
from scrimp.base.errors import ScrimpError
from scrimp.base.units import format_duration
from scrimp.bench.contestants import Contestant
from scrimp.bench.entries import Ask, Entry, Run
from scrimp.bench.machine import LoadWatch
from scrimp.bench.pool import Pool
from scrimp.bench.protocol import rates, refresh_every
from scrimp.bench.suites import NO_LIMIT, REFERENCE, STATED
from scrimp.bench.tasks import Mode, Place, Task
from scrimp.bench.turns import PlayerError, compare, warm_up
from scrimp.methods import options_of, piece

Say = Callable[[str], None]

TURN_LR = 1e-6  # whatever the rate, a step takes as long; at this one nothing diverges


@dataclass(frozen=True, slots=True)
class Planned:
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
    entries: list[Entry] = field(default_factory=list)
    reference: Entry = field(init=False)
    job: dict[str, Any] = field(default_factory=dict)
    centre: float = 0.0
    law: str = ""
    _took: dict[Mode, list[float]] = field(default_factory=dict)

    @property
    def turn_steps(self) -> int:
        """Optimizer steps a turn: what projecting peers have from one refresh to the next."""
        return refresh_every(self.job["recipe"]["steps"])

    def run(self) -> Iterator[None]:
        """Run the suite, and yield whenever there is something new to write down.

        Raises:
            ScrimpError: The job itself cannot be run.
        """
        self._describe()
        self._admit()
        yield
        if self.ask.pairs:
            yield from self._all_turns()
        if not self.ask.trials:
            return
        self._set_lengths()
        for number in range(self.ask.trials):
            yield from self._round(self._trials(number))
        for entry in self._competing():
            if not any(trial.found for trial in entry.trials):
                self._fail(entry, entry.trials[0].why)
        for number in range(1, self.ask.seeds):
            yield from self._round(self._seeds(number))

    def _competing(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.competes]

    def _fail(self, entry: Entry, why: str) -> None:
        entry.failed = why
        self.say(f"{entry.contestant.name}: failed; {why}")

    def _describe(self) -> None:
        """Find out what the job is; this also tokenises its text, once for all."""
        self.say("reading the job")
        found = self.pool.now(
            self._task("describe", Contestant(name=REFERENCE, title=REFERENCE), self.ask.recipe)
        )
        if found["status"] != "done":
            raise ScrimpError(found["why"])
        if self.ask.trials and not found["held_out"]:
            raise ScrimpError("data.held_out 0: a suite compares held-out losses; raise --data.held-out")
        self.job = found
        on_cpu = found["device"] == "cpu"
        self.pool.jobs = self.ask.jobs or (self._free_cores() if on_cpu else 1)
        if on_cpu:
            room = platform.available_memory_bytes() // found["predicted_bytes"]
            self.pool.jobs = max(1, min(self.pool.jobs, room))

    def _free_cores(self) -> int:
        return max(1, platform.usable_cores() // (self.ask.recipe.get("threads") or 1))

    def _admit(self) -> None:
        """Find out who can compete.

        Raises:
            ScrimpError: Nobody can.
        """
        device = self.job["device"]
        self.entries = [Entry(one, missing=one.why_missing(device)) for one in self.ask.contestants]
        for entry in self.entries:
            if entry.missing:
                self.say(f"{entry.contestant.name}: not here; {entry.missing}")
        if not self._competing():
            raise ScrimpError(f"methods: nobody can compete here; {self.entries[0].missing}")
        self._choose_reference()

    def _choose_reference(self) -> None:
        competing = self._competing()
        usual = [entry for entry in competing if entry.contestant.name == REFERENCE]
        self.reference = [*usual, *competing, *self.entries][0]

    def _task(
        self, mode: Mode, contestant: Contestant, recipe: Mapping[str, Any], *, against: str = ""
    ) -> Task:
        merged = _own_options({**recipe, **contestant.recipe})
        return Task(
            mode=mode,
            contestant=contestant.name,
            suite=self.ask.suite.name,
            recipe={name: value for name, value in merged.items() if value is not None},
            peer=None if contestant.peer is None else contestant.peer.name,
            facts=self.job.get("facts", ""),
            against=against,
            cache=None if self.ask.cache is None else str(self.ask.cache),
            trust_remote_code=self.ask.trust_remote_code,
        )

    def _recipe(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the job's recipe with what a run of it needs stated.

        Memory has no limit here: one that does not fit is to fail by itself, and not by what the recipe of
        AdamW would need.
        """
        found, asked = self.job["recipe"], self.ask.recipe
        asked.pop("tokens", None)
        settled = ("batch", "micro_batch", "seq", "model.name", "data.path", "data.tokenizer")
        return {**asked, "memory": NO_LIMIT, **{name: found[name] for name in settled}, **changes}

    def _all_turns(self) -> Iterator[None]:
        """Measure everybody's speed; where the reference fails, all begin anew with another one."""
        for entry in self._competing():
            if entry.competes:
                self._take_turns(entry)
                yield
            if not self.reference.competes:
                self._choose_reference()
                for other in self.entries:
                    other.turns = {}
                yield from self._all_turns()
                return

    def _take_turns(self, entry: Entry) -> None:
        """Measure a contestant's speed beside the reference's."""
        pairs, steps = self.ask.pairs, self.turn_steps
        # As long as a learning run, where settings of a peer depend on that.
        total = max(self.job["recipe"]["steps"], warm_up(steps) + pairs * steps + 1)
        never = {"evaluation.every": total, "checkpoint.every": total}
        recipe = self._recipe({"steps": total, "optimizer.lr": TURN_LR, **never})
        other = self._task("turns", self.reference.contestant, recipe)
        against = f"{self.pool.place(other).path.name}, {pairs} x {steps}"
        task = self._task("turns", entry.contestant, recipe, against=against)
        place, found = self.pool.place(task), self.pool.cached(task)
        if found is None:
            load = LoadWatch()
            reference = Place(place.path / "reference")
            place.prepare(task)
            reference.prepare(other)
            try:
                found = {"status": "done", **compare(place, reference, pairs=pairs, steps=steps)}
            except PlayerError as error:
                failed = self.reference if error.is_reference else entry
                self._fail(failed, str(error))
                return
            found |= {"others_share": load.others_share(), "seconds": load.seconds}
            place.write_result(found)
            self._took.setdefault("turns", []).append(load.seconds)
        entry.turns = found
        mine, theirs = found["speeds"]["contestant"], found["speeds"]["reference"]
        ratio = statistics.median(own / other for own, other in zip(mine, theirs, strict=True))
        self.say(f"{entry.contestant.name}: {ratio:.2f} x the reference's speed{self._left()}")

    def _set_lengths(self) -> None:
        """Say how long each contestant learns, and around which rate it searches."""
        recipe, seconds = self.job["recipe"], self.ask.seconds
        tokens = recipe["batch"] * recipe["seq"]
        for entry in self._competing():
            entry.steps = recipe["steps"]
            if seconds is not None:
                entry.steps = max(1, int(seconds * entry.speed / tokens))
        stated = self.ask.recipe.get("optimizer.lr")
        if stated not in (None, "auto"):
            self.centre = float(stated)
            self.law = "stated" if "optimizer.lr" in self.ask.stated else "the suite's own"
        elif recipe["model.init"] == "weights":
            self.centre, self.law = recipe["optimizer.lr"], "the default for fine-tuning"
        else:
            guess = laws.steplaw_lr(self.job["non_embedding"], self.reference.steps * tokens)
            self.centre, self.law = guess.value, guess.source

    def _trials(self, number: int) -> list[Planned]:
        """Return the runs of one round of the search; each round begins with another contestant."""
        first = self.job["recipe"]["seed"]
        tried = [
            Planned(entry, rates(self.centre * entry.contestant.lr_ratio, self.ask.trials)[number], first)
            for entry in self._competing()
        ]
        return tried[number:] + tried[:number]

    def _seeds(self, number: int) -> list[Planned]:
        seed = self.job["recipe"]["seed"] + number
        found = [(entry, entry.best) for entry in self._competing()]
        return [Planned(entry, run.lr, seed) for entry, run in found if run is not None]

    def _round(self, runs: Sequence[Planned]) -> Iterator[None]:
        for number, found in self.pool.do([self._training(run) for run in runs]):
            self._note(runs[number], found)
            yield

    def _training(self, run: Planned) -> Task:
        steps, asked, on_cpu = run.entry.steps, self.ask.recipe, self.job["device"] == "cpu"
        changes = {
            "steps": steps,
            "optimizer.lr": run.lr,
            "seed": run.seed,
            "evaluation.every": asked.get("evaluation.every")
            or max(1, steps // max(1, self.ask.suite.evaluations)),
            "checkpoint.every": steps,
            "threads": asked.get("threads") or (1 if on_cpu else None),
            "deterministic": not on_cpu,
        }
        return self._task("train", run.entry.contestant, self._recipe(changes))

    def _note(self, planned: Planned, found: Mapping[str, Any]) -> None:
        entry, lr, seed = planned.entry, planned.lr, planned.seed
        if found["status"] == "failed":
            run, said = Run(lr=lr, seed=seed, loss=None, why=found["why"]), f"failed; {found['why']}"
        else:
            self._took.setdefault("train", []).append(found["seconds"])
            run = Run(lr=lr, seed=seed, loss=found["loss"], found=found)
            said = "diverged" if run.loss is None else f"held-out loss {run.loss:.4f}"
        (entry.trials if seed == self.job["recipe"]["seed"] else entry.more).append(run)
        self.say(f"{entry.contestant.name}, lr {lr:g}, seed {seed}: {said}{self._left()}")

    def _left(self) -> str:
        """Say about how long the rest will take, by what took so long so far."""
        competing = self._competing()
        turns = sum(not entry.turns for entry in competing) if self.ask.pairs else 0
        done = sum(len(entry.trials) + len(entry.more) for entry in competing)
        runs = len(competing) * (self.ask.trials + max(0, self.ask.runs_each - 1)) - done
        left = 0.0
        waiting: list[tuple[Mode, int, int]] = [("turns", turns, 1), ("train", runs, self.pool.jobs)]
        for mode, count, width in waiting:
            took = self._took.get(mode, [])
            if count and not took:
                return ""
            left += count * statistics.fmean(took) / width if count else 0.0
        return f"; about {format_duration(left)} left" if left else ""


def _own_options(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe with those options alone that its optimizer takes, and a period that suits the run.

    The papers' period of 200 steps would leave a short run with the first subspace.
    """
    optimizer = recipe.get("optimizer.name", STATED["optimizer.name"])
    taken = piece("optimizer", optimizer).options
    foreign = {f"optimizer.{name}" for name in options_of("optimizer") if name not in taken}
    own = {name: value for name, value in recipe.items() if name not in foreign}
    besides = takes_besides("optimizer", optimizer)
    if stated := own.get("optimizer.options"):
        own["optimizer.options"] = tuple(each for each in stated if each.partition("=")[0] in besides)
    if taken.get("refresh_every", 1) > 1 and recipe.get("optimizer.refresh_every") is None:
        own["optimizer.refresh_every"] = refresh_every(recipe["steps"])
    return own
