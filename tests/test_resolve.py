"""What a recipe leaves open is filled in by rules, and a filled-in one stays as it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from scrimp import models
from scrimp.base.errors import ScrimpError
from scrimp.build import Prepared, inspect, prepare
from scrimp.data import byte_tokenizer
from scrimp.defaults import DEFAULT_BATCH, FINE_TUNING_LR, OPTIONAL, SCRATCH_LR, with_options
from scrimp.memory import predict
from scrimp.memory.predictor import needed
from scrimp.methods import options_of, piece
from scrimp.recipe import Recipe, flat, parse, replace
from scrimp.resolve import Resolved, choose_device, resolve
from scrimp.shapes import SHAPES, Dimensions

CPU = torch.device("cpu")
PLAIN = {"activations__name": "everything", "activations__loss": "logits", "precision": "fp32"}
MIB = 2**20
TINY = LlamaConfig(
    vocab_size=264,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text of 12,000 bytes, and a tiny model with and without weights."""
    root = tmp_path_factory.mktemp("resolve")
    (root / "text.txt").write_text("a text of 24 characters\n" * 500)
    TINY.save_pretrained(root / "bare")
    byte_tokenizer().save_pretrained(root / "bare")
    models.export(models.create(TINY, seed=0, dtype=torch.float32), byte_tokenizer(), root / "full")
    return root


@pytest.fixture
def prepared(folder: Path) -> Callable[..., Prepared]:
    """Return a function from fields by dotted name to a prepared recipe."""

    def make(**fields: Any) -> Prepared:
        values = {
            "model.name": str(folder / "bare"),
            "data.path": str(folder / "text.txt"),
            "data.held_out": 0,
        }
        recipe = replace(Recipe(), {**values, **{k.replace("__", "."): v for k, v in fields.items()}})
        return prepare(inspect(recipe, cache=folder / "cache"), lambda *_: None)

    return make


def _resolve(prepared: Prepared, fixed: int = 0) -> Resolved:
    return resolve(prepared, CPU, fixed=fixed, say=lambda *_: None)


def _resolved(prepared: Prepared, fixed: int = 0) -> Recipe:
    return _resolve(prepared, fixed).recipe


def test_nothing_stays_open_that_a_repeat_would_need(prepared: Callable[..., Prepared]) -> None:
    open_fields = {name for name, value in flat(_resolved(prepared())).items() if value is None}
    foreign = {f"{c}.{name}" for c in OPTIONAL for name in options_of(c)}  # options of pieces not chosen
    foreign -= {f"optimizer.{name}" for name in piece("optimizer", "adamw").options}
    # Steps stand for tokens, and the tokenizer is the model's.
    assert open_fields == {"tokens", "data.tokenizer"} | foreign


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"steps": 30, "schedule__name": "wsd", "schedule__decay": 0.3},
        {"tokens": 5000, "batch": 3, "seq": 33},
        {"steps": 7, "schedule__warmup": 0.5, "memory": "300MiB"},
        {"steps": 1},
    ],
)
def test_resolving_a_resolved_recipe_changes_nothing(
    prepared: Callable[..., Prepared], fields: dict[str, Any]
) -> None:
    once = _resolved(prepared(**fields), fixed=200 * MIB)
    assert _resolved(prepared(**flat(once)), fixed=200 * MIB) == once
    assert _resolved(prepared(**flat(once)), fixed=0) == once  # whatever else the process holds by then


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_brings_its_own_settings(folder: Path, name: str) -> None:
    values = {"model.name": name, "data.path": str(folder / "text.txt"), "data.held_out": 0, "memory": "1TiB"}
    pinned = {field.replace("__", "."): value for field, value in PLAIN.items()}  # so that nothing is planned
    recipe = replace(Recipe(), {**values, **pinned})
    shape = SHAPES[name]
    found = _resolved(prepare(inspect(recipe, cache=folder / "cache"), lambda *_: None))
    assert (found.optimizer.lr, found.seq, found.batch) == (shape.lr, shape.seq, shape.batch)
    assert found.model.init == "scratch"
    if shape.steps is not None:
        assert found.steps == shape.steps


def test_stored_weights_are_fine_tuned_and_random_ones_trained(
    prepared: Callable[..., Prepared], folder: Path
) -> None:
    bare, full = _resolved(prepared()), _resolved(prepared(model__name=str(folder / "full")))
    assert (bare.model.init, bare.optimizer.lr) == ("scratch", SCRATCH_LR)
    assert (full.model.init, full.optimizer.lr) == ("weights", FINE_TUNING_LR)
    again = _resolved(prepared(model__name=str(folder / "full"), model__init="scratch"))
    assert (again.model.init, again.optimizer.lr) == ("scratch", SCRATCH_LR)


def test_auto_is_step_laws_rate_for_this_model_and_this_run(prepared: Callable[..., Prepared]) -> None:
    """Once in steps, once in tokens; the recipe holds the number, and the note says what it rests on."""
    matrices = 4 * 16 * 16 + 3 * 16 * 24
    for length in ({"steps": 30}, {"tokens": 30 * 4 * 64}):
        found = _resolve(prepared(optimizer__lr="auto", batch=4, seq=64, **length))
        expected = 1.79 * matrices**-0.713 * (30 * 4 * 64) ** 0.307
        assert found.recipe.optimizer.lr == pytest.approx(expected, rel=0.005)  # three digits of it
        assert found.law is not None
        assert found.law.startswith(f"lr {found.recipe.optimizer.lr:g}: Step Law")
        for words in ("2.18 K non-embedding", "7.68 K tokens", "extrapolation", "1.5 sequences"):
            assert words in found.law
        assert _resolve(prepared(**flat(found.recipe))).law is None  # it is a stated number now


def test_auto_follows_the_rate_that_an_optimizer_wants(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"optimizer__lr": "auto", "steps": 30}
    adamw = _resolve(prepared(**fields))
    tenth = dataclasses.replace(piece("optimizer", "adamw"), lr_ratio=0.1)
    monkeypatch.setattr("scrimp.resolve.piece", lambda *_: tenth)
    found = _resolve(prepared(**fields))
    assert adamw.recipe.optimizer.lr is not None and found.recipe.optimizer.lr is not None
    assert float(found.recipe.optimizer.lr) == pytest.approx(0.1 * float(adamw.recipe.optimizer.lr), rel=0.01)
    assert found.law is not None and ", 0.1 times AdamW's for adamw:" in found.law


def test_auto_is_the_cap_of_schedule_power_and_says_so(prepared: Callable[..., Prepared]) -> None:
    plain = _resolve(prepared(optimizer__lr="auto", steps=30))
    power = _resolve(prepared(optimizer__lr="auto", steps=30, schedule__name="power"))
    assert power.recipe.optimizer.lr == plain.recipe.optimizer.lr
    assert power.law is not None and "the cap of schedule power" in power.law


def test_auto_is_refused_for_stored_weights(prepared: Callable[..., Prepared], folder: Path) -> None:
    with pytest.raises(ScrimpError, match=r"lr auto: .* starts from stored ones; choose .* --lr 2e-05"):
        _resolved(prepared(model__name=str(folder / "full"), optimizer__lr="auto"))
    again = prepared(model__name=str(folder / "full"), model__init="scratch", optimizer__lr="auto", steps=9)
    assert _resolve(again).law is not None


def test_memory_does_not_ask_where_the_rate_comes_from(prepared: Callable[..., Prepared]) -> None:
    """Which is why a plan, that reads no data and so knows no length, takes `auto` too."""
    stated, auto = (prepared(optimizer__lr=lr, micro_batch=2, **PLAIN) for lr in (1e-3, "auto"))
    assert predict(auto.inputs.recipe) == predict(stated.inputs.recipe)


def test_the_length_is_one_pass_or_what_was_asked_for(prepared: Callable[..., Prepared]) -> None:
    passes = _resolved(prepared(seq=50, batch=7))
    assert passes.steps == math.ceil(math.ceil(12_001 / 50) / 7) == 35
    assert _resolved(prepared(seq=50, batch=7, tokens=351)).steps == 2
    assert _resolved(prepared(seq=50, batch=7, tokens=350)).steps == 1
    assert _resolved(prepared(steps=3)).steps == 3


def test_shares_of_a_run_become_steps(prepared: Callable[..., Prepared]) -> None:
    found = _resolved(prepared(steps=200))
    assert (found.schedule.warmup, found.schedule.decay) == (10, 40)
    assert (found.evaluation.every, found.checkpoint.every) == (20, 20)
    found = _resolved(prepared(steps=25, schedule__warmup=3, checkpoint__every=4))
    assert (found.schedule.warmup, found.evaluation.every, found.checkpoint.every) == (3, 3, 4)
    assert _resolved(prepared(steps=2, schedule__warmup=10)).schedule.warmup == 2


def test_a_sequence_is_as_long_as_the_model_allows_and_no_longer(prepared: Callable[..., Prepared]) -> None:
    assert _resolved(prepared()).seq == 64
    with pytest.raises(ScrimpError, match=r"seq 65: .* has positions for 64 tokens; lower --seq"):
        _resolved(prepared(seq=65))


def test_the_largest_micro_batch_that_fits_is_chosen(prepared: Callable[..., Prepared]) -> None:
    """Each budget in steps of a tenth of a MiB: never over it, and the next divisor would be."""
    sizes = (1, 2, 3, 4, 6, 12)
    asks = {}
    for size in sizes:
        given = _resolve(prepared(batch=12, micro_batch=size, **PLAIN))
        asks[size] = needed(given.ledger, given.recipe)
    assert sorted(asks.values()) == list(asks.values())
    found = set()
    for tenths in range(10 * asks[1] // MIB + 1, 10 * asks[12] // MIB + 2):
        budget = tenths * MIB // 10
        chosen = _resolved(prepared(batch=12, memory=f"{budget}B", **PLAIN)).micro_batch
        assert chosen == max(size for size in sizes if asks[size] <= budget)
        found.add(chosen)
    assert len(found) > 3


def test_a_stated_budget_that_nothing_fits_is_refused_with_what_would(
    prepared: Callable[..., Prepared],
) -> None:
    with pytest.raises(ScrimpError, match=r"memory 100KiB: nothing fits.*it would take --memory"):
        _resolved(prepared(batch=12, micro_batch=6, memory="100KiB"))


def test_a_stated_budget_opens_what_was_left_open(prepared: Callable[..., Prepared]) -> None:
    """Where the plain recipe does not fit, one that recomputes does; what was stated stays."""
    seq, micro_batch = 64, 4
    given = {"batch": 4, "micro_batch": micro_batch, "seq": seq, "precision": "fp32"}
    plain = _resolve(prepared(**given))
    assert plain.why is None
    assert plain.recipe.activations.name == "everything"
    budget = needed(plain.ledger, plain.recipe) - 1
    planned = _resolve(prepared(**given, memory=f"{budget}B"))
    assert planned.why is not None
    assert planned.recipe.activations != plain.recipe.activations
    assert needed(planned.ledger, planned.recipe) <= budget
    with pytest.raises(ScrimpError, match="nothing fits"):
        _resolve(prepared(**{**given, **PLAIN}, memory=f"{budget}B"))


def test_a_run_that_was_given_no_budget_may_only_miss_what_it_holds_anyway(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scrimp.resolve.free_bytes", lambda _: 2 * MIB)
    assert _resolved(prepared(batch=12, micro_batch=6)).micro_batch == 6
    with pytest.raises(ScrimpError, match=r"alone need .*raise --memory"):
        _resolved(prepared(), fixed=2 * MIB)


def test_a_micro_batch_alone_decides_a_batch_it_divides(prepared: Callable[..., Prepared]) -> None:
    found = _resolved(prepared(micro_batch=4))
    assert (found.batch, found.micro_batch) == (DEFAULT_BATCH, 4)


@pytest.mark.parametrize("micro_batch", [3, 16])
def test_a_micro_batch_that_does_not_divide_the_usual_batch_is_no_mistake(
    prepared: Callable[..., Prepared], micro_batch: int
) -> None:
    """The user named one number, and it makes sense."""
    found = _resolved(prepared(micro_batch=micro_batch))
    assert found.batch is not None
    assert found.batch % micro_batch == 0


def test_precision_on_a_cpu_is_fp32_unless_asked(prepared: Callable[..., Prepared]) -> None:
    assert _resolved(prepared()).precision == "fp32"
    assert _resolved(prepared(precision="bf16")).precision == "bf16"


def test_auto_takes_the_cpu_where_there_is_nothing_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert choose_device(Recipe()) == CPU
    for name in ("cuda", "mps"):
        with pytest.raises(ScrimpError, match=f"device '{name}': torch sees none here"):
            choose_device(parse({"device": name}))


@pytest.mark.parametrize(
    ("tune", "depth", "layers"),
    [("owlore", 32, 5), ("owlore", 4, 2), ("owlore", 1, 1), ("lisa", 4, 2), ("lisa", 2, 1), ("ist", 4, 0.25)],
)
def test_by_default_no_more_than_half_of_the_layers_train_at_a_time(
    tune: str, depth: int, layers: float
) -> None:
    recipe = replace(Recipe(), {"tune.name": tune})
    assert with_options(recipe, Dimensions(None, 64, depth)).tune.layers == layers
    stated = replace(recipe, {"tune.layers": 3})
    assert with_options(stated, Dimensions(None, 64, depth)).tune.layers == 3
