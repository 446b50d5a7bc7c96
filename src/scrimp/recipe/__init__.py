"""The recipe: everything that decides what a run computes, as typed data.

Six choices (`weights`, `tune`, `gradient`, `optimizer`, `activations`, `placement`) plus model, data,
schedule and budget. It imports neither torch nor any piece, so that a bad recipe is refused at once; what
stands under `options` is read by the piece that it is for (`scrimp.assembly`).
A field left at None is *resolved* when the run is built (`scrimp.build`), and every run stores its
resolved recipe. Where a run is written (`out`) is no part of it, and it never names code to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator, model_validator

from scrimp.base.errors import ScrimpError
from scrimp.base.suggest import did_you_mean
from scrimp.base.units import parse_bytes
from scrimp.methods import options_of, piece
from scrimp.recipe.sections import (
    Activations,
    Auto,
    Checkpoint,
    Count,
    Data,
    Device,
    Evaluation,
    Gradient,
    Logger,
    Model,
    Optimizer,
    Placement,
    Precision,
    Schedule,
    Section,
    Tune,
    Weights,
    split,
)

__all__ = [
    "SHORT",
    "Device",
    "Logger",
    "Optimizer",
    "Precision",
    "Recipe",
    "fields",
    "flat",
    "nest",
    "parse",
    "replace",
]

SHORT = {  # fields that the command line has a short name for
    "model.name": "model",
    "data.path": "data",
    "weights.name": "weights",
    "tune.name": "tune",
    "tune.merge": "merge",
    "optimizer.name": "optimizer",
    "placement.name": "placement",
    "optimizer.lr": "lr",
}


class Recipe(Section):
    """Everything that decides what a run computes."""

    model: Model = Model()
    data: Data = Data()
    weights: Weights = Weights()
    tune: Tune = Tune()
    gradient: Gradient = Gradient()
    optimizer: Optimizer = Optimizer()
    activations: Activations = Activations()
    placement: Placement = Placement()
    schedule: Schedule = Schedule()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    steps: Annotated[Count | None, Auto] = Field(
        default=None, description="optimizer steps; none: one pass over the data"
    )
    tokens: Annotated[Count | None, Auto] = Field(
        default=None, description="training tokens, in place of steps"
    )
    batch: Annotated[Count | None, Auto] = Field(default=None, description="sequences an optimizer step")
    micro_batch: Annotated[Count | None, Auto] = Field(
        default=None, description="sequences at a time; divides batch; none: as many as fit the memory"
    )
    seq: Annotated[Count | None, Auto] = Field(default=None, description="tokens a sequence")
    clip: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0 does not clip")
    seed: int = Field(default=0, ge=0, description="every random stream is derived from it by name")
    precision: Precision = Field(
        default="auto",
        description="fp32, bf16-mixed (fp32 weights, autocast) or bf16 (pure); auto: by device",
    )
    device: Device = Field(default="auto", description="where the model trains")
    deterministic: bool = Field(
        default=False, description="bit-for-bit repeats on CUDA, at the cost of slower kernels"
    )
    threads: Annotated[Count | None, Auto] = Field(
        default=None, description="CPU threads; none: the cores this process may use"
    )
    memory: Annotated[str | None, Auto] = Field(
        default=None,
        description="memory budget such as 6GiB, which what is left open is planned for; "
        "none: 1GiB for llama-1m, else what the machine has free",
    )
    strict: bool = Field(
        default=False, description="stop, with a checkpoint, when the run takes more than the memory budget"
    )
    compile: bool | None = Field(default=None, description="torch.compile the model; none: no")
    nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="on a non-finite loss: stop and name the last good checkpoint, or skip the step",
    )
    log: Annotated[tuple[Logger, ...], BeforeValidator(split)] = Field(
        default=(), description="where metrics go besides metrics.jsonl"
    )

    @field_validator("weights", "tune", "gradient", "optimizer", "activations", "placement", mode="after")
    @classmethod
    def _known_piece(cls, value: Any, info: Any) -> Any:
        taken, optional = piece(info.field_name, value.name).options, options_of(info.field_name)
        odd = [name for name in optional if getattr(value, name) is not None and name not in taken]
        if odd:
            has = f"its options are {', '.join(taken)}" if taken else "it has no options"
            besides = f"; what is its own goes under {info.field_name}.options" if taken else ""
            raise ValueError(f"{info.field_name}.{odd[0]}: {value.name} does not take it; {has}{besides}")
        return value

    @field_validator("memory", mode="after")
    @classmethod
    def _memory(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("steps and tokens both say how long the run is: give one of them")
        is_adapter = piece("tune", self.tune.name).freezes_base
        if self.tune.name != "full" and not is_adapter and self.optimizer.name == "frugal":
            raise ValueError(
                f"optimizer frugal wakes whole matrices in turns, and tune {self.tune.name} whole layers: "
                "use one of them"
            )
        is_frozen = piece("weights", self.weights.name).freezes_base
        if is_frozen and not is_adapter:
            raise ValueError(
                f"weights {self.weights.name} never train, and tune {self.tune.name} trains them: tune an "
                "adapter, such as --tune lora, or use --weights int8"
            )
        wraps = piece("tune", self.tune.name).wraps
        if wraps and self.activations.loss == "chunked":
            raise ValueError(f"tune {self.tune.name} runs around the model: use --activations.loss logits")
        if (wraps or self.tune.name == "dept") and self.data.boundaries == "isolate":
            raise ValueError(
                f"tune {self.tune.name} puts its prompt before a row: use --data.boundaries join, or "
                "--data.packing padded"
            )
        if self.batch is not None and self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(
                f"micro_batch {self.micro_batch} does not divide batch {self.batch}: "
                "choose a divisor, or leave it out and one is chosen"
            )
        return self


def parse(data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Make a recipe from plain data.

    Args:
        data: Nested mappings and scalars, as read from YAML.
        where: What to call the source in an error.

    Raises:
        ScrimpError: A key is unknown (the nearest one is named) or a value is not allowed.
    """
    if not isinstance(data, Mapping):
        raise ScrimpError(f"{where}: a recipe is a mapping of fields to values, not {type(data).__name__}")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ScrimpError(f"{where}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in problem["loc"])
    # Below a field pydantic names items and the branches of a union, which nobody wrote.
    name = next((field for field in fields() if name.startswith(f"{field}.")), name)
    if problem["type"] == "extra_forbidden":
        return f"there is no field {name!r}{did_you_mean(name, [*fields(), *Recipe.model_fields])}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "literal_error":
        message += did_you_mean(str(problem["input"]), problem["ctx"]["expected"].split("'")[1::2])
    if not name or message.startswith(f"{name}."):
        return message
    return f"{name} = {problem['input']!r}: {message[0].lower()}{message[1:]}"


def fields(section: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Any]:
    """Return every leaf field of a recipe by its dotted name, as pydantic's `FieldInfo`."""
    found: dict[str, Any] = {}
    for name, info in section.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.update(fields(annotation, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = info
    return found


def flat(recipe: BaseModel, *, stated_only: bool = False, prefix: str = "") -> dict[str, Any]:
    """Return a recipe's values by dotted name.

    Args:
        recipe: The recipe, or one of its sections.
        stated_only: Leave out what was not given when it was made.
        prefix: Put before every name.
    """
    found: dict[str, Any] = {}
    for name in type(recipe).model_fields:
        value = getattr(recipe, name)
        if stated_only and name not in recipe.model_fields_set:
            continue
        if isinstance(value, BaseModel):
            found.update(flat(value, stated_only=stated_only, prefix=f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted names into nested mappings, the inverse of `flat`."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def replace(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return a copy with the given dotted fields changed, validated anew.

    Only what was stated before and `values` count as stated in the copy.

    Raises:
        ScrimpError: A name is unknown or a value is not allowed.
    """
    return parse(nest({**flat(recipe, stated_only=True), **values}))
