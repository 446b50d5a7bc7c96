"""The training loop.

It knows the six protocols of `scrimp.base.protocols` and no method. One optimizer step:

    micro-batches ──> estimator (loss / targets of the whole step) ──> clip ──> updates

On a GPU a step's loss and gradient norm stay there while the next step is queued, and are read after
it (`_Pending`), so that it never waits for the host. Whatever must know them at once (evaluation, a
checkpoint, the end) reads them first. Every random draw of step s comes from a seed derived from
the run's seed and s, so a resumed run needs no generator's state.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from scrimp.base.errors import Interrupted, ScrimpError
from scrimp.base.seeds import derive
from scrimp.build import Job
from scrimp.data.loader import MicroBatch
from scrimp.optim.clipping import AtStep
from scrimp.schedules import learning_rate
from scrimp.training import checkpoint
from scrimp.training.environment import seed_device
from scrimp.training.evaluate import evaluate, on_device
from scrimp.training.folder import RunFolder
from scrimp.training.loggers import Logger
from scrimp.training.metrics import Metrics, MetricsFile
from scrimp.training.optimizer_state import optimizer_numbers, optimizer_tensors
from scrimp.training.probe import make_probe
from scrimp.training.progress import Progress
from scrimp.training.reporter import Reporter
from scrimp.training.stopping import Stopper
from scrimp.training.telling import Teller
from scrimp.training.watch import Watch

CHECKPOINT_SECONDS = 600.0  # the longest stretch of work that a crash may cost


@dataclass(frozen=True, slots=True)
class _Pending:
    """A step whose results are still on the device."""

    loss: Tensor
    grad_norm: Tensor
    lr: float
    tokens: int
    targets: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A step that has begun.

    Attributes:
        lr: Its learning rate.
        targets: The targets of its batch.
    """

    lr: float
    targets: int

    @property
    def divisor(self) -> int:
        """What the summed loss is divided by."""
        return max(1, self.targets)


@dataclass(slots=True, kw_only=True)
class Loop:
    """Runs a job's remaining steps.

    Attributes:
        job: What to run.
        progress: Where it stands; kept up to date.
        watch: Looks at the memory.
        reporter: Told about every step.
        stopper: Asked between steps whether to stop.
        folder: Where checkpoints go; None writes none.
        metrics: Where metrics go; None writes none.
        loggers: Other takers of metrics.
        teller: Tells all of them, once the loop has begun.
    """

    job: Job
    progress: Progress
    watch: Watch
    reporter: Reporter
    stopper: Stopper
    folder: RunFolder | None = None
    metrics: MetricsFile | None = None
    loggers: list[Logger] = field(default_factory=list)
    teller: Teller = field(init=False)
    _pending: _Pending | None = None
    _saved: float = 0.0
    _mark: float = 0.0

    def run(self, until: int) -> None:
        """Train until `until` optimizer steps are done.

        Raises:
            Interrupted: A signal asked to stop; the step was finished and saved.
            ScrimpError: The loss is not finite, a checkpoint could not be written, or the run is over its
                budget and its recipe is strict.
        """
        self.begin()
        while self.progress.step < until:
            self._train_step()
            step, recipe = self.progress.step, self.job.recipe
            assert recipe.checkpoint.every is not None
            last = step == recipe.steps
            self.evaluate_when_due()
            if last or step % recipe.checkpoint.every == 0:
                self.save(scheduled=True)
            elif time.monotonic() - self._saved > CHECKPOINT_SECONDS:
                self.save(scheduled=False)
            if self.teller.over and recipe.strict:
                self._stop_over_budget()
            if self.stopper.requested is not None and not last:
                self._stop(self.stopper.requested)
        self._read_pending()

    def begin(self) -> None:
        """Start the clock, and put the model into training mode."""
        self._saved = self._mark = time.monotonic()
        self.teller = Teller.begin(
            self.job, self.progress, self.watch, self.reporter, self.metrics, self.loggers
        )
        self.job.model.train()

    def _train_step(self) -> None:
        job = self.job
        batch = [on_device(micro, job.device) for micro in job.loader.step(self.progress.step)]
        opened = self.open_step(batch)
        loss_function = functools.partial(job.loss, divisor=opened.divisor)
        with self.watch.step(batch):
            with job.activations.context(), job.placement.context():
                loss = job.estimator.step(self.watch.loss(loss_function), batch)
            self.watch.before_update()
            norm = self.update(loss)
        self.close_step(opened, loss, norm)

    def open_step(self, batch: Sequence[MicroBatch]) -> Opened:
        """Set all that a step runs with.

        Args:
            batch: Its micro-batches, on the job's device.
        """
        job, step = self.job, self.progress.step
        targets = sum(micro.targets for micro in batch)
        lr = learning_rate(job.recipe, step)
        for group in job.optimizer.param_groups:
            group["lr"] = lr
        self.seed()
        job.tune.before_step(step, job.optimizer, make_probe(job, batch, step))
        return Opened(lr=lr, targets=targets)

    def update(self, loss: Tensor) -> Tensor:
        """Clip the gradients, update with them and drop them; return their global norm."""
        job, recipe = self.job, self.job.recipe
        updates = job.fused or AtStep(job.optimizer, tuple(job.trained.values()), recipe.clip)
        norm = updates.clip()
        # Only this policy waits for the device: it must know before the update.
        if recipe.nonfinite == "skip" and not math.isfinite((loss + norm).item()):
            self.progress.skipped += 1
            updates.discard()
        else:
            updates.apply()
        job.optimizer.zero_grad(set_to_none=True)
        return norm

    def close_step(self, opened: Opened, loss: Tensor, norm: Tensor) -> None:
        """Count a step that is done, and tell of it when its numbers are there."""
        self._read_pending()
        progress = self.progress
        progress.step += 1
        progress.tokens += opened.targets
        self._pending = _Pending(loss, norm, opened.lr, progress.tokens, opened.targets, progress.step)
        if self.job.device.type == "cpu":
            self._read_pending()

    def seed(self) -> None:
        """Seed what the next step may draw from."""
        seed_device(self.job.device, derive(self.job.recipe.seed, "step", self.progress.step))

    def _read_pending(self) -> None:
        """Read the step before from the device, and tell everybody about it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        loss, norm = torch.stack([pending.loss.float(), pending.grad_norm.float()]).tolist()
        now = time.monotonic()
        last = Metrics(
            step=pending.step,
            tokens=pending.tokens,
            loss=loss,
            lr=pending.lr,
            grad_norm=norm,
            tokens_per_s=pending.targets / (now - self._mark),
            peak_bytes=self.watch.peak(),
            predicted_bytes=self.job.ledger.peak.total,
        )
        self.progress.last, self._mark = last, now
        self.teller.write("train", last)
        # A finite loss may have a gradient that is not, which no checkpoint may hold either.
        if not math.isfinite(loss + norm) and self.job.recipe.nonfinite == "stop":
            raise ScrimpError(self._not_finite(last))
        self.teller.report(last)

    def _not_finite(self, last: Metrics) -> str:
        found = None if self.folder is None else checkpoint.find_usable(self.folder.checkpoints).path
        good = "there is no checkpoint yet" if found is None else f"the last good checkpoint is {found}"
        return (
            f"the loss at step {last.step} is {last.loss} and its gradient norm {last.grad_norm}, so the run "
            f"stopped; {good}. "
            "Lower --lr, or leave such steps out with --nonfinite skip"
        )

    def evaluate_when_due(self) -> None:
        """Evaluate at every step that the recipe says, and at the last."""
        job, step = self.job, self.progress.step
        held_out, every = job.prepared.corpus.held_out, job.recipe.evaluation.every
        assert every is not None
        if step != job.recipe.steps and step % every:
            return
        self._read_pending()
        if self.metrics is None or not held_out.documents:
            return
        self.reporter.phase("evaluating", None)
        self.progress.evaluation = evaluate(
            job.loss,
            job.prepared,
            job.recipe,
            held_out,
            max_tokens=job.recipe.evaluation.tokens,
            first=self.watch.during("evaluation"),
        )
        self.progress.evaluated_step, self._mark = self.progress.step, time.monotonic()
        assert self.progress.last is not None
        self.teller.write("eval", self.progress.last, asdict(self.progress.evaluation))

    def save(self, *, scheduled: bool) -> Path | None:
        """Save a checkpoint; only a scheduled one has its line: the clock leaves no trace in the metrics."""
        if self.folder is None or self.metrics is None:
            return None
        self._read_pending()
        self.reporter.phase("saving a checkpoint", None)
        progress, job = self.progress, self.job
        if scheduled and progress.evaluation is not None and progress.evaluated_step == progress.step:
            held_out = progress.evaluation.eval_loss
            if math.isfinite(held_out) and (progress.best_loss is None or held_out < progress.best_loss):
                progress.best_loss, progress.best_step = held_out, progress.step
        state = {
            "progress": progress.to_plain(),
            "metrics_bytes": self.metrics.synced_length(),
            "scheduled": scheduled,
            "tune": job.tune.state(),
            "optimizer": optimizer_numbers(job.optimizer, job.trained.items()),
        }
        with self.watch.during("save"):
            path = checkpoint.save(
                self.folder.checkpoints,
                step=progress.step,
                model=job.stored(),
                optimizer=optimizer_tensors(job.optimizer, job.trained.items()),
                state=state,
                identity=job.identity,
            )
        keep = job.recipe.checkpoint.keep
        checkpoint.prune(self.folder.checkpoints, step=progress.step, keep=keep, best=progress.best_step)
        if scheduled and progress.last is not None:
            self.metrics.write("checkpoint", progress.last)
        self._saved = self._mark = time.monotonic()
        return path

    def _stop_over_budget(self) -> None:
        path = self.save(scheduled=False)
        raise ScrimpError(
            f"{self.teller.over}; stopped after step {self.progress.step} as strict asks, and saved {path}; "
            "start again with a smaller --micro-batch or --seq, or a larger --memory"
        )

    def _stop(self, signal_number: int) -> None:
        self.save(scheduled=False)
        out = None if self.folder is None else self.folder.path
        raise Interrupted(
            f"stopped after step {self.progress.step} of {self.job.recipe.steps} and saved it; "
            f"go on with: scrimp train --out {out} --resume",
            signal_number=signal_number,
            out=out,
        )
