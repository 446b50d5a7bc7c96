"""From profiles to a ledger: the moments of a run and what each holds, in plain arithmetic.

    load            weights as they are read, and what reading takes
    forward, loss, backward of the first micro-batch
    ... of the later ones, where the gradients of those before are alive
    optimizer step  gradients, and the optimizer's own temporaries
    evaluation      no gradients
    save            nothing but what lives; on disk, the checkpoints that stay and the one being written
    resume          one tensor at a time
    merge           what a parametrisation needs to become dense again

Weights and optimizer state are held at all of them but the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from scrimp.base.ledger import Ledger, Moment, Place, Term
from scrimp.memory.profile import EvaluationProfile, Line, ModelSize, OptimizerProfile, StepProfile, highest
from scrimp.methods import piece
from scrimp.recipe import Recipe

TRACED_ERROR = 0.03  # of the peak: the largest seen against allocator and resident memory, rounded up
ASSUMED_ERROR = 0.05  # where values were assumed: an eager mixture's untrained router is up to 2.5 % uneven
BEST_AND_NEXT = 2  # checkpoints besides those that are kept: the best one, and the one being written
SHARD_BYTES = 2 * 10**9  # of the finished model that are copied to the host at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a ledger is made of.

    Attributes:
        size: The model's tensors.
        step: The profile of a micro-batch in training.
        evaluation: That of one in evaluation.
        optimizer: The optimizer's profile.
        fixed: Bytes held before the model exists.
        slack: Bytes that the allocator and the libraries hold besides, once it trains.
        file_bytes: Bytes of the weight files that are mapped while the model is loaded, and differ in
            dtype from what trains, and of what decoding them takes; 0 where the weights are used as they lie
            in the file.
    """

    size: ModelSize
    step: StepProfile
    evaluation: EvaluationProfile
    optimizer: OptimizerProfile
    fixed: int
    slack: int = 0
    file_bytes: int = 0


def ledger(parts: Parts, recipe: Recipe) -> Ledger:
    """Account for a whole run.

    Args:
        parts: The profiles.
        recipe: The resolved recipe.
    """
    answers = tuple(f"assumed about a value: {answer}" for answer in parts.step.answers)
    error = ASSUMED_ERROR if answers else TRACED_ERROR
    pages_state = piece("placement", recipe.placement.name).pages_state
    paged = parts.optimizer.paged if pages_state else 0
    place: Place = "disk" if recipe.device == "cpu" else "host"
    moments = (_beside(moment, place, paged) for moment in _moments(parts, recipe, paged))
    return Ledger(tuple(moments), basis="traced", error=error, notes=answers)


def _beside(moment: Moment, place: Place, paged: int) -> Moment:
    """Return a moment at which so much optimizer state lies at a place beside the device."""
    if not paged or moment.name == "load":
        return moment
    there = dict(moment.elsewhere.get(place, {}))
    there["optimizer state"] = there.get("optimizer state", 0) + paged
    return replace(moment, elsewhere={**moment.elsewhere, place: there})


def _moments(parts: Parts, recipe: Recipe, paged: int) -> Iterator[Moment]:
    assert recipe.batch is not None and recipe.micro_batch is not None
    size, optimizer, rows = parts.size, parts.optimizer, recipe.micro_batch
    loaded: dict[Term, int] = {"fixed": parts.fixed, "weights": max(size.loaded, size.weights)}
    always: dict[Term, int] = {
        "fixed": parts.fixed + parts.slack,
        "weights": size.weights,
        "optimizer state": optimizer.state - paged,
    }
    updating = {**always, "optimizer state": optimizer.state - paged + (optimizer.at_hand if paged else 0)}
    on_gpu = recipe.device == "cuda"
    load: dict[Place, Mapping[Term, int]] = {}
    if on_gpu:
        load = {"host": {"weights": loaded["weights"], "temporaries": parts.file_bytes}}
        loaded["weights"] = size.weights
    elif parts.file_bytes:
        loaded["temporaries"] = parts.file_bytes
    yield Moment("load", loaded, load)
    several = recipe.batch > rows
    # Inside the backward pass of a single micro-batch the gradients have gone by the step.
    in_backward = recipe.optimizer.fused_backward and not several and not recipe.clip
    backward = updating if in_backward else always
    yield from _micro_batch(parts.step.first, rows, always, backward, ", micro-batch 1" if several else "")
    if several:
        yield from _micro_batch(parts.step.later, rows, always, always, ", micro-batch 2")
    gradients = 0 if in_backward else size.gradients
    yield Moment("optimizer step", {**updating, "gradients": gradients, "temporaries": optimizer.temporaries})
    yield _moment("evaluation", parts.evaluation.lines, rows, always)
    yield Moment("save", always, _saved(parts, recipe, on_gpu=on_gpu))
    yield Moment("resume", {**always, "temporaries": size.largest})
    yield Moment("merge", always)


def _micro_batch(
    lines: Mapping[str, tuple[Line, ...]],
    rows: int,
    always: Mapping[Term, int],
    backward: Mapping[Term, int],
    suffix: str,
) -> Iterator[Moment]:
    for name, found in lines.items():
        yield _moment(f"{name}{suffix}", found, rows, backward if name == "backward" else always)


def _moment(name: str, lines: tuple[Line, ...], rows: int, always: Mapping[Term, int]) -> Moment:
    (activations, gradients, temporaries), operation = highest(lines, rows)
    terms: dict[Term, int] = {
        "gradients": gradients,
        "activations": activations,
        "temporaries": temporaries,
    }
    return Moment(name, {**always, **terms}, operation=operation)


def _saved(parts: Parts, recipe: Recipe, *, on_gpu: bool) -> dict[Place, Mapping[Term, int]]:
    kept = recipe.checkpoint.keep + BEST_AND_NEXT
    weights, state = parts.size.weights, parts.optimizer.state
    places: dict[Place, Mapping[Term, int]] = {
        "disk": {"weights": (kept + 1) * weights, "optimizer state": kept * state}
    }
    if on_gpu:
        places["host"] = {"temporaries": min(weights, max(SHARD_BYTES, parts.size.largest))}
    return places
