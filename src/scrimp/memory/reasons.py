"""What a plan says in words: what a candidate gives up, and what there is where nothing fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scrimp.base.units import format_bytes

if TYPE_CHECKING:
    from scrimp.memory.planner import Candidate


def claim(sentence: str) -> str:
    """Return what a sentence claims, without its evidence."""
    return sentence.partition(": ")[0].partition(" (")[0]


def least_of(candidates: Sequence[Candidate], budget: int) -> str:
    """Say what to give up where nothing fits."""
    least = min(candidates, key=lambda c: c.needed)
    peak = least.ledger.peak
    terms = sorted(peak.terms.items(), key=lambda item: -item[1])[:3]
    held = ", ".join(f"{name} {format_bytes(size)}" for name, size in terms if size)
    staying = sum(peak.terms.get(term, 0) for term in ("fixed", "weights", "optimizer state", "gradients"))
    advice = (
        "a smaller model or another optimizer"
        if staying > budget
        else "a shorter --seq, a smaller model or another optimizer"
    )
    return (
        f"the least is {least.name}: {format_bytes(least.needed)}, "
        f"of which at its peak ({peak.name}) {held}; it would take "
        f"--memory {-(-least.needed // 2**20)}MiB, {advice}"
    )
