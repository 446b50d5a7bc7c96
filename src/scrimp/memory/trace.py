"""One step of a recipe on fake tensors: what is alive after every operation, by term.

The same pieces run as in training (loss, estimator, recomputation); only the tensors have no bytes.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scrimp.assembly import Assembly, assemble, make_optimizer
from scrimp.data.loader import MicroBatch
from scrimp.memory.fake import Routing, simulation, tensors_of, to_fake
from scrimp.memory.state_bytes import state_tensors
from scrimp.memory.tracker import Record, Tracker
from scrimp.memory.work import Work
from scrimp.optim.optimizer import Optimizer
from scrimp.recipe import Recipe

Array = np.ndarray[Any, np.dtype[np.int64]]
CUDA_GRANULARITY = 512  # bytes that CUDA's caching allocator rounds a block up to
KINDS = ("activations", "gradients", "new gradients", "temporaries")
ACTIVATIONS, GRADIENTS, NEW_GRADIENTS, TEMPORARIES = range(4)


@dataclass(slots=True)
class Curve:
    """What is alive after every operation of a micro-batch.

    Attributes:
        signatures: Each operation's name and the bytes it made, point 0 left out.
        bytes_: (4, points) int64, the rows as in `KINDS`. New gradients are those not yet added to an
            older one; they are among the gradients.
        marks: The points where moments begin: `loss`, `backward`.
        work: What the operations cost.
        answers: Questions about values that were answered beforehand.
    """

    signatures: list[tuple[str, int]]
    bytes_: Array
    marks: dict[str, int]
    work: Work = field(default_factory=Work)
    answers: tuple[str, ...] = ()

    @property
    def total(self) -> Array:
        """(points,) bytes alive."""
        total: Array = self.bytes_[[ACTIVATIONS, GRADIENTS, TEMPORARIES]].sum(0)
        return total


@contextmanager
def marking(model: nn.Module, mark: Callable[[str], None]) -> Iterator[None]:
    """Call `mark` with the name of a moment when it begins.

    `forward`: the model's decoder is called; `loss`: it is done; `backward`: its gradient is here. What lies
    between the last two is the head and the loss, forward and backward.
    """

    def decoder_called(*_: Any) -> None:
        mark("forward")

    def decoder_done(_: nn.Module, __: Any, output: Any) -> None:
        mark("loss")
        hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: mark("backward"))

    decoder: nn.Module = getattr(model, "base_model", model)
    handles = [
        decoder.register_forward_pre_hook(decoder_called),
        decoder.register_forward_hook(decoder_done),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ending(loss: Callable[[Any], Tensor], ended: Callable[[], None]) -> Callable[[Any], Tensor]:
    """Return a loss function that tells when its forward pass has ended."""

    def wrapped(batch: Any) -> Tensor:
        value = loss(batch)
        ended()
        return value

    return wrapped


def trace_micro_batch(
    recipe: Recipe, config: Any, *, rows: int, training: bool = True, routing: Routing = "balanced"
) -> Curve:
    """Trace one micro-batch, forward and backward or, in evaluation, forward alone.

    Args:
        recipe: The recipe, with `seq` and `precision` resolved.
        config: The model's configuration.
        rows: Sequences in the micro-batch.
        training: Whether gradients are wanted.
        routing: Where a mixture's tokens go.
    """
    with simulation(routing) as mode:
        made = fake_assembly(recipe, config, mode)
        optimizer = make_optimizer(recipe, made.model) if training else None
        if optimizer is not None:
            _begin(recipe, made, optimizer)
        assert recipe.seq is not None
        ids = torch.zeros((rows, recipe.seq), dtype=torch.int64)
        batch = MicroBatch(ids, ids, None, ids.numel())
        state = [] if optimizer is None else state_tensors(optimizer)
        tracker = tracker_for(recipe, [*tensors_of(made.model), *state, ids])
        with tracker:
            tracker.calibrate()
            curve = _train(made, batch, tracker) if training else _evaluate(made, batch, tracker)
        curve.answers = tuple(mode.answers)
        return curve


def _begin(recipe: Recipe, made: Assembly, optimizer: Optimizer) -> None:
    """Put to sleep what does not train in the first step, and set updates inside the backward pass up."""
    made.tune.before_step(0, optimizer)
    if not recipe.optimizer.fused_backward:
        return
    for parameter in made.trained.values():
        if parameter.requires_grad:
            optimizer.begin(parameter)
    optimizer.fuse_backward(clip=recipe.clip)


def tracker_for(recipe: Recipe, existing: Iterable[Tensor]) -> Tracker:
    """Return a tracker that counts as the device of a recipe does."""
    on_cuda = recipe.device == "cuda"
    return Tracker(
        existing,
        granularity=CUDA_GRANULARITY if on_cuda else 1,
        kernels="cuda" if on_cuda else "cpu",
        threads=recipe.threads,
    )


def fake_assembly(recipe: Recipe, config: Any, mode: Any) -> Assembly:
    """Put the pieces of a recipe around a model of fake tensors."""
    from scrimp import models

    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    with torch.utils._python_dispatch._disable_current_modes(), torch.device("meta"):
        model = models.create_empty(config, dtype=dtype, trust_remote_code=True)
        made = assemble(model, recipe)
    to_fake(made.model, mode)
    # The parameters are others now.
    made.trained.update(made.tune.select(model))
    return made


def _train(made: Assembly, batch: MicroBatch, tracker: Tracker) -> Curve:
    gradients: dict[int, int] = {}

    def done(parameter: nn.Parameter) -> None:
        if parameter.grad is not None and (index := tracker.index_of(parameter.grad)) is not None:
            gradients[index] = tracker.point

    made.model.train()
    loss = ending(functools.partial(made.loss, divisor=1.0), tracker.forward_ended)
    with ExitStack() as stack:
        for parameter in made.trained.values():
            if parameter.requires_grad:
                # Before the hooks that update inside the backward pass, and free what is counted here.
                stack.callback(parameter.register_post_accumulate_grad_hook(done).remove)
        stack.enter_context(marking(made.model, tracker.mark))
        stack.enter_context(made.activations.context())
        made.estimator.step(loss, [batch])
    return curve_of(tracker.record, gradients)


def _evaluate(made: Assembly, batch: MicroBatch, tracker: Tracker) -> Curve:
    made.model.eval()
    with marking(made.model, tracker.mark), torch.no_grad():
        made.loss(batch, divisor=1.0)
    return curve_of(tracker.record, {})


def curve_of(record: Record, gradients: dict[int, int]) -> Curve:
    """Turn a record into the bytes alive at each point.

    Args:
        record: What a tracker saw.
        gradients: The storages that are gradients, each with the point at which it was added to `.grad`.
    """
    bytes_, _ = bytes_by_kind(record, gradients)
    made = [0] * (len(record.operations) + 1)
    for storage in record.storages:
        made[storage.born] += storage.size
    signatures = list(zip(record.operations, made[1:], strict=True))
    return Curve(signatures, bytes_, dict(record.marks), record.work)


def bytes_by_kind(
    record: Record, gradients: Mapping[int, int], state: Container[int] = ()
) -> tuple[Array, Array]:
    """Return the bytes alive at each point, (4, points) as in `KINDS`, and those of the optimizer's state.

    Args:
        record: What a tracker saw.
        gradients: The storages that are gradients, each with the point at which it was added to `.grad`.
        state: The storages that are optimizer state.
    """
    points = len(record.operations) + 1
    change = np.zeros((len(KINDS) + 1, points + 1), dtype=np.int64)
    for index, storage in enumerate(record.storages):
        last = points - 1 if storage.died is None else storage.died
        if index in gradients:
            kind = GRADIENTS
            _add(change[NEW_GRADIENTS], storage.born, gradients[index], storage.size)
        elif index in state:
            kind = len(KINDS)
        else:
            next_end = bisect_left(record.ends, storage.born)
            kept = next_end < len(record.ends) and record.ends[next_end] < last
            kind = ACTIVATIONS if kept else TEMPORARIES
        _add(change[kind], storage.born, last, storage.size)
    bytes_ = change.cumsum(1)[:, :points]
    for point, extra in record.scratch.items():
        bytes_[TEMPORARIES, point] += extra
    return bytes_[:-1], bytes_[-1]


def _add(row: Any, first: int, last: int, size: int) -> None:
    row[first] += size
    row[last + 1] -= size
