"""llama-7b, every parameter trained: what a step really holds, for each method of the catalogue.

The planner lists every recipe for the card (1 x 256 tokens). Of each method the recipe that needs least is
run, if it fits, and what the planner would choose on this card besides. No method is known by name here: one
that is added to the catalogue is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from _card import card
from _tasks import Expect, Part, Row, Setting, Task, answer, own

MOST_ERROR_PERCENT = 3.0


def tasks(setting: Setting, rows: Mapping[str, Row], _: Callable[[], float]) -> Iterator[Task]:
    found = card() if setting.device == "cuda" else None
    asked = {
        "model.name": "llama-1m" if setting.tiny else "llama-7b",
        "device": setting.device,
        "batch": 1,
        "seq": 32 if setting.tiny else 256,
    }
    budget = found["memory_bytes"] if found else 2**30
    yield own("headlines", "plan", {"plan": asked, "memory": budget})
    candidates = rows["plan"].get("candidates", [])
    for candidate in wanted(candidates, rows["plan"].get("chosen")):
        if candidate["fits"]:
            yield own("headlines", candidate["name"], {"run": {**asked, **candidate["recipe"]}})


def wanted(candidates: list[dict[str, Any]], chosen: str | None) -> list[dict[str, Any]]:
    """Return what to run: of each method what needs least, and what the planner chose."""
    least: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        best = least.get(candidate["method"])
        if best is None or candidate["needed_bytes"] < best["needed_bytes"]:
            least[candidate["method"]] = candidate
    others = [c for c in candidates if c["name"] == chosen and c not in least.values()]
    return [*least.values(), *others]


def summary(rows: list[Row], expect: Expect) -> dict[str, Any]:
    planned = next((row for row in rows if row["name"] == "plan"), {})
    runs = [row for row in rows if "measured_bytes" in row]
    for row in runs:
        name = f"headlines: {row['name']}"
        expect(f"{name}: error of the prediction in %", abs(row["error_percent"]), below=MOST_ERROR_PERCENT)
        expect(f"{name}: fall of the loss in nats", row["losses"][0] - row["losses"][-1], at_least=0)
        # What a plan asks for is what the card must have free.
        if row["driver_bytes"] is not None:
            share = row["driver_bytes"] / row["needed_bytes"]
            expect(f"{name}: the whole card over what the plan asked for", share, below=1.0)
    broken = [row["name"] for row in rows if row["status"] != "done"]
    expect("headlines: what the plan offers and did not run", len(broken), below=1)
    return {
        "model": "llama-7b, 1 x 256 tokens, every parameter trained",
        "peaks": {row["name"]: row["measured_bytes"] for row in runs},
        "does_not_fit": {
            c["name"]: c["needed_bytes"] for c in wanted(planned.get("candidates", []), None) if not c["fits"]
        },
    }


PART = Part(name="headlines", minutes=4, tasks=tasks, summary=summary)


def work(spec: dict[str, Any]) -> Row:
    from _held import USUAL, hold

    from scrimp.recipe import Recipe, replace

    if "run" in spec:
        return hold(replace(Recipe(), {**USUAL, **spec["run"]}))
    return listed(replace(Recipe(), {**USUAL, **spec["plan"]}), spec["memory"])


def listed(recipe: Any, memory: int) -> Row:
    """Return what the planner offers for a recipe in some bytes of memory."""
    from scrimp.memory import plan
    from scrimp.memory.planner import FIELDS
    from scrimp.recipe import flat

    found = plan(recipe, f"{memory // 2**20}MiB")
    decided = (*FIELDS.values(), "precision", "micro_batch")
    candidates = [
        {
            "name": candidate.name,
            "method": candidate.method,
            "recipe": {name: flat(candidate.recipe)[name] for name in decided},
            "needed_bytes": candidate.needed,
            "fits": candidate.fits,
            "gives_up": list(candidate.gives_up),
        }
        for candidate in found.candidates
    ]
    return {
        "memory_bytes": memory,
        "candidates": candidates,
        "chosen": found.chosen and found.chosen.name,
        "why_chosen": found.why,
        "notes": list(found.notes),
    }


if __name__ == "__main__":
    answer(work)
