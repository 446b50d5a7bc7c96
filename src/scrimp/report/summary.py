"""What a run says before its first step and after its last, as lines for any screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scrimp.base.ledger import Moment
from scrimp.base.units import format_bytes, format_count, parse_bytes

if TYPE_CHECKING:
    from scrimp.base.ledger import Ledger
    from scrimp.build import Job, Prepared
    from scrimp.data import Corpus
    from scrimp.recipe import Recipe
    from scrimp.training.run import Run

Lines = list[tuple[str, str]]


def plan_lines(prepared: Prepared, recipe: Recipe, ledger: Ledger, *, parameters: int | None = None) -> Lines:
    """Return what a run will do, as pairs of a label and a text.

    Args:
        prepared: The run's inputs.
        recipe: The resolved recipe.
        ledger: The predicted memory.
        parameters: Parameters of the model, where it was made already.
    """
    assert recipe.steps is not None and recipe.batch is not None and recipe.seq is not None
    assert recipe.memory is not None and recipe.micro_batch is not None
    corpus = prepared.corpus
    size = "" if parameters is None else f", {format_count(parameters)} parameters"
    origin = "stored weights" if recipe.model.init == "weights" else "random weights"
    tokens = recipe.steps * recipe.batch * recipe.seq
    accumulated = recipe.batch // recipe.micro_batch
    return [
        ("model", f"{recipe.model.name}{size}, {origin}"),
        ("data", data_line(corpus)),
        (
            "steps",
            f"{recipe.steps:,} of {recipe.batch} x {recipe.seq} tokens ({format_count(tokens)} in all), "
            f"{accumulated} micro-batch{'es' if accumulated > 1 else ''} a step",
        ),
        (
            "recipe",
            f"{recipe.tune.name} tuning, {recipe.optimizer.name}, lr {recipe.optimizer.lr:g} "
            f"{recipe.schedule.name}, clip {recipe.clip:g}, {recipe.precision}, {_unusual(recipe)}"
            f"seed {recipe.seed}",
        ),
        ("device", f"{recipe.device}, {recipe.threads} threads"),
        ("memory", memory_line(ledger.peak, parse_bytes(recipe.memory))),
    ]


def _unusual(recipe: Recipe) -> str:
    """Name the pieces that most runs do not change, each before a comma."""
    chosen = {
        f"{recipe.weights.name} weights": recipe.weights.name != "dense",
        f"{recipe.gradient.name} gradient": recipe.gradient.name != "backprop",
        recipe.activations.name: recipe.activations.name != "everything",
        f"{recipe.activations.loss} loss": recipe.activations.loss != "logits",
        recipe.placement.name: recipe.placement.name != "device",
        "fused backward": recipe.optimizer.fused_backward,
    }
    return "".join(f"{name}, " for name, is_chosen in chosen.items() if is_chosen)


def data_line(corpus: Corpus) -> str:
    """Write what a corpus is made of."""
    report = corpus.report
    parts = [
        f"{report.description}: {_some(report.files, 'file')}, {_some(report.documents, 'document')}, "
        f"{format_count(report.tokens)} tokens, {_some(corpus.held_out.documents, 'document')} held out"
    ]
    if report.skipped:
        parts.append(f"{_some(report.skipped, 'file')} without text skipped")
    return "; ".join([*parts, *report.notes])


def _some(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def memory_line(peak: Moment, budget: int) -> str:
    """Write a predicted peak, where it goes, and whether it fits."""
    terms = ", ".join(f"{name} {format_bytes(size)}" for name, size in peak.terms.items() if size)
    verdict = "fits" if peak.total <= budget else "is over"
    where = f"about {format_bytes(peak.total)} at the {peak.name} ({terms})"
    return f"{where}; {verdict} the budget of {format_bytes(budget)}"


def done_lines(job: Job, run: Run) -> Lines:
    """Return what a finished run came to."""
    last, found = run.metrics, run.evaluation
    error = (last.predicted_bytes - last.peak_bytes) / last.peak_bytes
    moment = f" at {run.peak_moment!r}" if run.peak_moment else ""
    lines = [
        (
            "training loss",
            f"{last.loss:.3f} nats a token after {last.step:,} steps, {format_count(last.tokens)} targets",
        )
    ]
    if found is not None:
        lines.append(
            (
                "held out",
                f"{found.bits_per_byte:.3f} bits per byte (loss {found.eval_loss:.3f}, perplexity "
                f"{found.perplexity:.2f}, {found.eval_tokens:,} tokens)",
            )
        )
    lines.append(
        (
            "peak memory",
            f"{format_bytes(last.peak_bytes)}{moment} "
            f"(predicted {format_bytes(last.predicted_bytes)}, {error:+.1%})",
        )
    )
    if run.skipped:
        lines.append(("skipped", f"{run.skipped} steps with a non-finite gradient"))
    lines.append(("model", str(run.model)))
    return lines


def next_commands(job: Job, run: Run) -> list[str]:
    """Return commands worth trying next."""
    own_text = bool(run.recipe.data.path)
    prompt = "The " if own_text else "import "
    said = "--chat --prompt 'Hello'" if job.prepared.corpus.kind == "chat" else f"--prompt '{prompt}'"
    return [
        f"scrimp generate {run.out} {said}",
        f"scrimp verify {run.out}",
        f"scrimp train --model {run.out} --data MORE_TEXT" if own_text else "scrimp train --data YOUR_TEXT",
    ]
