"""Memory: what a run will need, what it was seen to hold, and which recipe fits.

    predict(recipe)          the ledger of a run, before anything is allocated
    measure(program, model)  the ledger of what a program really held
    plan(recipe, memory)     every recipe that could serve in a budget, and the one to run

None of them imports torch before it must.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scrimp.base.ledger import Ledger, Moment

if TYPE_CHECKING:
    from scrimp.memory.api import plan, predict
    from scrimp.memory.observer import measure
    from scrimp.memory.planner import Candidate, Plan

__all__ = ["Candidate", "Ledger", "Moment", "Plan", "measure", "plan", "predict"]

_HOMES = {
    "Candidate": "planner",
    "Plan": "planner",
    "measure": "observer",
    "plan": "api",
    "predict": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"scrimp.memory.{_HOMES[name]}"), name)
