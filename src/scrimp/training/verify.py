"""Train a stretch of a run again from a checkpoint, and compare it bit for bit with what it wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scrimp.base.errors import ScrimpError
from scrimp.build import build, inspect
from scrimp.memory.observer import PeakMeter
from scrimp.recipe import Recipe
from scrimp.training import checkpoint
from scrimp.training.environment import process_state
from scrimp.training.folder import RunFolder
from scrimp.training.loop import Loop
from scrimp.training.metrics import as_json, read_metrics
from scrimp.training.reporter import Reporter
from scrimp.training.run import plan, restore
from scrimp.training.start import choose_start
from scrimp.training.stopping import Stopper
from scrimp.training.watch import Watch

COMPARED = ("tokens", "loss", "lr", "grad_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What training a stretch again showed.

    Attributes:
        first: The checkpoint's step.
        last: The last step that was trained again.
        differing: The steps whose numbers differ.
        weights_equal: Whether the weights at `last` are those of its checkpoint; None where there is none.
    """

    first: int
    last: int
    differing: tuple[int, ...]
    weights_equal: bool | None

    @property
    def repeats(self) -> bool:
        """Whether everything compared was equal."""
        return not self.differing and self.weights_equal is not False


def verify(
    out: Path,
    *,
    steps: int | None,
    reporter: Reporter,
    cache: Path | None = None,
    trust_remote_code: bool = False,
) -> Verdict:
    """Train again from the oldest checkpoint that a run still holds.

    Args:
        out: The run's folder; nothing in it is changed.
        steps: How many steps; None goes to the next checkpoint, or as far as the metrics go.
        reporter: Told how it goes.
        cache: Folder of the token files.
        trust_remote_code: Let the model's own Python code run.

    Raises:
        ScrimpError: The run holds nothing to verify.
    """
    folder = RunFolder(out)
    if not folder.is_run:
        raise ScrimpError(f"verify {out}: this folder holds no run")
    rows = {row["step"]: row for row in read_metrics(folder.metrics) if row["kind"] == "train"}
    saved = {checkpoint.step_of(path): path for path in checkpoint.complete(folder.checkpoints)}
    first = min(saved, default=0)
    if not saved or first >= max(rows, default=0):
        raise ScrimpError(
            f"verify {out}: it holds no checkpoint with a step after it; keep more with --checkpoint.keep"
        )
    following = [step for step in saved if step > first]
    last = min(max(rows), first + steps if steps else min(following, default=max(rows)))
    start = choose_start(Recipe(), out=out, resume=True)
    prepared, device, resolved = plan(
        inspect(start.recipe, cache=cache, trust_remote_code=trust_remote_code), reporter
    )
    with process_state(resolved.recipe, device):
        job = build(prepared, resolved.recipe, resolved.ledger, empty=True, say=reporter.phase)
        point = restore(job, checkpoint.Found(saved[first], []), reporter)
        loop = Loop(
            job=job,
            progress=point.progress,
            watch=Watch(job, PeakMeter(device)),
            reporter=reporter,
            stopper=Stopper(),
        )
        reporter.plan(job)
        differing = tuple(step for step in range(first + 1, last + 1) if not _repeats(loop, rows[step]))
        equal = checkpoint.holds(saved[last], job.stored()) if last in saved else None
    return Verdict(first=first, last=last, differing=differing, weights_equal=equal)


def _repeats(loop: Loop, row: dict[str, Any]) -> bool:
    """Train the step of a metrics row again, and tell whether its numbers are the same."""
    loop.run(row["step"])
    now = loop.progress.last
    return now is not None and all(as_json(getattr(now, name)) == row[name] for name in COMPARED)
