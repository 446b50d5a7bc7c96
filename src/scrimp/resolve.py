"""Fill in what a recipe leaves open, by rules that depend on the model, the data and the machine.

Resolving a resolved recipe changes nothing, so a stored one repeats its run. Where the user gave a memory
budget, the planner chooses what was left open so that the run fits; else the micro-batch alone is fitted
to what the machine has free.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace as replaced

import torch

from scrimp.base.errors import ScrimpError
from scrimp.base.ledger import Ledger
from scrimp.base.units import format_bytes, parse_bytes
from scrimp.build import Prepared, make_loader
from scrimp.defaults import settle
from scrimp.laws import steplaw_batch, steplaw_lr
from scrimp.memory.machine import Machine, known
from scrimp.memory.observer import fixed_bytes, free_bytes
from scrimp.memory.planner import FIELDS, Candidate, Planner
from scrimp.memory.predictor import Predictor, divisors
from scrimp.memory.profiles import Profiles, Say
from scrimp.memory.untraceable import Untraceable
from scrimp.methods import piece
from scrimp.models import dimensions, non_embedding
from scrimp.recipe import Recipe, flat, replace
from scrimp.schedules import in_steps
from scrimp.shapes import SHAPES

TENTHS = 10  # of a run: the default distance between evaluations and between checkpoints


def choose_device(recipe: Recipe) -> torch.device:
    """Return the device a recipe trains on.

    Raises:
        ScrimpError: It asks for one that is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if recipe.device == "auto":
        return torch.device(next(name for name, is_there in there.items() if is_there))
    if not there[recipe.device]:
        raise ScrimpError(f"device {recipe.device!r}: torch sees none here; use --device auto or cpu")
    return torch.device(recipe.device)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe with nothing left open.

    Attributes:
        recipe: It.
        ledger: The memory it was predicted to need.
        planner: What predicted it.
        why: Why the planner chose what it chose; None where it was not asked.
        law: Where its learning rate comes from; None where it was not left to a law.
    """

    recipe: Recipe
    ledger: Ledger
    planner: Planner
    why: str | None = None
    law: str | None = None

    def next_smaller(self, budget: int) -> Candidate | None:
        """Return what the planner would choose in a smaller budget; None where nothing fits."""
        planner = replaced(self.planner, budget=budget)
        return planner.choose(planner.candidates())


def resolve(prepared: Prepared, device: torch.device, *, fixed: int | None, say: Say) -> Resolved:
    """Fill every field that a recipe leaves open, and predict the memory it will need.

    Args:
        prepared: The recipe's inputs.
        device: Where it trains.
        fixed: Bytes the process holds before the model exists; None measures them.
        say: Told what is going on.

    Raises:
        ScrimpError: A sequence is longer than the model or the data allows, or the memory cannot do.
    """
    asked, source = prepared.inputs.recipe, prepared.inputs.model
    settled = _settled(prepared, device)
    assert settled.memory is not None
    profiles = Profiles(
        source,
        vocab=len(prepared.tokenizer),
        trust_remote_code=prepared.inputs.trust_remote_code,
        config=prepared.config,
    )
    if fixed is None:
        # What a first trace loads counts, so that it comes before the measurement.
        with suppress(Untraceable):
            profiles.optimizer(settled)
        fixed = fixed_bytes(settled)
    planner = Planner(
        predictor=Predictor(profiles=profiles, fixed=fixed),
        machine=_machine(device),
        asked=asked,
        settled=settled,
        budget=parse_bytes(settled.memory),
        say=say,
    )
    resolved = _planned(planner) if asked.memory and _is_open(asked) else _fitted(planner)
    profiles.save()
    return _with_law(prepared, resolved) if asked.optimizer.lr == "auto" else resolved


def resolve_evaluation(prepared: Prepared, device: torch.device, *, say: Say) -> Recipe:
    """Fill what an evaluation takes from a recipe.

    Where its micro-batch is given nothing depends on memory, least of all on what training would need.
    """
    if prepared.inputs.recipe.micro_batch:
        return _settled(prepared, device)
    return resolve(prepared, device, fixed=None, say=say).recipe


def _settled(prepared: Prepared, device: torch.device) -> Recipe:
    """Fill every field that does not depend on what training holds in memory."""
    asked, source = prepared.inputs.recipe, prepared.inputs.model
    shape = SHAPES.get(source.name)
    settled = settle(
        asked,
        source,
        device=device.type,
        has_bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(),
        model=dimensions(prepared.config),
    )
    budget = asked.memory or (shape.memory if shape else None) or f"{free_bytes(device) // 2**20}MiB"
    settled = replace(settled, {"memory": budget})
    return _resolve_length(prepared, settled, None if shape is None else shape.steps)


def _machine(device: torch.device) -> Machine:
    """Return what is known of this machine, without measuring anything now."""
    return known() or Machine(device=device.type, memory={device.type: free_bytes(device)})


def _is_open(asked: Recipe) -> bool:
    """Tell whether a recipe leaves the planner anything to choose."""
    stated = flat(asked, stated_only=True)
    return not all(name in stated for name in (*FIELDS.values(), "precision", "micro_batch"))


def _planned(planner: Planner) -> Resolved:
    """Take what the planner chooses.

    Raises:
        ScrimpError: Nothing fits.
    """
    plan = planner.plan()
    if plan.chosen is None:
        raise ScrimpError(f"memory {planner.settled.memory}: {plan.why}; {plan.notes[-1]}")
    return Resolved(plan.chosen.recipe, plan.chosen.ledger, planner, plan.why)


def _fitted(planner: Planner) -> Resolved:
    """Choose the largest micro-batch that fits the budget, where none is given.

    Raises:
        ScrimpError: Not even what the run holds at all times fits.
    """
    recipe, budget = planner.settled, planner.budget
    assert recipe.batch is not None
    sizes = [recipe.micro_batch] if recipe.micro_batch else divisors(recipe.batch)
    fitted, found = planner.predictor.fit(recipe, sizes, budget)
    held = found.peak.terms
    floor = held["fixed"] + held["weights"] + held.get("optimizer state", 0)
    if floor > budget:
        raise ScrimpError(
            f"memory {recipe.memory}: the program, weights and optimizer state of {recipe.model.name} alone "
            f"need {format_bytes(floor)}; raise --memory or choose a smaller model"
        )
    return Resolved(fitted, found, planner)


def _with_law(prepared: Prepared, resolved: Resolved) -> Resolved:
    """Take Step Law's learning rate, for the optimizer that was chosen, and say what it rests on."""
    recipe = resolved.recipe
    assert recipe.steps is not None and recipe.batch is not None and recipe.seq is not None
    tokens = recipe.steps * recipe.batch * recipe.seq
    trust = prepared.inputs.trust_remote_code
    found = steplaw_lr(non_embedding(prepared.config, trust_remote_code=trust), tokens)
    ratio = piece("optimizer", recipe.optimizer.name).lr_ratio
    lr = float(f"{found.value * ratio:.3g}")
    cap = ", the cap of schedule power" if recipe.schedule.name == "power" else ""
    scaled = "" if ratio == 1 else f", {ratio:g} times AdamW's for {recipe.optimizer.name}"
    rows = steplaw_batch(tokens).value / recipe.seq
    law = f"lr {lr:g}{cap}{scaled}: {found.text}; the law's batch would be {rows:.3g} sequences"
    return replaced(resolved, recipe=replace(recipe, {"optimizer.lr": lr}), law=law)


def _resolve_length(prepared: Prepared, recipe: Recipe, default_steps: int | None) -> Recipe:
    """Fill in the steps of the run, and what is a share of them."""
    assert recipe.batch is not None and recipe.seq is not None
    if recipe.steps is not None:
        steps = recipe.steps
    elif recipe.tokens is not None:
        steps = math.ceil(recipe.tokens / (recipe.batch * recipe.seq))
    else:
        counted = replace(recipe, {"micro_batch": 1})  # which no number of sequences depends on
        steps = default_steps or math.ceil(make_loader(prepared, counted).sequences / recipe.batch)
    tenth = math.ceil(steps / TENTHS)
    return replace(
        recipe,
        {
            "steps": steps,
            "tokens": None,
            "schedule.warmup": in_steps(recipe.schedule.warmup, steps),
            "schedule.decay": max(1, in_steps(recipe.schedule.decay, steps)),
            "evaluation.every": recipe.evaluation.every or tenth,
            "checkpoint.every": recipe.checkpoint.every or tenth,
        },
    )
