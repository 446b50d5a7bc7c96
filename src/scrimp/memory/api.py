"""The two questions that are asked before a run, in Python."""

from __future__ import annotations

from scrimp.base.ledger import Ledger
from scrimp.base.units import parse_bytes
from scrimp.memory.machine import look
from scrimp.memory.planner import Plan, make_planner
from scrimp.memory.predictor import divisors, prepare
from scrimp.recipe import Recipe


def predict(recipe: Recipe, *, trust_remote_code: bool = False) -> Ledger:
    """Predict the bytes that a run of a recipe holds, by term, by place and by moment.

    Nothing of the model is allocated. What the recipe leaves open is filled in as a run would, without
    reading its data: a micro-batch that is not given is the largest that fits `memory`, or the whole batch.

    Args:
        recipe: What to run.
        trust_remote_code: Let the model's own Python code run.

    Raises:
        ScrimpError: There is no such model, or it cannot do what the recipe asks.
    """
    predictor, settled = prepare(recipe, look(), trust_remote_code=trust_remote_code)
    assert settled.batch is not None
    sizes = [settled.micro_batch] if settled.micro_batch else divisors(settled.batch)
    budget = parse_bytes(recipe.memory) if recipe.memory else 1 << 62
    _, found = predictor.fit(settled, sizes, budget)
    predictor.profiles.save()
    return found


def plan(
    recipe: Recipe,
    memory: str,
    *,
    host: str | None = None,
    disk: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Find every recipe that could serve in a budget, and the one to run.

    Args:
        recipe: What to run; what it does not state is open to the planner.
        memory: The budget on the device that trains, such as `24GiB`; on a CPU the whole process counts.
        host: The budget on the host beside a GPU; None is no limit.
        disk: The budget on disk; None is no limit.
        trust_remote_code: Let the model's own Python code run.

    Raises:
        ScrimpError: A budget is no amount of memory, there is no such model, or it cannot do what the recipe
            asks.
    """
    planner = make_planner(
        recipe,
        look(),
        budget=parse_bytes(memory),
        host=None if host is None else parse_bytes(host),
        disk=None if disk is None else parse_bytes(disk),
        trust_remote_code=trust_remote_code,
    )
    found = planner.plan()
    planner.predictor.profiles.save()
    return found
