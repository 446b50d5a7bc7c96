"""`scrimp bench`: methods and peers on one job, by rules that are the same for all."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from scrimp.base.errors import ScrimpError
from scrimp.cli.guard import print_json
from scrimp.cli.options import with_recipe_options


def _option(help_text: str, *names: str, least: float | None = None) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel="Bench", min=least)


SuiteName = Annotated[
    str, typer.Argument(metavar="SUITE", help="optimizers, pretrain, finetune, memory or speed.")
]
Methods = Annotated[
    str | None,
    _option(
        "Who competes, as A,B,…: methods of the catalogue, with other pieces as in adamw+recompute+bf16, "
        "plan:BUDGET for the planner's choice, packages as in galore-torch or pytorch-optimizer:Fira; "
        "all: everybody; none: the suite's own. `scrimp methods` lists both."
    ),
]
Out = Annotated[Path | None, _option("Folder of the suite; none: bench/SUITE.")]
Trials = Annotated[int | None, _option("Rates each may try; none: three, in suites that learn.", least=1)]
Seeds = Annotated[int | None, _option("Runs at the best rate; none: three, in suites that learn.", least=1)]
Pairs = Annotated[
    int | None, _option("Turns against the reference, for speed; none: five, but for memory.", least=0)
]
Seconds = Annotated[
    float | None,
    _option("Train each for the steps that it makes in so many seconds, in place of --steps.", least=1.0),
]
Jobs = Annotated[
    int | None,
    _option("Learning runs side by side; none: one for each thread that is free, one on a GPU.", least=1),
]
Again = Annotated[bool, _option("Do even what --out holds already.", "--again")]
Cache = Annotated[Path | None, _option("Folder of the token files; none: the platform's.")]
TrustRemoteCode = Annotated[bool, _option("Let the model's own Python code run.", "--trust-remote-code")]
AsJson = Annotated[bool, _option("Write the result as one JSON document.", "--json")]


@with_recipe_options
def bench(
    stated: dict[str, Any],
    suite: SuiteName,
    methods: Methods = None,
    out: Out = None,
    trials: Trials = None,
    seeds: Seeds = None,
    pairs: Pairs = None,
    seconds: Seconds = None,
    jobs: Jobs = None,
    again: Again = False,
    cache: Cache = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods and other packages on one job: loss, memory and speed, by rules that are equal for all.

    What was measured is kept in --out: the same command goes on where it stopped.
    """
    from scrimp.bench.contestants import contestants
    from scrimp.bench.entries import Ask
    from scrimp.bench.suite_folder import SuiteFolder
    from scrimp.bench.suites import suite as find
    from scrimp.recipe import Recipe, flat, replace

    chosen = find(suite)
    pairs = chosen.pairs if pairs is None else pairs
    _check(stated, seconds, pairs)
    stated = flat(replace(Recipe(), stated), stated_only=True)
    who = contestants(methods.split(",") if methods else chosen.contestants, chosen)
    ask = Ask(
        suite=chosen,
        contestants=who,
        stated=stated,
        trials=chosen.trials if trials is None else trials,
        seeds=chosen.seeds if seeds is None else seeds,
        pairs=pairs,
        jobs=jobs,
        seconds=seconds,
        cache=cache,
        trust_remote_code=trust_remote_code,
        again=again,
        command=["scrimp", *sys.argv[1:]],
    )
    document = SuiteFolder(out or Path("bench") / chosen.name).run(ask, say)
    if as_json:
        print_json(document)
        return
    from rich.console import Console

    from scrimp.report.suite_table import print_suite

    console = Console(width=max(80, shutil.get_terminal_size((100, 24)).columns))
    print_suite(document, console)


def say(message: str) -> None:
    """Tell how the suite goes, on standard error."""
    print(message, file=sys.stderr, flush=True)


def _check(stated: dict[str, Any], seconds: float | None, pairs: int) -> None:
    """Refuse options that contradict each other.

    Raises:
        ScrimpError: Two do.
    """
    if "optimizer.name" in stated:
        raise ScrimpError("--optimizer: a suite compares several; name them with --methods")
    if seconds is not None and {"steps", "tokens"} & stated.keys():
        raise ScrimpError("--seconds takes the place of --steps and --tokens: give one of them")
    if seconds is not None and not pairs:
        raise ScrimpError("--seconds needs the speed that turns measure: add --pairs 5")
