"""What a recipe leaves open is filled in by rules, and a filled-in one stays as it is."""

from __future__ import annotations

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
from scrimp.recipe import Recipe, flat, parse, replace
from scrimp.resolve import DEFAULT_BATCH, FINE_TUNING_LR, SCRATCH_LR, choose_device, resolve
from scrimp.shapes import SHAPES

CPU = torch.device("cpu")
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


def _resolved(prepared: Prepared, fixed: int = 0) -> Recipe:
    return resolve(prepared, CPU, fixed=fixed)[0]


def test_nothing_stays_open_that_a_repeat_would_need(prepared: Callable[..., Prepared]) -> None:
    open_fields = {name for name, value in flat(_resolved(prepared())).items() if value is None}
    assert open_fields == {"tokens", "data.tokenizer"}  # steps stand for tokens; the tokenizer is the model's


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
    recipe = parse(
        {"model": name, "data": {"path": str(folder / "text.txt"), "held_out": 0}, "memory": "1TiB"}
    )
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
    found = set()
    for tenths in range(4, 60):
        made = prepared(batch=12, memory=f"{tenths * MIB // 10}B")
        recipe, ledger = resolve(made, CPU, fixed=0)
        chosen = recipe.micro_batch
        assert chosen is not None
        found.add(chosen)
        if chosen > 1:
            assert ledger.peak.total <= tenths * MIB // 10
        for larger in (size for size in (2, 3, 4, 6, 12) if size > chosen):
            given = resolve(prepared(batch=12, micro_batch=larger), CPU, fixed=0)[1]
            assert given.peak.total > tenths * MIB // 10
    assert found == {1, 2, 3, 4, 6, 12}


def test_a_given_micro_batch_is_kept_even_over_the_budget(prepared: Callable[..., Prepared]) -> None:
    recipe, ledger = resolve(prepared(batch=12, micro_batch=6, memory="1MiB"), CPU, fixed=0)
    assert recipe.micro_batch == 6
    assert ledger.peak.total > MIB


def test_a_budget_below_weights_and_state_is_refused(prepared: Callable[..., Prepared]) -> None:
    with pytest.raises(ScrimpError, match=r"alone need .*raise --memory"):
        _resolved(prepared(memory="50KiB"))
    with pytest.raises(ScrimpError, match="alone need"):
        _resolved(prepared(memory="300MiB"), fixed=300 * MIB)


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
