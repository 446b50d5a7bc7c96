"""Which recipe to run in the memory at hand: a search over the catalogue.

Every method of the catalogue is crossed with the pieces of the choices it leaves free and with the
precisions; what the user stated stays as stated. Each candidate gets the largest micro-batch that fits. Of
those that fit, the choice gives up the least, then takes the least time, then the least memory. Nothing
here knows a method by name: one that is added to the catalogue takes part.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path
from typing import Literal

from scrimp.base.ledger import Ledger, Place
from scrimp.base.units import format_bytes
from scrimp.defaults import choose
from scrimp.memory.machine import Machine
from scrimp.memory.predictor import Predictor, divisors, needed, prepare
from scrimp.memory.profile import ModelSize
from scrimp.memory.profiles import Say
from scrimp.memory.reasons import claim, least_of
from scrimp.memory.untraceable import Untraceable
from scrimp.methods import METHODS, PIECES, Choice, piece
from scrimp.recipe import Recipe, flat, replace

Goal = Literal["pretrain", "finetune"]
FIELDS: dict[Choice, str] = {
    "weights": "weights.name",
    "tune": "tune.name",
    "gradient": "gradient.name",
    "optimizer": "optimizer.name",
    "activations": "activations.name",
    "loss": "activations.loss",
    "placement": "placement.name",
}
FREE: tuple[Choice, ...] = ("activations", "loss")  # what any method can be combined with
PURE_BF16 = (
    "weights of 16 bits: an update below 1/256 of a weight survives in the mean alone, by stochastic "
    "rounding (Zamirai et al., 2020, arXiv 2010.06192)"
)
PURE_BF16_RANK = 2
# What a usual machine computes while it moves a byte: only the order of the candidates depends on it.
OPERATIONS_PER_BYTE = {"cpu": 10, "cuda": 100, "mps": 30}
Question = Literal["batch", "seq", "model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A recipe that could serve.

    Attributes:
        recipe: It, settled, with the largest micro-batch that fits, or else the smallest.
        method: The method of the catalogue that it follows.
        ledger: What it will need.
        needed: The budget that this asks for: the peak and its stated error.
        spare: How much of the budget is left; negative is over.
        rank: How much it gives up; 0 is nothing.
        gives_up: What, in sentences with the evidence.
        work: Of a step: operations of its products, and bytes that all others move, weighed by
            `OPERATIONS_PER_BYTE`; 0 where it is not known.
        tokens_per_s: Predicted, where the device was calibrated.
    """

    recipe: Recipe
    method: str
    ledger: Ledger
    needed: int
    spare: int
    rank: int
    gives_up: tuple[str, ...]
    work: int
    tokens_per_s: float | None

    @property
    def fits(self) -> bool:
        """Whether it fits the budget, on every place that has one."""
        return self.spare >= 0

    @property
    def name(self) -> str:
        """What it is, in the words of the catalogue."""
        recipe = self.recipe
        chosen = [recipe.activations.name, f"{recipe.activations.loss} loss", recipe.placement.name]
        usual = {"everything", "logits loss", "device"}
        return ", ".join([self.method, recipe.precision, *(c for c in chosen if c not in usual)])


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to an inverse question.

    Attributes:
        value: Rows, tokens, or the name of a shape; None where there is none.
        text: The same in a sentence.
    """

    value: int | str | None
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What could run in a budget, and what should.

    Attributes:
        asked: What was asked; what was not stated was open.
        recipe: The same, settled.
        size: The model's tensors; None where it cannot be made without its bytes.
        budget: Bytes on the device.
        host: Bytes on the host beside a GPU; None is no limit.
        disk: Bytes on disk; None is no limit.
        candidates: All, the one that needs most first.
        chosen: The one to run; None where nothing fits.
        why: Why, in a line.
        notes: What else there is to know.
        answers: Answers to the inverse questions, by question.
    """

    asked: Recipe
    recipe: Recipe
    size: ModelSize | None
    budget: int
    host: int | None
    disk: int | None
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    why: str
    notes: tuple[str, ...] = ()
    answers: Mapping[Question, Answer] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Planner:
    """Plans one model in one budget.

    Attributes:
        predictor: Predicts its recipes.
        machine: What it is to run on.
        asked: What the user asked for; what was not stated is open.
        settled: The same with what neither data nor memory decide.
        budget: Bytes on the device.
        host: Bytes on the host beside a GPU.
        disk: Bytes on disk.
        say: Told what is being traced, and how much of it is done; where all is in the cache, nothing.
    """

    predictor: Predictor
    machine: Machine
    asked: Recipe
    settled: Recipe
    budget: int
    host: int | None = None
    disk: int | None = None
    say: Say = lambda *_: None

    def candidates(self) -> tuple[Candidate, ...]:
        """Return every recipe that could serve, the one that needs most first."""
        recipes, profiles = list(self._recipes()), self.predictor.profiles
        profiles.say, found = self.say, []
        for done, (method, recipe) in enumerate(recipes):
            profiles.share = done / len(recipes)
            found.append(self._candidate(method, recipe, divisors(_batch(recipe))[-1:]))
        profiles.share = None
        # What lives elsewhere costs time that no trace tells: it is tried where nothing fits without.
        if not any(c.fits for c in found):
            found += [
                self._candidate(
                    method, replace(recipe, {FIELDS["placement"]: name}), divisors(_batch(recipe))[-1:]
                )
                for name in self._other_placements()
                for method, recipe in recipes
            ]
        # Larger micro-batches take traces of their own, and only what may be chosen is worth them.
        lowest = min((c.rank for c in found if c.fits), default=0)
        found = [
            self._candidate(c.method, c.recipe, divisors(_batch(c.recipe)))
            if c.fits and c.rank == lowest
            else c
            for c in found
        ]
        found = [_with_extra_work(c, found) for c in found]
        return tuple(sorted(found, key=lambda c: -c.needed))

    def choose(self, candidates: Sequence[Candidate]) -> Candidate | None:
        """Return the candidate to run: what gives up least, then takes the least time, then memory."""
        fitting = [c for c in candidates if c.fits]
        return min(fitting, key=_preference, default=None)

    def plan(self) -> Plan:
        """Make the plan."""
        candidates = self.candidates()
        chosen = self.choose(candidates)
        return Plan(
            asked=self.asked,
            recipe=self.settled,
            size=self._size(),
            budget=self.budget,
            host=self.host,
            disk=self.disk,
            candidates=candidates,
            chosen=chosen,
            why=_why(chosen, candidates, self.settled),
            notes=self._notes(candidates, chosen),
        )

    def _size(self) -> ModelSize | None:
        try:
            return self.predictor.size(self.settled)
        except Untraceable:
            return None

    def _recipes(self) -> Iterator[tuple[str, Recipe]]:
        """Yield every combination of the catalogue that agrees with what was stated."""
        stated = flat(self.asked, stated_only=True)
        precisions = [self.settled.precision]
        if "precision" not in stated or self.asked.precision == "auto":
            precisions = list(dict.fromkeys([self.settled.precision, "bf16"]))
        seen, model = set(), self.predictor.profiles.dimensions()
        name, fixed = _chosen(stated)
        wraps = piece("tune", self.settled.tune.name).wraps
        free = [choice for choice in FREE if FIELDS[choice] not in fixed]
        for precision, *names in itertools.product(precisions, *(_open(c, stated) for c in free)):
            chosen = {FIELDS[c]: value for c, value in zip(free, names, strict=True)}
            if wraps and chosen.get(FIELDS["loss"]) == "chunked":
                continue
            recipe = choose(self.settled, {**fixed, **chosen, "precision": precision}, stated, model)
            if recipe is not None and recipe not in seen:
                seen.add(recipe)
                yield name, recipe

    def _other_placements(self) -> list[str]:
        stated = flat(self.asked, stated_only=True)
        return [name for name in _open("placement", stated) if name != self.settled.placement.name]

    def _candidate(self, method: str, recipe: Recipe, sizes: Sequence[int]) -> Candidate:
        assert recipe.batch is not None
        sizes = [self.settled.micro_batch] if self.settled.micro_batch else sizes
        sized, found = self.predictor.fit(recipe, sizes, self.budget)
        asks = needed(found, sized)
        lost = [
            (p.rank, p.gives_up)
            for choice, name in FIELDS.items()
            if (p := piece(choice, flat(sized)[name])).gives_up
        ]
        if sized.precision == "bf16":
            lost.append((PURE_BF16_RANK, PURE_BF16))
        work, seconds = self._time(sized)
        spare = self.budget - asks
        limits: tuple[tuple[int | None, Place], ...] = ((self.host, "host"), (self.disk, "disk"))
        for limit, place in limits:
            if limit is not None:
                spare = min(spare, limit - found.peak_at(place))
        return Candidate(
            recipe=sized,
            method=method,
            ledger=found,
            needed=asks,
            spare=spare,
            rank=sum(rank for rank, _ in lost),
            gives_up=tuple(text for _, text in lost),
            work=work,
            tokens_per_s=None if seconds is None else recipe.batch * (recipe.seq or 0) / seconds,
        )

    def _time(self, recipe: Recipe) -> tuple[int, float | None]:
        """Return the work of a step, and its seconds where the device was calibrated."""
        assert recipe.micro_batch is not None and recipe.batch is not None
        try:
            step = self.predictor.profiles.step(recipe, recipe.micro_batch).effort
            optimizer = self.predictor.profiles.optimizer(recipe)
        except Untraceable:
            return 0, None
        rows, times = recipe.micro_batch, recipe.batch // recipe.micro_batch
        flops = times * (step.flops[0] + rows * step.flops[1])
        moved = times * (step.moved[0] + rows * step.moved[1])
        work = flops + OPERATIONS_PER_BYTE[recipe.device] * moved
        roofline = self.machine.roofline
        if roofline is None or recipe.device != self.machine.device:
            return work, None
        seconds = roofline.seconds(flops, moved, times * step.operations, recipe.precision)
        return work, seconds + roofline.seconds(optimizer.flops, optimizer.moved, 0, recipe.precision)

    def _notes(self, candidates: Sequence[Candidate], chosen: Candidate | None) -> tuple[str, ...]:
        notes = list(dict.fromkeys(note for c in candidates for note in c.ledger.notes))
        has = self.machine.memory.get(self.settled.device)
        if has is None:
            notes.append(f"this machine has no {self.settled.device}: the plan is for one that has")
        elif self.budget > has:
            notes.append(
                f"the budget of {format_bytes(self.budget)} is more than the {format_bytes(has)} "
                f"that this machine's {self.settled.device} has"
            )
        if chosen is None:
            notes.append(least_of(candidates, self.budget))
        return tuple(notes)


def make_planner(
    asked: Recipe,
    machine: Machine,
    *,
    budget: int,
    host: int | None = None,
    disk: int | None = None,
    trust_remote_code: bool = False,
    folder: Path | None = None,
    say: Say = lambda *_: None,
) -> Planner:
    """Make the planner of a recipe's model.

    Args:
        asked: What the user asked for; what was not stated is open.
        machine: What it is to run on.
        budget: Bytes on the device.
        host: Bytes on the host beside a GPU; None is no limit.
        disk: Bytes on disk; None is no limit.
        trust_remote_code: Let the model's own Python code run.
        folder: Where traces are kept; None is the cache.
        say: Told what is going on.

    Raises:
        ScrimpError: There is no such model, or it cannot do what the recipe asks.
    """
    predictor, settled = prepare(asked, machine, trust_remote_code=trust_remote_code, folder=folder, say=say)
    return Planner(
        predictor=predictor,
        machine=machine,
        asked=asked,
        settled=settled,
        budget=budget,
        host=host,
        disk=disk,
        say=say,
    )


def _batch(recipe: Recipe) -> int:
    assert recipe.batch is not None
    return recipe.batch


def _chosen(stated: Mapping[str, object]) -> tuple[str, dict[str, str]]:
    """Return the method that was stated, by name and fields; where none was, the first of the catalogue."""
    found = [m for m in METHODS if all(stated.get(FIELDS[c]) == name for c, name in m.pieces.items())]
    # QLoRA is LoRA and more.
    found = [m for m in found if not any(m.pieces.items() < other.pieces.items() for other in found)]
    if found:
        return " + ".join(method.name for method in found), {}
    default = METHODS[0]
    fixed = {FIELDS[choice]: name for choice, name in default.pieces.items()}
    return default.name, {field: name for field, name in fixed.items() if field not in stated}


def _open(choice: Choice, stated: dict[str, object]) -> list[str]:
    """Return the pieces that a choice may take."""
    name = FIELDS[choice]
    return [str(stated[name])] if name in stated else [p.name for p in PIECES if p.choice == choice]


def _preference(candidate: Candidate) -> tuple[float, ...]:
    time = -candidate.tokens_per_s if candidate.tokens_per_s else float(candidate.work)
    micro = candidate.recipe.batch or 1
    return (candidate.rank, time, micro / (candidate.recipe.micro_batch or 1), candidate.needed)


def _with_extra_work(candidate: Candidate, others: Sequence[Candidate]) -> Candidate:
    """Say how much slower a candidate is than the fastest of its precision."""
    alike = [c for c in others if c.recipe.precision == candidate.recipe.precision and c.work]
    if candidate.tokens_per_s:
        extra = max(c.tokens_per_s or 0 for c in alike) / candidate.tokens_per_s - 1
        text = f"{extra:.0%} more time (predicted for this machine)"
    else:
        extra = candidate.work / min((c.work for c in alike), default=1) - 1 if candidate.work else 0.0
        text = f"about {extra:.0%} more work (traced)"
    return changed(candidate, gives_up=(*candidate.gives_up, text)) if extra >= 0.005 else candidate


def _why(chosen: Candidate | None, candidates: Sequence[Candidate], recipe: Recipe) -> str:
    if chosen is None:
        return f"nothing fits: none of {len(candidates)} recipes"
    better = [c for c in candidates if not c.fits and _preference(c) < _preference(chosen)]
    lost = ", ".join(map(claim, chosen.gives_up)) or "nothing"
    first = f"it gives up the least of what fits ({lost})"
    return f"{first}; {len(better)} that give up less do not fit" if better else first
