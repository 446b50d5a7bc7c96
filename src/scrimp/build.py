"""From a recipe to a job: all that the training loop runs.

    recipe ──> inspect ──> prepare ──> resolve ──> build ──> Job

`inspect` looks at what the recipe names without importing torch, so that most mistakes are found at
once. `prepare` tokenises. `resolve` fills every field that was left open, by rules that depend on the
model, the data and the machine (`scrimp.resolve`). `build` puts the pieces together (`scrimp.assembly`).
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from scrimp import adapted, data, models
from scrimp.assembly import assemble, fuse, make_optimizer, make_placement, make_weights
from scrimp.base import extras, platform
from scrimp.base.errors import ScrimpError
from scrimp.base.seeds import derive
from scrimp.checks import check_model, check_tune
from scrimp.methods import piece
from scrimp.recipe import Recipe, replace

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from scrimp.base.ledger import Ledger
    from scrimp.base.protocols import (
        Activations,
        Estimator,
        Loss,
        Parametrisation,
        Placement,
        Trainable,
        Updates,
    )
    from scrimp.data import Corpus, Loader, Sources

Say = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a recipe names, found but not yet read.

    Attributes:
        recipe: The recipe, with absolute paths.
        model: Where the model comes from.
        tokenizer: Where the tokenizer comes from; None is the byte-level one.
        sources: Where the text comes from.
        cache: Folder of the token files.
        trust_remote_code: Whether the model's own code may run.
    """

    recipe: Recipe
    model: models.Source
    tokenizer: Path | None
    sources: Sources
    cache: Path
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A recipe's inputs, read: tokenizer, tokens and the model's configuration."""

    inputs: Inputs
    tokenizer: PreTrainedTokenizerFast
    corpus: Corpus
    config: PreTrainedConfig

    @property
    def pad_id(self) -> int:
        """What fills short rows: never a target, so any token will do where there is none for it."""
        given = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, self.tokenizer.bos_token_id)
        return int(next(token for token in given if token is not None))


@dataclass(slots=True, kw_only=True)
class Job:
    """All that the training loop runs.

    Attributes:
        recipe: The resolved recipe.
        prepared: Its inputs.
        device: Where it trains.
        model: The model, on `device`.
        weights: How its matrices are stored.
        tune: What trains, and when.
        trained: The parameters that train, by name.
        loss: The loss over a micro-batch.
        estimator: Where gradients come from.
        optimizer: How they become steps.
        fused: The updates that run inside the backward pass; None where all run at the step.
        activations: What the backward pass keeps.
        placement: Where tensors live.
        loader: The training batches.
        ledger: The predicted memory.
        identity: Fingerprint of the model's architecture; a checkpoint of another one is refused.
        base: Fingerprint of the weights that an adapter lies over; empty where the weights themselves train.
    """

    recipe: Recipe
    prepared: Prepared
    device: torch.device
    model: PreTrainedModel
    weights: Parametrisation
    tune: Trainable
    trained: dict[str, nn.Parameter]
    loss: Loss
    estimator: Estimator
    optimizer: torch.optim.Optimizer
    fused: Updates | None
    activations: Activations
    placement: Placement
    loader: Loader
    ledger: Ledger
    identity: str
    base: str

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the model's tensors that a checkpoint holds: all of them, or an adapter's."""
        from scrimp.base.protocols import Adapter

        if isinstance(self.tune, Adapter):
            return self.tune.stored(self.model)
        return self.model.state_dict()


def inspect(recipe: Recipe, *, cache: Path | None = None, trust_remote_code: bool = False) -> Inputs:
    """Find everything a recipe names, without importing torch.

    Raises:
        ScrimpError: Something is not there, or needs a package that is not installed.
    """
    for logger in recipe.log:
        extras.require(logger, extra=logger, purpose=f"--log {logger}")
    model = models.locate(recipe.model.name, trust_remote_code=trust_remote_code)
    sources = data.find_sources(recipe.data.path)
    absolute: dict[str, Any] = {
        "model.name": model.name,
        "data.path": [_absolute(p) for p in recipe.data.path],
    }
    tokenizer = _find_tokenizer(recipe, model)
    if recipe.data.tokenizer is not None:
        absolute["data.tokenizer"] = str(tokenizer)
    return Inputs(
        recipe=replace(recipe, absolute),
        model=model,
        tokenizer=tokenizer,
        sources=sources,
        cache=cache or data.cache_folder(),
        trust_remote_code=trust_remote_code,
    )


def _absolute(path: str) -> str:
    """Make a file, folder or pattern independent of the working folder; a dataset id stays as it is."""
    where = Path(path).expanduser()
    return str(where.absolute()) if where.exists() or glob.has_magic(path) else path


def _find_tokenizer(recipe: Recipe, model: models.Source) -> Path | None:
    named = recipe.data.tokenizer
    return model.tokenizer if named is None else models.locate_tokenizer(named)


def prepare(inputs: Inputs, say: Say) -> Prepared:
    """Read the tokenizer and the model's configuration, and tokenise the text (once: it is cached).

    Raises:
        ScrimpError: The data is empty or broken, or the tokenizer does not fit the model.
    """
    recipe = inputs.recipe
    say("reading the tokenizer", None)
    tokenizer = data.byte_tokenizer() if inputs.tokenizer is None else data.load_tokenizer(inputs.tokenizer)
    config = models.load_config(
        inputs.model, vocab=len(tokenizer), trust_remote_code=inputs.trust_remote_code
    )
    vocab = config.get_text_config().vocab_size
    needed = _tokens_needed(tokenizer)
    if needed > vocab:
        raise ScrimpError(
            f"the tokenizer has {needed} tokens and model {recipe.model.name} only {vocab}: "
            "choose another one with --data.tokenizer"
        )
    corpus = data.prepare(
        inputs.sources,
        tokenizer,
        text_key=recipe.data.text_key,
        held_out=recipe.data.held_out,
        cache=inputs.cache,
        progress=say,
    )
    return Prepared(inputs=inputs, tokenizer=tokenizer, corpus=corpus, config=config)


def _tokens_needed(tokenizer: PreTrainedTokenizerFast) -> int:
    """Count the vocabulary up to its last token that a text can hold.

    T5's tokenizer, which the GaLore papers use with 32,000 rows of embedding, ends in 100 sentinels
    that no text becomes.
    """
    used = [number for token, number in tokenizer.get_vocab().items() if not token.startswith("<extra_id_")]
    return max(used) + 1


def make_loader(prepared: Prepared, recipe: Recipe) -> Loader:
    """Make the training batches of a recipe whose `seq`, `batch` and `micro_batch` are given."""
    from scrimp.data.loader import Loader

    assert recipe.seq is not None and recipe.batch is not None and recipe.micro_batch is not None
    return Loader(
        prepared.corpus.train,
        seq=recipe.seq,
        batch=recipe.batch,
        micro_batch=recipe.micro_batch,
        packing=recipe.data.packing,
        boundaries=recipe.data.boundaries,
        long=recipe.data.long,
        seed=recipe.seed,
        pad_id=prepared.pad_id,
    )


@dataclass(frozen=True, slots=True)
class Base:
    """A model that an adapter is to be laid over, made already.

    Attributes:
        model: It, its matrices stored as the recipe says.
        fingerprint: Of its weights, before that.
    """

    model: PreTrainedModel
    fingerprint: str


def make_base(prepared: Prepared, recipe: Recipe) -> Base:
    """Make the frozen model of a resolved recipe, where it trains."""
    import torch

    model = _make_model(prepared, recipe, empty=False)
    fingerprint = adapted.fingerprint(model)
    make_weights(recipe).apply(model)
    placed = make_placement(recipe).place(model, torch.device(recipe.device))
    return Base(cast("PreTrainedModel", placed), fingerprint)


def build(
    prepared: Prepared,
    recipe: Recipe,
    ledger: Ledger,
    *,
    empty: bool,
    say: Say,
    over: Base | None = None,
) -> Job:
    """Make the objects of a resolved recipe.

    Args:
        prepared: The recipe's inputs.
        recipe: The resolved recipe.
        ledger: Its predicted memory.
        empty: Leave the weights to be read from a checkpoint.
        say: Told what is going on.
        over: The model to lay an adapter over; None makes it.

    Raises:
        ScrimpError: The model cannot do what the recipe asks of it.
    """
    import torch

    entry = piece("tune", recipe.tune.name)
    device = torch.device(recipe.device)
    placement = make_placement(recipe)
    say("building the model", None)
    # A checkpoint of an adapter holds the adapter alone.
    if over is None:
        model = _make_model(prepared, recipe, empty=empty and not entry.freezes_base)
        base = adapted.fingerprint(model) if entry.freezes_base else ""
    else:
        model, base = over.model, over.fingerprint
    made = assemble(model, recipe, place=placement.place, stored=over is not None)
    platform.trim_heap()  # of what loading and coding freed
    check_tune(made, recipe)
    if not empty:  # a checkpoint's model was tried when it was new
        check_model(made.model, recipe, device)
    optimizer = make_optimizer(recipe, made.model)
    placement.place_state(optimizer, prepared.inputs.cache)
    return Job(
        recipe=recipe,
        prepared=prepared,
        device=device,
        model=made.model,
        weights=made.weights,
        tune=made.tune,
        trained=made.trained,
        loss=made.loss,
        estimator=made.estimator,
        optimizer=optimizer,
        fused=fuse(recipe, optimizer),
        activations=made.activations,
        placement=placement,
        loader=make_loader(prepared, recipe),
        ledger=ledger,
        identity=_identity(made.model),
        base=base,
    )


def _make_model(prepared: Prepared, recipe: Recipe, *, empty: bool) -> PreTrainedModel:
    import torch

    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    trust = prepared.inputs.trust_remote_code
    if empty:
        return models.create_empty(prepared.config, dtype=dtype, trust_remote_code=trust)
    if recipe.model.init == "weights":
        stored = models.load(prepared.inputs.model, dtype=dtype, trust_remote_code=trust)
        if adapted.is_wrapped(stored):
            raise ScrimpError(
                f"model {prepared.inputs.model.name}: no weight can hold what this adapter does, so nothing "
                "can be trained over it; train over its base"
            )
        return stored
    seed = derive(recipe.seed, "init")
    model = models.create(prepared.config, seed=seed, dtype=dtype, trust_remote_code=trust)
    for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, special, getattr(prepared.tokenizer, special))
        setattr(model.generation_config, special, getattr(prepared.tokenizer, special))
    return model


def _identity(model: nn.Module) -> str:
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in model.state_dict().items())
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
