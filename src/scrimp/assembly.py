"""Names into objects: the one place that sees all six choices.

The training loop runs what is put together here on real tensors, and the planner on fake ones.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast, get_args, get_origin, get_type_hints

from scrimp.base.errors import ScrimpError
from scrimp.base.seeds import derive
from scrimp.base.suggest import did_you_mean
from scrimp.methods import Choice, piece
from scrimp.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from scrimp.base.protocols import (
        Activations,
        Estimator,
        Loss,
        Parametrisation,
        Placement,
        Trainable,
        Updates,
    )
    from scrimp.optim.optimizer import Optimizer

# What builders take of the run, or of the other fields.
FROM_THE_RUN = frozenset({"lr", "seed", "steps", "length", "compile", "inner"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """A model with the pieces of a recipe around it, optimizer and data left out."""

    model: PreTrainedModel
    weights: Parametrisation
    tune: Trainable
    trained: dict[str, nn.Parameter]
    loss: Loss
    estimator: Estimator
    activations: Activations


def assemble(
    model: PreTrainedModel,
    recipe: Recipe,
    *,
    place: Callable[[Any, torch.device], Any] | None = None,
    stored: bool = False,
) -> Assembly:
    """Put the pieces of a resolved recipe around a model.

    Args:
        model: The model as transformers makes it.
        recipe: The resolved recipe.
        place: Moves the model to where it trains; None leaves it.
        stored: Whether the model's matrices are stored as the recipe says already.
    """
    import torch

    from scrimp.base.protocols import Adapter

    weights = make_weights(recipe)
    tune = _make_tune(recipe)
    activations = _builder("activations", recipe)()
    if not stored:
        weights.apply(model)
    trained = tune.select(model)
    if isinstance(tune, Adapter):
        model = cast("PreTrainedModel", tune.wrap(model))
    if place is not None:
        model = place(model, torch.device(recipe.device))
    activations.apply(model)
    forward = cast("nn.Module", torch.compile(model)) if recipe.compile and place is not None else model
    return Assembly(
        model=model,
        weights=weights,
        tune=tune,
        trained=trained,
        loss=make_loss(recipe, forward),
        estimator=_builder("gradient", recipe)(),
        activations=activations,
    )


def make_weights(recipe: Recipe) -> Parametrisation:
    """Make how the matrices of a recipe are stored."""
    return cast("Parametrisation", _builder("weights", recipe)(**piece_options("weights", recipe)))


def make_loss(recipe: Recipe, model: nn.Module) -> Loss:
    """Make the loss of a resolved recipe over a model."""
    import torch

    autocast = torch.bfloat16 if recipe.precision == "bf16-mixed" else None
    return cast("Loss", _builder("loss", recipe)(model, autocast))


def make_placement(recipe: Recipe) -> Placement:
    """Make the placement of a recipe."""
    return cast("Placement", _builder("placement", recipe)())


def make_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """Make the optimizer of a resolved recipe over what trains of a model."""
    settings, seed = recipe.optimizer, derive(recipe.seed, "optimizer")
    rate = {} if settings.lr is None else {"lr": settings.lr}  # an unsettled recipe is planned with any
    make = functools.partial(_builder("optimizer", recipe), **rate, **piece_options("optimizer", recipe))
    made = cast("Optimizer", make(model, seed=seed, compile=settings.compile))
    if recipe.device != "cpu":  # in a simulation its tensors are a CPU's
        made.leave_kernels_out()
    return made


def fuse(recipe: Recipe, optimizer: Optimizer) -> Updates | None:
    """Let updates run inside the backward pass, where a resolved recipe asks for it.

    Raises:
        ScrimpError: They could not be exact there.
    """
    if not recipe.optimizer.fused_backward:
        return None
    assert recipe.batch is not None and recipe.micro_batch is not None
    return optimizer.fuse_backward(micro_batches=recipe.batch // recipe.micro_batch, clip=recipe.clip)


def _make_tune(recipe: Recipe) -> Trainable:
    """Make what trains, with what it takes of the run: a seed, the steps, the length of a sequence."""
    builder = _builder("tune", recipe)
    known = {"seed": derive(recipe.seed, "tune"), "steps": recipe.steps, "length": recipe.seq}
    taken = signature(builder).parameters
    more = {name: value for name, value in known.items() if name in taken and value is not None}
    return cast("Trainable", builder(**piece_options("tune", recipe), **more))


def _builder(choice: Choice, recipe: Recipe) -> Callable[..., Any]:
    name = recipe.activations.loss if choice == "loss" else getattr(recipe, choice).name
    return load_function(piece(choice, name).builder)


def piece_options(choice: Choice, recipe: Recipe) -> dict[str, Any]:
    """Return the options of a choice's piece that the recipe has; a builder knows its own defaults."""
    section = getattr(recipe, choice)
    given = {name: getattr(section, name) for name in piece(choice, section.name).options}
    stated = {name: value for name, value in given.items() if value is not None}
    return stated | _further(choice, section)


def _further(choice: Choice, section: Any) -> dict[str, Any]:
    """Return a section's `options` in the types that the builder states.

    Raises:
        ScrimpError: The builder takes no such option, or not such a value.
    """
    given = dict(each.split("=", 1) for each in section.options)
    if not given:
        return {}
    taken, named = takes_besides(choice, section.name), f"{choice} {section.name}"
    for name in (name for name in given if name not in taken):
        if name in type(section).model_fields:
            raise ScrimpError(f"{choice}.options: {name} is a field of its own: write {choice}.{name}")
        may = f"may hold {', '.join(taken)}" if taken else "must be empty"
        raise ScrimpError(
            f"{choice}.options: {named} has no {name!r} among them{did_you_mean(name, taken)}; they {may}"
        )
    return {name: _typed(f"{choice}.options", name, value, taken[name]) for name, value in given.items()}


def takes_besides(choice: Choice, name: str) -> dict[str, Any]:
    """Return what a piece's builder takes that no field holds: the type of each option, by name."""
    found = piece(choice, name)
    builder = load_function(found.builder)
    known = {*found.options, *FROM_THE_RUN}
    stated = {
        each.name: each.annotation
        for each in signature(builder).parameters.values()
        if each.kind is each.KEYWORD_ONLY and each.name not in known
    }
    namespace = vars(sys.modules[builder.__module__])
    return get_type_hints(SimpleNamespace(__annotations__=stated), namespace)


def _typed(where: str, name: str, text: str, kind: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    alternatives = (kind, *get_args(kind))
    kinds = {get_origin(each) or each for each in alternatives}
    if text.lower() == "none" and type(None) in kinds:
        return None
    try:
        adapter = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
        return adapter.validate_python(text.split(",") if tuple in kinds else text)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"]
        several = [len(get_args(each)) for each in alternatives if get_origin(each) is tuple]
        if several and problem == "Field required":
            problem = f"it has {several[0]} values"
        raise ScrimpError(f"{where}: {name} = {text!r}: {problem[0].lower()}{problem[1:]}") from None


def load_function(where: str) -> Callable[..., Any]:
    """Import the function that a table names as `module:function`."""
    module, _, function = where.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]
