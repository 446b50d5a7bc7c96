"""The recipe: typed, frozen, strict about its keys, and the same in every way of writing it."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from scrimp.base.errors import ScrimpError
from scrimp.methods import PIECES
from scrimp.recipe import Recipe, fields, flat, nest, parse, replace

CHOICES = ("weights", "tune", "gradient", "optimizer", "activations", "placement")


def test_the_default_recipe_states_nothing() -> None:
    assert flat(Recipe(), stated_only=True) == {}
    assert parse({}) == Recipe()


def test_the_six_choices_are_there_with_model_data_and_schedule() -> None:
    assert {*CHOICES, "model", "data", "schedule", "memory"} <= Recipe.model_fields.keys()
    assert {piece.choice for piece in PIECES} == {*CHOICES, "loss"}  # which is a field of the activations
    assert "activations.loss" in fields()


def test_a_recipe_is_frozen_through_and_through() -> None:
    recipe = Recipe()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.optimizer.lr = 1.0  # type: ignore[misc]
    assert hash(recipe) == hash(Recipe())


def test_flat_and_nest_are_inverse() -> None:
    values = flat(Recipe())
    assert values.keys() == fields().keys()
    assert parse(nest(values)) == Recipe()
    assert nest({"a.b.c": 1, "a.d": 2, "e": 3}) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_section_may_be_written_as_its_first_field_alone(choice: str) -> None:
    name = getattr(Recipe(), choice).name
    short, long = parse({choice: name}), parse({choice: {"name": name}})
    assert short == long
    assert flat(short, stated_only=True) == {f"{choice}.name": name}


def test_one_path_or_several_are_the_same_field() -> None:
    assert parse({"data": "a.txt"}).data.path == ("a.txt",)
    assert parse({"data": ["a.txt", "b,c.txt"]}).data.path == ("a.txt", "b,c.txt")
    assert parse({"data": {"path": "a,b.txt"}}).data.path == ("a,b.txt",)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "1.5K", 1500),
        ("tokens", "20M", 20_000_000),
        ("batch", "16", 16),
        ("optimizer.lr", "3e-4", 3e-4),
        ("optimizer.lr", "auto", "auto"),
        ("optimizer.betas", "0.9,0.95", (0.9, 0.95)),
        ("seed", "7", 7),
        ("clip", "0", 0.0),
        ("log", "wandb,tensorboard", ("wandb", "tensorboard")),
        ("memory", "6 GiB", "6 GiB"),
        ("micro_batch", "auto", None),
        ("tune.options", "mask=snip", ("mask=snip",)),
        ("optimizer.options", "theta = 1,gammas=0.6, 0.8", ("gammas=0.6,0.8", "theta=1")),
        ("optimizer.options", "", ()),
    ],
)
def test_text_and_typed_values_mean_the_same(name: str, text: str, value: Any) -> None:
    from_text = replace(Recipe(), {name: text})
    assert flat(from_text)[name] == value
    assert replace(Recipe(), {name: value}) == from_text


def test_an_unknown_key_names_the_nearest_with_its_full_path() -> None:
    for data, nearest in (
        ({"optimiser": "adamw"}, "optimizer"),
        ({"optimizer": {"weigth_decay": 0}}, "optimizer.weight_decay"),
        ({"step": 3}, "steps"),
        ({"schedule": {"warm_up": 3}}, "schedule.warmup"),
    ):
        with pytest.raises(ScrimpError, match=f"did you mean '{nearest}'"):
            parse(data)


def test_an_error_says_where_what_and_what_is_allowed() -> None:
    with pytest.raises(ScrimpError) as caught:
        parse({"schedule": {"name": "cosinus"}}, where="my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml: schedule.name = 'cosinus': ")
    assert "'constant', 'linear', 'cosine', 'wsd' or 'power'" in message
    assert "did you mean 'cosine'?" in message


@pytest.mark.parametrize("lr", [0, -1, "fast"])
def test_an_error_of_a_field_of_two_types_names_the_field_alone(lr: Any) -> None:
    with pytest.raises(ScrimpError, match=rf"recipe: optimizer\.lr = {lr!r}: input should be"):
        parse({"optimizer": {"lr": lr}})


def test_an_unknown_piece_is_refused_once_not_with_its_path_twice() -> None:
    with pytest.raises(ScrimpError) as caught:
        parse({"optimizer": "adamv"})
    said = "recipe: optimizer.name: there is no 'adamv' (did you mean 'adamw'?); known: adamw, adamw-8bit, "
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    "data",
    [
        {"steps": 10, "tokens": 100},
        {"batch": 8, "micro_batch": 3},
        {"steps": 1.5},
        {"steps": True},
        {"seed": -1},
        {"seed": 1.5},
        {"optimizer": {"lr": float("inf")}},
        {"optimizer": {"betas": [0.9]}},
        {"optimizer": {"betas": [0.9, 1.0]}},
        {"optimizer": {"betas": [0.9, float("nan")]}},
        {"data": {"held_out": 1.0}},
        {"data": {"text_key": ""}},
        {"model": ""},
        {"model": None},
        {"memory": "6 elephants"},
        {"log": ["csv"]},
        {"clip": "nan"},
        {"compile": "maybe"},
        {"tune": {"options": "mask"}},
        {"tune": {"options": "=snip"}},
        {"tune": {"options": "mask="}},
        {"tune": {"options": {"mask": []}}},
        {"tune": {"options": "mask=snip,mask=random"}},
        {"tune": {"options": 5}},
        {"tune": {"options": [{"mask": "snip"}]}},
    ],
)
def test_what_makes_no_sense_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ScrimpError):
        parse(data)


def test_replace_validates_anew_and_remembers_what_was_stated() -> None:
    recipe = replace(parse({"batch": 8, "seed": 3}), {"micro_batch": 4})
    assert flat(recipe, stated_only=True) == {"batch": 8, "seed": 3, "micro_batch": 4}
    with pytest.raises(ScrimpError, match="does not divide"):
        replace(recipe, {"batch": 6})
    with pytest.raises(ScrimpError, match="there is no field 'batches'"):
        replace(recipe, {"batches": 6})


def test_every_field_is_described_and_no_two_mean_the_same() -> None:
    descriptions = [info.description for info in fields().values()]
    assert all(descriptions)
    assert len(set(descriptions)) == len(descriptions) > 30
