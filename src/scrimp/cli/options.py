"""A recipe's fields as command-line options: every field has its dotted name, some a short one too.

The options are made from the fields themselves, so that the two cannot drift apart. Values stay text
until the recipe validates them, which gives one wording of each mistake for YAML and command line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from scrimp.base.errors import ScrimpError
from scrimp.recipe import SHORT, fields

FLAGS = (bool, bool | None)
_PREFIX, _UNSET = "field_", "unset_"


def option_names(field: str) -> list[str]:
    """Return the option names of a dotted field, the short one first."""
    names = [SHORT[field], field] if field in SHORT else [field]
    return [f"--{name.replace('_', '-')}" for name in names]


def with_recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every field of a recipe; they arrive as the mapping `stated`.

    Args:
        command: A function whose parameter `stated` takes the given values by dotted name.
    """
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "stated"]
    in_order = [*SHORT, *sorted(fields(), key=_is_usual, reverse=True)]
    made = {_PREFIX + field.replace(".", "__"): field for field in dict.fromkeys(in_order)}

    unset = {f"{_UNSET}{name}": field for name, field in made.items() if fields()[field].annotation in FLAGS}

    def wrapper(**given: Any) -> None:
        stated = {field: given.pop(name) for name, field in made.items()}
        for name, field in unset.items():
            if given.pop(name):
                if stated[field]:
                    one = option_names(field)[0].removeprefix("--")
                    raise ScrimpError(f"--{one} and --no-{one} are both given: keep one")
                stated[field] = False
        command(stated={field: value for field, value in stated.items() if value not in (None, [])}, **given)

    types_of = {name: _annotation(field) for name, field in made.items()}
    types_of |= {name: _unsetting(field) for name, field in unset.items()}
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=each)
        for name, each in types_of.items()
    ]
    types = inspect.get_annotations(command, eval_str=True)
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=types[p.name]) for p in own]
    wrapper.__signature__ = inspect.Signature([*own, *extra])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *extra]}
    wrapper.__doc__, wrapper.__name__ = command.__doc__, command.__name__
    return wrapper


def _annotation(field: str) -> Any:
    info = fields()[field]
    default = info.get_default(call_default_factory=True)
    # Round brackets: square ones would be markup.
    shown = "" if default in (None, (), "auto", False) else f" (default: {_plain(default)})"
    flag = info.annotation in FLAGS
    repeats = field == "data.path" or field.endswith(".options")
    kind = bool | None if flag else list[str] | None if repeats else str | None
    return Annotated[
        kind,
        typer.Option(
            *option_names(field),
            help=f"{info.description}{shown}",
            rich_help_panel="Recipe: the usual" if _is_usual(field) else "Recipe: the rest",
            metavar=None if flag else _metavar(field),
            show_default=False,
        ),
    ]


def _unsetting(field: str) -> Any:
    """Return the option that unsets a flag of a recipe file; in `--help` it would double every flag."""
    names = [f"--no-{name.removeprefix('--')}" for name in option_names(field)]
    return Annotated[bool | None, typer.Option(*names, hidden=True)]


def _metavar(field: str) -> str:
    if field.endswith(".options"):
        return "NAME=VALUE"
    annotation = str(fields()[field].annotation)
    return "N" if "int" in annotation or "float" in annotation else "NAME"


def _is_usual(field: str) -> bool:
    return field in SHORT or "." not in field


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
