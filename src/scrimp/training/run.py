"""A whole run, from a recipe to a finished model.

    start ─> inspect ─> claim the folder ─> prepare ─> resolve ─> build ─> loop ─> model/

Nothing is written into the folder before the first step is next, so an early mistake or an interrupt
leaves nothing behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from scrimp import adapted, models, recipe_file
from scrimp.assembly import piece_options
from scrimp.base import files
from scrimp.base.errors import Interrupted, ScrimpError
from scrimp.base.protocols import Adapter
from scrimp.base.units import parse_bytes
from scrimp.build import Inputs, Job, Prepared, build, make_loader, prepare
from scrimp.memory.heap import choose_policy, returning, trimming
from scrimp.memory.machine import CUDA_CONTEXT
from scrimp.memory.observer import PeakMeter
from scrimp.recipe import Recipe, flat
from scrimp.resolve import Resolved, choose_device, resolve
from scrimp.training import checkpoint
from scrimp.training.budget import out_of_memory
from scrimp.training.environment import differences, process_state, recorded
from scrimp.training.evaluate import Evaluation
from scrimp.training.folder import RunFolder, claimed, next_free
from scrimp.training.loggers import open_loggers
from scrimp.training.loop import Loop
from scrimp.training.metrics import Metrics, MetricsFile, read_metrics
from scrimp.training.optimizer_state import load_optimizer
from scrimp.training.progress import Progress
from scrimp.training.reporter import Reporter
from scrimp.training.sample import kept_sample
from scrimp.training.start import Start
from scrimp.training.stopping import Stopper
from scrimp.training.watch import Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        out: Its folder.
        model: The finished model, an ordinary Hugging Face folder; or that of an adapter that was not merged.
        recipe: The resolved recipe.
        metrics: The numbers of the last step.
        evaluation: The last evaluation; None where nothing was held out.
        skipped: Steps left out for a non-finite gradient.
        sample: A short text of the model's; empty where a run that was finished before kept none.
        peak_moment: The moment of the run that held the most; empty where this call trained nothing.
    """

    out: Path
    model: Path
    recipe: Recipe
    metrics: Metrics
    evaluation: Evaluation | None
    skipped: int
    sample: str = field(default="", repr=False)
    peak_moment: str = field(default="", compare=False)


def execute(start: Start, inputs: Inputs, reporter: Reporter) -> Run:
    """Run what was chosen and inspected.

    Args:
        start: Where the run begins.
        inputs: What its recipe names.
        reporter: Told how it goes.

    Returns:
        The finished run.

    Raises:
        ScrimpError: The recipe, the data or the machine do not allow it; the message says what to do.
        Interrupted: A signal stopped it; it was saved unless no step was done.
    """
    stopper = Stopper()
    with stopper.listening(), taken(start, inputs) as folder:
        finished = finished_run(folder) if start.resuming else None
        if finished is not None:
            reporter.note(f"{folder.path} has finished all its {finished.recipe.steps} steps already")
            return finished
        # A run has one prediction: what the process held when it began counts after a resume too.
        fixed = start.recorded.get("fixed_bytes") if start.resuming else None
        prepared, device, resolved = plan(inputs, reporter, fixed=fixed)
        recipe = resolved.recipe
        meter = PeakMeter(device)
        heap = choose_policy(resolved.ledger, recipe) if device.type == "cpu" else "leave"
        with (
            process_state(recipe, device),
            _capped(recipe, device, inputs),
            returning(heap),
            explaining(folder, resolved),
        ):
            files.recover(folder.checkpoints)
            found = (
                checkpoint.find_usable(folder.checkpoints) if start.resuming else checkpoint.Found(None, [])
            )
            job = build(prepared, recipe, resolved.ledger, empty=found.path is not None, say=reporter.phase)
            compare(job, start, reporter)
            point = restore(job, found, reporter)
            if start.asked_to_resume and point.progress.step == 0:
                reporter.note(f"{folder.path} holds no usable checkpoint, so the run starts at step 0")
            if start.overwrite:
                folder.clear()
            with clean_on_failure(folder, start, point):
                write_recipe(job, folder)
                reporter.plan(job)
                with trimming(job.model, heap):
                    run = _train(job, folder, point, meter, reporter, stopper)
            run = replace(run, sample=keep_sample(job, folder, reporter))
            reporter.done(job, run)
            return run


def plan(
    inputs: Inputs, reporter: Reporter, *, fixed: int | None = None
) -> tuple[Prepared, torch.device, Resolved]:
    """Tokenise, resolve the recipe and predict its memory, without making the model.

    Args:
        inputs: What the recipe names.
        reporter: Told what is going on.
        fixed: Bytes that the process holds besides the run; None measures them.
    """
    prepared = prepare(inputs, reporter.phase)
    device = choose_device(inputs.recipe)
    reporter.phase("planning", None)
    resolved = resolve(prepared, device, fixed=fixed, say=reporter.phase)
    recipe = resolved.recipe
    if resolved.why is not None:
        reporter.note(f"planned for {recipe.memory}: {resolved.why}")
    if resolved.law is not None:
        reporter.note(resolved.law)
    loader = make_loader(prepared, recipe)  # refuses data shorter than one sequence
    if loader.lost_tokens:
        share = loader.lost_tokens / len(prepared.corpus.train.tokens)
        reporter.note(
            f"data.long cut: {loader.lost_tokens:,} tokens ({share:.1%}) lie beyond seq {recipe.seq} and are "
            "left out; --data.long split keeps them"
        )
    if recipe.precision == "bf16":
        reporter.note(
            "precision bf16: weights of 16 bits, which stochastic rounding moves in the mean alone; "
            "--precision bf16-mixed keeps fp32 weights"
        )
    return prepared, device, resolved


@contextmanager
def taken(start: Start, inputs: Inputs) -> Iterator[RunFolder]:
    """Choose and hold the folder of a run."""
    folder = start.folder or next_free(inputs.recipe.model.name)
    with claimed(folder):
        if not start.resuming:
            folder.check_free(overwrite=start.overwrite)  # another program may have been faster
        yield folder


def finished_run(folder: RunFolder) -> Run | None:
    """Return the run in a folder if it was finished, by the last line of its metrics."""
    if folder.finished is None or not folder.metrics.is_file():
        return None
    rows = read_metrics(folder.metrics)
    if not rows or rows[-1]["kind"] != "end":
        return None
    end = rows[-1]
    evaluated = "eval_loss" in end
    return Run(
        out=folder.path,
        model=folder.finished,
        recipe=recipe_file.read(folder.recipe).recipe,
        metrics=Metrics(**{name: end[name] for name in Metrics.__dataclass_fields__}),
        evaluation=Evaluation(**{name: end[name] for name in Evaluation.__dataclass_fields__})
        if evaluated
        else None,
        skipped=end["skipped"],
        sample=folder.sample.read_text(encoding="utf-8") if folder.sample.is_file() else "",
    )


@dataclass(frozen=True, slots=True)
class Point:
    """Where the loop takes over.

    Attributes:
        progress: What was done before.
        metrics_bytes: How much of the metrics file belongs to it.
        announced: Whether the checkpoint's own line comes next in the metrics.
    """

    progress: Progress
    metrics_bytes: int = 0
    announced: bool = False


def restore(job: Job, found: checkpoint.Found, reporter: Reporter) -> Point:
    """Read the newest usable checkpoint into a job, tensor by tensor."""
    for path, reason in found.damaged:
        reporter.note(f"the checkpoint {path} is damaged ({reason}) and is left out")
    if found.path is None:
        return Point(Progress())
    reporter.phase(f"reading {found.path}", None)
    checkpoint.check_model(found.path, job.identity)
    state = checkpoint.read_state(found.path)
    checkpoint.read_model_into(found.path, job.stored())
    load_optimizer(found.path / checkpoint.OPTIMIZER, job.optimizer, job.trained.items(), state["optimizer"])
    job.tune.load_state(state.get("tune", {}))
    progress = Progress.from_plain(state["progress"])
    reporter.note(f"going on after step {progress.step} of {job.recipe.steps}")
    return Point(progress, state["metrics_bytes"], state["scheduled"])


def compare(job: Job, start: Start, reporter: Reporter) -> None:
    """Hold what the recipe was recorded with against what is here now.

    Raises:
        ScrimpError: A run is to go on with other data.
    """
    now = recorded(job)
    if start.resuming and start.recorded.get("data", now["data"]) != now["data"]:
        raise ScrimpError(
            "the training data has changed since this run began, so it cannot go on exactly: "
            "bring the old files back, or start another run with another --out"
        )
    changed = differences(start.recorded, now)
    if changed:
        reporter.note(f"not all is as it was recorded, so bits may differ: {'; '.join(changed)}")


def write_recipe(job: Job, folder: RunFolder) -> None:
    """Write the resolved recipe and what it runs with; from then on the folder is a run."""
    files.write_atomic(folder.recipe, recipe_file.dumps(job.recipe, recorded(job)))


def _train(
    job: Job, folder: RunFolder, point: Point, meter: PeakMeter, reporter: Reporter, stopper: Stopper
) -> Run:
    with MetricsFile(folder.metrics, length=point.metrics_bytes) as metrics:
        if metrics.synced_length() < point.metrics_bytes:
            reporter.note(f"{folder.metrics} is shorter than its checkpoint says: earlier lines are missing")
        if point.announced and point.progress.last is not None:
            metrics.write("checkpoint", point.progress.last)
        watch = Watch(job, meter)
        loop = Loop(
            job=job,
            progress=point.progress,
            watch=watch,
            reporter=reporter,
            stopper=stopper,
            folder=folder,
            metrics=metrics,
            loggers=open_loggers(job.recipe.log, folder.path, flat(job.recipe)),
        )
        try:
            with stopper.deferring():
                assert job.recipe.steps is not None
                loop.run(job.recipe.steps)
        finally:
            for logger in loop.loggers:
                logger.close()
            _write_ledgers(job, watch, folder)
        run = finish(job, folder, point.progress, metrics, reporter)
    return replace(run, peak_moment=watch.peak_moment())


def finish(job: Job, folder: RunFolder, progress: Progress, metrics: MetricsFile, reporter: Reporter) -> Run:
    """Write the finished model or adapter, and the last line of the metrics."""
    reporter.phase("saving the model", None)
    _export(job, folder)
    assert progress.last is not None
    found = {} if progress.evaluation is None else asdict(progress.evaluation)
    metrics.write("end", progress.last, {**found, "skipped": progress.skipped})
    assert folder.finished is not None
    return Run(
        out=folder.path,
        model=folder.finished,
        recipe=job.recipe,
        metrics=progress.last,
        evaluation=progress.evaluation,
        skipped=progress.skipped,
    )


def _write_ledgers(job: Job, watch: Watch, folder: RunFolder) -> None:
    """Write what was predicted and what was measured, moment by moment."""
    if watch.ledger is not None:
        found = {"predicted": job.ledger.to_plain(), "measured": watch.ledger.to_plain()}
        files.write_atomic(folder.memory, json.dumps(found, indent=1) + "\n")


def keep_sample(job: Job, folder: RunFolder, reporter: Reporter) -> str:
    """Let the model write a little when all else of the run is safe, and keep it."""
    reporter.phase("making a sample", None)
    text = kept_sample(job.model, job.prepared.tokenizer, job.prepared.corpus.kind)
    files.write_atomic(folder.sample, text)
    return text


def _stored(job: Job) -> dict[str, object] | None:
    """Return how the base of an adapter was kept; None where it was as it is."""
    kept = job.recipe.weights
    if kept.name == "dense":
        return None
    options = piece_options("weights", job.recipe)
    dtype = torch.bfloat16 if job.recipe.precision == "bf16" else torch.float32
    return {"name": kept.name, "options": options, "dtype": str(dtype).removeprefix("torch.")}


def _export(job: Job, folder: RunFolder) -> None:
    """Write the finished model as an ordinary Hugging Face folder, or the adapter in peft's form."""
    if isinstance(job.tune, Adapter):
        with files.atomic_directory(folder.adapter) as partial:
            job.tune.save(job.model, partial, job.prepared.inputs.model.name)
            job.prepared.tokenizer.save_pretrained(partial)
            adapted.write_base(
                partial,
                name=job.prepared.inputs.model.name,
                config=adapted.config_hash(job.prepared.config),
                weights=job.base,
                stored=_stored(job),
            )
        if not job.recipe.tune.merge:
            return
        job.weights.materialize(job.model)
        job.tune.merge(job.model)
    else:
        job.weights.materialize(job.model)
    with files.atomic_directory(folder.model) as partial:
        models.export(job.model, job.prepared.tokenizer, partial)


@contextmanager
def clean_on_failure(folder: RunFolder, start: Start, point: Point) -> Iterator[None]:
    """Leave no run behind that did not do its first step, unless it was here before."""
    try:
        yield
    except BaseException:
        if point.progress.step == 0 and not start.resuming:
            folder.clear()
        raise


@contextmanager
def _capped(recipe: Recipe, device: torch.device, inputs: Inputs) -> Iterator[None]:
    """On CUDA, let the allocator itself refuse what is over a budget that the user gave."""
    if device.type != "cuda" or inputs.recipe.memory is None or recipe.memory is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = parse_bytes(recipe.memory) - CUDA_CONTEXT
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, allowed / total)), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextmanager
def explaining(folder: RunFolder, resolved: Resolved) -> Iterator[None]:
    """Say what to do about memory that ran out, and after a stop that could not wait for its step."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ScrimpError(out_of_memory(resolved)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise ScrimpError(out_of_memory(resolved)) from error
    except Interrupted as stop:
        if stop.out is not None or not folder.is_run:
            raise
        raise Interrupted(
            f"stopped at once; go on with: scrimp train --out {folder.path} --resume",
            signal_number=stop.signal_number,
            out=folder.path,
        ) from None
