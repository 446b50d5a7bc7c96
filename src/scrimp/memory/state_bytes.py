"""How many bytes an optimizer holds: every storage that can be reached from it, counted once.

Packages keep state in more places than `optimizer.state`: in objects inside it (GaLore's projector), in
attributes of the optimizer (BAdam's copies of the active block, bitsandbytes' code books) and inside tensor
subclasses (torchao's codes and scales). Storages are counted, not shapes: a view of r columns keeps the whole
matrix alive, which is what GaLore's projector does in fp32. Parameters and gradients are not state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_OPAQUE = (str, bytes, int, float, complex, type, FunctionType, MethodType, ModuleType, nn.Module)
_NOT_STATE = ("param_groups", "defaults")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of an optimizer's state, on any device."""
    return sum(tensor.untyped_storage().nbytes() for tensor in state_tensors(optimizer))


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return one plain tensor for every storage that an optimizer holds besides its parameters.

    Args:
        optimizer: Its parameters are those of its `param_groups`.
    """
    parameters = {
        _key(part) for group in optimizer.param_groups for p in group["params"] for part in plain(p)
    }
    held = {_key(part): part for tensor in _tensors(optimizer) for part in plain(tensor)}
    return [tensor for key, tensor in held.items() if key not in parameters]


def _key(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata  # of the storage's own record: fake ones have no data
    return address


def plain(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the ordinary tensors that a tensor is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from plain(getattr(tensor, name))


def _tensors(root: object) -> Iterator[Tensor]:
    """Yield every tensor that can be reached from an object, through containers and attributes."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or found is None or isinstance(found, _OPAQUE):
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            yield found
        else:
            waiting.extend(_inside(found))


def _inside(found: object) -> Iterator[Any]:
    if isinstance(found, Mapping):
        # Keys too: state is kept by parameter, and a parameter may be the optimizer's own copy.
        yield from found.keys()
        yield from found.values()
    elif isinstance(found, list | tuple | set | frozenset):
        yield from found
    else:
        attributes = getattr(found, "__dict__", {})
        yield from (value for name, value in attributes.items() if name not in _NOT_STATE)
