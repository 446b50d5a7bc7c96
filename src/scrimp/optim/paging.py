"""Optimizer state that leaves the training device between the updates of its parameter.

    beside a GPU   it lies in the host's pinned memory; it is copied to the device for an update, and back
    on a CPU       it lies in files that the system pages (`base.paged`), and is used where it lies

So a step holds the state of one parameter at a time, and what is computed is the same to the bit. Copies
follow each other on the device's stream: the host waits for none of them. Small tensors stay on the device.

References:
    Paged optimizers: QLoRA, Dettmers et al., 2023, arXiv 2305.14314; there the GPU's driver moves the pages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scrimp.base.paged import is_paged, paged_zeros, release
from scrimp.optim.pieces import Entries

SMALL = 64 * 2**10  # bytes of a tensor below which it stays on the device


def tensor_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


def is_small(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Tell whether a tensor stays on the device."""
    return tensor_bytes(shape, dtype) < SMALL


@dataclass(frozen=True, slots=True)
class Pager:
    """Keeps state off the device.

    Attributes:
        folder: Where files have their room, for parameters on a CPU.
    """

    folder: Path

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor of zeros where state of a parameter on `device` lies between updates."""
        if is_small(shape, dtype):
            return torch.zeros(shape, dtype=dtype, device=device)
        if device.type == "cpu":
            return paged_zeros(shape, dtype, self.folder)
        return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def fetch(self, state: Entries, device: torch.device) -> Entries:
        """Return a parameter's state for its update on `device`: of the tensors there, the same ones."""
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }

    def put_back(self, state: Entries, held: Entries, device: torch.device) -> None:
        """Make `state` what an update left in `held`, off the device."""
        for name in state.keys() - held.keys():
            del state[name]
        for name, value in held.items():
            state[name] = self._kept(value, state.get(name), device) if isinstance(value, Tensor) else value

    def _kept(self, value: Tensor, old: Tensor | None, device: torch.device) -> Tensor:
        shape = tuple(value.shape)
        if is_small(shape, value.dtype):
            return value
        place = value
        if not is_paged(value):  # a copy on the device, or something new
            if old is None or old is value or (tuple(old.shape), old.dtype) != (shape, value.dtype):
                place = self.zeros(shape, value.dtype, device)
            else:
                place = old
            place.copy_(value, non_blocking=True)
        release(place)
        return place
