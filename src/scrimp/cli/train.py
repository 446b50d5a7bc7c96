"""`scrimp train`: from a recipe to a finished model."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scrimp.base.errors import ScrimpError
from scrimp.cli.guard import print_json
from scrimp.cli.options import with_recipe_options
from scrimp.recipe import Recipe, flat
from scrimp.recipe import replace as change

if TYPE_CHECKING:
    from scrimp.build import Inputs
    from scrimp.training.reporter import Reporter
    from scrimp.training.run import Run

RUN = "Run"


@with_recipe_options
def train(
    stated: dict[str, Any],
    recipe_path: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE.yaml]", help="A recipe; the options below change it.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; none: runs/NAME-N, the first free N.", rich_help_panel=RUN),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out.", rich_help_panel=RUN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.", rich_help_panel=RUN)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would do, and leave.", rich_help_panel=RUN)
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of the token files; none: the platform's.", rich_help_panel=RUN),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Let the model's own Python code run.", rich_help_panel=RUN),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write the result as one JSON document.", rich_help_panel=RUN)
    ] = False,
) -> None:
    """Train a model. With nothing else said: a small one, on Python's own source code, in about a minute."""
    from scrimp import recipe_file
    from scrimp.build import inspect
    from scrimp.training.start import choose_start

    base = recipe_file.RecipeFile(recipe=Recipe())
    if recipe_path is not None:
        if recipe_path.suffix not in (".yaml", ".yml"):
            raise ScrimpError(
                f"{recipe_path} is no recipe (.yaml): name text with --data, once for each file or as one "
                "quoted pattern such as --data 'books/*.txt'"
            )
        base = recipe_file.read(recipe_path)
    start = choose_start(change(base.recipe, stated), out=out, resume=resume, overwrite=overwrite)
    if not start.resuming and base.recorded:
        start = replace(start, recorded=base.recorded)
    inputs = inspect(start.recipe, cache=cache, trust_remote_code=trust_remote_code)
    reporter = make_reporter()
    load_torch(reporter)
    if dry_run:
        _dry_run(inputs, reporter, as_json=as_json)
        return
    from scrimp.training.run import execute

    run = execute(start, inputs, reporter)
    if as_json:
        print_json(run_document(run))


def make_reporter() -> Reporter:
    """Return a reporter that suits standard error: a bar on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        from scrimp.report.lines import LineReporter

        return LineReporter()
    from rich.console import Console

    from scrimp.report.console import ConsoleReporter

    return ConsoleReporter(Console(stderr=True))


def load_torch(reporter: Reporter) -> None:
    """Import torch, with OpenMP's threads asked to wait without spinning."""
    from scrimp.base.platform import passive_openmp

    reporter.phase("loading torch", None)
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        # peft imports what is installed, and it says what it is without: nothing that a run needs.
        logging.getLogger(name).setLevel(logging.ERROR)
    with passive_openmp():
        import torch  # noqa: F401


def _dry_run(inputs: Inputs, reporter: Reporter, *, as_json: bool) -> None:
    from scrimp.report.summary import plan_lines
    from scrimp.training.run import plan

    prepared, _, resolved = plan(inputs, reporter)
    recipe, ledger = resolved.recipe, resolved.ledger
    for label, text in plan_lines(prepared, recipe, ledger):
        print(f"{label:>13}  {text}", file=sys.stderr)
    if as_json:
        found = {"predicted_bytes": ledger.peak.total, "memory": ledger.to_plain()}
        print_json({"recipe": flat(recipe), **found})


def run_document(run: Run) -> dict[str, Any]:
    """Return a finished run as data for JSON."""
    from dataclasses import asdict

    return {
        "out": str(run.out),
        "model": str(run.model),
        **asdict(run.metrics),
        **({} if run.evaluation is None else asdict(run.evaluation)),
        "skipped": run.skipped,
        "recipe": flat(run.recipe),
    }
