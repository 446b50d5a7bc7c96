"""Optimizers: how a gradient becomes a step. This package needs torch alone.

    from scrimp.optim import GaLore
    optimizer = GaLore(model, lr=1e-2, rank=128)

A step is made of pieces (`scrimp.optim.pieces`); every method of `scrimp.optim.named` is a few of them put
together, and `Optimizer` runs any composition.
"""

from __future__ import annotations

from scrimp.optim.named import (
    SGDM,
    SM3,
    SPAM,
    Adafactor,
    AdamMini,
    AdamW,
    AdamW4bit,
    AdamW8bit,
    AdamWFP8,
    Apollo,
    ApolloMini,
    DCTAdamW,
    Fira,
    Frugal,
    GaLore,
    GaLore8bit,
    Lion,
    Lion8bit,
    NaturalGaLore,
    QGaLore,
    StableSPAM,
)
from scrimp.optim.optimizer import Optimizer
from scrimp.optim.pieces import Composition

__all__ = [
    "SGDM",
    "SM3",
    "SPAM",
    "Adafactor",
    "AdamMini",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "AdamWFP8",
    "Apollo",
    "ApolloMini",
    "Composition",
    "DCTAdamW",
    "Fira",
    "Frugal",
    "GaLore",
    "GaLore8bit",
    "Lion",
    "Lion8bit",
    "NaturalGaLore",
    "Optimizer",
    "QGaLore",
    "StableSPAM",
]
