"""Train a stretch of a run again from a checkpoint, and compare it bit for bit with what it wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scrimp.base.errors import ScrimpError
from scrimp.build import build, inspect
from scrimp.memory.measure import PeakMeter
from scrimp.recipe import Recipe
from scrimp.training import checkpoint
from scrimp.training.environment import process_state
from scrimp.training.folder import RunFolder
from scrimp.training.loop import Loop
from scrimp.training.metrics import read_metrics
from scrimp.training.reporter import Reporter
from scrimp.training.run import plan, restore
from scrimp.training.start import choose_start
from scrimp.training.stopping import Stopper

COMPARED = ("tokens", "loss", "lr", "grad_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What training a stretch again showed.

    Attributes:
        first: The checkpoint's step.
        last: The last step that was trained again.
        differing: The steps whose numbers differ.
        weights_equal: Whether weights and optimizer state at `last` are those of its checkpoint; None where
            there is none.
    """

    first: int
    last: int
    differing: tuple[int, ...]
    weights_equal: bool | None

    @property
    def repeats(self) -> bool:
        """Whether everything compared was equal."""
        return not self.differing and self.weights_equal is not False


def verify(out: Path, *, steps: int | None, reporter: Reporter, cache: Path | None = None) -> Verdict:
    """Train again from the oldest checkpoint that a run still holds.

    Args:
        out: The run's folder; nothing in it is changed.
        steps: How many steps; None goes to the next checkpoint, or as far as the metrics go.
        reporter: Told how it goes.
        cache: Folder of the token files.

    Raises:
        ScrimpError: The run holds nothing to verify.
    """
    folder = RunFolder(out)
    if not folder.is_run:
        raise ScrimpError(f"verify {out}: this folder holds no run")
    rows = {row["step"]: row for row in read_metrics(folder.metrics) if row["kind"] == "train"}
    saved = [
        path
        for path in checkpoint.complete(folder.checkpoints)
        if checkpoint.step_of(path) < max(rows, default=0)
    ]
    if not saved:
        raise ScrimpError(
            f"verify {out}: it holds no checkpoint with a step after it; keep more with --checkpoint.keep"
        )
    start = choose_start(Recipe(), out=out, resume=True)
    prepared, device, recipe, ledger = plan(inspect(start.recipe, cache=cache), reporter)
    with process_state(recipe, device):
        job = build(prepared, recipe, ledger, empty=True, say=reporter.phase)
        point = restore(job, checkpoint.Found(saved[0], []), reporter)
        first = point.progress.step
        later = [checkpoint.step_of(path) for path in checkpoint.complete(folder.checkpoints)]
        last = min(
            max(rows),
            first + steps
            if steps is not None
            else min((step for step in later if step > first), default=max(rows)),
        )
        loop = Loop(
            job=job, progress=point.progress, meter=PeakMeter(device), reporter=reporter, stopper=Stopper()
        )
        reporter.plan(job)
        differing = []
        for step in range(first + 1, last + 1):
            loop.run(step)
            now = loop.progress.last
            if now is None or any(getattr(now, name) != rows[step][name] for name in COMPARED):
                differing.append(step)
        equal = checkpoint.equals(
            checkpoint.checkpoint_path(folder.checkpoints, last), job.model.state_dict()
        )
    return Verdict(
        first=first, last=last, differing=tuple(differing), weights_equal=equal if last in later else None
    )
