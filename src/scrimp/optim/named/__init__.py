"""The named optimizers: each a composition of a few lines with its paper's defaults.

All take a model, parameters, named parameters, or parameter groups, and return an `Optimizer`. Options that
all take besides their own, the first two also for a group alone:

    store         how moments are kept: fp32, bf16, bf16-nearest, 8bit, 4bit, fp8, fp8-plain
    reset_every   zero the moments every so many updates (0: never)
    seed          of every random draw
    maximize      climb instead of descending
    compile       run the arithmetic as compiled functions, after seconds of compiling at the first step:
                  several times faster, but where a kernel of our own does it already
"""

from __future__ import annotations

from scrimp.optim.named.adam import SPAM, AdamMini, AdamW, AdamW4bit, AdamW8bit, AdamWFP8, StableSPAM
from scrimp.optim.named.apollo import Apollo, ApolloMini
from scrimp.optim.named.galore import GaLore, GaLore8bit, NaturalGaLore, QGaLore
from scrimp.optim.named.low_rank import DCTAdamW, Fira, Frugal
from scrimp.optim.named.others import SGDM, SM3, Adafactor, Lion, Lion8bit

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
    "DCTAdamW",
    "Fira",
    "Frugal",
    "GaLore",
    "GaLore8bit",
    "Lion",
    "Lion8bit",
    "NaturalGaLore",
    "QGaLore",
    "StableSPAM",
]
