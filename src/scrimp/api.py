"""The Python entry: a recipe in, a finished run out."""

from __future__ import annotations

from pathlib import Path

from scrimp.build import inspect
from scrimp.recipe import Recipe
from scrimp.report.lines import LineReporter
from scrimp.training.run import Run, execute
from scrimp.training.start import choose_start


def train(recipe: Recipe, *, out: str | Path | None = None, resume: bool = False) -> Run:
    """Train a model by a recipe.

    Args:
        recipe: What to run; `Recipe()` is the default run.
        out: The run's folder; None is `runs/NAME-N` with the first free N.
        resume: Go on with the run in `out`, exactly as if it had not stopped.

    Returns:
        The finished run.

    Raises:
        ScrimpError: The recipe, the data or the machine do not allow it; the message says what to do.
        Interrupted: A signal stopped it; it was saved unless no step was done.
    """
    start = choose_start(recipe, out=None if out is None else Path(out), resume=resume)
    return execute(start, inspect(start.recipe), LineReporter())
