"""An optimizer's state as named tensors and plain numbers, and back.

Torch's own `load_state_dict` numbers the parameters by position and casts floating-point state
to the parameter's dtype; codes, scales and fp32 moments of bf16 weights would not survive that.
Here a tensor is called `PARAMETER/KEY` (`model.norm.weight/exp_avg`), keeps its dtype, and is read
straight into its place. Groups are told apart by the parameters they hold, not by their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from scrimp.base.errors import ScrimpError
from scrimp.base.paged import wait_for_host
from scrimp.training.safetensors_stream import StoredTensor, read_header, read_tensors_into

Named = Iterable[tuple[str, Tensor]]


def optimizer_tensors(optimizer: Optimizer, named: Named) -> dict[str, Tensor]:
    """Return the state tensors, not copied, under names that do not depend on position.

    Args:
        optimizer: Any torch optimizer whose state for a parameter is tensors and plain values.
        named: The parameters with their names, as `model.named_parameters()` gives them.

    Returns:
        `PARAMETER/KEY` to the tensor; nothing for parameters that have no state yet.
    """
    wait_for_host(optimizer)
    return {name: value for name, value in _state_items(optimizer, named) if isinstance(value, Tensor)}


def optimizer_numbers(optimizer: Optimizer, named: Named) -> dict[str, Any]:
    """Return all else that an optimizer knows, as plain JSON data.

    Returns:
        `groups`: each group's options with the names of its `params`; `values`: what a parameter's
        state holds besides tensors; `on_host`: the state tensors on the CPU whose parameter is not.
    """
    named = list(named)
    names = _names_by_parameter(named)
    devices = {name: parameter.device for name, parameter in named}
    values: dict[str, Any] = {}
    on_host: list[str] = []
    for name, value in _state_items(optimizer, named):
        if not isinstance(value, Tensor):
            values[name] = _plain(name, value)
        elif value.device.type == "cpu" != devices[name.rpartition("/")[0]].type:
            on_host.append(name)
    groups = [
        {key: _plain(key, value) for key, value in group.items() if key != "params"}
        | {"params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"groups": groups, "values": values, "on_host": on_host}


def load_optimizer(path: Path, optimizer: Optimizer, named: Named, numbers: Mapping[str, Any]) -> None:
    """Give an optimizer the state that was saved, bit for bit, whatever state it had.

    Args:
        path: The safetensors file with what `optimizer_tensors` returned.
        optimizer: One built like the one saved, over parameters of the same names.
        named: The parameters with their names.
        numbers: What `optimizer_numbers` returned.

    Raises:
        ScrimpError: The file or the numbers are of another model or optimizer.
    """
    parameters = dict(named)
    names = _names_by_parameter(parameters.items())
    stored = read_header(path).tensors
    for name in [*stored, *numbers["values"]]:
        if name.rpartition("/")[0] not in parameters:
            raise ScrimpError(f"{path} holds {name!r}, and the model has no such parameter")
    _load_groups(path, optimizer, names, numbers["groups"])

    on_host, pager = set(numbers["on_host"]), getattr(optimizer, "pager", None)
    state: dict[str, dict[str, Any]] = {name: {} for name in names.values()}
    targets: dict[str, Tensor] = {}
    for name, kind in stored.items():
        parameter, _, key = name.rpartition("/")
        device = parameters[parameter].device
        if pager is not None and parameters[parameter].is_contiguous():
            target = pager.zeros(kind.shape, kind.dtype, device)
        else:
            target = _empty(kind, parameters[parameter], torch.device("cpu") if name in on_host else device)
        targets[name] = state[parameter][key] = target
    for name, value in numbers["values"].items():
        parameter, _, key = name.rpartition("/")
        state[parameter][key] = value
    read_tensors_into(path, targets)
    optimizer.state.clear()
    optimizer.state.update({parameters[name]: entries for name, entries in state.items() if entries})


def _names_by_parameter(named: Named) -> dict[Tensor, str]:
    # Tensors hash by identity, so a tied parameter has one entry: its first name's.
    names: dict[Tensor, str] = {}
    for name, parameter in named:
        names.setdefault(parameter, name)
    return names


def _state_items(optimizer: Optimizer, named: Named) -> Iterable[tuple[str, Any]]:
    names = _names_by_parameter(named)
    # In the model's order, not in that of the first updates.
    for parameter, name in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{name}/{key}", value


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):  # a learning rate for compiled steps is a 0-d tensor
        if value.numel() != 1:
            raise TypeError(f"the optimizer's option {name!r} is a tensor of shape {list(value.shape)}")
        return value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{name!r} of the optimizer is {value}, which JSON cannot hold")
    if isinstance(value, (list, tuple)):
        return [_plain(name, item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name!r} of the optimizer is a {type(value).__name__}, neither tensor nor plain value")


def _load_groups(
    path: Path, optimizer: Optimizer, names: Mapping[Tensor, str], stored: list[dict[str, Any]]
) -> None:
    by_members = {frozenset(group["params"]): group for group in stored}
    for group in optimizer.param_groups:
        members = frozenset(names[parameter] for parameter in group["params"])
        if members not in by_members:
            raise ScrimpError(
                f"{path} has no group of the parameters {min(members, default='')!r} and so on: "
                "it is of another model or optimizer"
            )
        options = {key: value for key, value in by_members[members].items() if key != "params"}
        if options.keys() != group.keys() - {"params"}:
            odd = min(options.keys() ^ (group.keys() - {"params"}))
            raise ScrimpError(f"{path} is of another optimizer: the option {odd!r} is not in both")
        for key, value in options.items():
            _set_option(group, key, value)


def _set_option(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group[key], Tensor):
        group[key].fill_(value)  # compiled steps hold on to this very tensor
    else:
        group[key] = tuple(value) if isinstance(group[key], tuple) else value


def _empty(kind: StoredTensor, parameter: Tensor, device: torch.device) -> Tensor:
    if kind.shape == tuple(parameter.shape):  # with the parameter's strides, as fused steps demand
        return torch.empty_like(parameter, dtype=kind.dtype, device=device, requires_grad=False)
    return torch.empty(kind.shape, dtype=kind.dtype, device=device)
