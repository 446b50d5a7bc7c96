"""The inverse questions: what is the largest batch, sequence or model that a budget holds?

A batch and a sequence are asked of the recipe that a plan chose and of the one that needs the least, so that
the answer says what giving up more would buy.
"""

from __future__ import annotations

from collections.abc import Callable

from scrimp.base.units import format_bytes, format_count
from scrimp.memory.planner import Answer, Candidate, Plan, Planner, Question, make_planner
from scrimp.memory.predictor import needed
from scrimp.recipe import Recipe, replace
from scrimp.shapes import SHAPES

LONGEST_ROWS = 4096  # of the micro-batches that the largest one is looked for among
LONGEST_SEQ = 2**20  # where the model's positions have no limit
SEQ_STEP = 64


def answer(planner: Planner, plan: Plan, question: Question) -> Answer:
    """Answer an inverse question.

    Args:
        planner: Made the plan.
        plan: The plan, whose budget is asked about.
        question: What is to be as large as can be.
    """
    if question == "model":
        return _model(planner)
    return _batch(planner, plan) if question == "batch" else _seq(planner, plan)


def largest_batch(planner: Planner, candidate: Candidate) -> int:
    """Return the most rows of a micro-batch that fit, with everything else as in a candidate; 0 if none."""

    def fits(rows: int) -> bool:
        return _fits(planner, replace(candidate.recipe, {"micro_batch": rows, "batch": rows}))

    return _largest(fits, LONGEST_ROWS)


def largest_seq(planner: Planner, candidate: Candidate) -> int:
    """Return the longest sequence that fits, in steps of 64 and up to the model's positions; 0 if none.

    Its micro-batch is the one that was asked for, or else one row.
    """
    rows = planner.asked.micro_batch or 1

    def fits(steps: int) -> bool:
        return _fits(planner, replace(candidate.recipe, {"seq": steps * SEQ_STEP, "micro_batch": rows}))

    return SEQ_STEP * _largest(fits, _longest(planner) // SEQ_STEP)


def largest_model(planner: Planner) -> tuple[str, Candidate] | None:
    """Return the largest named shape with a recipe that fits, and that recipe."""
    by_size = sorted(SHAPES, key=lambda name: -SHAPES[name].parameters(SHAPES[name].vocab or 0))
    for name in by_size:
        # A shape has no stored weights; what a run holds of it is the same without them.
        asked = replace(planner.asked, {"model.name": name, "model.init": "scratch"})
        asking = make_planner(
            asked,
            planner.machine,
            budget=planner.budget,
            host=planner.host,
            disk=planner.disk,
            folder=planner.predictor.profiles.folder,
            say=planner.say,
        )
        chosen = asking.choose(asking.candidates())
        asking.predictor.profiles.save()
        if chosen is not None:
            return name, chosen
    return None


def _batch(planner: Planner, plan: Plan) -> Answer:
    found = {c.name: largest_batch(planner, c) for c in _asked(planner, plan)}
    best = max(found.values())
    if best == 0:
        return Answer(None, "batch: not even one sequence fits at a time")
    more = "at least " if best == LONGEST_ROWS else ""
    return Answer(
        best, f"batch: {more}{best} sequences of {plan.recipe.seq} tokens at a time ({_each(found)})"
    )


def _seq(planner: Planner, plan: Plan) -> Answer:
    found = {c.name: largest_seq(planner, c) for c in _asked(planner, plan)}
    best = max(found.values())
    rows = planner.asked.micro_batch or 1
    if best == 0:
        return Answer(None, f"seq: not even {SEQ_STEP} tokens fit in a micro-batch of {rows}")
    limit = ", all that the model has positions for" if best + SEQ_STEP > _longest(planner) else ""
    return Answer(best, f"seq: {best} tokens in a micro-batch of {rows}{limit} ({_each(found)})")


def _each(found: dict[str, int]) -> str:
    """Say what each candidate reaches, if that is more than those before it do."""
    reached, texts = 0, []
    for name, value in found.items():
        if value > reached:
            reached = value
            texts.append(f"{value} with {name}")
    return ", ".join(texts)


def _model(planner: Planner) -> Answer:
    found = largest_model(planner)
    if found is None:
        return Answer(None, "model: none of the named shapes fits")
    name, chosen = found
    size = format_count(SHAPES[name].parameters(SHAPES[name].vocab or 0))
    return Answer(
        name,
        f"model: {name} ({size} parameters) with {chosen.name}, which asks for {format_bytes(chosen.needed)}",
    )


def _asked(planner: Planner, plan: Plan) -> list[Candidate]:
    """Return the candidates to ask: the chosen one, and the one that needs the least at the same rows."""
    rows = planner.settled.micro_batch or 1  # which every candidate was traced for

    def needs(candidate: Candidate) -> int:
        recipe = replace(candidate.recipe, {"micro_batch": rows})
        return needed(planner.predictor.ledger(recipe), recipe)

    leanest = min(plan.candidates, key=needs)
    return [leanest] if plan.chosen in (None, leanest) else [plan.chosen, leanest]


def _fits(planner: Planner, recipe: Recipe) -> bool:
    found = planner.predictor.ledger(recipe)
    limits = {"host": planner.host, "disk": planner.disk}
    return needed(found, recipe) <= planner.budget and all(
        limit is None or found.peak_at(place) <= limit  # type: ignore[arg-type]
        for place, limit in limits.items()
    )


def _longest(planner: Planner) -> int:
    return planner.predictor.profiles.dimensions().context or LONGEST_SEQ


def _largest(fits: Callable[[int], bool], high: int) -> int:
    """Return the largest number from 1 to `high` that fits, where all smaller ones do; 0 if none."""
    if high < 1 or not fits(1):
        return 0
    good, bad = 1, high + 1
    while good < high and bad > high:
        trial = min(2 * good, high)
        good, bad = (trial, bad) if fits(trial) else (good, trial)
    while bad - good > 1:
        trial = (good + bad) // 2
        good, bad = (trial, bad) if fits(trial) else (good, trial)
    return good
