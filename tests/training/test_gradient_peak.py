"""With updates inside the backward pass one gradient is alive at a time, in the loop's own step.

Every storage that the step makes is tracked, as for the ledger, and those count that became gradients or sums
of them in a subspace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from tests.training.conftest import Lab
from torch import Tensor, nn

from scrimp.build import Job
from scrimp.memory.fake import tensors_of
from scrimp.memory.state_bytes import state_tensors
from scrimp.memory.trace import ACTIVATIONS, GRADIENTS, TEMPORARIES, bytes_by_kind
from scrimp.memory.tracker import Tracker
from scrimp.optim import Optimizer


@dataclass
class Watched:
    """A job whose steps run as the loop runs them, the tracked one's bytes known at each operation."""

    job: Job
    fused: bool
    begun: list[int] = field(default_factory=list)
    _tracker: Tracker = field(default_factory=Tracker)
    _gradients: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        optimizer = self.job.optimizer
        assert isinstance(optimizer, Optimizer)
        optimizer.unfuse_backward()
        for p in self.job.trained.values():  # before the hooks that update
            p.register_post_accumulate_grad_hook(self._note)
            optimizer.begin(p)
        self._updates = None
        if self.fused:
            self._updates = optimizer.fuse_backward(micro_batches=len(self.job.loader.step(0)))

    def _note(self, *parameters: nn.Parameter) -> None:
        small = [] if self._updates is None else self._updates._small.values()
        for tensor in (*small, *(p.grad for p in parameters)):
            index = None if tensor is None else self._tracker.index_of(tensor)
            if index is not None:
                self._gradients[index] = self._tracker.point

    def _loss(self, micro: Any) -> Tensor:
        self.begun.append(self._tracker.point)
        self._note()
        return self.job.loss(micro, divisor=64.0)

    def step(self, number: int) -> None:
        """Run a step."""
        self.job.estimator.step(self._loss, self.job.loader.step(number))
        self.job.optimizer.step()
        self.job.optimizer.zero_grad()

    def bytes(self, number: int) -> tuple[Any, Any]:
        """Run a step, and return the bytes of gradients and of all else that it made, by operation."""
        self.begun.clear()
        self._tracker = Tracker([*tensors_of(self.job.model), *state_tensors(self.job.optimizer)])
        with self._tracker:
            self._tracker.calibrate()
            self.step(number)
        kinds, _ = bytes_by_kind(self._tracker.record, self._gradients)
        return kinds[GRADIENTS], np.add(kinds[ACTIVATIONS], kinds[TEMPORARIES])


@pytest.mark.parametrize("name", ["adamw", "galore", "apollo"])
def test_the_peak_of_gradients_is_the_largest_and_without_fusing_their_sum(lab: Lab, name: str) -> None:
    job = lab.job(lab.recipe(optimizer__name=name, clip=0, batch=2))
    sizes = [p.nbytes for p in job.trained.values()]
    assert Watched(job, fused=True).bytes(0)[0].max() == max(sizes) < sum(sizes) / 3
    assert Watched(job, fused=False).bytes(0)[0].max() == sum(sizes)


def test_between_micro_batches_what_is_projected_is_held_in_its_subspace_alone(lab: Lab) -> None:
    job = lab.job(lab.recipe(optimizer__name="galore", optimizer__rank=4, clip=0, batch=4))
    watched = Watched(job, fused=True)
    watched.step(0)  # which chooses the subspaces, from whole gradients
    gradients, rest = watched.bytes(1)
    assert isinstance(job.optimizer, Optimizer)
    plans = {p: job.optimizer.plan_of(p) for p in job.trained.values()}
    projected = {p for p, plan in plans.items() if plan.composition.projector is not None}
    assert len(projected) == 14
    sums = sum(4 * max(p.shape) * 4 for p in projected)
    second = watched.begun[1]
    assert gradients[second] == sums + sum(p.nbytes for p in plans.keys() - projected)
    assert rest[second] < 2048  # token numbers and the first loss
