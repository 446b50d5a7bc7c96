"""The recipe: everything that decides what a run computes, as typed data.

Six choices (`weights`, `tune`, `gradient`, `optimizer`, `activations`, `placement`) plus model, data,
schedule and budget. It imports neither torch nor any piece, so that a bad recipe is refused at once.
A field left at None is *resolved* when the run is built (`scrimp.build`), and every run stores its
resolved recipe. Where a run is written (`out`) is no part of it, and it never names code to import.

A section may be written as its first field alone: `optimizer: adamw` is `optimizer: {name: adamw}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from scrimp.base.errors import ScrimpError
from scrimp.base.suggest import did_you_mean
from scrimp.base.units import parse_bytes, parse_count
from scrimp.methods import piece

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16-mixed", "bf16"]
Logger = Literal["tensorboard", "wandb", "trackio"]


def _split(value: Any) -> Any:
    """Read `a,b` as a list: how the command line writes several values of one option."""
    return value.split(",") if isinstance(value, str) else value


def _auto_is_none(value: Any) -> Any:
    return None if value == "auto" else value


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=1)]
Auto = BeforeValidator(_auto_is_none)


def _one_is_a_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class Section(BaseModel):
    """A part of a recipe: frozen, strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _first_field_alone(cls, data: Any) -> Any:
        if isinstance(data, Mapping | BaseModel):
            return data
        return {next(iter(cls.model_fields)): data}


class Model(Section):
    """Which model trains, and from which weights."""

    name: str = Field(
        default="llama-1m",
        min_length=1,
        description="named shape, local folder, GGUF file, or Hugging Face hub id",
    )
    init: Literal["auto", "scratch", "weights"] = Field(
        default="auto",
        description="start from random weights or the stored ones; auto: stored ones where there are any",
    )


class Data(Section):
    """Which text it trains on, and how sequences are cut from it."""

    path: Annotated[tuple[str, ...], BeforeValidator(_one_is_a_tuple)] = Field(
        default=(),
        description="file, glob, folder or dataset id; none: the Python standard library's source",
    )
    tokenizer: str | None = Field(
        default=None,
        description="tokenizer.json, folder or hub id; none: the model's own, or bytes for a named shape",
    )
    text_key: str = Field(
        default="text", min_length=1, description="column that holds the text of a jsonl or parquet row"
    )
    packing: Literal["packed", "padded"] = Field(
        default="packed",
        description="packed: documents end to end; padded: one document a row (the papers' protocol)",
    )
    boundaries: Literal["join", "isolate"] = Field(
        default="join",
        description="isolate: no attention across documents in a packed row, positions restart",
    )
    long: Literal["split", "cut"] = Field(
        default="split",
        description="padded rows: split a long document into several rows, or cut it and say what is lost",
    )
    held_out: float = Field(
        default=0.02, ge=0, lt=1, description="share of the documents kept for evaluation"
    )

    @field_validator("text_key", mode="after")
    @classmethod
    def _text_key(cls, value: str) -> str:
        if value == "messages":
            raise ValueError("'messages' holds chats and is found by itself; name the column of plain text")
        return value


class Weights(Section):
    """How a matrix is stored and parametrised."""

    name: str = Field(default="dense", description="parametrisation of the weights")


class Tune(Section):
    """Which parameters train, and when."""

    name: str = Field(default="full", description="what trains")


class Gradient(Section):
    """Where the gradient comes from."""

    name: str = Field(default="backprop", description="gradient estimator")


class Optimizer(Section):
    """How a gradient becomes a step."""

    name: str = Field(default="adamw", description="optimizer")
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        default=None,
        description="peak learning rate; none: one that suits the model; "
        "auto: Step Law's, from its size and the run's tokens",
    )
    betas: Annotated[tuple[float, float], BeforeValidator(_split)] = Field(
        default=(0.9, 0.999), description="decay rates of the two moments"
    )
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(
        default=0.01, ge=0, description="decoupled decay of matrices; norms and biases have none"
    )

    @field_validator("betas", mode="after")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("each must be at least 0 and below 1")
        return value


class Activations(Section):
    """What the backward pass keeps."""

    name: str = Field(default="everything", description="what the backward pass keeps")
    loss: str = Field(
        default="logits", description="logits: cross-entropy over all logits; chunked: without holding them"
    )

    @field_validator("loss", mode="after")
    @classmethod
    def _known_loss(cls, value: str) -> str:
        return piece("loss", value).name


class Placement(Section):
    """Where tensors live."""

    name: str = Field(default="device", description="where tensors live")


class Schedule(Section):
    """The learning rate over the run, as a multiple of `optimizer.lr`."""

    name: Literal["constant", "linear", "cosine", "wsd", "power"] = Field(
        default="cosine",
        description="shape after warm-up; wsd: stable, then a linear decay; power: falls with the tokens",
    )
    warmup: float = Field(
        default=0.05, ge=0, description="warm-up in steps, or below 1 as a share of the run"
    )
    floor: float = Field(default=0.1, ge=0, le=1, description="the multiple that all but constant end at")
    decay: float = Field(
        default=0.2,
        gt=0,
        description="wsd, power: length of the decay in steps, or below 1 as a share of the run",
    )
    amplitude: float = Field(
        default=4.0, gt=0, description="power: the rate a sequence of the batch after one token"
    )
    exponent: float = Field(default=-0.51, lt=0, description="power: how the rate falls with the tokens")


class Evaluation(Section):
    """When and on how much held-out text the loss is taken."""

    every: Annotated[Count | None, Auto] = Field(
        default=None, description="steps between evaluations; none: a tenth of the run"
    )
    tokens: Count = Field(
        default=32_768, description="held-out tokens, rounded down to whole documents (at least one)"
    )


class Checkpoint(Section):
    """When the run is saved, and how many saves stay."""

    every: Annotated[Count | None, Auto] = Field(
        default=None,
        description="steps between checkpoints; none: a tenth of the run (and every ten minutes)",
    )
    keep: int = Field(default=2, ge=1, description="newest checkpoints that stay, besides the best one")


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
    log: Annotated[tuple[Logger, ...], BeforeValidator(_split)] = Field(
        default=(), description="where metrics go besides metrics.jsonl"
    )

    @field_validator("weights", "tune", "gradient", "optimizer", "activations", "placement", mode="after")
    @classmethod
    def _known_piece(cls, value: Any, info: Any) -> Any:
        piece(info.field_name, value.name)
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
