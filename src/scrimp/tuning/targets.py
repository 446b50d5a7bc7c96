"""Which linear layers an adapter changes.

`all-linear` is every linear layer within the decoder layers; the output head, embeddings and the routers of a
mixture (whose weight is no `nn.Linear`'s in transformers) stay as they are. Other targets are names as peft
takes them: the end of a module's path, such as `q_proj` or `mlp.down_proj`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from scrimp.base.decoder_layers import decoder_layers
from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import QuantizedParameter

ALL_LINEAR = "all-linear"


class Place(NamedTuple):
    """A linear layer that is to be adapted.

    Attributes:
        name: Its path in the model.
        kind: The last word of it, such as `q_proj`.
        number: Among all targets, from 0.
        layer: The decoder layer it lies in, from 0; -1 outside.
        module: It.
    """

    name: str
    kind: str
    number: int
    layer: int
    module: nn.Linear


def find_targets(model: nn.Module, targets: Sequence[str], *, tune: str) -> list[Place]:
    """Find the layers that targets name, in the model's order.

    Args:
        model: The model.
        targets: `all-linear` alone, or ends of paths.
        tune: Who asks, for the message.

    Raises:
        ScrimpError: One matches nothing (the message lists what there is).
    """
    layers = decoder_layers(model)
    within = {id(part): number for number, layer in enumerate(layers) for part in layer.modules()}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    every = tuple(targets) == (ALL_LINEAR,)
    if every:
        found = [name for name, module in linear.items() if id(module) in within]
    else:
        found = [name for name in linear if any(_ends(name, target) for target in targets)]
    missing = [t for t in targets if not every and not any(_ends(name, t) for name in found)]
    if missing or not found:
        what = f"target {missing[0]!r}" if missing else f"target {ALL_LINEAR!r}"
        there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear)) or "none"
        raise ScrimpError(
            f"tune {tune}: {what} matches no linear layer of {type(model).__name__}; there are: {there}; "
            "correct --tune.targets"
        )
    return [
        Place(name, name.rpartition(".")[2], number, within.get(id(linear[name]), -1), linear[name])
        for number, name in enumerate(found)
    ]


def check_rank(places: Sequence[Place], rank: int, *, tune: str) -> None:
    """Refuse a rank above the smaller side of a target.

    Raises:
        ScrimpError: It is; the message names the layer and the largest rank.
    """
    small = min(places, key=lambda place: min(place.module.weight.shape))
    largest = min(small.module.weight.shape)
    if rank > largest:
        sides = " x ".join(map(str, small.module.weight.shape))
        raise ScrimpError(
            f"tune {tune}: rank {rank} does not fit {small.name} ({sides}): the largest allowed is "
            f"{largest}; lower --tune.rank or leave the layer out of --tune.targets"
        )


def check_writable(places: Sequence[Place], *, tune: str) -> None:
    """Refuse targets that are stored as codes, for what writes to the base weights.

    Raises:
        ScrimpError: One is; the message names it.
    """
    for place in places:
        if isinstance(place.module.weight, QuantizedParameter):
            raise ScrimpError(
                f"tune {tune} changes the base weights, and {place.name} is stored as codes: use --weights "
                "dense, or an adapter that leaves them alone, such as --tune lora"
            )


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
