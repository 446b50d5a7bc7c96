"""Plans made by hand, with every number known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from scrimp.base.ledger import Basis, Ledger, Moment, Place, Term
from scrimp.memory.planner import Candidate, Plan
from scrimp.memory.profile import ModelSize
from scrimp.recipe import parse

GIB = 2**30
BUDGET = 24 * GIB
STAGNATES = "weights stagnate: an update below 1/256 of a weight rounds away (somebody, 2025)"


def _ledger(peak: float, basis: Basis, disk: float) -> Ledger:
    """Return a ledger that peaks at the loss; weights are a quarter of it, activations the rest."""
    weights = round(peak * GIB / 4)
    elsewhere: Mapping[Place, Mapping[Term, int]] = {"disk": {"weights": round(disk * GIB)}}
    return Ledger(
        (
            Moment("load", {"fixed": 0, "weights": weights}),
            Moment(
                "loss, micro-batch 1",
                {"fixed": 0, "weights": weights, "activations": 3 * weights},
                operation="aten.log_softmax",
            ),
            Moment("optimizer step", {"weights": weights, "optimizer state": 2 * weights}),
            Moment("save", {"weights": weights}, elsewhere),
        ),
        basis=basis,
        error=0.3 if basis == "formula" else 0.03,
    )


@pytest.fixture(scope="session")
def make_candidate() -> Callable[..., Candidate]:
    """Return a function that makes a candidate for a budget of 24 GiB."""

    def make(peak: float, *, basis: Basis = "traced", disk: float = 1.0, **changes: Any) -> Candidate:
        recipe = {"model": changes.pop("model", "llama-7b"), "batch": 8, "micro_batch": 4, "seq": 2048}
        found = _ledger(peak, basis, disk)
        values: dict[str, Any] = {
            "recipe": parse({**recipe, "device": "cuda", "precision": "bf16-mixed"}),
            "method": "adamw",
            "ledger": found,
            "needed": found.peak.total,
            "spare": BUDGET - found.peak.total,
            "rank": 0,
            "gives_up": (),
            "work": 0,
            "tokens_per_s": None,
        }
        return Candidate(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def make_plan(make_candidate: Callable[..., Candidate]) -> Callable[..., Plan]:
    """Return a function that makes a plan of candidates; without any, of three of which two fit."""

    def make(*candidates: Candidate, chosen: int | None = 1, **changes: Any) -> Plan:
        found = candidates or (
            make_candidate(54.4, method="adamw"),
            make_candidate(20.0, method="fira", gives_up=(STAGNATES,)),
            make_candidate(9.75, method="apollo", gives_up=("about 30% more work (traced)", STAGNATES)),
        )
        values: dict[str, Any] = {
            "asked": parse({"model": found[0].recipe.model.name, "memory": "24GiB"}),
            "recipe": found[0].recipe,
            "size": ModelSize(
                parameters=6_738_415_616, layers=32, weights=0, loaded=0, gradients=0, largest=0
            ),
            "budget": BUDGET,
            "host": None,
            "disk": None,
            "candidates": tuple(found),
            "chosen": None if chosen is None else found[chosen],
            "why": "it gives up the least of what fits",
        }
        return Plan(**{**values, **changes})

    return make
