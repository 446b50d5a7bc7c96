"""What a plan's pictures show, whatever they are drawn with: stacked bars of bytes by term.

Terms differ in colour (Okabe and Ito's, which colour-blind people tell apart) and in pattern.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scrimp.base.ledger import Term
from scrimp.memory.planner import Candidate, Plan
from scrimp.report.plan_table import verdict

COLOURS: dict[Term, str] = {
    "fixed": "#999999",
    "weights": "#0072b2",
    "gradients": "#d55e00",
    "optimizer state": "#e69f00",
    "activations": "#56b4e9",
    "temporaries": "#009e73",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One stacked bar.

    Attributes:
        label: What it is.
        detail: A second, quieter line.
        terms: Bytes by term.
        verdict: What stands to its right.
        fits: Whether it is within the budget.
        marked: Whether it is the one to look at.
    """

    label: str
    detail: str
    terms: Mapping[Term, int]
    verdict: str
    fits: bool
    marked: bool

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.terms.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Bars on one scale.

    Attributes:
        title: What they show.
        bars: From the top.
        budget: Bytes at which the line stands.
    """

    title: str
    bars: Sequence[Bar]
    budget: int

    @property
    def scale(self) -> float:
        """Bytes of the whole width."""
        return 1.04 * max(self.budget, *(bar.total for bar in self.bars))


def panels(plan: Plan, candidates: Sequence[Candidate]) -> list[Panel]:
    """Return the recipes at their peaks, and one of them at every moment.

    The one is the chosen recipe; where nothing fits, the one that needs least.

    Args:
        plan: The plan.
        candidates: Those to show, from the top.
    """
    if not candidates:
        return []
    one = plan.chosen or min(candidates, key=lambda c: c.needed)
    which = "The chosen recipe" if plan.chosen else "The recipe that needs least"
    return [
        Panel(
            title="Each recipe at its peak",
            bars=[_recipe_bar(plan, candidate) for candidate in candidates],
            budget=plan.budget,
        ),
        Panel(title=f"{which} at every moment: {one.name}", bars=_moment_bars(plan, one), budget=plan.budget),
    ]


def _recipe_bar(plan: Plan, candidate: Candidate) -> Bar:
    peak = candidate.ledger.peak
    return Bar(
        label=candidate.name,
        detail=f"at {peak.name}; {candidate.recipe.micro_batch} of {candidate.recipe.batch} rows at a time",
        terms=peak.terms,
        verdict=verdict(candidate, plan),
        fits=candidate.fits,
        marked=candidate is plan.chosen,
    )


def _moment_bars(plan: Plan, candidate: Candidate) -> list[Bar]:
    peak = candidate.ledger.peak
    return [
        Bar(
            label=moment.name,
            detail=moment.operation,
            terms=moment.terms,
            verdict="peak" if moment is peak else "",
            fits=moment.total <= plan.budget,
            marked=moment is peak,
        )
        for moment in candidate.ledger.moments
    ]
