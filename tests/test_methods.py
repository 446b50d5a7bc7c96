"""The catalogue holds together: every piece can be built, every method is made of pieces."""

from __future__ import annotations

import importlib
from typing import get_args

import pytest

from scrimp.base.errors import ScrimpError
from scrimp.methods import METHODS, PIECES, Choice, Method, Piece, names, piece
from scrimp.recipe import Recipe
from scrimp.reported import sentence


def test_every_choice_has_a_piece_and_the_default_is_one() -> None:
    choices = get_args(Choice)
    assert len(choices) == 7
    for choice in choices:
        value = Recipe().activations.loss if choice == "loss" else getattr(Recipe(), choice).name
        assert value in names(choice)


def test_no_two_pieces_of_a_choice_share_a_name() -> None:
    keys = [(entry.choice, entry.name) for entry in PIECES]
    assert len(keys) == len(set(keys)) >= 6
    assert len({method.name for method in METHODS}) == len(METHODS) >= 1


@pytest.mark.parametrize("entry", PIECES, ids=lambda entry: f"{entry.choice}-{entry.name}")
def test_every_piece_says_where_it_is_built(entry: Piece) -> None:
    module, _, function = entry.builder.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert piece(entry.choice, entry.name) is entry
    assert entry.summary


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_is_made_of_pieces_and_names_its_source(method: Method) -> None:
    assert method.pieces
    for choice, name in method.pieces.items():
        assert name in names(choice)
    assert method.terms
    assert method.source
    assert "arXiv" in method.source or "torch.optim" in method.source
    assert not sentence(method.name) or "arXiv" in sentence(method.name)


def test_an_unknown_piece_names_the_nearest_and_all() -> None:
    with pytest.raises(ScrimpError, match=r"there is no 'adam' \(did you mean 'adamw'\?\); known: adamw"):
        piece("optimizer", "adam")
    with pytest.raises(ScrimpError, match="known: dense"):
        piece("weights", "adamw")  # a name of another choice
    with pytest.raises(ScrimpError, match="qlora is several choices: tune lora, weights nf4; make each"):
        piece("tune", "qlora")
