"""The catalogue: every piece a recipe can name, and every method as the pieces it is made of.

Two tables of plain data, free of torch, so that validation, suggestions and `scrimp methods` are
instant. A *piece* is one value of one of the six choices and says where its builder lives
(`module:function`); `scrimp.build` is the one place that imports it. A *method* is what a paper or
a library gives a name to: one piece for each choice it makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scrimp.base.errors import ScrimpError
from scrimp.base.suggest import did_you_mean

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
        lr_ratio: Of an optimizer: its learning rate over AdamW's, as its source states; `--lr auto` and the
            bench's search start there.
    """

    choice: Choice
    name: str
    builder: str
    summary: str
    gives_up: str = ""
    rank: int = 0
    lr_ratio: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A named method: the pieces it is made of. What its paper reports stands in `scrimp.reported`.

    Attributes:
        name: Its name in the catalogue.
        pieces: The piece for each choice that it makes; the other choices stay free.
        terms: Which of the memory terms it changes, and to what.
        source: Paper or library.
    """

    name: str
    pieces: dict[Choice, str]
    terms: str
    source: str


PIECES: tuple[Piece, ...] = (
    Piece(
        choice="weights",
        name="dense",
        builder="scrimp.weights.dense:dense",
        summary="every matrix as an ordinary nn.Linear",
    ),
    Piece(
        choice="tune",
        name="full",
        builder="scrimp.tuning.full:full",
        summary="every parameter trains, all the time",
    ),
    Piece(
        choice="gradient",
        name="backprop",
        builder="scrimp.gradient.backprop:backprop",
        summary="exact gradients by backpropagation, summed over micro-batches",
    ),
    Piece(
        choice="optimizer",
        name="adamw",
        builder="scrimp.optim.named:adamw",
        summary="Adam with decoupled weight decay, two moments a parameter (torch's fused kernel)",
    ),
    Piece(
        choice="activations",
        name="everything",
        builder="scrimp.activations.everything:everything",
        summary="the backward pass keeps all it needs",
    ),
    Piece(
        choice="activations",
        name="recompute",
        builder="scrimp.activations.recompute:recompute",
        summary="whole decoder layers run again in the backward pass: only their inputs are kept",
    ),
    Piece(
        choice="activations",
        name="recompute-keep-attention",
        builder="scrimp.activations.recompute:recompute_keep_attention",
        summary="whole layers run again, but the attention kernel's output is kept",
    ),
    Piece(
        choice="activations",
        name="recompute-keep-matmuls",
        builder="scrimp.activations.recompute:recompute_keep_matmuls",
        summary="products and attention are kept; what is element by element runs again",
    ),
    Piece(
        choice="activations",
        name="recompute-mlp",
        builder="scrimp.activations.recompute:recompute_mlp",
        summary="MLPs and norms run again; attention is kept",
    ),
    Piece(
        choice="loss",
        name="logits",
        builder="scrimp.activations.loss:logits",
        summary="cross-entropy over all logits of a micro-batch at once, as transformers does",
    ),
    Piece(
        choice="loss",
        name="chunked",
        builder="scrimp.activations.loss:chunked",
        summary="the same cross-entropy and gradients from a few hundred tokens' logits at a time",
    ),
    Piece(
        choice="placement",
        name="device",
        builder="scrimp.placement.device:device",
        summary="everything lives on the training device",
    ),
)

METHODS: tuple[Method, ...] = (
    Method(
        name="adamw",
        pieces={"optimizer": "adamw"},
        terms="optimizer state: 8 bytes a parameter (two fp32 moments)",
        source="Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101; torch.optim.AdamW(fused=True)",
    ),
)


def names(choice: Choice) -> tuple[str, ...]:
    """Return the names a recipe may give for `choice`."""
    return tuple(piece.name for piece in PIECES if piece.choice == choice)


def piece(choice: Choice, name: str) -> Piece:
    """Look a piece up.

    Raises:
        ScrimpError: There is none of that name; the message names the nearest and all of them.
    """
    for candidate in PIECES:
        if candidate.choice == choice and candidate.name == name:
            return candidate
    known = names(choice)
    field = "activations.loss" if choice == "loss" else f"{choice}.name"
    raise ScrimpError(f"{field}: there is no {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
