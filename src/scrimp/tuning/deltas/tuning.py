"""Adapters of our own: every target becomes a frozen layer with a delta, and only the deltas train.

peft's adapters are peft's (`from_peft`). What peft lacks is a `Delta` for each target, made all at once
since some share parameters, and perhaps `Event`s that change what trains over time. Changes
of low rank are saved as a plain LoRA, sparse ones as peft's SHiRA, so that others need nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import Probe
from scrimp.tuning import adapter_files
from scrimp.tuning.deltas.delta import AdaptedLinear, Delta
from scrimp.tuning.targets import ALL_LINEAR, Place, find_targets


class Event(Protocol):
    """Something that changes deltas over time: an initialisation, a selection, a rank that grows."""

    def before_step(
        self,
        step: int,
        deltas: Mapping[str, Delta],
        optimizer: torch.optim.Optimizer,
        probe: Probe | None,
    ) -> None:
        """Act before 0-based `step`, and on nothing that a checkpoint does not hold.

        Args:
            step: 0-based; the first call of a resumed run is for the step it goes on with.
            deltas: By the path of their layer.
            optimizer: Over what trains.
            probe: Returns the mean loss on some training tokens, differentiable; None in a simulation.
        """


@dataclass(slots=True, kw_only=True)
class DeltaTuning:
    """Trains deltas.

    Attributes:
        name: What a recipe calls it.
        make: Makes the deltas of all targets, in their order.
        targets: Which layers.
        events: What changes them over time.
        saves: A plain LoRA, peft's SHiRA, or a file of our own.
        is_mergeable: Whether a plain weight can hold the change.
        settings: Numbers for people, which the saved adapter states.
    """

    name: str
    make: Callable[[Sequence[Place]], Sequence[Delta]]
    targets: tuple[str, ...] = (ALL_LINEAR,)
    events: tuple[Event, ...] = ()
    saves: Literal["lora", "shira", "own"] = "lora"
    is_mergeable: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    _adapted: dict[str, AdaptedLinear] = field(default_factory=dict, init=False, repr=False)

    @property
    def deltas(self) -> dict[str, Delta]:
        """The deltas by the path of their layer."""
        return {name: adapted.delta for name, adapted in self._adapted.items()}

    @property
    def needs_step(self) -> bool:
        """Whether an event acts on gradients or state just before or after the step."""
        return any(getattr(event, "needs_step", False) for event in self.events)

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Put a delta around every target, once, freeze all else, and return what trains by name.

        Raises:
            ScrimpError: A target matches nothing, or a delta does not fit one.
        """
        if not self._adapted:  # the planner selects again, when the parameters are others
            self._insert(model)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model itself."""
        return model

    def before_step(self, step: int, optimizer: torch.optim.Optimizer, probe: Probe | None = None) -> None:
        """Let the events act."""
        for event in self.events:
            event.before_step(step, self.deltas, optimizer, probe)

    def state(self) -> dict[str, list[float]]:
        """Return nothing: what events keep are buffers of the deltas."""
        return {}

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Do nothing."""

    def stored(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the deltas' tensors: the base comes from where it came from."""
        own = tuple(f"{name}.delta." for name in self._adapted)
        return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(own)}

    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """Write the adapter, in peft's form where that can hold it.

        Args:
            model: The model.
            folder: Where.
            base: The name of the model it belongs to.
        """
        if self.saves == "lora":
            found = {name: delta.factors() for name, delta in self.deltas.items()}
            factors = {name: each for name, each in found.items() if each is not None}
            adapter_files.write_lora(folder, factors, base=base)
        elif self.saves == "shira":
            adapter_files.write_shira(folder, self.deltas, base=base)
        else:
            settings = {**self.settings, "targets": list(self.targets)}
            adapter_files.write_own(folder, self.stored(model), base=base, name=self.name, settings=settings)

    def merge(self, model: nn.Module) -> None:
        """Turn every adapted layer back into a plain one that holds the change.

        Raises:
            ScrimpError: No plain weight can hold it.
        """
        if not self.is_mergeable:
            raise ScrimpError(f"tune {self.name} cannot be merged: no plain weight can hold what it does")
        for name, adapted in self._adapted.items():
            adapted.delta.merge_into(adapted.base_layer)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, adapted.base_layer)
        self._adapted.clear()

    def _insert(self, model: nn.Module) -> None:
        model.requires_grad_(False)
        places = find_targets(model, self.targets, tune=self.name)
        for place, delta in zip(places, self.make(places), strict=True):
            adapted = AdaptedLinear(place.module, delta.to(place.module.weight.device))
            parent, _, leaf = place.name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, adapted)
            self._adapted[place.name] = adapted
