"""A recipe's first steps through scrimp's own loop: what they held, and what was predicted.

Counted are tensors, since that is what a prediction without its fixed part is: on CUDA
`max_memory_allocated`, on a CPU the events of torch's allocator. The first two steps are those that a run
tracks, which gives the terms; the others are not: their peak is the measured one, and each is timed. Beside
the peak stand what the caching allocator reserved and what the driver says the whole card held.

Weights are drawn where they train (a CPU takes minutes for 7B), and loading is not measured.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from _card import card

from scrimp.base.ledger import Ledger, Moment
from scrimp.bench.protocol import spread
from scrimp.build import build, inspect
from scrimp.memory import predict
from scrimp.memory.allocator import allocator_events
from scrimp.memory.fake import tensors_of
from scrimp.memory.observer import PeakMeter, storage_bytes
from scrimp.memory.predictor import needed
from scrimp.recipe import Recipe
from scrimp.report.lines import LineReporter
from scrimp.training.environment import process_state
from scrimp.training.loop import Loop
from scrimp.training.progress import Progress
from scrimp.training.reporter import Tick
from scrimp.training.run import plan
from scrimp.training.stopping import Stopper
from scrimp.training.watch import TRACKED_STEPS, Watch

TIMED_STEPS = 5
STEPS = TRACKED_STEPS + TIMED_STEPS
IN_A_STEP = ("forward", "loss", "backward", "optimizer step")
USUAL = {  # what every recipe here has
    "model.init": "scratch",
    "steps": STEPS,
    "schedule.name": "constant",
    "schedule.warmup": 0,
}


class Losses(LineReporter):
    """Notes the loss of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def tick(self, tick: Tick) -> None:
        self.losses.append(tick.loss)


@contextmanager
def running(recipe: Recipe) -> Iterator[tuple[Loop, Losses]]:
    """Build a recipe's job, with the loop around it and nothing written anywhere."""
    reporter = Losses()
    prepared, device, resolved = plan(inspect(recipe), reporter)
    with process_state(resolved.recipe, device):
        with device:  # what is made without a device goes there
            job = build(prepared, resolved.recipe, resolved.ledger, empty=False, say=reporter.phase)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        watch = Watch(job, PeakMeter(device))
        yield (
            Loop(job=job, progress=Progress(), watch=watch, reporter=reporter, stopper=Stopper()),
            reporter,
        )


@dataclass(slots=True)
class Peak:
    """The most bytes of tensors that were held at once."""

    total: int = 0


@contextmanager
def peak_of(loop: Loop) -> Iterator[Peak]:
    """Measure the peak of what a loop does; it is there when the context has closed."""
    peak = Peak()
    if loop.job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.total = torch.cuda.max_memory_allocated()
    else:
        state = [t for of in loop.job.optimizer.state.values() for t in of.values() if torch.is_tensor(t)]
        lasting = storage_bytes([*tensors_of(loop.job.model), *state])
        with allocator_events() as events:
            yield peak
        peak.total = lasting + events.peak


def timed(loop: Loop, steps: int) -> float:
    """Take a loop's next steps, and return the seconds until the device, idle before, is done with them."""
    _wait_for(loop)
    began = time.perf_counter()
    loop.run(loop.progress.step + steps)
    _wait_for(loop)
    return time.perf_counter() - began


def _wait_for(loop: Loop) -> None:
    """Wait until all that was queued is done, on every stream of the device."""
    if loop.job.device.type == "cuda":
        torch.cuda.synchronize(loop.job.device)


def hold(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe's first steps, and return what was held beside what was predicted.

    Args:
        recipe: With its device and micro-batch stated.
    """
    predicted = predict(recipe)
    moment = highest(predicted)
    workspace = _library_workspace(recipe)
    with running(recipe) as (loop, reporter):
        loop.run(TRACKED_STEPS)
        tracked = loop.watch.ledger
        assert tracked is not None
        with peak_of(loop) as peak:
            seconds = [timed(loop, 1) for _ in range(TIMED_STEPS)]
        on_card = _on_the_card(recipe)
        parameters = sum(p.numel() for p in loop.job.model.parameters())
    seen = highest(tracked)
    return {
        "recipe": recipe.model_dump(mode="json", exclude_unset=True),
        "parameters": parameters,
        "basis": predicted.basis,
        "predicted_bytes": tensors(moment),
        "predicted_at": moment.name,
        "predicted_terms": dict(moment.terms),
        "needed_bytes": needed(predicted, recipe),
        "fixed_bytes": moment.terms["fixed"],
        "measured_bytes": peak.total,
        "error_percent": round(100 * (tensors(moment) / peak.total - 1), 4),
        "tracked": {"at": seen.name, "bytes": tensors(seen), "terms": dict(seen.terms)},
        "workspace_bytes": workspace,
        **on_card,
        "losses": reporter.losses,
        "seconds_per_step": spread(seconds, digits=4),
    }


def highest(ledger: Ledger) -> Moment:
    """Return the moment of a step, nothing before or after it, that holds the most tensors."""
    return max((m for m in ledger.moments if m.name.startswith(IN_A_STEP)), key=tensors)


def tensors(moment: Moment) -> int:
    """Return the bytes of a moment without its fixed part: the process, or the CUDA context."""
    return moment.total - moment.terms["fixed"]


def _on_the_card(recipe: Recipe) -> dict[str, Any]:
    """Return what the caching allocator took, what the driver counts, and what lies between."""
    found = card() if recipe.device == "cuda" else None
    if found is None:
        return {"reserved_bytes": None, "driver_bytes": None, "outside_allocator_bytes": None}
    reserved = torch.cuda.max_memory_reserved()
    used = found["used_bytes"]
    return {"reserved_bytes": reserved, "driver_bytes": used, "outside_allocator_bytes": used - reserved}


def _library_workspace(recipe: Recipe) -> int | None:
    """Return what cuBLAS takes from torch's allocator at its first product, and keeps."""
    if recipe.device != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    ones = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    _ = ones @ ones
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before - 2 * ones.nbytes


def fits_in(recipe: Recipe, allowed: int, *, measured: int) -> bool:
    """Tell whether a recipe's steps end well in a capped allocator.

    Args:
        recipe: The recipe.
        allowed: Bytes that the allocator may take, fragmentation included.
        measured: What the steps held without a cap; a CPU's allocator has none, and this is compared.
    """
    if recipe.device != "cuda":
        return measured <= allowed
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()  # the steps before, which may have ended in an error
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, allowed / total)))
    try:
        with running(recipe) as (loop, _):
            loop.run(TRACKED_STEPS)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return True
