"""The promise of a plan: what is said when a run takes more than its budget, or than there is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from scrimp.base.errors import ScrimpError
from scrimp.base.ledger import Ledger, Moment, Term
from scrimp.base.units import format_bytes
from scrimp.memory.command import command_of
from scrimp.training.watch import moment_of

if TYPE_CHECKING:
    from scrimp.resolve import Resolved

SMALLER = 0.9  # of what ran out: what the next recipe may need


def over_budget(peak: int, budget: int, *, predicted: Ledger, measured: Ledger | None) -> str:
    """Say by how much a run is over its budget, and which term was predicted wrong."""
    moment = moment_of(measured, peak)
    text = f"{format_bytes(peak)} at {moment!r} is over the budget of {format_bytes(budget)}"
    if measured is None:
        return text
    seen = measured.peak
    expected = _same_moment(predicted, seen)
    wrong = max(seen.terms, key=lambda term: seen.terms[term] - expected.get(term, 0))
    found, planned = format_bytes(seen.terms[wrong]), format_bytes(expected.get(wrong, 0))
    return f"{text} ({wrong}: {found}, predicted {planned})"


def _same_moment(predicted: Ledger, seen: Moment) -> Mapping[Term, int]:
    """Return the predicted terms of a moment that was seen."""
    same = (moment.terms for moment in predicted.moments if moment.name == seen.name)
    return next(same, predicted.peak.terms)


def out_of_memory(resolved: Resolved) -> str:
    """Say what was held when memory ran out, as far as it was predicted, and what to run instead."""
    recipe, peak = resolved.recipe, resolved.ledger.peak
    terms = ", ".join(f"{name} {format_bytes(size)}" for name, size in peak.terms.items() if size)
    what = (
        f"the memory of {recipe.device} ran out with micro-batches of {recipe.micro_batch} x {recipe.seq} "
        f"tokens; predicted were {format_bytes(peak.total)} at {peak.name!r} ({terms})"
    )
    try:
        smaller = resolved.next_smaller(int(peak.total * SMALLER))
    except (ScrimpError, MemoryError, RuntimeError):  # there may be no memory to plan in
        smaller = None
    if smaller is None:
        return f"{what}: lower --micro-batch or --seq, or choose a smaller model"
    asked = resolved.planner.asked
    return f"{what}; {format_bytes(smaller.needed)} would do for: {command_of(smaller, asked)}"
