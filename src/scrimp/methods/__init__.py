"""The catalogue: every piece a recipe can name, and every method as the pieces it is made of.

Tables of plain data, free of torch, so that validation, suggestions and `scrimp methods` are instant. A
*piece* is one value of one of the six choices and says where its builder lives (`module:function`);
`scrimp.build` is the one place that imports it. A *method* is what a paper or a library gives a name to: one
piece for each choice it makes.
"""

from __future__ import annotations

from textwrap import shorten

from scrimp.base.errors import ScrimpError
from scrimp.base.suggest import did_you_mean
from scrimp.methods.adapters import ADAPTER_METHODS, ADAPTERS
from scrimp.methods.optimizers import OPTIMIZER_METHODS, OPTIMIZERS
from scrimp.methods.types import Choice, Method, Piece

__all__ = ["METHODS", "PIECES", "Choice", "Method", "Piece", "names", "options_of", "piece"]

MOST_LISTED = 380  # characters of names in a message

PIECES: tuple[Piece, ...] = (
    Piece(
        choice="weights",
        name="dense",
        builder="scrimp.weights.dense:dense",
        summary="every matrix as an ordinary nn.Linear",
    ),
    Piece(
        choice="weights",
        name="int8",
        builder="scrimp.weights.int8:int8",
        summary="the decoder's matrices in 8 bits, rounded stochastically when they change",
        gives_up="weights of 8 bits (perplexity 0.0 to 0.9 higher on C4 in the papers)",
        rank=3,
        options={"group": 256},
    ),
    Piece(
        choice="weights",
        name="nf4",
        builder="scrimp.weights.nf4:nf4",
        summary="the decoder's matrices in 4 bits that never train, below an adapter that does",
        gives_up="weights of 4 bits (QLoRA's paper finds the scores of adapters over 16 bits)",
        rank=4,
        options={"group": 64, "double": True},
        freezes_base=True,
    ),
    Piece(
        choice="weights",
        name="weight-norm",
        builder="scrimp.weights.weight_norm:weight_norm",
        summary="every row of the decoder's matrices as a length and a direction",
        gives_up="the plain parametrisation (its paper finds better scores)",
        rank=2,
    ),
    Piece(
        choice="tune",
        name="full",
        builder="scrimp.tuning.full:full",
        summary="every parameter trains, all the time",
    ),
    Piece(
        choice="tune",
        name="lisa",
        builder="scrimp.tuning.layer_sampling:LISA",
        summary="a few decoder layers at a time, drawn evenly, and all outside them",
        gives_up="training of all layers at once (LISA's paper finds full tuning's scores)",
        rank=2,
        options={"layers": 2, "every": 20},
    ),
    Piece(
        choice="tune",
        name="owlore",
        builder="scrimp.tuning.layer_sampling:OwLore",
        summary="a few decoder layers at a time, those with outliers more often",
        gives_up="training of all layers at once",
        rank=2,
        options={"layers": 5, "every": 50},
    ),
    Piece(
        choice="tune",
        name="ist",
        builder="scrimp.tuning.layer_sampling:IST",
        summary="a quarter of the layers at a time, by an importance learnt from losses",
        gives_up="training of all layers at once",
        rank=2,
        options={"layers": 0.25, "every": 1},
    ),
    Piece(
        choice="tune",
        name="badam",
        builder="scrimp.tuning.badam:BAdam",
        summary="one decoder layer at a time, in turns",
        gives_up="training of all layers at once; embeddings and head stay as they are",
        rank=3,
        options={"every": 100, "order": "random"},
    ),
    *ADAPTERS,
    Piece(
        choice="gradient",
        name="backprop",
        builder="scrimp.gradient.backprop:backprop",
        summary="exact gradients by backpropagation, summed over micro-batches",
    ),
    *OPTIMIZERS,
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
    Piece(
        choice="placement",
        name="paged-state",
        builder="scrimp.placement.paged_state:paged_state",
        summary="optimizer state comes to the device a parameter at a time; on a CPU it lies in files",
        gives_up="time: the state goes to the host and back once a step, or on a CPU through files",
        pages_state=True,
    ),
)

METHODS: tuple[Method, ...] = (
    *OPTIMIZER_METHODS,
    Method(
        name="q-galore",
        pieces={"weights": "int8", "optimizer": "q-galore-adam"},
        terms="weights: 1.02 bytes a matrix element; optimizer state: 0.5 n r + 2.03 m r bytes a matrix",
        source="Zhang et al., 2024, arXiv 2407.08296; the released form",
    ),
    Method(
        name="q-apollo",
        pieces={"weights": "int8", "optimizer": "apollo"},
        terms="weights: 1.03 bytes a matrix element; optimizer state: 4 (2 m r + 1) bytes a matrix",
        source="Zhu et al., MLSys 2025, arXiv 2412.05270",
        settings={"weights.group": 128, "optimizer.weight_decay": 0.01, "optimizer.eps": 1e-8},
    ),
    Method(
        name="q-apollo-mini",
        pieces={"weights": "int8", "optimizer": "apollo-mini"},
        terms="weights: 1.03 bytes a matrix element; optimizer state: 4 (2 m + 1) bytes a matrix",
        source="Zhu et al., MLSys 2025, arXiv 2412.05270",
        settings={"weights.group": 128, "optimizer.weight_decay": 0.01},
    ),
    Method(
        name="gradnormlorp",
        pieces={"weights": "weight-norm", "optimizer": "galore"},
        terms="optimizer state: 4 (n r + 2 m r + 2 m) bytes a matrix; weights: m numbers a matrix more",
        source="Huang et al., AAAI 2025, arXiv 2412.19616; the paper's form: the released code is GaLore "
        "with a full-size copy more",
        settings={"optimizer.refresh_every": 250},
    ),
    Method(
        name="lisa",
        pieces={"tune": "lisa"},
        terms="gradients and optimizer state: those of the layers that are awake, and of all outside them",
        source="Pan et al., NeurIPS 2024, arXiv 2403.17919; the released code never frees what sleeps",
    ),
    Method(
        name="owlore",
        pieces={"tune": "owlore", "optimizer": "galore"},
        terms="gradients and optimizer state: those of the layers that are awake, in a subspace",
        source="Li et al., 2024, arXiv 2405.18380 (with rank 256)",
        settings={"optimizer.refresh_every": 100, "optimizer.scale": 1.0},
    ),
    Method(
        name="badam",
        pieces={"tune": "badam"},
        terms="gradients and optimizer state: one layer's",
        source="Luo et al., NeurIPS 2024, arXiv 2404.02827",
    ),
    Method(
        name="ist",
        pieces={"tune": "ist"},
        terms="gradients: those of the layers that are awake",
        source="Yao et al., Findings of EMNLP 2024, arXiv 2410.11772, and its authors' code",
    ),
    *ADAPTER_METHODS,
    Method(
        name="qlora",
        pieces={"tune": "lora", "weights": "nf4"},
        terms="weights: 0.516 bytes a matrix element; gradients and optimizer state: those of lora",
        source="Dettmers et al., NeurIPS 2023, arXiv 2305.14314",
    ),
)


def names(choice: Choice) -> tuple[str, ...]:
    """Return the names a recipe may give for `choice`."""
    return tuple(piece.name for piece in PIECES if piece.choice == choice)


def piece(choice: Choice, name: str) -> Piece:
    """Look a piece up.

    Raises:
        ScrimpError: There is none of that name; the message names the nearest and those that fit a sentence.
    """
    for candidate in PIECES:
        if candidate.choice == choice and candidate.name == name:
            return candidate
    known = names(choice)
    field = "activations.loss" if choice == "loss" else f"{choice}.name"
    for method in METHODS:
        if method.name == name and len(method.pieces) > 1:
            parts = ", ".join(f"{part} {chosen}" for part, chosen in method.pieces.items())
            raise ScrimpError(f"{field}: {name} is several choices: {parts}; make each of them")
    listed = shorten(", ".join(known), MOST_LISTED, placeholder=" ... (`scrimp methods` lists them all)")
    raise ScrimpError(f"{field}: there is no {name!r}{did_you_mean(name, known)}; known: {listed}")


def options_of(choice: Choice) -> tuple[str, ...]:
    """Return the names of the options that some piece of a choice takes."""
    found = [name for entry in PIECES if entry.choice == choice for name in entry.options]
    return tuple(dict.fromkeys(found))
