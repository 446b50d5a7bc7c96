"""A finished model, loaded to be asked: for `scrimp eval` and `scrimp generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from scrimp import models, recipe_file
from scrimp.activations.loss import TokenLoss
from scrimp.base.errors import ScrimpError
from scrimp.build import inspect, prepare
from scrimp.recipe import Recipe, flat, replace
from scrimp.resolve import choose_device, resolve_evaluation
from scrimp.training.environment import process_state
from scrimp.training.evaluate import Evaluation, evaluate
from scrimp.training.folder import RunFolder
from scrimp.training.reporter import Reporter


def score(
    target: str,
    *,
    paths: Sequence[str],
    options: dict[str, object],
    reporter: Reporter,
    cache: Path | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Evaluate a model on text, as the training loop does.

    Args:
        target: A run's folder, or any name of a model.
        paths: The text; none of it is held out. Empty: what the run in `target` held out.
        options: Recipe fields by dotted name, in place of the run's own.
        reporter: Told what is going on.
        cache: Folder of the token files.
        trust_remote_code: Let the model's own Python code run.

    Raises:
        ScrimpError: The target or the text cannot be used.
    """
    recipe = _recipe_for(target, paths, options)
    inputs = inspect(recipe, cache=cache, trust_remote_code=trust_remote_code)
    prepared = prepare(inputs, reporter.phase)
    device = choose_device(inputs.recipe)
    resolved = resolve_evaluation(prepared, device, say=reporter.phase)
    with process_state(resolved, device):
        reporter.phase("loading the model", None)
        dtype = torch.bfloat16 if resolved.precision == "bf16" else torch.float32
        model = models.load(inputs.model, dtype=dtype, trust_remote_code=trust_remote_code)
        model.to(device)  # type: ignore[arg-type]  # transformers wraps it untyped
        loss = TokenLoss(model, autocast=torch.bfloat16 if resolved.precision == "bf16-mixed" else None)
        reporter.phase("evaluating", None)
        corpus = prepared.corpus
        if paths:
            return evaluate(loss, prepared, resolved, corpus.train, max_tokens=None)
        return evaluate(loss, prepared, resolved, corpus.held_out, max_tokens=resolved.evaluation.tokens)


def _recipe_for(target: str, paths: Sequence[str], options: dict[str, object]) -> Recipe:
    folder = RunFolder(Path(target))
    text = {"data.path": list(paths), "data.held_out": 0.0} if paths else {}
    if folder.is_run:
        stored = flat(recipe_file.read(folder.recipe).recipe)
        base = Recipe()
        kept = {name: value for name, value in stored.items() if not name.startswith("model.")}
        base = replace(base, kept)
    elif paths:
        base = Recipe()
    else:
        raise ScrimpError(
            f"eval {target}: it is no run with held-out text of its own; name the text with --data"
        )
    # A run's length decides nothing here, and a text may be shorter than one sequence.
    fixed = {"model.name": target, "model.init": "weights", "steps": 1, "tokens": None}
    return replace(base, {**fixed, **text, **options})
