"""A candidate of a plan as the command that runs it."""

from __future__ import annotations

import shlex

from scrimp.memory.planner import FIELDS, Candidate
from scrimp.recipe import SHORT, Recipe, flat


def command_of(candidate: Candidate, asked: Recipe) -> str:
    """Return the command that runs a candidate."""
    recipe = candidate.recipe
    values = {**flat(asked, stated_only=True), **{name: flat(recipe)[name] for name in FIELDS.values()}}
    values |= {"precision": recipe.precision, "micro_batch": recipe.micro_batch}
    default = flat(Recipe())
    shown = {n: v for n, v in values.items() if v != default[n] or n == "model.name"}
    words = [_option(SHORT.get(n, n).replace("_", "-"), v) for n, v in shown.items()]
    return " ".join(["scrimp train", *words])


def _option(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    if name == SHORT["data.path"] and isinstance(value, tuple):
        return " ".join(f"--{name} {shlex.quote(path)}" for path in value)
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"--{name} {shlex.quote(text)}"
