"""`scrimp verify`: does a run repeat, bit for bit?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from scrimp.cli.guard import print_json
from scrimp.cli.train import load_torch, make_reporter


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps to train again; none: up to the next checkpoint.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of the token files.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the model's own Python code run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the result as one JSON document.")] = False,
) -> None:
    """Train a stretch of a run again from a checkpoint and compare bit for bit; exit code 2 if it differs."""
    reporter = make_reporter()
    load_torch(reporter)
    from scrimp.training.verify import verify as verify_run

    verdict = verify_run(
        run, steps=steps, reporter=reporter, cache=cache, trust_remote_code=trust_remote_code
    )
    weights = {True: "equal", False: "DIFFERENT", None: "not compared (no checkpoint there)"}[
        verdict.weights_equal
    ]
    if as_json:
        print_json({**asdict(verdict), "repeats": verdict.repeats})
    else:
        print(f"steps {verdict.first + 1} to {verdict.last} of {run} trained again")
        steps_done = verdict.last - verdict.first
        print(f"losses and gradient norms  {len(verdict.differing)} of {steps_done} steps differ")
        print(f"weights                    {weights}")
    raise typer.Exit(0 if verdict.repeats else 2)
