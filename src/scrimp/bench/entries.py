"""What a suite is asked to do, and what is known of its contestants so far."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scrimp.bench.contestants import Contestant
from scrimp.bench.protocol import best
from scrimp.bench.suites import STATED, Suite


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a suite is asked to do.

    Attributes:
        suite: The suite.
        contestants: Who competes.
        stated: Fields of the recipe that the user gave, by dotted name.
        trials: Learning rates each may try; 0 learns nothing.
        seeds: Runs at the best rate.
        pairs: Turns against the reference; 0 measures no speed.
        jobs: Learning runs side by side; None is one for each thread that is free, and one on a GPU.
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
    jobs: int | None = None
    seconds: float | None = None
    cache: Path | None = None
    trust_remote_code: bool = False
    again: bool = False
    command: Sequence[str] = ()

    @property
    def runs_each(self) -> int:
        """How many runs a contestant has at its best rate, the search's own among them."""
        return max(1, self.seeds) if self.trials else 0

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A learning run that was done.

    Attributes:
        lr: Its peak learning rate.
        seed: Its seed.
        loss: Held-out nats a token at its end; None where it diverged or failed.
        found: All that it found; empty where it failed.
        why: Why it failed.
    """

    lr: float
    seed: int
    loss: float | None
    found: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


@dataclass(slots=True)
class Entry:
    """What is known of a contestant so far.

    Attributes:
        contestant: It.
        missing: What it needs and is not there; empty where it can compete.
        failed: Why it stopped competing; empty where it did not.
        steps: Optimizer steps of its learning runs.
        trials: Its search for a learning rate.
        more: The runs with other seeds.
        turns: What its turns found; empty before.
    """

    contestant: Contestant
    missing: str = ""
    failed: str = ""
    steps: int = 0
    trials: list[Run] = field(default_factory=list)
    more: list[Run] = field(default_factory=list)
    turns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def competes(self) -> bool:
        """Whether it is there and has not failed."""
        return not self.missing and not self.failed

    @property
    def best(self) -> Run | None:
        """The trial with the lowest held-out loss; None where none is finite."""
        return best(self.trials)

    @property
    def runs(self) -> list[Run]:
        """The runs at the best rate, the search's own first."""
        found = self.best
        return [] if found is None else [found, *(run for run in self.more if run.lr == found.lr)]

    @property
    def speed(self) -> float:
        """Tokens a second, the median of its turns."""
        speeds: list[float] = self.turns["speeds"]["contestant"]
        return statistics.median(speeds)
