"""Adapters that no type of peft's holds, laid over a loaded base.

Their `adapter_config.json` has `peft_type` SCRIMP, a method's name and its options. The catalogue's builder
makes the adapter anew from these, and what was saved takes the place of what it drew. Plain peft knows no
such type and refuses the folder.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scrimp.base.errors import ScrimpError
from scrimp.methods import piece
from scrimp.tuning import adapter_files
from scrimp.tuning.deltas.delta import AdaptedLinear
from scrimp.tuning.modules.attached import CHILD

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from scrimp.base.protocols import Adapter


def is_ours(folder: Path) -> bool:
    """Tell whether an adapter is of our own form."""
    return adapter_files.read_config(folder).get("peft_type") == adapter_files.OWN


def lay_over(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return a base model with an adapter of our own: merged where that is possible.

    Args:
        base: The model; it is changed in place.
        folder: The adapter's, whose `peft_type` is SCRIMP.

    Raises:
        ScrimpError: The adapter cannot be read, is of a method that is not known here, or does not fit.
    """
    name, settings, tensors = adapter_files.read_own(folder)
    try:
        tune = _build(name, settings)
        tune.select(base)
    except ScrimpError as error:
        raise ScrimpError(f"adapter {folder}: it does not fit its base: {error}") from error
    _load(tune.stored(base), tensors, folder)
    base.requires_grad_(False)
    if tune.is_mergeable:
        tune.merge(base)
    return base


def is_laid_over(model: nn.Module) -> bool:
    """Tell whether a model holds an adapter of our own that was not merged."""
    return any(isinstance(m, AdaptedLinear) or CHILD in dict(m.named_children()) for m in model.modules())


def _build(name: str, settings: Mapping[str, Any]) -> Adapter:
    builder = pkgutil.resolve_name(piece("tune", name).builder)
    known = inspect.signature(builder).parameters
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise ScrimpError(f"tune {name} has no option {unknown[0]!r}; a newer version wrote it")
    made: Adapter = builder(**options)
    return made


@torch.no_grad()
def _load(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copy saved tensors to where they belong.

    Raises:
        ScrimpError: One is missing, left over, or of another shape.
    """
    odd = sorted(places.keys() ^ tensors.keys())
    if odd:
        where = "its base has no place for" if odd[0] in tensors else "it lacks"
        raise ScrimpError(
            f"adapter {folder}: {where} tensor {odd[0]}; is it the base that it was trained on?"
        )
    for name, place in places.items():
        if place.shape != tensors[name].shape:
            raise ScrimpError(
                f"adapter {folder}: tensor {name} is {tuple(tensors[name].shape)} and its base has "
                f"{tuple(place.shape)}; is it the base that it was trained on?"
            )
        place.copy_(tensors[name])
