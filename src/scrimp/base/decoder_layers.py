"""Where a model's layers are: those that schedules of training choose from, and those to run again.

They are found in the model's structure, since each family has names of its own. The decoder layers are a
list of what transformers marks as layers; in a model without marks (some old ones, and code of a model's
own) any list of modules. Of several it is the one that is as long as the configuration says, which a vision
tower's is not, or the only one that is marked: LongCat's layers count twice. Of those it is the largest: a
list within a layer (experts, say) is smaller. What is marked besides are layers of other stacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_MARK = "GradientCheckpointingLayer"  # transformers' base class of layers, by name: base imports torch alone


def decoder_layers(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the decoder layers of a model, first to last: one list of modules; nothing where it has none."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    marked = [found for found in lists if all(map(_is_marked, found))]
    fitting = [found for found in marked or lists if count in (None, len(found))]
    if not fitting and len(marked) == 1:
        fitting = marked
    fitting.sort(key=_size)
    return tuple(fitting[-1]) if fitting else ()


def all_layers(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the layers of every stack that transformers marks, or else the decoder layers."""
    return tuple(_marked(model)) or decoder_layers(model)


def _is_marked(module: nn.Module) -> bool:
    return any(kind.__name__ == _MARK for kind in type(module).__mro__)


def _marked(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the marked modules below `root`, and none that is within another."""
    for child in root.children():
        if _is_marked(child):
            yield child
        else:
            yield from _marked(child)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
