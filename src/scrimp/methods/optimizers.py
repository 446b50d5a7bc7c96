"""The catalogue's optimizers, with each source's defaults.

`rank` is None where the default is a quarter of the model's width, as in the papers' tables. `terms` are
bytes for a matrix of m rows and n columns, m the larger, and rank r; what is not projected keeps Adam's 8 a
parameter. `released` and `paper` say which form a method defaults to where the authors' code is another
algorithm than their paper: always the one that produced the published figures, unless it is plainly broken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scrimp.methods.types import Method, Piece

_EVERY: dict[str, Any] = {"store": "fp32", "reset_every": 0}  # what every optimizer takes
_ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
_BARE: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}  # the papers' H-Adam
_LION: dict[str, Any] = {"betas": (0.9, 0.99), "weight_decay": 0.0}
_LOW_RANK: dict[str, Any] = {"rank": None, "refresh_every": 200, "scale": 0.25}

_SAME = 1  # as good as AdamW in its paper, on the tables' models
_OTHER = 2  # another algorithm, better or worse by the task
_LESS = 3  # worse than AdamW in most published comparisons


def _piece(
    name: str,
    function: str,
    summary: str,
    gives_up: str,
    rank: int,
    lr_ratio: float,
    options: Mapping[str, Any],
) -> Piece:
    """Return an optimizer's piece; `options` are the defaults of its function."""
    return Piece(
        choice="optimizer",
        name=name,
        builder=f"scrimp.optim.named:{function}",
        summary=summary,
        gives_up=gives_up,
        rank=rank,
        lr_ratio=lr_ratio,
        options={**_EVERY, **options},
    )


OPTIMIZERS: tuple[Piece, ...] = (
    _piece("adamw", "AdamW", "Adam with decoupled weight decay, two moments a parameter", "", 0, 1.0, _ADAM),
    _piece(
        "adamw-8bit",
        "AdamW8bit",
        "AdamW with moments in 8-bit blocks",
        "moments of 8 bits (their paper finds AdamW's losses)",
        _SAME,
        1.0,
        {**_ADAM, "store": "8bit"},
    ),
    _piece(
        "adamw-4bit",
        "AdamW4bit",
        "AdamW with moments in 4-bit blocks",
        "moments of 4 bits (relative errors of 15 to 18 %)",
        _OTHER,
        1.0,
        {**_ADAM, "store": "4bit"},
    ),
    _piece(
        "adamw-fp8",
        "AdamWFP8",
        "AdamW with moments in 8-bit floats, stretched to their range",
        "moments of 8 bits (COAT finds AdamW's losses)",
        _SAME,
        1.0,
        {**_ADAM, "store": "fp8"},
    ),
    _piece(
        "adam-mini",
        "AdamMini",
        "Adam with one second moment for each head or row",
        "second moments within heads and rows (its paper finds AdamW's losses)",
        _SAME,
        1.0,
        {**_ADAM, "weight_decay": 0.0},
    ),
    _piece(
        "spam",
        "SPAM",
        "Adam that clips spikes and forgets its moments every 500 steps",
        "moments older than 500 steps (by design)",
        _OTHER,
        1.0,
        {**_BARE, "reset_every": 500, "variant": "paper"},
    ),
    _piece(
        "stable-spam",
        "StableSPAM",
        "Adam on gradients clipped by their running maximum and scaled by their norms",
        "moments older than 1,000 steps (by design)",
        _OTHER,
        1.0,
        {**_ADAM, "weight_decay": 0.0, "reset_every": 1000, "variant": "paper"},
    ),
    _piece(
        "lion",
        "Lion",
        "the sign of an interpolated momentum: one moment",
        "second moments (better or worse than AdamW by the task)",
        _OTHER,
        0.1,
        _LION,
    ),
    _piece(
        "lion-8bit",
        "Lion8bit",
        "Lion with its momentum in 8-bit blocks",
        "second moments, and a momentum of 8 bits",
        _OTHER,
        0.1,
        {**_LION, "store": "8bit"},
    ),
    _piece(
        "sgd-m",
        "SGDM",
        "SGD with momentum: one moment",
        "adaptive learning rates (language models train far slower)",
        _LESS + 1,
        10.0,
        {"momentum": 0.9, "weight_decay": 0.0},
    ),
    _piece(
        "adafactor",
        "Adafactor",
        "second moments by row and column, no first",
        "the first moment, and second moments within a matrix",
        _OTHER,
        1.0,
        {"momentum": 0.0, "weight_decay": 0.0},
    ),
    _piece(
        "sm3",
        "SM3",
        "Adagrad with an accumulator for each row and column, and a momentum",
        "second moments within a matrix, and forgetting",
        _LESS,
        30.0,
        {"momentum": 0.9, "weight_decay": 0.0},
    ),
    _piece(
        "galore",
        "GaLore",
        "Adam in the leading singular subspace of the gradient",
        "what of a gradient lies outside a subspace (C4 perplexity 0.1 to 0.8 above AdamW's)",
        _LESS,
        2.5,
        {**_BARE, **_LOW_RANK, "variant": "released"},
    ),
    _piece(
        "galore-8bit",
        "GaLore8bit",
        "GaLore with moments in 8-bit blocks",
        "what of a gradient lies outside a subspace, and moments of 8 bits",
        _LESS,
        2.5,
        {**_ADAM, **_LOW_RANK, "weight_decay": 0.0, "store": "8bit", "variant": "released"},
    ),
    _piece(
        "q-galore-adam",
        "QGaLore",
        "Q-GaLore's optimizer: 8-bit moments, a 4-bit subspace chosen anew only where it moves",
        "what of a gradient lies outside a subspace, and moments of 8 bits",
        _LESS,
        2.5,
        {
            **_ADAM,
            **_LOW_RANK,
            "betas": (0.9, 0.95),
            "weight_decay": 0.0,
            "store": "8bit",
            "variant": "released",
        },
    ),
    _piece(
        "natural-galore",
        "NaturalGaLore",
        "GaLore on the natural gradient of the subspace",
        "what of a gradient lies outside a subspace (between GaLore and AdamW in its paper)",
        _LESS,
        2.5,
        {**_BARE, **_LOW_RANK, "weight_decay": 0.01, "variant": "released"},
    ),
    _piece(
        "fira",
        "Fira",
        "GaLore, and the rest of the gradient scaled as Adam scaled its part",
        "adaptive learning rates outside a subspace (its paper finds lower perplexities than AdamW's)",
        _OTHER,
        2.5,
        {**_BARE, **_LOW_RANK, "variant": "released"},
    ),
    _piece(
        "apollo",
        "Apollo",
        "the gradient itself, scaled channel by channel as Adam scales a random sketch of it",
        "momentum, and learning rates within a channel (its paper finds lower perplexities than AdamW's)",
        _OTHER,
        2.5,
        {**_BARE, **_LOW_RANK, "scale": 1.0, "variant": "paper"},
    ),
    _piece(
        "apollo-mini",
        "ApolloMini",
        "APOLLO with a sketch of rank 1 and one factor a matrix",
        "momentum, and learning rates within a matrix (its paper finds lower perplexities than AdamW's)",
        _OTHER,
        2.5,
        {"refresh_every": 200, "scale": 128**0.5, "weight_decay": 0.0, "variant": "paper"},
    ),
    _piece(
        "frugal",
        "Frugal",
        "Adam on a quarter of the matrices in turn, the sign of the gradient for the rest",
        "moments of three quarters of the matrices at a time",
        _OTHER,
        1.0,
        {**_ADAM, "weight_decay": 0.0, "density": 0.25, "refresh_every": 200, "scale": 1.0},
    ),
    _piece(
        "dct-adamw",
        "DCTAdamW",
        "Adam in those columns of a fixed cosine basis that fit the gradient best",
        "what of a gradient lies outside a subspace (perplexity 13.7 for AdamW's 11.7 at 800M, as quoted)",
        _LESS,
        1.0,
        {**_ADAM, **_LOW_RANK, "refresh_every": 1, "scale": 1.0},
    ),
)


def _method(name: str, terms: str, source: str) -> Method:
    """Return the method that is an optimizer alone."""
    return Method(name=name, pieces={"optimizer": name}, terms=terms, source=source)


_EIGHT_BIT = "8-bit Optimizers, Dettmers et al., ICLR 2022, arXiv 2110.02861"
_GALORE = "Zhao et al., ICML 2024, arXiv 2403.03507"

OPTIMIZER_METHODS: tuple[Method, ...] = (
    _method(
        "adamw",
        "optimizer state: 8 bytes a parameter (two fp32 moments)",
        "Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101",
    ),
    _method("adamw-8bit", "optimizer state: 2.03 bytes a parameter", _EIGHT_BIT),
    _method(
        "adamw-4bit", "optimizer state: 1.06 bytes a parameter", "Li et al., NeurIPS 2023, arXiv 2309.01507"
    ),
    _method("adamw-fp8", "optimizer state: 2.13 bytes a parameter", "COAT, ICLR 2025, arXiv 2410.19313"),
    _method(
        "adam-mini",
        "optimizer state: 4 bytes a parameter, and 4 for each head or row",
        "Zhang et al., ICLR 2025, arXiv 2406.16793; package 1.1.1",
    ),
    _method(
        "spam",
        "optimizer state: 8 bytes a parameter",
        "Huang et al., ICLR 2025, arXiv 2501.06842; the paper's form without the element mask: "
        "the released one never updates what it first sees late",
    ),
    _method(
        "stable-spam",
        "optimizer state: 8 bytes a parameter",
        "Huang et al., 2025, arXiv 2502.17055; the paper's form: the released one does not clip after resets",
    ),
    _method("lion", "optimizer state: 4 bytes a parameter", "Chen et al., NeurIPS 2023, arXiv 2302.06675"),
    _method("lion-8bit", "optimizer state: 1.02 bytes a parameter", _EIGHT_BIT),
    _method("sgd-m", "optimizer state: 4 bytes a parameter", "torch.optim.SGD, with decoupled decay"),
    _method(
        "adafactor",
        "optimizer state: 4 (m + n) bytes a matrix",
        "Shazeer and Stern, ICML 2018, arXiv 1804.04235; with an explicit rate, as the papers run it",
    ),
    _method(
        "sm3",
        "optimizer state: 4 (m n + m + n) bytes a matrix",
        "Anil et al., NeurIPS 2019, arXiv 1901.11150",
    ),
    _method(
        "galore",
        "optimizer state: 4 (n r + 2 m r) bytes a matrix",
        f"{_GALORE}; the released form: exact singular vectors as they come out",
    ),
    _method("galore-8bit", "optimizer state: 4 n r + 2.03 m r bytes a matrix", _GALORE),
    _method(
        "natural-galore",
        "optimizer state: 4 ((m + n) r + 22 r r) bytes a matrix",
        "Das, 2024, arXiv 2410.16029; the released form projects both sides, which its memory needs",
    ),
    _method(
        "fira",
        "optimizer state: 4 (n r + 2 m r + 1) bytes a matrix; the update reads the whole gradient",
        "Chen et al., NeurIPS 2025, arXiv 2410.01623; the released form, whose scale leaves the rest alone",
    ),
    _method(
        "apollo",
        "optimizer state: 4 (2 m r + 1) bytes a matrix; the update reads the whole gradient",
        "Zhu et al., MLSys 2025, arXiv 2412.05270; the paper's form: a seed is kept, the released code keeps "
        "the matrix",
    ),
    _method(
        "apollo-mini",
        "optimizer state: 4 (2 m + 1) bytes a matrix; the update reads the whole gradient",
        "Zhu et al., MLSys 2025, arXiv 2412.05270",
    ),
    _method(
        "frugal",
        "optimizer state: 8 bytes a parameter of the quarter of the matrices that is awake",
        "Zmushko et al., ICML 2025, arXiv 2411.07837",
    ),
    _method(
        "dct-adamw",
        "optimizer state: 8 m r + 4 r bytes a matrix, and one basis for each width",
        "Modoranu et al., ICLR 2026, arXiv 2505.17967; the paper's basis: the released one breaks on "
        "models of two widths",
    ),
)
