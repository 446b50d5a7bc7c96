"""The six choices as protocols: all that the training loop knows of a method.

A paper's method is a value of one or two of them. If one needs an `if` in the loop, a protocol is
missing something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

IGNORED = -100  # the label of what is not to be predicted; torch's and transformers' convention


class Batch(Protocol):
    """A micro-batch: `batch` sequences of `seq` tokens."""

    @property
    def input_ids(self) -> Tensor:
        """(batch, seq) int64."""

    @property
    def labels(self) -> Tensor:
        """(batch, seq) int64, the token after each input token; `IGNORED` is no target."""

    @property
    def position_ids(self) -> Tensor | None:
        """(batch, seq) int64, or None where positions run through."""

    @property
    def targets(self) -> int:
        """How many labels are targets."""


LossFunction = Callable[[Batch], Tensor]


class Parametrisation(Protocol):
    """`weights`: how matrices are stored."""

    def apply(self, model: nn.Module) -> None:
        """Swap modules of `model` in place."""

    def materialize(self, model: nn.Module) -> None:
        """Turn every swapped module back into a plain one, in place."""


class Trainable(Protocol):
    """`tune`: which parameters train."""

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Freeze what does not train, and return the rest by name."""


class Estimator(Protocol):
    """`gradient`: where the gradient comes from."""

    def step(self, loss: LossFunction, batch: Sequence[Batch]) -> Tensor:
        """Leave the gradient of the summed loss in `.grad`, and return that loss, detached."""


class Loss(Protocol):
    """`activations.loss`: a model's loss over a micro-batch."""

    model: nn.Module

    def __call__(self, batch: Batch, *, divisor: float) -> Tensor:
        """Return the summed cross-entropy in nats over `divisor`, a scalar fp32 tensor."""


class Activations(Protocol):
    """`activations`: what the backward pass keeps."""

    def apply(self, model: nn.Module) -> None:
        """Install on `model`, before its first step."""

    def context(self) -> AbstractContextManager[None]:
        """Return a context for the forward and backward pass of one optimizer step."""


class Placement(Protocol):
    """`placement`: where tensors live."""

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Move a model to where it trains."""

    def context(self) -> AbstractContextManager[None]:
        """Return a context for the forward and backward pass of one optimizer step."""
