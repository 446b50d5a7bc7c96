"""What a test of projectors stands on: a projector with what an optimizer would keep for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scrimp.optim.pieces import Entries, Projector, Target


class Held:
    """A projector with what an optimizer would keep for it, and a parameter's view of it."""

    def __init__(self, projector: Projector, shape: tuple[int, ...], index: int = 0) -> None:
        self.projector = projector
        self.transposed = projector.transposes(shape)
        seen = (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape
        self.target = Target(name="w", shape=seen, index=index, count=8)
        sizes = projector.tensors(self.target).items()
        self.entries: Entries = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in sizes}
        self.entries |= dict.fromkeys(projector.counters, 0)
        self.slots: dict[str, Tensor] = {}
        self.carry: Any = None

    def see(self, tensor: Tensor) -> Tensor:
        return tensor.mT if self.transposed else tensor

    def refresh(self, g: Tensor, step: int = 0) -> Any:
        old = self.basis(g) if step else None
        slots, self.carry = self.projector.refresh(self.see(g), old, self.entries, self.target, step)
        for slot in self.projector.slots(self.target):
            assert slots[slot.name].shape == slot.shape
        self.slots = slots
        return self.basis(g)

    def basis(self, g: Tensor) -> Any:
        return self.projector.load(self.slots, self.entries, self.target, self.see(g))


def gradient(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def captured(g: Tensor, basis: Tensor) -> float:
    return float((g @ basis).square().sum())


def eye_error(basis: Tensor) -> float:
    return float((basis.mT @ basis - torch.eye(basis.shape[-1], dtype=basis.dtype)).abs().max())
