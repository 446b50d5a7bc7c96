"""Recipes as YAML: what is written is read back, and nothing but plain values is ever built."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import scrimp
from scrimp.base.errors import ScrimpError
from scrimp.recipe import Recipe, flat, parse, replace
from scrimp.recipe_file import dumps, load_recipe, read

FULL = {
    "model.name": "a folder/with: colons #and more",
    "data.path": ("été/*.txt", "-b", "1e3", "yes"),
    "data.tokenizer": "0x1f",
    "optimizer.lr": 1e-5,
    "optimizer.betas": (0.5, 0.999),
    "optimizer.eps": 1e-30,
    "steps": 10**12,
    "memory": "6GiB",
    "log": ("wandb", "trackio"),
    "compile": False,
    "deterministic": True,
}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    recipe = replace(Recipe(), FULL)
    recorded = {"torch": "2.13.0", "fixed_bytes": 12345678, "python": "3.10"}
    path = tmp_path / "recipe.yaml"
    path.write_text(dumps(recipe, recorded), encoding="utf-8")
    found = read(path)
    assert found.recipe == recipe
    assert found.recorded == recorded
    assert load_recipe(str(path)) == recipe
    assert dumps(found.recipe, found.recorded) == path.read_text(encoding="utf-8")


def test_a_file_holds_every_field_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dumps(Recipe()))
    assert flat(read(path).recipe, stated_only=True).keys() == flat(Recipe()).keys()


def test_an_empty_file_is_the_default_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for content in ("", "# nothing yet\n", "---\n"):
        path.write_text(content)
        assert read(path).recipe == Recipe()
        assert read(path).recorded == {}


def test_numbers_may_be_written_as_people_do(tmp_path: Path) -> None:
    """YAML 1.1 reads `3e-4` as a text and `20M` is one."""
    path = tmp_path / "recipe.yaml"
    path.write_text("optimizer: {lr: 3e-4}\ntokens: 20M\nmemory: 6GiB\ndata: [a.txt, b.txt]\n")
    expected = {"optimizer": {"lr": 3e-4}, "tokens": 20_000_000, "memory": "6GiB", "data": ["a.txt", "b.txt"]}
    assert read(path).recipe == parse(expected)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system",
        "!!python/object/new:pathlib.Path ['x']",
        "!!python/module:os",
        "!Recipe {seed: 1}",
    ],
)
def test_nothing_but_plain_values_is_built(tmp_path: Path, tag: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"seed: 1\nmodel: {tag}\n")
    with pytest.raises(ScrimpError, match=re.escape(f"{path}:2: a recipe holds plain values only")):
        read(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a: [", "it is not YAML"),
        (b"\xff\xfe", "cannot be read as a recipe"),
        (b"a\0b: 1", "it is not YAML"),
        (b"- 1\n", "not list"),
        (b"recorded: {torch: 1}\nfoo: 1\n", "there is no field 'foo'"),
        (b"recorded: yes\n", "recorded"),
        (b"model: 2020-01-01\n", "model.name"),
    ],
)
def test_what_is_no_recipe_is_refused_with_the_file_s_name(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ScrimpError, match=re.escape(sentence)) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(scrimp.ScrimpError, match=r"gone\.yaml: there is no such recipe file"):
        scrimp.load_recipe(tmp_path / "gone.yaml")
