"""What the catalogue is made of: pieces, and the methods that name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Choice = Literal["weights", "tune", "gradient", "optimizer", "activations", "loss", "placement"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One value of one choice.

    Attributes:
        choice: The choice it is a value of.
        name: Its name in a recipe.
        builder: Where it is built, as `module:function`.
        summary: One line for people.
        gives_up: What a run loses by it, with the evidence; empty where it computes the same.
        rank: How much is lost, from 0 for nothing; the planner takes the lowest that fits.
        options: The fields of the choice's section that it takes, with its defaults.
        lr_ratio: Of an optimizer: its learning rate over AdamW's, as its source states; of a way to tune:
            over that of full tuning. The default rate, `--lr auto` and the bench's search start there.
        freezes_base: Of a way to tune: whether the model's own weights stay as they are. Of a way to keep
            weights: whether they must.
        wraps: Of a way to tune: whether it runs around the model, so that only whole logits come out.
        pages_state: Of a placement: whether the optimizer's state is on the device only while it is used.
    """

    choice: Choice
    name: str
    builder: str
    summary: str
    gives_up: str = ""
    rank: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    lr_ratio: float = 1.0
    freezes_base: bool = False
    wraps: bool = False
    pages_state: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A named method: the pieces it is made of. What its paper reports stands in `scrimp.reported`.

    Attributes:
        name: Its name in the catalogue.
        pieces: The piece for each choice that it makes; the other choices stay free.
        terms: Which of the memory terms it changes, and to what.
        source: Paper or library.
        settings: What it sets besides, by dotted field of a recipe.
    """

    name: str
    pieces: Mapping[Choice, str]
    terms: str
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
