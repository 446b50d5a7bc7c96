"""What a recipe says under `options` reaches the function that it is for, in the types that this states."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from torch import nn

from scrimp import assembly, optim
from scrimp.assembly import load_function, takes_besides
from scrimp.base.errors import ScrimpError
from scrimp.methods import PIECES, Piece
from scrimp.recipe import Recipe, parse, replace
from scrimp.recipe_file import dumps, read

MORE = [piece for piece in PIECES if takes_besides(piece.choice, piece.name)]


def as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("piece", MORE, ids=[piece.name for piece in MORE])
def test_every_default_may_be_stated_as_text(piece: Piece) -> None:
    taken = signature(load_function(piece.builder)).parameters
    defaults = {name: taken[name].default for name in takes_besides(piece.choice, piece.name)}
    text = ",".join(f"{name}={as_text(value)}" for name, value in defaults.items())
    recipe = replace(Recipe(), {f"{piece.choice}.name": piece.name, f"{piece.choice}.options": text})
    assert assembly.piece_options(piece.choice, recipe) == defaults


def test_an_optimizer_is_the_one_of_its_python_function() -> None:
    def trained(make: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24))
        optimizer = make(model)
        for _ in range(3):
            model(torch.randn(8, 24)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    stated = {"optimizer.name": "apollo", "optimizer.lr": 0.01, "optimizer.rank": 4, "device": "cpu"}
    plain = replace(Recipe(), stated)
    other = replace(Recipe(), {**stated, "optimizer.options": "gamma=none,proj=svd"})
    by_recipe = trained(lambda model: assembly.make_optimizer(other, model))
    assert torch.equal(
        by_recipe, trained(lambda model: optim.Apollo(model, lr=0.01, rank=4, gamma=None, proj="svd"))
    )
    assert not torch.equal(by_recipe, trained(lambda model: assembly.make_optimizer(plain, model)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("gama=2", "has no 'gama' among them (did you mean 'gamma'?); they may hold side, scale_type"),
        ("gamma=wide", "gamma = 'wide': input should be a valid number"),
        ("proj=none", "proj = 'none': input should be 'random' or 'svd'"),
        ("rank=4", "rank is a field of its own: write optimizer.rank"),
        ("lr=4", "lr is a field of its own: write optimizer.lr"),
        ("seed=4", "has no 'seed' among them"),
        ("gamma=inf", "gamma = 'inf': input should be a finite number"),
        ("gamma=nan", "gamma = 'nan': input should be a finite number"),
    ],
)
def test_what_the_function_does_not_take_is_refused(options: str, said: str) -> None:
    recipe = replace(Recipe(), {"optimizer.name": "apollo", "optimizer.options": options})
    with pytest.raises(ScrimpError) as caught:
        assembly.make_optimizer(recipe, nn.Linear(8, 8))
    assert said in str(caught.value)


def test_too_few_values_are_counted() -> None:
    recipe = replace(Recipe(), {"optimizer.name": "stable-spam", "optimizer.options": "gammas=0.7"})
    with pytest.raises(ScrimpError, match=r"gammas = '0\.7': it has 2 values"):
        assembly.make_optimizer(recipe, nn.Linear(8, 8))


def test_a_method_without_any_says_so() -> None:
    recipe = replace(Recipe(), {"optimizer.name": "adamw", "optimizer.options": "gamma=2"})
    with pytest.raises(ScrimpError, match="has no 'gamma' among them; they must be empty"):
        assembly.make_optimizer(recipe, nn.Linear(8, 8))


def test_a_file_keeps_them(tmp_path: Any) -> None:
    recipe = parse({"optimizer": {"name": "stable-spam", "options": {"gammas": [0.6, 0.8], "theta": 1}}})
    assert recipe.optimizer.options == ("gammas=0.6,0.8", "theta=1")
    file = tmp_path / "recipe.yaml"
    file.write_text(dumps(recipe))
    assert read(file).recipe.optimizer == recipe.optimizer
