"""What a recipe leaves open and neither the data nor the memory decides.

It imports no torch, so that a plan whose traces are cached is there at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scrimp.base import platform
from scrimp.base.errors import ScrimpError
from scrimp.methods import Choice, options_of, piece
from scrimp.recipe import Recipe, replace
from scrimp.shapes import SHAPES, Dimensions

if TYPE_CHECKING:
    from scrimp.models import Source

FINE_TUNING_LR = 2e-5
SCRATCH_LR = 1e-3
DEFAULT_SEQ = 512
DEFAULT_BATCH = 8


def settle(recipe: Recipe, source: Source, *, device: str, has_bf16: bool, model: Dimensions) -> Recipe:
    """Fill in where a model starts, its learning rate, sequence, batch, precision, device and threads.

    Args:
        recipe: What the user asked for.
        source: Where its model comes from.
        device: The type of the device it trains on.
        has_bf16: Whether that device multiplies in bf16.
        model: Its dimensions.

    Raises:
        ScrimpError: The sequence is longer than the model's positions, or Step Law is asked for the rate of
            fine-tuning.
    """
    shape = SHAPES.get(source.name)
    init = recipe.model.init
    if init == "auto":
        init = "weights" if source.has_weights else "scratch"
    context = model.context
    if init == "scratch" and piece("tune", recipe.tune.name).freezes_base:
        raise ScrimpError(
            f"tune {recipe.tune.name}: an adapter adds to a trained model, and {recipe.model.name} starts "
            "from random weights; name a trained one with --model, or use --tune full"
        )
    seq = recipe.seq or (shape.seq if shape else min(DEFAULT_SEQ, context or DEFAULT_SEQ))
    if context is not None and seq > context:
        raise ScrimpError(
            f"seq {seq}: model {recipe.model.name} has positions for {context} tokens; lower --seq"
        )
    micro_batch = recipe.micro_batch or 1
    usual_batch = shape.batch if shape else DEFAULT_BATCH
    lr = recipe.optimizer.lr
    if lr == "auto" and init == "weights":
        raise ScrimpError(
            f"lr auto: Step Law is for random weights, and {recipe.model.name} starts from stored ones; "
            f"choose a rate, such as --lr {FINE_TUNING_LR:g}, or leave it out"
        )
    if lr is None or lr == "auto":  # the law needs the length too; what memory takes depends on neither
        usual = shape.lr if shape else FINE_TUNING_LR if init == "weights" else SCRATCH_LR
        ratio = piece("optimizer", recipe.optimizer.name).lr_ratio * piece("tune", recipe.tune.name).lr_ratio
        lr = float(f"{usual * ratio:.3g}")
    precision = recipe.precision
    if precision == "auto":
        precision = "bf16-mixed" if device == "cuda" and has_bf16 else "fp32"
    filled: dict[str, Any] = {
        "model.init": init,
        "optimizer.lr": lr,
        "seq": seq,
        "batch": recipe.batch or math.ceil(usual_batch / micro_batch) * micro_batch,
        "precision": precision,
        "device": device,
        "threads": recipe.threads or platform.usable_cores(),
        "compile": bool(recipe.compile),
    }
    return with_options(replace(recipe, filled), model)


OPTIONAL: tuple[Choice, ...] = ("weights", "tune", "optimizer")  # whose pieces take options


def with_options(recipe: Recipe, model: Dimensions) -> Recipe:
    """Fill in the options of the chosen pieces with each piece's defaults.

    Args:
        recipe: Its pieces are chosen.
        model: Its dimensions: a quarter of its width is the papers' usual rank, and half of its layers is
            as many as train at a time.
    """
    filled: dict[str, Any] = {}
    for choice in OPTIONAL:
        section = getattr(recipe, choice)
        taken = piece(choice, section.name).options
        for name in options_of(choice):
            if name in taken and getattr(section, name) is None:
                default = taken[name]
                if (name, default) == ("rank", None):
                    default = max(1, model.width // 4)
                elif name == "layers":
                    default = min(default, max(1, model.depth // 2))
                filled[f"{choice}.{name}"] = default
    return replace(recipe, filled)


def choose(
    recipe: Recipe, chosen: Mapping[str, Any], stated: Mapping[str, Any], model: Dimensions
) -> Recipe | None:
    """Return a settled recipe with other pieces and their defaults.

    Args:
        recipe: The settled recipe.
        chosen: The pieces' names and other fields, by dotted name.
        stated: What the user stated; options among it are kept.
        model: Its dimensions.

    Returns:
        The recipe; None where a chosen piece does not take an option that was stated.
    """
    options = {f"{choice}.{name}" for choice in OPTIONAL for name in options_of(choice)}
    kept = {name: value for name, value in stated.items() if name in options and value is not None}
    bare = replace(recipe, {**dict.fromkeys(options), **chosen})
    for choice in OPTIONAL:
        taken = piece(choice, getattr(bare, choice).name).options
        if any(name.startswith(f"{choice}.") and name.partition(".")[2] not in taken for name in kept):
            return None
    return with_options(replace(bare, kept), model)
