"""The six choices as protocols: all that the training loop knows of a method.

A paper's method is a value of one or two of them. If one needs an `if` in the loop, a protocol is
missing something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

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
Probe = Callable[[], Tensor]  # runs the model on some training tokens, and returns their mean loss in nats


class Parametrisation(Protocol):
    """`weights`: how matrices are stored."""

    def apply(self, model: nn.Module) -> None:
        """Swap modules of `model` in place."""

    def materialize(self, model: nn.Module) -> None:
        """Turn every swapped module back into a plain one, in place."""


class Trainable(Protocol):
    """`tune`: which parameters train, and when."""

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Freeze what never trains, and return the rest by name, all of it requiring a gradient."""

    def before_step(self, step: int, optimizer: torch.optim.Optimizer, probe: Probe | None = None) -> None:
        """Wake what trains at a step, put the rest to sleep and free its gradients and optimizer state.

        Called before each step's first forward pass, also the first one after a resume, when the optimizer
        holds the state that was saved. It may be called twice for a step only while nothing is measured.

        Args:
            step: 0-based.
            optimizer: Over the parameters that `select` returned.
            probe: For schedules that measure the model.
        """

    def state(self) -> dict[str, list[float]]:
        """Return what a checkpoint must hold besides the step: what was measured or learnt."""

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take what `state` returned, after `select`."""


@runtime_checkable
class Adapter(Trainable, Protocol):
    """A `Trainable` that adds to a model whose own weights stay as they are, and can be saved alone."""

    @property
    def is_mergeable(self) -> bool:
        """Whether the model's own weights can hold what it adds."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return what is to run, after `select`: the model, or something around it."""

    def stored(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint must hold, as they lie: all else comes from the base."""

    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """Write the adapter for the untouched base, in peft's form where that can hold it.

        Args:
            model: The model, with the adapter.
            folder: Where.
            base: The name of the model it belongs to.
        """

    def merge(self, model: nn.Module) -> None:
        """Fold the adapter into the model's own weights, in place, so that nothing of it is left.

        Raises:
            ScrimpError: They cannot hold it.
        """


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


class PagesState(Protocol):
    """An optimizer whose state can leave the device between updates."""

    def page_state(self, folder: Path) -> None:
        """Keep it off the device, on a CPU in files in `folder`."""


class Placement(Protocol):
    """`placement`: where tensors live."""

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Move a model to where it trains."""

    def place_state(self, optimizer: PagesState, folder: Path) -> None:
        """Say where an optimizer's state lives, before it has any; files go into `folder`."""

    def context(self) -> AbstractContextManager[None]:
        """Return a context for the forward and backward pass of one optimizer step."""


class RowCodec(Protocol):
    """How rows of a matrix become codes and back: pure functions, for eager and compiled code alike."""

    def decode(self, entries: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the rows (n, in) in `dtype`."""

    def encode(self, value: Tensor, noise: Tensor | None, start: int = 0) -> dict[str, Tensor]:
        """Return the entries of rows.

        Args:
            value: (n, in), float32.
            noise: A 0-d int64 seed for stochastic rounding; None rounds to nearest.
            start: Index of the first element in the whole matrix, so that blocks draw what the whole would.
        """


@runtime_checkable
class QuantizedParameter(Protocol):
    """A parameter (out, in) that holds its rows as codes, and is updated in blocks of rows.

    To autograd it is a tensor of `dtype`, and has a plain gradient of it. An optimizer asks before anything
    else, since such a parameter refuses to be changed by torch's own in-place operations.
    """

    @property
    def codec(self) -> RowCodec:
        """How rows become entries."""

    def stored_rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Return the entries of rows `first` to `last` (excluded), as views that may be copied into."""

    def dequantize_rows(self, first: int, last: int) -> Tensor:
        """Return rows `first` to `last` (excluded), (last - first, in) float32."""

    def requantize_rows_(self, first: int, last: int, value: Tensor, noise: Tensor) -> None:
        """Store rows with fresh scales, rounded stochastically: the expectation is `value`.

        Args:
            first: The first row.
            last: The row after the last.
            value: (last - first, in), float32.
            noise: A 0-d int64 seed, one for a whole matrix: its blocks draw what the whole would.
        """


class Updates(Protocol):
    """When the optimizer's updates run: at the end of the step, or inside the backward pass."""

    def clip(self) -> Tensor:
        """Clip what waits for its update, and return the global gradient norm, a scalar on its device."""

    def apply(self) -> None:
        """Run what updates are left."""

    def discard(self) -> None:
        """Leave what updates are left out."""
