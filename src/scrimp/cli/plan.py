"""`scrimp plan`: which recipe to run in the memory at hand.

Every recipe option pins its choice; the rest is open. What was traced once is kept, so that a second
question about the same model is answered without importing torch.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from scrimp.base.errors import ScrimpError
from scrimp.base.suggest import did_you_mean
from scrimp.base.units import format_bytes, parse_bytes
from scrimp.cli.guard import print_json
from scrimp.cli.options import with_recipe_options
from scrimp.cli.train import make_reporter
from scrimp.recipe import Recipe, flat
from scrimp.recipe import replace as change
from scrimp.shapes import SHAPES

if TYPE_CHECKING:
    from scrimp.memory.machine import Machine
    from scrimp.memory.planner import Candidate, Plan, Planner, Question
    from scrimp.training.reporter import Reporter


def _option(*names: str, text: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel="Plan")


@with_recipe_options
def plan(
    stated: dict[str, Any],
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A named shape, folder, GGUF file or hub id.")
    ] = None,
    host: Annotated[str | None, _option(text="Memory of the host beside a GPU; none: no limit.")] = None,
    disk: Annotated[str | None, _option(text="Disk for checkpoints; none: no limit.")] = None,
    goal: Annotated[
        str | None,
        _option(text="Start from random weights, or from the stored ones.", metavar="pretrain|finetune"),
    ] = None,
    largest: Annotated[
        list[str] | None,
        _option(
            text="Say too which is the largest that fits; may be given again.", metavar="batch|seq|model"
        ),
    ] = None,
    calibrate: Annotated[
        bool, _option("--calibrate", text="Measure this machine, to predict tokens/s.")
    ] = False,
    picture: Annotated[Path | None, _option(text="Draw it too: a .svg, .html or .png file.")] = None,
    everything: Annotated[bool, _option("--all", text="Show every recipe, not only the nearest.")] = False,
    cache: Annotated[Path | None, _option(text="Folder of the traces; none: the platform's.")] = None,
    trust_remote_code: Annotated[
        bool, _option("--trust-remote-code", text="Let the model's own Python code run.")
    ] = False,
    as_json: Annotated[bool, _option("--json", text="Write the plan as one JSON document.")] = False,
) -> None:
    """Say which recipes fit a memory budget, which to run, and why. Nothing is allocated."""
    from scrimp.memory.planner import Goal, Question
    from scrimp.report import plan_picture, plan_table

    asked = _asked(stated, model, None if goal is None else _one_of(Goal, "--goal", goal))
    questions = cast("list[Question]", [_one_of(Question, "--largest", text) for text in largest or []])
    limits = {name: _limit(name, text) for name, text in (("host", host), ("disk", disk))}
    if picture is not None:
        plan_picture.check(picture)
    reporter = make_reporter()
    machine = _machine(cache, reporter, calibrate=calibrate)
    planner, note = _planner(
        asked, machine, limits, reporter, cache=cache, trust_remote_code=trust_remote_code
    )
    _check_goal(goal, planner)
    found = _plan(planner, note, questions)
    _close(reporter)
    if picture is not None:
        plan_picture.write(found, plan_table.shown(found, everything=everything), picture)
    if as_json:
        print_json(plan_document(found))
    else:
        plan_table.write(found, sys.stdout, everything=everything)


def _asked(stated: dict[str, Any], model: str | None, goal: str | None) -> Recipe:
    """Make a recipe of what was stated.

    Raises:
        ScrimpError: A value is not allowed, or two contradict each other.
    """
    given = dict(stated)
    if model is not None:
        if given.get("model.name", model) != model:
            raise ScrimpError(f"the model is given twice: {model} and --model {given['model.name']}")
        given["model.name"] = model
    if goal == "pretrain":
        given.setdefault("model.init", "scratch")
    elif goal == "finetune" and given.setdefault("model.init", "weights") == "scratch":
        raise ScrimpError(
            "goal finetune starts from stored weights, and --model.init scratch from random ones"
        )
    return change(Recipe(), given)


def _check_goal(goal: str | None, planner: Planner) -> None:
    """Refuse to fine-tune what has no weights.

    Raises:
        ScrimpError: That was asked.
    """
    if goal == "finetune" and not planner.predictor.profiles.source.has_weights:
        raise ScrimpError(
            f"goal finetune: {planner.asked.model.name} has no stored weights to go on from; "
            "name a folder, GGUF file or hub id that has, or plan with --goal pretrain"
        )


def _one_of(known: Any, option: str, given: str) -> str:
    """Return a value that must be one of a `Literal`'s.

    Raises:
        ScrimpError: It is none of them.
    """
    names = get_args(known)
    if given not in names:
        raise ScrimpError(f"{option} {given!r}: it must be {' or '.join(names)}{did_you_mean(given, names)}")
    return given


def _limit(name: str, text: str | None) -> int | None:
    """Read a limit on host or disk.

    Raises:
        ScrimpError: It is no amount of memory.
    """
    if text is None:
        return None
    try:
        return parse_bytes(text)
    except ScrimpError as error:
        raise ScrimpError(f"--{name}: {error}") from None


def _machine(cache: Path | None, reporter: Reporter, *, calibrate: bool) -> Machine:
    from scrimp.memory.machine import look

    if calibrate:
        reporter.phase("measuring this machine", None)
    return look(cache, calibrate=calibrate, fresh=True)


def _planner(
    asked: Recipe,
    machine: Machine,
    limits: dict[str, int | None],
    reporter: Reporter,
    *,
    cache: Path | None,
    trust_remote_code: bool,
) -> tuple[Planner, str | None]:
    """Return the planner, and where its budget comes from if that was not stated."""
    from scrimp.memory.planner import make_planner

    budget, note = _budget(asked, machine)
    planner = make_planner(
        asked,
        machine,
        budget=budget,
        host=limits["host"],
        disk=limits["disk"],
        trust_remote_code=trust_remote_code,
        folder=None if cache is None else cache / "plans",
        say=reporter.phase,
    )
    return planner, note


def _budget(asked: Recipe, machine: Machine) -> tuple[int, str | None]:
    """Return the bytes to plan for, and where they come from if they were not stated.

    Raises:
        ScrimpError: They were not, and this machine does not have the device.
    """
    if asked.memory is not None:
        return parse_bytes(asked.memory), None
    shape = SHAPES.get(asked.model.name)
    if shape is not None and shape.memory is not None:
        return parse_bytes(shape.memory), f"no --memory was given: {shape.memory} is {asked.model.name}'s own"
    device = machine.device if asked.device == "auto" else asked.device
    if device not in machine.memory:
        raise ScrimpError(f"device {device!r}: there is none here, so say how much it has with --memory")
    has = machine.memory[device]
    return has, f"no --memory was given: {format_bytes(has)} is what the {device} of this machine has"


def _plan(planner: Planner, note: str | None, questions: list[Question]) -> Plan:
    """Make the plan and answer the questions about it."""
    from scrimp.memory.inverse import answer

    found = planner.plan()
    planner.predictor.profiles.save()  # what an interrupted question would lose
    answers = {question: answer(planner, found, question) for question in dict.fromkeys(questions)}
    planner.predictor.profiles.save()
    notes = found.notes if note is None else (note, *found.notes)
    if planner.settled.device == "cpu" and planner.host is not None:
        notes = (*notes, "on a CPU everything lies in the budget, and --host limits nothing")
    return replace(found, notes=notes, answers=answers)


def _close(reporter: Reporter) -> None:
    """Take the bar of a terminal away before standard output is written."""
    from scrimp.report.console import ConsoleReporter

    if isinstance(reporter, ConsoleReporter):
        reporter.close()


def plan_document(found: Plan) -> dict[str, Any]:
    """Return a plan as data for JSON; `chosen` counts into `candidates`, from 0."""
    from scrimp.memory.command import command_of

    chosen = found.chosen
    return {
        "model": found.recipe.model.name,
        "parameters": None if found.size is None else found.size.parameters,
        "device": found.recipe.device,
        "budget": found.budget,
        "host": found.host,
        "disk": found.disk,
        "candidates": [_candidate_document(candidate) for candidate in found.candidates],
        "chosen": None if chosen is None else found.candidates.index(chosen),
        "why": found.why,
        "command": None if chosen is None else command_of(chosen, found.asked),
        "notes": list(found.notes),
        "answers": {question: asdict(answer) for question, answer in found.answers.items()},
    }


def _candidate_document(candidate: Candidate) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "method": candidate.method,
        "needed": candidate.needed,
        "spare": candidate.spare,
        "fits": candidate.fits,
        "rank": candidate.rank,
        "gives_up": list(candidate.gives_up),
        "work": candidate.work,
        "tokens_per_s": candidate.tokens_per_s,
        "recipe": flat(candidate.recipe),
        "ledger": candidate.ledger.to_plain(),
    }
