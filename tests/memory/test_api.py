"""What is predicted and planned in Python, on a real shape, without a byte of it."""

from __future__ import annotations

from typing import Any

import pytest

from scrimp import memory
from scrimp.base.errors import ScrimpError
from scrimp.base.ledger import Ledger
from scrimp.memory.predictor import needed
from scrimp.methods import PIECES, Piece
from scrimp.recipe import Recipe, replace

GIB = 2**30


def make_recipe(**changes: Any) -> Recipe:
    values = {"model.name": "llama-9m", "seq": 64, "batch": 4, "device": "cpu", "threads": 1}
    return replace(Recipe(), {**values, **{name.replace("__", "."): v for name, v in changes.items()}})


@pytest.fixture(scope="module")
def plain() -> Ledger:
    return memory.predict(make_recipe(micro_batch=4))


def test_a_ledger_has_every_moment_of_a_run(plain: Ledger) -> None:
    names = [moment.name for moment in plain.moments]
    steps = ["forward", "loss", "backward", "optimizer step"]
    assert names == ["load", *steps, "evaluation", "save", "resume", "merge"]
    assert plain.peak.total == max(moment.total for moment in plain.moments)
    parameters = 2 * 32_000 * 128 + 4 * (4 * 128 * 128 + 3 * 128 * 352 + 2 * 128) + 128
    for moment in plain.moments:
        assert moment.terms["weights"] == pytest.approx(4 * parameters, abs=1024)  # and a buffer
        assert moment.terms["fixed"] > 100 * 2**20
    assert plain.moments[4].terms["gradients"] == 4 * parameters
    saved = plain.moments[6].elsewhere["disk"]
    assert saved["optimizer state"] == 4 * plain.peak.terms["optimizer state"]  # 2 kept, the best, the next
    assert Ledger.from_plain(plain.to_plain()) == plain


def test_accumulation_names_its_micro_batches() -> None:
    found = memory.predict(make_recipe(micro_batch=1))
    terms = {moment.name: moment.terms for moment in found.moments}
    assert terms["forward, micro-batch 1"]["gradients"] == 0
    assert terms["forward, micro-batch 2"]["gradients"] == terms["optimizer step"]["gradients"]


def test_recomputation_and_chunks_lower_what_they_say(plain: Ledger) -> None:
    def activations(name: str, **changes: Any) -> int:
        found = memory.predict(make_recipe(micro_batch=4, **changes))
        return next(moment.terms["activations"] for moment in found.moments if moment.name == name)

    forward = {
        moment.name: moment.terms["activations"] for moment in plain.moments if "activations" in moment.terms
    }
    assert activations("forward", activations__name="recompute") < forward["forward"] / 4
    assert activations("loss", activations__loss="chunked") < forward["loss"]


def test_a_plan_takes_what_gives_up_the_least_that_fits() -> None:
    plan = memory.plan(make_recipe(), "8GiB")
    assert plan.chosen is not None
    assert plan.chosen.rank == min(candidate.rank for candidate in plan.candidates) == 0
    assert plan.chosen.recipe.micro_batch == 4
    for candidate in plan.candidates:
        assert candidate.fits == (needed(candidate.ledger, candidate.recipe) <= 8 * GIB)
    peaks = [candidate.needed for candidate in plan.candidates]
    assert peaks == sorted(peaks, reverse=True)


def test_ten_percent_less_is_planned_otherwise() -> None:
    plan = memory.plan(make_recipe(), "8GiB")
    assert plan.chosen is not None
    less = memory.plan(make_recipe(), f"{int(plan.chosen.ledger.peak.total * 0.9)}B")
    assert less.chosen is None or less.chosen.recipe != plan.chosen.recipe


def test_a_piece_that_is_added_to_the_catalogue_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search knows no piece by name: another one, here the same recomputation, is a candidate at once."""
    other = Piece(
        choice="activations",
        name="another",
        builder="scrimp.activations.recompute:recompute",
        summary="a test",
        gives_up="a test gives up nothing",
        rank=1,
    )
    for module in ("scrimp.memory.planner", "scrimp.methods"):  # imported in between, the first would keep it
        monkeypatch.setattr(f"{module}.PIECES", (*PIECES, other))
    plan = memory.plan(make_recipe(precision="fp32", micro_batch=1), "8GiB")
    found = {c.recipe.activations.name: c for c in plan.candidates if c.recipe.activations.loss == "logits"}
    assert found["another"].ledger.peak.terms == found["recompute"].ledger.peak.terms
    assert found["another"].rank == 1
    assert "a test gives up nothing" in found["another"].gives_up


def test_state_leaves_the_device_where_nothing_else_fits_and_never_before() -> None:
    everything = memory.plan(make_recipe(), "1GiB")
    assert {c.recipe.placement.name for c in everything.candidates} == {"device"}
    least = everything.candidates[-1]
    found = memory.plan(make_recipe(), f"{least.needed - 2**20}B")
    assert {c.recipe.placement.name for c in found.candidates} == {"device", "paged-state"}
    assert found.chosen is not None and found.chosen.recipe.placement.name == "paged-state"
    assert found.chosen.needed < least.needed and "paged-state" in found.chosen.name
    stated = memory.plan(make_recipe(placement__name="device"), f"{least.needed - 2**20}B")
    assert stated.chosen is None


def test_host_and_disk_are_budgets_too() -> None:
    recipe = make_recipe(device="cuda", precision="bf16", activations__name="everything")
    free = memory.plan(recipe, "8GiB")
    tight = memory.plan(recipe, "8GiB", host="1MiB")
    assert free.chosen is not None
    assert tight.chosen is None
    assert memory.plan(recipe, "8GiB", disk="1MiB").chosen is None


@pytest.mark.parametrize("budget", ["0", "24 GBB", "-1GiB", "much"])
def test_a_budget_that_makes_no_sense_is_refused(budget: str) -> None:
    with pytest.raises(ScrimpError, match="not an amount of memory"):
        memory.plan(make_recipe(), budget)
