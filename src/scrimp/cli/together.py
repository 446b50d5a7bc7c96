"""`scrimp together`: several adapters trained at once over one base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from scrimp.base.errors import ScrimpError
from scrimp.cli.guard import print_json
from scrimp.cli.train import load_torch, make_reporter, run_document

RUN = "Run"


def together(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE.yaml...", help="Two recipes or more, as train takes them.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the runs, each named after its recipe.", rich_help_panel=RUN)
    ],
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most tokens that go through the model at once; none: all runs' micro-batches, or the "
            "largest where they do not fit the memory.",
            rich_help_panel=RUN,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with them.", rich_help_panel=RUN)] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the runs in --out.", rich_help_panel=RUN)
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
    """Train several LoRAs at once over one model, each as its recipe alone would."""
    from scrimp import recipe_file
    from scrimp.build import inspect
    from scrimp.training.start import choose_start

    names = [path.stem for path in recipes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ScrimpError(f"two recipes are called {twice}, and each needs a folder of its own: rename one")
    read = [recipe_file.read(path) for path in recipes]
    starts = []
    for name, file in zip(names, read, strict=True):
        start = choose_start(file.recipe, out=out / name, resume=resume, overwrite=overwrite)
        starts.append(start if start.resuming else replace(start, recorded=file.recorded))
    inputs = [inspect(each.recipe, cache=cache, trust_remote_code=trust_remote_code) for each in starts]
    reporter = make_reporter()
    load_torch(reporter)
    from scrimp.training.together import Member, check, execute

    members = [
        Member(name=name, start=start, inputs=found)
        for name, start, found in zip(names, starts, inputs, strict=True)
    ]
    for member in members:
        check(member.name, member.inputs.recipe)
    runs = execute(members, out, reporter, tokens=tokens)
    if as_json:
        print_json({name: run_document(run) for name, run in zip(names, runs, strict=True)})
