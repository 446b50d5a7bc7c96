"""The sections of a recipe: the six choices, the model, the data, the schedule and what a run leaves behind.

A section may be written as its first field alone: `optimizer: adamw` is `optimizer: {name: adamw}`. Of the
six choices' fields, those that only some pieces have are None until the recipe is settled, and then hold the
chosen piece's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from scrimp.base.units import parse_count
from scrimp.methods import piece

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16-mixed", "bf16"]
Logger = Literal["tensorboard", "wandb", "trackio"]


def split(value: Any) -> Any:
    """Read `a,b` as a list: how the command line writes several values of one option."""
    return value.split(",") if isinstance(value, str) else value


def _by_name(value: Any) -> Any:
    """Read `b=2,3,a=1`, or {b: [2, 3], a: 1}, as the texts `a=1` and `b=2,3`."""
    if isinstance(value, Mapping):
        several = ((name, each if isinstance(each, list | tuple) else [each]) for name, each in value.items())
        value = [f"{name}={','.join(map(str, each))}" for name, each in several]
    texts = [value or ""] if isinstance(value, str | None) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(AS_NAMED)
    if not any(texts):
        return ()
    found: dict[str, str] = {}
    name = ""
    for part in ",".join(texts).split(","):
        before, is_named, after = (each.strip() for each in part.partition("="))
        text = after if is_named else before
        name = before if is_named else name
        if not name or not text:
            raise ValueError(AS_NAMED)
        if is_named and name in found:
            raise ValueError(f"{name} is given twice: keep one")
        found[name] = text if is_named else f"{found[name]},{text}"
    return tuple(f"{name}={text}" for name, text in sorted(found.items()))


def _auto_is_none(value: Any) -> Any:
    return None if value == "auto" else value


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=1)]
Auto = BeforeValidator(_auto_is_none)
AS_NAMED = "write it as name=value, several with commas between"
Further = Annotated[tuple[str, ...], BeforeValidator(_by_name)]


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
    group: int | None = Field(default=None, ge=1, description="weights that share a scale")
    double: bool | None = Field(default=None, description="keep the scales themselves in 8 bits")
    options: Further = Field(
        default=(), description="what else a way to keep weights takes, as name=value,..."
    )


class Tune(Section):
    """Which parameters train, and when."""

    name: str = Field(default="full", description="what trains")
    layers: float | None = Field(
        default=None,
        gt=0,
        description="layers that train at a time; below 1 a share of all; by default half of them at most",
    )
    every: Annotated[int | None, Auto] = Field(
        default=None, ge=1, description="steps between changes of what trains"
    )
    order: Literal["random", "ascending", "descending", "fixed"] | None = Field(
        default=None, description="in which blocks take turns"
    )
    rank: int | None = Field(default=None, ge=1, description="rank of an adapter")
    alpha: float | None = Field(default=None, gt=0, description="scale of an adapter, times its rank")
    dropout: float | None = Field(default=None, ge=0, lt=1, description="dropout of an adapter's input")
    targets: Annotated[tuple[str, ...] | None, BeforeValidator(split)] = Field(
        default=None, description="linear layers that are adapted: all-linear, or ends of their names"
    )
    prompt: int | None = Field(default=None, ge=1, description="vectors of a trained prompt")
    bottleneck: int | None = Field(default=None, ge=1, description="width of a small network's middle")
    passes: int | None = Field(default=None, ge=1, description="micro-batches that an initialisation sees")
    ratio: float | None = Field(default=None, gt=0, description="learning rate of one part over the other's")
    per_row: int | None = Field(default=None, ge=1, description="entries of every row that train")
    density: float | None = Field(default=None, gt=0, le=1, description="share of the entries that train")
    bits: int | None = Field(default=None, ge=2, le=8, description="bits of a code of the base")
    variant: Literal["paper", "released"] | None = Field(
        default=None, description="where a method's paper and its authors' code differ, whose form"
    )
    options: Further = Field(default=(), description="what else a way to tune takes, as name=value,...")
    merge: bool = Field(default=False, description="write the merged model beside the adapter")


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
    betas: Annotated[tuple[float, float] | None, BeforeValidator(split)] = Field(
        default=None, description="decay rates of the two moments"
    )
    eps: float | None = Field(default=None, gt=0, description="added to the root of the second moment")
    weight_decay: float | None = Field(
        default=None, ge=0, description="decoupled decay of matrices; norms and biases have none"
    )
    momentum: float | None = Field(default=None, ge=0, lt=1, description="decay rate of the momentum")
    rank: int | None = Field(default=None, ge=1, description="dimensions of the subspace")
    density: float | None = Field(default=None, ge=0, le=1, description="share that keeps state")
    refresh_every: Annotated[int | None, Auto] = Field(
        default=None, ge=1, description="steps between choices of the subspace"
    )
    scale: float | None = Field(default=None, gt=0, description="factor of the update")
    store: Literal["fp32", "bf16", "bf16-nearest", "8bit", "4bit", "fp8", "fp8-plain"] | None = Field(
        default=None, description="how moments are kept"
    )
    reset_every: int | None = Field(
        default=None, ge=0, description="steps between resets of the moments; 0: never"
    )
    variant: Literal["paper", "released"] | None = Field(
        default=None, description="the paper's algorithm, or what its authors' code does"
    )
    fused_backward: bool = Field(
        default=False, description="update inside the backward pass, one gradient alive at a time"
    )
    compile: bool = Field(
        default=False,
        description="compile the update: faster where no kernel does it, after seconds at the first step",
    )
    options: Further = Field(default=(), description="what else an optimizer takes, as name=value,...")

    @field_validator("betas", mode="after")
    @classmethod
    def _betas(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not all(0 <= beta < 1 for beta in value):
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
