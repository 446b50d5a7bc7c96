"""Losses on training tokens for what chooses what trains, or begins from it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor

from scrimp.base.protocols import Probe
from scrimp.build import Job
from scrimp.data.loader import MicroBatch
from scrimp.training.evaluate import on_device


def make_probe(job: Job, batch: Sequence[MicroBatch], step: int) -> Probe:
    """Return what runs the model on some training tokens.

    Before the first step each call takes another micro-batch, in their order, for what an adapter starts
    from; later all take the step's first one, so that what is compared differs in the model alone.

    Args:
        job: The run.
        batch: The step's micro-batches, on the job's device.
        step: 0-based.
    """
    found = itertools.repeat(batch[0]) if step else _from_here(job, batch, step)

    def probe() -> Tensor:
        micro = next(found)
        return job.loss(micro, divisor=max(1, micro.targets))

    return probe


def _from_here(job: Job, batch: Sequence[MicroBatch], step: int) -> Iterator[MicroBatch]:
    yield from batch
    for later in itertools.count(step + 1):
        yield from (on_device(micro, job.device) for micro in job.loader.step(later))
