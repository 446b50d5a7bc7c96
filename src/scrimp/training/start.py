"""Where a run begins: a fresh folder, or the place where an earlier one stopped.

Decided before torch is imported, so that a used folder or a changed option is refused at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scrimp import recipe_file
from scrimp.base.errors import ScrimpError
from scrimp.recipe import Recipe, flat, replace
from scrimp.schedules import in_steps
from scrimp.training.folder import RunFolder

MAY_CHANGE = ("log", "checkpoint.every", "checkpoint.keep")  # of a run that is resumed


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a run begins with.

    Attributes:
        recipe: The recipe to run: the stored one where a run is resumed.
        folder: The run's folder; None takes the next free one.
        asked_to_resume: Whether the run in the folder is to go on, if there is one.
        resuming: Whether there is one.
        overwrite: Whether a run in the folder is to be replaced.
        recorded: What that run ran with.
    """

    recipe: Recipe
    folder: RunFolder | None
    asked_to_resume: bool = False
    resuming: bool = False
    overwrite: bool = False
    recorded: dict[str, Any] = field(default_factory=dict)


def choose_start(recipe: Recipe, *, out: Path | None, resume: bool, overwrite: bool = False) -> Start:
    """Decide where a run begins.

    Args:
        recipe: What the user asked for; fields that were not stated agree with any stored recipe.
        out: The folder; None is the next free one.
        resume: Go on with the run in `out`.
        overwrite: Replace the run in `out`.

    Raises:
        ScrimpError: The folder is taken, or the stored run had other options.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ScrimpError("scrimp runs on one device for now: start it without torchrun, or with one process")
    if resume and overwrite:
        raise ScrimpError("--resume keeps the run in --out and --overwrite replaces it: give one of them")
    if out is None:
        if resume:
            raise ScrimpError("--resume needs the run to go on with: add --out DIR")
        return Start(recipe=recipe, folder=None)
    folder = RunFolder(out)
    if resume and folder.is_run:
        stored = recipe_file.read(folder.recipe)
        return Start(
            recipe=_agreed(recipe, stored.recipe),
            folder=folder,
            asked_to_resume=True,
            resuming=True,
            recorded=stored.recorded,
        )
    folder.check_free(overwrite=overwrite)
    if resume and not {*flat(recipe, stated_only=True)} - {*MAY_CHANGE}:
        raise ScrimpError(
            f"--resume: {out} holds no run to go on with: correct --out, or say what to run there (a recipe, "
            "--model or --data)"
        )
    return Start(recipe=recipe, folder=folder, asked_to_resume=resume, overwrite=overwrite)


def _agreed(asked: Recipe, stored: Recipe) -> Recipe:
    """Return the stored recipe with the changes that are allowed.

    Raises:
        ScrimpError: Another change was asked for.
    """
    changes = {}
    for name, value in flat(asked, stated_only=True).items():
        before = flat(stored)[name]
        if name in MAY_CHANGE:
            changes[name] = value
        elif name == "tokens" and value is not None:
            _check_tokens(value, stored)
        elif value not in (None, "auto") and not _same(name, value, before, stored):
            raise ScrimpError(
                f"{name} is {before!r} in the run to go on with, and {value!r} was asked for: "
                "leave the option out, or start another run with another --out"
            )
    return replace(stored, changes)


def _same(name: str, value: Any, before: Any, stored: Recipe) -> bool:
    if value == before:
        return True
    if name == "data.path":
        return [Path(path).expanduser().absolute() for path in value] == [Path(path) for path in before]
    if name in ("model.name", "data.tokenizer") and before is not None:
        path = Path(value).expanduser().resolve()
        return Path(before) in (path, path / "model")
    if name in ("schedule.warmup", "schedule.decay"):
        assert stored.steps is not None
        least = 1 if name == "schedule.decay" else 0
        return bool(max(least, in_steps(value, stored.steps)) == before)  # the stored one is in steps
    return False


def _check_tokens(tokens: int, stored: Recipe) -> None:
    assert stored.steps is not None and stored.batch is not None and stored.seq is not None
    step = stored.batch * stored.seq
    if -(-tokens // step) != stored.steps:
        raise ScrimpError(
            f"tokens {tokens} are {-(-tokens // step)} steps, and the run to go on with has {stored.steps}: "
            "leave the option out, or start another run with another --out"
        )
