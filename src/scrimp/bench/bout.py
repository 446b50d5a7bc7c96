"""A contestant's job, built and ready to run, with what its memory and its optimizer are seen to hold."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from scrimp.assembly import load_function
from scrimp.base.errors import ScrimpError
from scrimp.bench.peers import Peer
from scrimp.build import Inputs, Job, build
from scrimp.memory.heap import choose_policy, returning, trimming
from scrimp.memory.observer import PeakMeter
from scrimp.memory.state_bytes import state_bytes
from scrimp.recipe import flat
from scrimp.report.lines import LineReporter
from scrimp.schedules import learning_rate
from scrimp.training.environment import process_state
from scrimp.training.evaluate import evaluate
from scrimp.training.loop import Loop
from scrimp.training.metrics import Metrics, MetricsFile
from scrimp.training.progress import Progress
from scrimp.training.reporter import Tick
from scrimp.training.run import plan
from scrimp.training.stopping import Stopper
from scrimp.training.watch import Watch

OUTSIDE_STEPS = ("evaluation", "save")
CHOSEN = ("optimizer.name", "activations.name", "activations.loss")


@dataclass(slots=True, kw_only=True)
class Bout:
    """A contestant's job.

    Attributes:
        job: What runs.
        peer: Whose code takes part in it; None is ours alone.
        settings: The peer's, as used.
        meter: Reads the memory's high-water mark.
        watch: Looks at the memory in our own loop.
        progress: Where our own loop stands.
    """

    job: Job
    peer: Peer | None
    settings: Mapping[str, Any]
    meter: PeakMeter
    watch: Watch
    progress: Progress = field(default_factory=Progress)

    @property
    def is_finite(self) -> bool:
        """Whether the last step's loss is, and the gradients that are there now."""
        last = self.progress.last
        if last is not None and not math.isfinite(last.loss + last.grad_norm):
            return False
        gradients = [p.grad for p in self.job.trained.values() if p.grad is not None]
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)

    def run(self, metrics: MetricsFile | None, reporter: LineReporter) -> None:
        """Run all steps of the job.

        Args:
            metrics: Where they go; None keeps none, and evaluates nothing.
            reporter: Told of every step.

        Raises:
            ScrimpError: The loss is not finite.
        """
        if self.peer is not None and self.peer.brings_loop:
            _PeerLoop(self, metrics, reporter).run()
            return
        assert self.job.recipe.steps is not None
        loop = Loop(
            job=self.job,
            progress=self.progress,
            watch=self.watch,
            reporter=reporter,
            stopper=Stopper(),
            metrics=metrics,
        )
        loop.run(self.job.recipe.steps)

    def found(self) -> dict[str, Any]:
        """Return what the run's memory was seen to hold, and how it was set up."""
        model, ours = self.job.model, self.peer is None
        measured = self.watch.ledger
        inside = [m for m in measured.moments if m.name not in OUTSIDE_STEPS] if measured else []
        highest = max(inside, key=lambda moment: moment.total - moment.terms["fixed"], default=None)
        return {
            "settings": {**dict(self.settings), **(self._chosen() if ours else {})},
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in self.job.trained.values()),
            "state_bytes": state_bytes(self.job.optimizer),
            "peak_bytes": self.meter.read(),
            "predicted_bytes": self.job.ledger.peak.total if ours else None,
            "tensor_bytes": highest and highest.total - highest.terms["fixed"],
            "memory": highest and {"moment": highest.name, "terms": dict(highest.terms)},
        }

    def _chosen(self) -> dict[str, Any]:
        """Return what a recipe of ours, or the planner, chose."""
        recipe = self.job.recipe
        chosen = {name: value for name, value in flat(recipe).items() if name in CHOSEN}
        return {**chosen, "precision": recipe.precision, "micro_batch": recipe.micro_batch}


@dataclass(slots=True)
class _PeerLoop:
    """A peer's own loop on our job: what it tells, in our metrics."""

    bout: Bout
    metrics: MetricsFile | None
    reporter: LineReporter
    _mark: float = 0.0

    def run(self) -> None:
        peer = self.bout.peer
        assert peer is not None
        self._mark = time.monotonic()
        load_function(peer.adapt)(self.bout.job, after_step=self._step, evaluate=self._evaluate)

    def _step(self, step: int, loss: float) -> None:
        seconds = time.monotonic() - self._mark
        if self.metrics is not None:
            self._write(self.metrics, step, loss, seconds)
        recipe = self.bout.job.recipe
        assert recipe.steps is not None
        if not math.isfinite(loss):
            raise ScrimpError(f"the loss at step {step} is {loss}")
        self.reporter.tick(
            Tick(
                step=step,
                steps=recipe.steps,
                loss=loss,
                tokens_per_s=0.0,
                peak_bytes=0,
                predicted_bytes=0,
                budget_bytes=0,
                left_s=seconds * (recipe.steps - step),
            )
        )
        self._mark = time.monotonic()

    def _write(self, metrics: MetricsFile, step: int, loss: float, seconds: float) -> None:
        job, progress = self.bout.job, self.bout.progress
        targets = sum(micro.targets for micro in job.loader.step(step - 1))
        progress.step, progress.tokens = step, progress.tokens + targets
        progress.last = Metrics(
            step=step,
            tokens=progress.tokens,
            loss=loss,
            lr=learning_rate(job.recipe, step - 1),
            grad_norm=0.0,  # the loop keeps it to itself
            tokens_per_s=targets / seconds,
            peak_bytes=self.bout.meter.read(),
            predicted_bytes=job.ledger.peak.total,
        )
        metrics.write("train", progress.last)

    def _evaluate(self) -> None:
        job, last = self.bout.job, self.bout.progress.last
        held_out = job.prepared.corpus.held_out
        if self.metrics is None or last is None or not held_out.documents:
            return
        found = evaluate(
            job.loss, job.prepared, job.recipe, held_out, max_tokens=job.recipe.evaluation.tokens
        )
        self.metrics.write("eval", last, asdict(found))
        self._mark = time.monotonic()


@contextmanager
def bout(inputs: Inputs, peer: Peer | None, reporter: LineReporter) -> Iterator[Bout]:
    """Build a contestant's job, and set up the process around it.

    Args:
        inputs: What its recipe names.
        peer: Whose code takes part; None is ours alone.
        reporter: Told what is going on.

    Raises:
        ScrimpError: The recipe does not fit the data, the machine or the peer.
    """
    prepared, device, resolved = plan(inputs, reporter)
    meter = PeakMeter(device)
    # The same for all that run in our loop, for it costs time and saves memory.
    in_our_loop = peer is None or not peer.brings_loop
    on_cpu = device.type == "cpu"
    heap = choose_policy(resolved.ledger, resolved.recipe) if in_our_loop and on_cpu else "leave"
    with process_state(resolved.recipe, device), returning(heap):
        job = build(prepared, resolved.recipe, resolved.ledger, empty=False, say=reporter.phase)
        settings: Mapping[str, Any] = {}
        if peer is not None:
            settings = peer.settings if peer.brings_loop else load_function(peer.adapt)(job, peer.settings)
        with trimming(job.model, heap):
            yield Bout(job=job, peer=peer, settings=settings, meter=meter, watch=Watch(job, meter))
