"""Recipes as YAML files: read safely, written in full.

A file that a run wrote also holds `recorded`: the versions, device and data it ran with. It is no
part of the recipe; reading one with other versions is allowed, and the differences are named.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scrimp.base.errors import ScrimpError
from scrimp.recipe import Recipe, flat, nest, parse

RECORDED = "recorded"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeFile:
    """A recipe as it stood in a file.

    Attributes:
        recipe: The recipe.
        recorded: What the run that wrote the file ran with (versions, device, data); empty in a
            file written by hand.
    """

    recipe: Recipe
    recorded: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> RecipeFile:
    """Read a recipe from a YAML file.

    Raises:
        ScrimpError: The file is missing, is no YAML, would build objects, or holds no valid recipe.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScrimpError(f"{path}: there is no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ScrimpError(f"{path}: it cannot be read as a recipe: {error}") from None
    except yaml.constructor.ConstructorError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise ScrimpError(f"{path}{line}: a recipe holds plain values only: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ScrimpError(f"{path}: it is not YAML: {' '.join(str(error).split())}") from None
    data = {} if data is None else data
    recorded = data.pop(RECORDED, None) if isinstance(data, dict) else None
    if not isinstance(recorded, dict | None):
        raise ScrimpError(f"{path}: {RECORDED!r} is what a run wrote there, a mapping; remove it")
    return RecipeFile(recipe=parse(data, where=str(path)), recorded=recorded or {})


def dumps(recipe: Recipe, recorded: dict[str, Any] | None = None) -> str:
    """Write every field of a recipe as YAML, with what the run ran with."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in flat(recipe).items()}
    tree = nest(plain)
    if recorded:
        tree[RECORDED] = recorded
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file, such as a run's `recipe.yaml`.

    Raises:
        ScrimpError: The file is missing, is no YAML, would build objects, or holds no valid recipe.
    """
    return read(Path(path)).recipe
