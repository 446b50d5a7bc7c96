"""Several runs at once over one base: shared forward and backward passes, and all else as if each were alone.

    recipes ─> plan each ─> one base, a job over it each ─> rounds of shared slots ─> an adapter each

Every run has its own folder, recipe, data order, optimizer, schedule and metrics: it is the run that
`scrimp train` makes of its recipe, to the rounding of products that were taken over more rows, and its folder
is an ordinary one. What is shared is the base's memory and the passes over it (`tuning.together`,
`training.shared_loop`).

All are saved at the same rounds. A killed run goes on from the last round that every job has a checkpoint of,
and then takes the very passes that the uninterrupted one took.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from scrimp import recipe as recipes
from scrimp.activations.recompute import is_random
from scrimp.base import files
from scrimp.base.errors import Interrupted, ScrimpError
from scrimp.base.units import format_bytes, parse_bytes
from scrimp.build import Base, Inputs, Job, Prepared, build, make_base
from scrimp.memory.heap import choose_policy, returning, trimming
from scrimp.memory.observer import PeakMeter
from scrimp.recipe import Recipe, flat
from scrimp.resolve import Resolved
from scrimp.training import checkpoint
from scrimp.training import run as single
from scrimp.training.environment import process_state
from scrimp.training.folder import RunFolder
from scrimp.training.loggers import open_loggers
from scrimp.training.loop import Loop
from scrimp.training.metrics import MetricsFile
from scrimp.training.reporter import Reporter, Tick
from scrimp.training.run import Run
from scrimp.training.shared_batches import rounds_of, step_at
from scrimp.training.shared_loop import Together
from scrimp.training.start import Start
from scrimp.training.stopping import Stopper
from scrimp.training.watch import Watch
from scrimp.tuning.together import share

if TYPE_CHECKING:
    from scrimp.base.ledger import Ledger

# What one base and one pass have for all.
AGREED = (
    "model.name", "model.init", "weights.name", "weights.group", "weights.double", "weights.options",
    "precision", "device", "activations.name", "activations.loss", "gradient.name", "placement.name",
    "data.packing", "data.boundaries", "threads", "deterministic", "memory",
)  # fmt: skip
POSSIBLE: Mapping[str, tuple[Any, ...]] = {
    "tune.name": ("lora", "rslora"),
    "tune.dropout": (None, 0.0),  # masks would be drawn in another order
    "tune.merge": (False,),  # into weights that the others train over
    "optimizer.fused_backward": (False,),
    "compile": (None, False),
    "strict": (False,),
    "activations.name": ("everything", "recompute", "recompute-mlp", "recompute-keep-attention"),
    "log": ((), ("tensorboard",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One of the runs.

    Attributes:
        name: What it is called, and its folder.
        start: Where it begins.
        inputs: What its recipe names.
    """

    name: str
    start: Start
    inputs: Inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A member with nothing left open."""

    member: Member
    folder: RunFolder
    prepared: Prepared
    device: torch.device
    resolved: Resolved

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe

    @property
    def steps(self) -> int:
        assert self.recipe.steps is not None
        return self.recipe.steps


def check(name: str, recipe: Recipe) -> None:
    """Refuse a recipe that cannot share its passes.

    Raises:
        ScrimpError: It asks for what only a run alone can do.
    """
    found = flat(recipe)
    for what, allowed in POSSIBLE.items():
        if found[what] not in allowed:
            can = ", ".join(str(value) for value in allowed if value not in (None, ()))
            raise ScrimpError(
                f"{name}: {what} {found[what]} does not go together with other runs; "
                f"choose {can.lower() or 'none'}, or train it alone"
            )
    if recipe.checkpoint.keep == 1:
        raise ScrimpError(
            f"{name}: with checkpoint.keep 1 a process killed between two runs' saves would leave no round "
            "that all go on from; keep 2 or more"
        )


def execute(
    members: Sequence[Member], out: Path, reporter: Reporter, *, tokens: int | None = None
) -> list[Run]:
    """Train all members over one base.

    Args:
        members: What to run, each checked.
        out: The folder that holds theirs.
        reporter: Told how it goes.
        tokens: The most that go through the model at once; None is all members' micro-batches, or where they
            do not fit the memory budget, the largest one's.

    Returns:
        The finished runs, in the order of the members.

    Raises:
        ScrimpError: The recipes, the data or the machine do not allow it; the message says what to do.
        Interrupted: A signal stopped it; all were saved unless no round was done.
    """
    stopper = Stopper()
    with stopper.listening(), ExitStack() as held:
        folders = [held.enter_context(single.taken(each.start, each.inputs)) for each in members]
        runs: dict[str, Run] = {}
        for member, folder in zip(members, folders, strict=True):
            finished = single.finished_run(folder) if member.start.resuming else None
            if finished is not None:
                reporter.note(f"{folder.path} has finished all its {finished.recipe.steps} steps already")
                runs[member.name] = finished
        left = [pair for pair in zip(members, folders, strict=True) if pair[0].name not in runs]
        if left:
            runs |= _run(left, out, reporter, stopper, tokens)
    return [runs[member.name] for member in members]


def _run(
    left: Sequence[tuple[Member, RunFolder]],
    out: Path,
    reporter: Reporter,
    stopper: Stopper,
    tokens: int | None,
) -> dict[str, Run]:
    planned = _plan(left, reporter)
    first = planned[0]
    recipe, ledger = first.recipe, first.resolved.ledger
    meter = PeakMeter(first.device)
    heap = choose_policy(ledger, recipe) if first.device.type == "cpu" else "leave"
    with (
        process_state(recipe, first.device),
        returning(heap),
        single.explaining(first.folder, first.resolved),
        _resumable(out, planned),
        ExitStack() as opened,
    ):
        together = _begin(planned, meter, reporter, stopper, opened, tokens)
        together.out = out
        with trimming(together.trunk, heap), stopper.deferring():
            together.run()
        expected, peak = predicted(planned), meter.read()
        found = {}
        for each, loop in zip(planned, together.loops, strict=True):
            assert loop.metrics is not None
            done = single.finish(loop.job, each.folder, loop.progress, loop.metrics, reporter)
            sample = single.keep_sample(loop.job, each.folder, reporter)
            found[each.member.name] = replace(done, sample=sample)
            reporter.note(_ending(each.member.name, done))
        error = f"{expected / peak - 1:+.1%}"
        reporter.note(f"peak memory {format_bytes(peak)} (predicted {format_bytes(expected)}, {error})")
        return found


def _ending(name: str, done: Run) -> str:
    held_out = "" if done.evaluation is None else f", held-out {done.evaluation.eval_loss:.4f}"
    return f"{name}: loss {done.metrics.loss:.4f}{held_out}: {done.model}"


def _plan(left: Sequence[tuple[Member, RunFolder]], reporter: Reporter) -> list[_Planned]:
    """Resolve the first recipe, and the others with what they must share with it.

    Raises:
        ScrimpError: They state something else.
    """
    planned: list[_Planned] = []
    fixed: int | None = None
    for member, folder in left:
        inputs = member.inputs
        if planned:
            inputs = replace(inputs, recipe=_agreed(member, planned[0]))
        recorded = member.start.recorded.get("fixed_bytes") if member.start.resuming else None
        reporter.note(f"{member.name}:")
        prepared, device, resolved = single.plan(inputs, reporter, fixed=recorded or fixed)
        fixed = resolved.ledger.moments[0].terms["fixed"]
        planned.append(
            _Planned(member=member, folder=folder, prepared=prepared, device=device, resolved=resolved)
        )
        check(member.name, resolved.recipe)
    return planned


def _agreed(member: Member, first: _Planned) -> Recipe:
    asked = member.inputs.recipe
    theirs, stated = flat(first.recipe), flat(asked, stated_only=True)
    for name in AGREED:
        if stated.get(name) not in (None, "auto", theirs[name]):
            raise ScrimpError(
                f"{name} is {theirs[name]!r} in {first.member.name} and {stated[name]!r} in {member.name}: "
                "runs that are trained together have one base, so they must agree in it"
            )
    return recipes.replace(asked, {name: theirs[name] for name in AGREED})


def _tokens(planned: Sequence[_Planned]) -> int:
    """Return how many tokens may go through the model at once."""

    def at_once(each: _Planned) -> int:
        assert each.recipe.micro_batch is not None and each.recipe.seq is not None
        return each.recipe.micro_batch * each.recipe.seq

    assert planned[0].recipe.memory is not None
    fits = predicted(planned) <= parse_bytes(planned[0].recipe.memory)
    return sum(map(at_once, planned)) if fits else max(map(at_once, planned))


def predicted(planned: Sequence[_Planned]) -> int:
    """Return the bytes that all members hold at once: one base, and what each adds to it."""
    ledgers: list[Ledger] = [each.resolved.ledger for each in planned]
    shared = max(ledger.peak.terms["fixed"] + ledger.peak.terms["weights"] for ledger in ledgers)
    return shared + sum(
        ledger.peak.total - ledger.peak.terms["fixed"] - ledger.peak.terms["weights"] for ledger in ledgers
    )


def _begin(
    planned: Sequence[_Planned],
    meter: PeakMeter,
    reporter: Reporter,
    stopper: Stopper,
    opened: ExitStack,
    tokens: int | None,
) -> Together:
    """Make the base, the jobs over it, and their loops where the last common round left them."""
    first = planned[0]
    reporter.phase("building the model", None)
    base = make_base(first.prepared, first.recipe)
    _check_model(base.model)
    rounds = rounds_of([each.steps for each in planned])
    turn = _last_common(planned, rounds)
    jobs = [_build(each, base, turn, reporter) for each in planned]
    loops = []
    for each, job in zip(planned, jobs, strict=True):
        step = step_at(turn, each.steps, rounds)
        path = checkpoint.checkpoint_path(each.folder.checkpoints, step) if turn else None
        point = single.restore(job, checkpoint.Found(path, []), _Named(each.member.name, reporter))
        if each.member.start.overwrite:
            each.folder.clear()
        opened.enter_context(single.clean_on_failure(each.folder, each.member.start, point))
        single.write_recipe(job, each.folder)
        loops.append(_loop(each, job, point, meter, reporter, stopper, opened))
    for each, job in zip(planned, jobs, strict=True):
        reporter.note(f"{each.member.name}, as if alone:")
        reporter.plan(job)
    reporter.note(f"together, over one base: about {format_bytes(predicted(planned))}")
    return Together.over(
        base.model,
        loops,
        tokens=tokens or _tokens(planned),
        rounds=rounds,
        turn=turn,
        predicted=predicted(planned),
        reporter=reporter,
        stopper=stopper,
    )


def _build(each: _Planned, base: Base, turn: int, reporter: Reporter) -> Job:
    own = Base(share(base.model), base.fingerprint)
    ledger = each.resolved.ledger
    job = build(each.prepared, each.recipe, ledger, empty=turn > 0, say=reporter.phase, over=own)
    single.compare(job, each.member.start, reporter)
    return job


def _loop(
    each: _Planned,
    job: Job,
    point: single.Point,
    meter: PeakMeter,
    reporter: Reporter,
    stopper: Stopper,
    opened: ExitStack,
) -> Loop:
    metrics = opened.enter_context(MetricsFile(each.folder.metrics, length=point.metrics_bytes))
    if point.announced and point.progress.last is not None:
        metrics.write("checkpoint", point.progress.last)
    loggers = open_loggers(job.recipe.log, each.folder.path, flat(job.recipe))
    for logger in loggers:
        opened.callback(logger.close)
    return Loop(
        job=job,
        progress=point.progress,
        watch=Watch(job, meter),
        reporter=_Named(each.member.name, reporter),
        stopper=stopper,
        folder=each.folder,
        metrics=metrics,
        loggers=loggers,
    )


def _check_model(model: nn.Module) -> None:
    """Refuse a model whose rows are not independent of each other, or that draws at random."""
    config: Any = model.config
    if is_random(model):
        raise ScrimpError(f"model {type(model).__name__} has dropout, which runs together cannot repeat")
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise ScrimpError(
            f"model {type(model).__name__} balances its experts over all rows of a pass, which runs together "
            "share; train them one by one"
        )


def _last_common(planned: Sequence[_Planned], rounds: int) -> int:
    """Return the last round that every member has a whole checkpoint of the beginning of."""
    if not all(each.member.start.resuming for each in planned):
        return 0
    saved = []
    for each in planned:
        files.recover(each.folder.checkpoints)
        saved.append({checkpoint.step_of(path) for path in checkpoint.complete(each.folder.checkpoints)})
    for turn in range(rounds, 0, -1):
        steps = (step_at(turn, each.steps, rounds) for each in planned)
        if all(step in have for step, have in zip(steps, saved, strict=True)):
            return turn
    return 0


@contextmanager
def _resumable(out: Path, planned: Sequence[_Planned]) -> Iterator[None]:
    """Say how to go on after a stop that could not wait for its round."""
    try:
        yield
    except Interrupted as stop:
        if stop.out is not None or not all(each.folder.is_run for each in planned):
            raise
        raise Interrupted(
            "stopped at once; go on with the same command and --resume",
            signal_number=stop.signal_number,
            out=out,
        ) from None


class _Named:
    """Passes on what one of several runs has to say, with its name; its steps are told by rounds."""

    def __init__(self, name: str, reporter: Reporter) -> None:
        self._name, self._reporter = name, reporter

    def phase(self, message: str, done: float | None) -> None:
        self._reporter.phase(f"{self._name}: {message}", done)

    def plan(self, job: Job) -> None:
        pass

    def tick(self, tick: Tick) -> None:
        pass

    def note(self, message: str) -> None:
        self._reporter.note(f"{self._name}: {message}")

    def done(self, job: Job, run: Run) -> None:
        pass
