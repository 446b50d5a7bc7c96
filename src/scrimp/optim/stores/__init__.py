"""State stores: how a slot is kept between steps."""

from __future__ import annotations

from collections.abc import Mapping

from scrimp.optim.pieces import Store
from scrimp.optim.stores.bf16 import BF16Nearest, BF16Stochastic
from scrimp.optim.stores.dynamic8 import Dynamic8
from scrimp.optim.stores.four_bit import FourBit
from scrimp.optim.stores.fp8 import FP8
from scrimp.optim.stores.full import Full

STORES: Mapping[str, Store] = {
    "fp32": Full(),
    "bf16": BF16Stochastic(),
    "bf16-nearest": BF16Nearest(),
    "8bit": Dynamic8(),
    "4bit": FourBit(),
    "fp8": FP8(),
    "fp8-plain": FP8(expansion=False),
}
