"""What a run was seen to hold: in all, by moment, and by term.

On a CPU that is the resident memory of the whole process, read from the kernel's high-water mark; on a
GPU it is what the allocator handed out. Neither read waits for the device. The terms come from tracking
every storage (`Tracker`), which costs 9 to 22 % of a small step, so that runs track only their first steps;
what the marks show beyond the tracked tensors is the fixed part: the program, its libraries, their
kernels' scratch and the allocator's slack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.base import platform
from scrimp.base.ledger import Ledger, Moment, Term
from scrimp.base.paged import is_paged
from scrimp.memory.fake import tensors_of
from scrimp.memory.machine import CUDA_CONTEXT
from scrimp.memory.state_bytes import state_tensors
from scrimp.memory.trace import (
    ACTIVATIONS,
    CUDA_GRANULARITY,
    GRADIENTS,
    TEMPORARIES,
    bytes_by_kind,
    marking,
)
from scrimp.memory.tracker import Record, Tracker
from scrimp.memory.warmup import ADAPTED, settle_resident, warm_up
from scrimp.methods import piece
from scrimp.recipe import Recipe


class PeakMeter:
    """The highest memory use since it was made, or since the process started where a mark stays.

    Args:
        device: Where the run trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._highest = 0
        self._reset()

    def read(self) -> int:
        """Return the peak in bytes."""
        self._highest = max(self._highest, self._now())
        return self._highest

    def since_last(self) -> int:
        """Return the peak in bytes since this was last asked."""
        peak = self._now()
        self._highest = max(self._highest, peak)
        self._reset()
        return peak

    def _now(self) -> int:
        if self._cuda is not None:
            return torch.cuda.max_memory_allocated(self._cuda)
        return platform.peak_resident_bytes()

    def _reset(self) -> None:
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        else:
            platform.reset_peak_resident()


def free_bytes(device: torch.device) -> int:
    """Return the memory a run may take where no budget is given, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return platform.available_memory_bytes() + platform.resident_bytes()


def fixed_bytes(recipe: Recipe) -> int:
    """Return what counts against the budget before a recipe's model exists.

    On a CPU that is the process, after a first tiny step has loaded what steps load; on CUDA it is what
    `CUDA_CONTEXT` assumes.
    """
    if recipe.device == "cuda":
        return CUDA_CONTEXT
    warm_up(recipe.precision, ADAPTED if piece("tune", recipe.tune.name).freezes_base else "full")
    return settle_resident()


@dataclass(slots=True)
class Observer:
    """Watches a model train, moment by moment.

    Attributes:
        meter: Reads the marks.
        model: The model.
        optimizer: Its optimizer.
        device: Where it trains.
        seen: The largest of every moment so far, by name.
    """

    meter: PeakMeter
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    device: torch.device
    seen: dict[str, Moment] = field(default_factory=dict)
    _tracker: Tracker | None = None
    _moment: str = ""
    _first: int = 0
    _spans: list[tuple[str, int, int, int]] = field(default_factory=list)
    _gradients: dict[int, int] = field(default_factory=dict)
    _micro_batch: int = 0
    _ended: bool = False

    @property
    def ledger(self) -> Ledger | None:
        """What was seen; None before the first step."""
        return Ledger(tuple(self.seen.values()), basis="measured") if self.seen else None

    @contextmanager
    def step(self, *, several: bool) -> Iterator[None]:
        """Watch an optimizer step; `several` tells whether it has more than one micro-batch."""
        self._micro_batch = 0

        def mark(name: str) -> None:
            if name == "forward":
                self._micro_batch += 1
                self._ended = False
            if name == "backward" and not self._ended:
                self.forward_ended()
            # The later micro-batches are alike, and go by the name of the second.
            number = f", micro-batch {min(self._micro_batch, 2)}" if several else ""
            self.moment(f"{name}{number}")

        with self._watching(""), marking(self.model, mark):
            yield

    def forward_ended(self) -> None:
        """Tell that the forward pass of a micro-batch ended."""
        self._ended = True
        if self._tracker is not None:
            self._tracker.forward_ended()

    def before_update(self) -> None:
        """Tell that the gradients are there and the optimizer's step is next."""
        if self._tracker is None:
            return
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        indices = (self._tracker.index_of(grad) for grad in grads)
        self._gradients = {index: 0 for index in indices if index is not None}
        self.moment("optimizer step")

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Watch a moment outside a step, such as the evaluation."""
        with self._watching(name):
            yield

    def moment(self, name: str) -> None:
        """End the current moment and begin another."""
        if self._tracker is None:
            return
        point, peak = self._tracker.point, self.meter.since_last()
        if self._moment:
            self._spans.append((self._moment, self._first, point, peak))
        self._moment, self._first = name, point

    @contextmanager
    def _watching(self, name: str) -> Iterator[None]:
        existing = [*tensors_of(self.model), *self._state()]
        on_cuda = self.device.type == "cuda"
        self._tracker = Tracker(
            existing,
            granularity=CUDA_GRANULARITY if on_cuda else 1,
            kernels="cuda" if on_cuda else "cpu",
        )
        self._moment, self._first, self._spans, self._gradients = name, 0, [], {}
        before = storage_bytes(self._state())
        with ExitStack() as stack:
            stack.callback(self._forget)
            with self._tracker:
                self._tracker.calibrate()
                self.meter.since_last()
                yield
                self.moment("")
            self._add(self._tracker.record, before)

    def _forget(self) -> None:
        self._tracker = None

    def _state(self) -> list[Tensor]:
        held = [] if self.optimizer is None else state_tensors(self.optimizer)
        return [t for t in held if t.device.type == self.device.type and not is_paged(t)]

    def _add(self, record: Record, state_before: int) -> None:
        """Account for the spans of what was just watched."""
        assert self._tracker is not None
        states = {index for t in self._state() if (index := self._tracker.index_of(t)) is not None}
        bytes_, state = bytes_by_kind(record, self._gradients, states)
        weights = storage_bytes(tensors_of(self.model))
        for name, first, last, total in self._spans:
            span = slice(first, last + 1)
            held = bytes_[[ACTIVATIONS, GRADIENTS, TEMPORARIES], span].sum(0) + state[span]
            at = first + int(held.argmax())
            terms: dict[Term, int] = {
                "weights": weights,
                "optimizer state": state_before + int(state[at]),
                "gradients": int(bytes_[GRADIENTS, at]),
                "activations": int(bytes_[ACTIVATIONS, at]),
                "temporaries": int(bytes_[TEMPORARIES, at]),
            }
            terms = {"fixed": max(0, total - sum(terms.values())), **terms}
            operation = record.operations[at - 1] if at else ""
            found = Moment(name, terms, operation=operation)
            if name not in self.seen or found.total > self.seen[name].total:
                self.seen[name] = found


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of some tensors' storages; shared ones count once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def measure(
    program: Callable[[], Any], *, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Ledger:
    """Run a program on a model, and return what was held, by moment and by term.

    Args:
        program: Runs one optimizer step of one micro-batch, or anything else that calls the model: `forward`
            begins with it, `loss` with the end of the decoder, `backward` with its gradient, and
            `optimizer step` with a call of `optimizer.step`.
        model: The model, on its device.
        optimizer: Its optimizer.

    Returns:
        The measured moments. On a CPU their totals are the resident memory of the process; on CUDA the
        bytes that the allocator handed out.
    """
    device = next(model.parameters()).device
    observer = Observer(PeakMeter(device), model, optimizer, device)
    with ExitStack() as stack:
        if optimizer is not None:
            handle = optimizer.register_step_pre_hook(lambda *_: observer.before_update())
            stack.callback(handle.remove)
        with observer.step(several=False):
            program()
    found = observer.ledger
    assert found is not None
    return found
