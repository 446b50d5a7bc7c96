"""Fill in what a recipe leaves open, by rules that depend on the model, the data and the machine.

Resolving a resolved recipe changes nothing, so a stored one repeats its run.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from scrimp import models
from scrimp.base import platform
from scrimp.base.errors import ScrimpError
from scrimp.base.units import format_bytes, parse_bytes
from scrimp.build import Prepared, make_loader
from scrimp.memory.measure import free_bytes
from scrimp.memory.predict import Widths, predict
from scrimp.recipe import Recipe, replace
from scrimp.schedules import in_steps
from scrimp.shapes import SHAPES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from scrimp.base.ledger import Ledger

TENTHS = 10  # of a run: the default distance between evaluations and between checkpoints
FINE_TUNING_LR = 2e-5
SCRATCH_LR = 1e-3
DEFAULT_SEQ = 512
DEFAULT_BATCH = 8


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


def resolve(prepared: Prepared, device: torch.device, *, fixed: int) -> tuple[Recipe, Ledger]:
    """Fill every field that a recipe leaves open, and predict the memory it will need.

    Args:
        prepared: The recipe's inputs.
        device: Where it trains.
        fixed: Bytes the process holds before the model exists.

    Raises:
        ScrimpError: A sequence is longer than the model or the data allows, or the memory cannot do.
    """
    recipe, source = prepared.inputs.recipe, prepared.inputs.model
    shape = SHAPES.get(source.name)
    init = recipe.model.init
    if init == "auto":
        init = "weights" if source.has_weights else "scratch"
    limit = models.context_length(prepared.config)
    seq = recipe.seq or (shape.seq if shape else min(DEFAULT_SEQ, limit or DEFAULT_SEQ))
    if limit is not None and seq > limit:
        raise ScrimpError(
            f"seq {seq}: model {recipe.model.name} has positions for {limit} tokens; lower --seq"
        )
    micro_batch = recipe.micro_batch or 1
    usual_batch = shape.batch if shape else DEFAULT_BATCH
    batch = recipe.batch or math.ceil(usual_batch / micro_batch) * micro_batch
    budget = recipe.memory or (shape.memory if shape else None) or f"{free_bytes(device) // 2**20}MiB"
    default_lr = shape.lr if shape else FINE_TUNING_LR if init == "weights" else SCRATCH_LR
    recipe = replace(
        recipe,
        {
            "model.init": init,
            "optimizer.lr": recipe.optimizer.lr or default_lr,
            "seq": seq,
            "batch": batch,
            "micro_batch": micro_batch,
            "precision": _precision(recipe, device),
            "device": device.type,
            "threads": recipe.threads or platform.usable_cores(),
            "memory": budget,
            "compile": bool(recipe.compile),
        },
    )
    recipe = _resolve_length(prepared, recipe, None if shape is None else shape.steps)
    return _resolve_micro_batch(prepared, recipe, fixed=fixed)


def _precision(recipe: Recipe, device: torch.device) -> str:
    if recipe.precision != "auto":
        return recipe.precision
    return "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def _resolve_length(prepared: Prepared, recipe: Recipe, default_steps: int | None) -> Recipe:
    """Fill in the steps of the run, and what is a share of them."""
    assert recipe.batch is not None and recipe.seq is not None
    if recipe.steps is not None:
        steps = recipe.steps
    elif recipe.tokens is not None:
        steps = math.ceil(recipe.tokens / (recipe.batch * recipe.seq))
    else:
        steps = default_steps or math.ceil(make_loader(prepared, recipe).sequences / recipe.batch)
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


def _resolve_micro_batch(prepared: Prepared, recipe: Recipe, *, fixed: int) -> tuple[Recipe, Ledger]:
    """Choose the largest micro-batch that fits the budget, where none is given."""
    assert recipe.batch is not None and recipe.seq is not None and recipe.memory is not None
    widths, parameters = Widths.of(prepared.config), _count_parameters(prepared.config)

    def predicted(micro_batch: int) -> Ledger:
        assert recipe.batch is not None and recipe.seq is not None
        return predict(
            widths,
            parameters=parameters,
            trained=parameters,
            precision=recipe.precision,
            tokens=micro_batch * recipe.seq,
            micro_batches=recipe.batch // micro_batch,
            fixed=fixed,
        )

    budget = parse_bytes(recipe.memory)
    given = prepared.inputs.recipe.micro_batch
    sizes = [given] if given else [n for n in range(recipe.batch, 0, -1) if recipe.batch % n == 0]
    smallest = predicted(sizes[-1])
    held = smallest.peak.terms
    floor = held["fixed"] + held["weights"] + held["optimizer state"]
    if floor > budget:
        raise ScrimpError(
            f"memory {recipe.memory}: the program, weights and optimizer state of {recipe.model.name} alone "
            f"need {format_bytes(floor)}; raise --memory or choose a smaller model"
        )
    tried = ((size, predicted(size)) for size in sizes)
    size, ledger = next((fit for fit in tried if fit[1].peak.total <= budget), (sizes[-1], smallest))
    return replace(recipe, {"micro_batch": size}), ledger


def _count_parameters(config: PreTrainedConfig) -> int:
    """Count a model's parameters without allocating them; tied ones count once."""
    with torch.device("meta"):
        model = models.create_empty(config, dtype=torch.float32)
    return sum(parameter.numel() for parameter in model.parameters())
