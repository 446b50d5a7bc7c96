"""The parameters of a model by place: its decoder layers, its embeddings, its head and what else there is.

Schedules of what trains (`layer_sampling`, `badam`) stand on it. Places are found in the model's structure
and not by parameters' names, which each family of models has its own of. Oddities:

- Adapters decide what may train at all: in a model that has some (modules around a `base_layer`, as all of
  peft's are), a schedule wakes only what they left unfrozen; in another model it wakes everything. What one
  schedule left asleep in a model with adapters stays so for the next.
- A tied head is the embedding's matrix. It stands in both places, and is one parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from scrimp.base.decoder_layers import decoder_layers
from scrimp.base.errors import ScrimpError

Parameters = tuple[nn.Parameter, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """A model's parameters by place. Every tuple holds such as may train.

    Attributes:
        model: The model.
        modules: Its decoder layers, first to last.
        decoder: Each layer's parameters.
        embedding: Of the embeddings (of tokens, and of positions where they are learnt).
        head: Of all else: the output head, tied or not, the final norm.
        trainable: All of them by name, each once.
    """

    model: nn.Module
    modules: tuple[nn.Module, ...]
    decoder: tuple[Parameters, ...]
    embedding: Parameters
    head: Parameters
    trainable: dict[str, nn.Parameter]


def find_layers(model: nn.Module, *, tune: str) -> Layers:
    """Sort a model's parameters by place, and let all require a gradient that may.

    Args:
        model: A model with one list of decoder layers, as all of transformers' have.
        tune: Who asks, for the message.

    Raises:
        ScrimpError: There is no list of decoder layers.
    """
    modules = decoder_layers(model)
    if not modules:
        raise ScrimpError(
            f"tune {tune}: model {type(model).__name__} has no list of decoder layers to choose from; "
            "use --tune full"
        )
    trainable = _trainable(model)
    allowed = set(trainable.values())

    def of(places: Iterable[nn.Module]) -> Parameters:
        return tuple(dict.fromkeys(p for place in places for p in place.parameters() if p in allowed))

    decoder = tuple(of([module]) for module in modules)
    within = {part for module in modules for part in module.modules()}
    embedding = of(m for m in model.modules() if isinstance(m, nn.Embedding) and m not in within)
    placed = {*embedding, *(p for layer in decoder for p in layer)}
    rest = tuple(p for p in trainable.values() if p not in placed)
    return Layers(
        model=model,
        modules=modules,
        decoder=decoder,
        embedding=embedding,
        head=tuple(dict.fromkeys((*rest, *of(_output_head(model))))),
        trainable=trainable,
    )


def is_adapter(module: nn.Module) -> bool:
    """Tell whether a module is an adapter around another, whose output it adds to or changes."""
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def wake(
    parameters: Iterable[nn.Parameter],
    awake: Collection[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    forget: Literal["all", "asleep", "none"],
) -> None:
    """Let the parameters in `awake` require a gradient, and no other; free what the others held.

    Hooks that were registered on a parameter stay. Doing it twice does no more than doing it once.

    Args:
        parameters: All that may train.
        awake: Those that train now.
        optimizer: Its state for what is forgotten is dropped.
        forget: Whose state: of every parameter, of those asleep, or of none.
    """
    for parameter in parameters:
        is_awake = parameter in awake
        parameter.requires_grad_(is_awake)
        if not is_awake:
            parameter.grad = None
        if forget == "all" or (forget == "asleep" and not is_awake):
            optimizer.state.pop(parameter, None)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    has_adapters = any(is_adapter(module) for module in model.modules())
    for parameter in model.parameters():
        if not has_adapters and parameter.is_floating_point():
            parameter.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _output_head(model: nn.Module) -> list[nn.Module]:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return [head] if isinstance(head, nn.Module) else []
