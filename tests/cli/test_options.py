"""The options of `scrimp train` are the fields of a recipe, no more and no fewer."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from scrimp.cli import app, options
from scrimp.memory.command import _option
from scrimp.methods import PIECES
from scrimp.recipe import SHORT as SHORT_NAMES
from scrimp.recipe import Recipe, fields, flat, replace

# The short names that exist, as the project's users may rely on them.
SHORT = {
    *("--model", "--data", "--weights", "--tune", "--optimizer", "--lr", "--steps", "--tokens", "--batch"),
    *("--micro-batch", "--seq", "--clip", "--seed", "--precision", "--device", "--threads", "--memory"),
    *("--log", "--out", "--resume", "--overwrite", "--merge", "--placement"),
}
# What is no part of a recipe, and the fields at its top that are named in full.
RUN = {"--out", "--resume", "--overwrite", "--dry-run", "--cache", "--trust-remote-code", "--json", "--help"}
IN_FULL = {"--deterministic", "--strict", "--compile", "--nonfinite"}


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
    """Return every option of `train` by each of its names."""
    command: Any = typer.main.get_command(app)
    return {
        name: option
        for option in command.commands["train"].params
        for name in (*option.opts, *option.secondary_opts)
        if name.startswith("-")
    }


def test_every_field_has_exactly_one_dotted_name(declared: dict[str, Any]) -> None:
    dotted = [f"--{field.replace('_', '-')}" for field in fields()]
    assert len(dotted) == len(set(dotted)) > 30
    assert set(dotted) <= declared.keys()
    shown = {name for name in declared if not name.startswith("--no-")}
    assert {name for name in shown if "." in name} == {name for name in dotted if "." in name}


def test_the_short_names_are_those_of_the_contract(declared: dict[str, Any]) -> None:
    undotted = {name for name in declared if "." not in name and not name.startswith("--no-")}
    assert undotted - RUN - IN_FULL | (RUN & SHORT) == SHORT


def test_no_option_is_declared_twice(declared: dict[str, Any]) -> None:
    names = [name for field in fields() for name in options.option_names(field)]
    assert len(names) == len(set(names))
    assert set(names) <= declared.keys()


@pytest.mark.parametrize("short", sorted(SHORT_NAMES.values()))
def test_a_short_name_and_its_dotted_one_say_the_same(short: str, declared: dict[str, Any]) -> None:
    field = next(field for field, name in SHORT_NAMES.items() if name == short)
    assert declared[f"--{short}"] is declared[f"--{field.replace('_', '-')}"]


def test_a_recipe_cannot_name_code_or_its_own_folder() -> None:
    assert not {"out", "trust_remote_code", "cache", "resume", "overwrite"} & fields().keys()


def test_help_shows_what_every_field_means(declared: dict[str, Any]) -> None:
    seen = 0
    for field, info in fields().items():
        assert info.description, field
        assert info.description in declared[f"--{field.replace('_', '-')}"].help
        seen += 1
    assert seen == len(fields())


VALUES = {
    "tune.order": "descending",
    "tune.dropout": "0.5",
    "tune.density": "0.5",
    "weights.options": "variant=paper",
    "tune.options": "mask=snip",
    "tune.variant": "paper",
    "optimizer.options": "gamma=none",
    "optimizer.momentum": "0.5",
    "optimizer.density": "0.5",
    "optimizer.store": "8bit",
    "optimizer.variant": "paper",
    "schedule.exponent": "-0.7",
    "model.name": "llama-9m",
    "data.path": "x.txt",
    "data.tokenizer": "t",
    "data.text_key": "body",
    "data.packing": "padded",
    "data.boundaries": "isolate",
    "data.long": "cut",
    "model.init": "scratch",
    "optimizer.betas": "0.8,0.95",
    "schedule.name": "wsd",
    "precision": "bf16",
    "device": "cpu",
    "memory": "2GiB",
    "nonfinite": "skip",
    "log": "tensorboard",
    "schedule.floor": "0.5",
    "data.held_out": "0.5",
    "micro_batch": "3",
}


def _its_piece(field: str) -> dict[str, str]:
    """Return the piece that takes an option which the default one does not, as fields of a recipe."""
    choice, _, option = field.partition(".")
    takers = [entry for entry in PIECES if entry.choice == choice and option in entry.options]
    default = getattr(getattr(Recipe(), choice, None), "name", None)
    if not takers or default in [entry.name for entry in takers]:
        return {}
    adapter = {"tune.name": "lora"} if choice == "weights" and takers[0].freezes_base else {}
    return {f"{choice}.name": takers[0].name, **adapter}


def test_every_option_reaches_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each field is given a value of its own by the command line, and found in the recipe."""
    reached, stated = 0, dict[str, Any]()
    command: Any = typer.main.get_command(app)
    for field, info in fields().items():
        default = info.get_default(call_default_factory=True)
        is_flag = info.annotation in (bool, bool | None)
        name = f"--{field.replace('_', '-')}"
        value = VALUES.get(field, default if isinstance(default, str) else "7")
        arguments = [name] if is_flag else [name, value]
        with command.commands["train"].make_context("train", arguments) as context:
            given = {key: v for key, v in context.params.items() if v not in (None, False, [], ())}
        assert list(given) == [options._PREFIX + field.replace(".", "__")]
        recipe = replace(Recipe(), {**_its_piece(field), field: next(iter(given.values()))})
        stated = flat(recipe, stated_only=True)
        assert stated.keys() == {field, *_its_piece(field)}
        assert stated[field] is not None
        reached += 1
    assert reached == len(fields())


FLAGS = [field for field, info in fields().items() if info.annotation in options.FLAGS]


@pytest.mark.parametrize("field", FLAGS)
def test_a_flag_of_a_file_can_be_unset(field: str) -> None:
    given: list[dict[str, Any]] = []

    def take(stated: dict[str, Any]) -> None:
        """Take what was stated."""
        given.append(stated)

    made = typer.Typer()
    made.command()(options.with_recipe_options(take))
    for word in ("", "no-"):
        result = CliRunner().invoke(made, [f"--{word}{field.replace('_', '-')}"])
        assert result.exit_code == 0, result.output
    assert given == [{field: True}, {field: False}]


@pytest.mark.parametrize("field", FLAGS)
@pytest.mark.parametrize("value", [True, False])
def test_a_plans_command_states_a_flag_as_it_is(field: str, value: bool, declared: dict[str, Any]) -> None:
    word = _option(SHORT_NAMES.get(field, field).replace("_", "-"), value)
    assert word.startswith("--no-") is not value
    assert declared[word].name.endswith(field.replace(".", "__"))


def test_data_may_be_named_several_times() -> None:
    command: Any = typer.main.get_command(app)
    arguments = ["--data", "a.txt", "--data", "b.txt"]
    with command.commands["train"].make_context("train", arguments) as context:
        given = context.params[options._PREFIX + "data__path"]
    assert replace(Recipe(), {"data.path": given}).data.path == ("a.txt", "b.txt")


def test_commands_keep_their_docstrings_and_hide_nothing_behind_kwargs() -> None:
    from scrimp.cli import COMMANDS

    assert len(COMMANDS) == 11
    for command in COMMANDS.values():
        kinds = {parameter.kind for parameter in inspect.signature(command).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
        assert command.__doc__


def test_options_do_not_import_torch() -> None:
    source = Path(options.__file__).read_text()
    assert "torch" not in source
