"""Adapters around whole modules: a part changes what goes into a module, or what comes out of it.

A `Delta` (`deltas`) replaces a linear layer's product. What belongs to an MLP or to the whole decoder
has no weight to be a delta of: it is a `Part`, attached to the module by forward hooks and kept as its child
`attached`, so that no path of the base model changes. Some of the model's own parameters may
train with the parts, in the base's dtype and place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import Probe
from scrimp.tuning import adapter_files

CHILD = "attached"
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Part(nn.Module):
    """A change of a module's input or output. What trains is fp32, whatever the base's dtype."""

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Return what the module is called with."""
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return what the module gives.

        Args:
            module: It.
            args: What it was called with.
            kwargs: The same, by name.
            output: What it gave.
        """
        return output

    def can_fold(self, module: nn.Module) -> bool:
        """Tell whether the module's own parameters can hold the change."""
        return False

    def fold(self, module: nn.Module) -> None:
        """Let the module's own parameters hold the change."""
        raise NotImplementedError


@dataclass(slots=True, kw_only=True)
class AttachedTuning:
    """Trains parts.

    Attributes:
        name: What a recipe calls it.
        find: Makes the parts for a model, by the path of their module.
        own: Names the model's own parameters that train with them.
        settings: What the builder was called with; the saved adapter states it, and is read with it.
        is_mergeable: Whether every part can be folded; known after `select`.
    """

    name: str
    find: Callable[[nn.Module], Mapping[str, Part]]
    own: Callable[[nn.Module], Iterable[str]] = lambda model: ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_mergeable: bool = field(default=False, init=False)
    _parts: dict[str, Part] = field(default_factory=dict, init=False, repr=False)
    _own: tuple[str, ...] = field(default=(), init=False, repr=False)
    _handles: list[RemovableHandle] = field(default_factory=list, init=False, repr=False)

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by the path of their module."""
        return dict(self._parts)

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Attach the parts, once, freeze all else, and return what trains by name.

        Raises:
            ScrimpError: There is nothing in the model that a part belongs to.
        """
        if not self._parts:
            self._attach(model)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model itself."""
        return model

    def before_step(self, step: int, optimizer: torch.optim.Optimizer, probe: Probe | None = None) -> None:
        """Do nothing: the same trains at every step."""

    def state(self) -> dict[str, list[float]]:
        """Return nothing: all that changes is tensors."""
        return {}

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Do nothing."""

    def stored(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the parts' tensors, and those of the model's own that train."""
        parts = tuple(f"{name}.{CHILD}.".lstrip(".") for name in self._parts)
        tensors = model.state_dict()
        return {name: t for name, t in tensors.items() if name in self._own or name.startswith(parts)}

    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """Write the adapter in our own form: no type of peft's holds it.

        Args:
            model: The model.
            folder: Where.
            base: The name of the model it belongs to.
        """
        adapter_files.write_own(folder, self.stored(model), base=base, name=self.name, settings=self.settings)

    def merge(self, model: nn.Module) -> None:
        """Fold every part into its module, so that nothing of it is left.

        Raises:
            ScrimpError: One cannot be folded.
        """
        if not self.is_mergeable:
            raise ScrimpError(
                f"tune {self.name} cannot be merged: {type(model).__name__} has no weights for it"
            )
        for handle in self._handles:
            handle.remove()
        for name, part in self._parts.items():
            module = model.get_submodule(name)
            delattr(module, CHILD)
            part.fold(module)
        self._parts.clear()

    def _attach(self, model: nn.Module) -> None:
        model.requires_grad_(False)
        self._own = tuple(self.own(model))
        found = self.find(model)
        device = next(model.parameters()).device
        for name in self._own:
            model.get_parameter(name).requires_grad_(True)
        for name, part in found.items():
            module = model.get_submodule(name)
            module.add_module(CHILD, part.to(device))
            if type(part).before is not Part.before:
                self._handles.append(module.register_forward_pre_hook(_before, with_kwargs=True))
            if type(part).after is not Part.after:
                self._handles.append(module.register_forward_hook(_after, with_kwargs=True))
            self._parts[name] = part
        self.is_mergeable = all(part.can_fold(model.get_submodule(name)) for name, part in found.items())


def base_model_path(model: nn.Module, *, tune: str) -> str:
    """Return the path of the decoder without its head: what takes embeddings and gives hidden states.

    Raises:
        ScrimpError: The model has none.
    """
    base = getattr(model, "base_model", model)
    if base is model:  # Llama 4's text model has another prefix than its decoder's name
        base = getattr(model, "model", None)
    path = next((name for name, module in model.named_modules() if module is base), "")
    if not path:
        raise ScrimpError(f"tune {tune}: model {type(model).__name__} has no decoder of its own to change")
    return path


def embedded(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return the embeddings (batch, seq, width) a decoder is called with, and its other arguments."""
    kwargs = {"input_ids": args[0], **kwargs} if args else dict(kwargs)
    ids, given = kwargs.pop("input_ids", None), kwargs.pop("inputs_embeds", None)
    return (module.get_input_embeddings()(ids) if given is None else given), kwargs


def replace_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the hidden states that a module gives, alone or before other things."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    output.last_hidden_state = change(output.last_hidden_state)
    return output


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    part: Any = module.get_submodule(CHILD)
    changed: Arguments = part.before(module, args, kwargs)
    return changed


def _after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    part: Any = module.get_submodule(CHILD)
    return part.after(module, args, kwargs, output)
